"""Strict matching on distributions (arXiv 2610.08448): the reverse KL on the student's likeliest shared tokens, where
both tokenizers cut the same token.

Decisions: the k tokens are chosen by the student's own probabilities, without gradient; both sides are renormalised over
them. Ids that spell the same bytes are one token, and so are all stop tokens. A text's first chunk is left out where
only one side puts a dummy prefix space before it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss, Metrics, ScoredChunks
from .distributions import over_tiles
from .divergences import kl


@dataclass
class StrictTopK(Loss):
    """
    loss = Σ_c KL(p̄ ‖ q̄) / N over the chunks of one token on each side, p̄ and q̄ renormalised over the student's `top_k`
    likeliest shared tokens.

    A perfect student stays only where all chunks are one token on each side.

    Args:
        top_k (`int` or `None`, defaults to `16`): how many; `None` for all shared tokens.
    """

    signal: ClassVar[str] = "logits"
    copies: ClassVar[int] = 3
    policy: ClassVar[str] = "on"
    structures: ClassVar[tuple[str, ...]] = ("shared",)

    top_k: int | None = 16

    def __post_init__(self):
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"strict_topk's top_k must be at least 1 or None, got {self.top_k}.")

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        chunks = batch.comparable_chunks
        chunks = chunks.where(chunks.one_to_one)
        shared = batch.vocabulary.shared

        def divergence(log_p, log_q):
            log_p, log_q = shared.student_log_probs(log_p), shared.teacher_log_probs(log_q)
            if self.top_k is not None:
                likeliest = log_p.detach().topk(min(self.top_k, log_p.shape[-1])).indices
                log_p, log_q = log_p.gather(1, likeliest), log_q.gather(1, likeliest)
            return (kl(log_p.log_softmax(-1), log_q.log_softmax(-1)),)

        student, teacher = (batch.student, chunks.student_first), (batch.teacher, chunks.teacher_first)
        (rows,) = over_tiles(divergence, self.tile(batch), student, teacher)
        return rows.sum() / num_items, batch.compared(chunks)
