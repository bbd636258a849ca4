"""GOLD, TRL's general online logit distillation: Jensen-Shannon on the shared vocabulary, ULD on the rest.

Decisions: a chunk is one token by the chain rule: the distribution at its last token times the probability of the tokens
before (TRL's `token_merge_strategy="bayesian"`).
Where TRL 1.16 differs: it takes the divergence of parts that do not sum to 1, which is negative for some at beta 0 and 1,
and above 0 for some that are equal but for their mass; here both are renormalised over the shared vocabulary first. It
keys the overlap by token strings, so that `Ġthe` and `▁the` differ; here by bytes. It averages over the chunks of a text
and then over texts; here all chunks of a step count alike.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss, Metrics, ScoredChunks
from .distributions import over_tiles
from .divergences import generalized_jsd, sorted_l1


@dataclass
class GOLD(Loss):
    """
    loss = Σ_c (matched_weight · JSD_β(p̄, q̄) + unmatched_weight · Σ_r |p_(r) − q_(r)|) / N, p̄ and q̄ over the shared
    vocabulary, p_(r) and q_(r) the sorted probabilities of the tokens outside it.

    A perfect student stays only where all chunks are one token on each side.

    Args:
        beta (`float`, defaults to `0.5`): of the generalized Jensen-Shannon divergence; 0 = forward KL, 1 = reverse KL.
        matched_weight (`float`, *optional*): `None`: the shared part of the teacher's vocabulary.
        unmatched_weight (`float`, *optional*): `None`: 1 − `matched_weight`.
    """

    signal: ClassVar[str] = "logits"
    copies: ClassVar[int] = 8
    structures: ClassVar[tuple[str, ...]] = ("shared",)

    beta: float = 0.5
    matched_weight: float | None = None
    unmatched_weight: float | None = None

    def __post_init__(self):
        if not 0 <= self.beta <= 1:
            raise ValueError(f"gold's beta must be between 0 and 1, got {self.beta}.")
        self.check_weights("matched_weight", "unmatched_weight")
        if self.unmatched_weight is None and (self.matched_weight or 0) > 1:
            raise ValueError(
                f"gold's matched_weight is {self.matched_weight}, which leaves unmatched_weight, 1 minus it, below 0: set "
                "both."
            )

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        chunks = batch.comparable_chunks
        shared = batch.vocabulary.shared

        def parts(log_p, log_q, before_p, before_q):
            matched = (shared.student_log_probs(log_p), shared.teacher_log_probs(log_q))
            matched = generalized_jsd(*(side.softmax(-1) for side in matched), self.beta)
            rest = (
                log_p[:, shared.student_rest] + before_p[:, None],
                log_q[:, shared.teacher_rest] + before_q[:, None],
            )
            return matched, sorted_l1(*(side.exp() for side in rest))

        student, teacher = (batch.student, chunks.student_last), (batch.teacher, chunks.teacher_last)
        before = batch.log_probs_before_last(chunks)
        matched, unmatched = over_tiles(parts, self.tile(batch), student, teacher, *before)
        weight = self.matched_weight
        if weight is None:
            weight = len(shared.student_ids) / batch.vocabulary.teacher_size
        rest_weight = 1 - weight if self.unmatched_weight is None else self.unmatched_weight
        count = torch.tensor(len(matched))
        metrics = {"gold/matched": (matched.sum(), count), "gold/unmatched": (unmatched.sum(), count)}
        value = (weight * matched.sum() + rest_weight * unmatched.sum()) / num_items
        return value, {**batch.compared(chunks), **metrics}
