"""ESCD (arXiv 2609.34738): BPM where both models begin a token together, and the whole probability of completing the
teacher's token where the student stands in the middle of one.

Decisions: of the teacher tokens that the written bytes leave possible, those that no single student token completes give
nothing at this position; a later position, where less of them is left, does. Their share is logged. A student that
gives less than 1e-12 to completing a token is charged as for 1e-12 and gets no gradient there.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from .base import Loss, Metrics, ScoredChunks
from .bpm import compared_rows, outcome_divergence, possible, standing_rows
from .distributions import over_tiles


_FLOOR = 1e-12  # of a probability that is a difference of two float64 sums


@dataclass
class ESCD(Loss):
    """
    loss = (Σ_{i at the start of a teacher token} KL(t_i ‖ p_i) − Σ_{i within one} Σ_w M_w · log Σ_{u ∈ C_w} p_i(u)) / N,
    where M_w is the teacher's probability of w given the bytes already written, and C_w are the student tokens that begin
    with the rest of w; t as in BPM.

    A perfect student stays only where all chunks are one token on each side.

    Args:
        mask_whitespace (`bool`, defaults to `True`): leave out student tokens of whitespace alone.
    """

    signal: ClassVar[str] = "logits"
    copies: ClassVar[int] = 14
    policy: ClassVar[str] = "on"
    structures: ClassVar[tuple[str, ...]] = ("prefixes",)

    mask_whitespace: bool = True

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        rows = standing_rows(batch, self.mask_whitespace)
        prefixes = batch.vocabulary.prefixes

        def at_start(*rows):
            return (outcome_divergence(prefixes, 0, *rows),)

        def within(log_p, log_q, teacher_ids, written):
            mass = possible(prefixes, log_q, teacher_ids, written)
            entry = prefixes.entries(written)
            low, high = prefixes.completing_low[entry], prefixes.completing_high[entry]
            mass = mass.masked_fill(low == high, 0)
            summed = pad(log_p[:, prefixes.order].double().exp().cumsum(1), (1, 0))
            completed = (summed.gather(1, high) - summed.gather(1, low)).clamp(min=_FLOOR).log()
            return -(mass * completed).sum(-1), mass.sum(-1)

        def tiles(function, rows):
            student, teacher = (batch.student, rows.student), (batch.teacher, rows.teacher)
            return over_tiles(function, self.tile(batch), student, teacher, rows.teacher_ids, rows.written)

        (starts,) = tiles(at_start, rows.where(rows.written == 0))
        completions, completable = tiles(within, rows.where(rows.written > 0))
        metrics = {"escd/completable_mass": (completable.sum(), torch.tensor(len(completable)))}
        return (starts.sum() + completions.sum()) / num_items, {**compared_rows(batch, rows), **metrics}
