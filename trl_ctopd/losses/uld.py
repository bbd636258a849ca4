"""ULD, universal logit distillation (arXiv 2402.12030): the sorted probabilities of two vocabularies, matched by rank.

Decisions: it needs no correspondence between tokens, only between positions. `"position"` is the paper's: the n-th token
of one side with the n-th of the other, whatever they spell. `"chunk"` compares each synchronized chunk as one token, by
the chain rule (as TRL's GOLD does, `token_merge_strategy="bayesian"`). The stop tokens of a side are one outcome. The paper's
cross-entropy is a knob.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss, Metrics, ScoredChunks
from .distributions import over_tiles
from .divergences import sorted_l1, with_one_end


PAIRINGS = ("position", "chunk")


@dataclass
class ULD(Loss):
    """
    loss = Σ Σ_r |p_(r) − q_(r)| / N over pairs of positions, p_(r) the r-th greatest probability.

    A perfect student stays only where all chunks are one token on each side.

    Args:
        uld_pairing (`str`, defaults to `"position"`): which positions are pairs, `"position"` or `"chunk"`.
        cross_entropy_weight (`float`, defaults to `0.0`): of −Σ_i log p_i, which the paper adds on its reference texts;
            on text of the student's own it teaches nothing.
    """

    signal: ClassVar[str] = "logits"
    copies: ClassVar[int] = 8

    uld_pairing: str = "position"
    cross_entropy_weight: float = 0.0

    def __post_init__(self):
        if self.uld_pairing not in PAIRINGS:
            raise ValueError(f"Unknown uld_pairing {self.uld_pairing!r}: choose one of {', '.join(PAIRINGS)}.")
        self.check_weights("cross_entropy_weight")

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        if self.uld_pairing == "chunk":
            chunks = batch.chunks
            student, teacher, compared = chunks.student_last, chunks.teacher_last, batch.compared(chunks)
            before = batch.log_probs_before_last(chunks)
        else:
            student, teacher = batch.positional_pairs
            before = student.new_zeros(2, len(student), dtype=batch.student_log_probs.dtype)
            compared = {"loss/compared_fraction": (torch.tensor(len(student)), batch.scored_tokens)}

        stops = batch.vocabulary.student_stops, batch.vocabulary.teacher_stops

        def distance(log_p, log_q, before_p, before_q):
            log_p, log_q = (with_one_end(*side) for side in zip((log_p, log_q), stops, strict=True))
            return (sorted_l1((log_p + before_p[:, None]).exp(), (log_q + before_q[:, None]).exp()),)

        sides = (batch.student, student), (batch.teacher, teacher)
        (rows,) = over_tiles(distance, self.tile(batch), *sides, *before)
        return (rows.sum() + self.cross_entropy_weight * batch.cross_entropy()) / num_items, compared
