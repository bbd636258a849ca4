"""SimCT (arXiv 2605.07711): the reverse KL over the shared vocabulary, enlarged by the multi-token unit that was written.

Decisions: a unit is a minimal synchronized chunk, its score the mean of its tokens' log-probs. Of a text's units only the
one that starts at a position has a score there, so only that one joins the shared tokens.
Where the published code differs: it averages raw logits, which are defined up to a constant at each position; it ends a
unit only where the *next* tokens are equal too; it compares decoded strings, which breaks characters that are cut in
two. Here log-probs, byte boundaries and bytes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss, Metrics, ScoredChunks
from .distributions import over_tiles
from .divergences import kl


@dataclass
class SimCT(Loss):
    """
    loss = Σ_c KL(softmax(s_S) ‖ softmax(s_T)) / N over units u: the shared tokens, s_M(u) = log p_M(u), and, where the
    chunk is not one token on each side, the chunk itself, s_M(u) = the mean log-prob of its tokens.

    A perfect student stays only where all chunks are one token on each side.
    """

    signal: ClassVar[str] = "logits"
    copies: ClassVar[int] = 6
    policy: ClassVar[str] = "on"
    structures: ClassVar[tuple[str, ...]] = ("shared",)

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        chunks = batch.comparable_chunks
        shared = batch.vocabulary.shared
        budgets = batch.student_sum(batch.student_log_probs), batch.teacher_sum(batch.teacher_log_probs)
        own_p, own_q = (
            (budget[chunks.row, chunks.chunk] / tokens).masked_fill(chunks.one_to_one, -torch.inf)
            for budget, tokens in zip(budgets, (chunks.student_tokens, chunks.teacher_tokens), strict=True)
        )

        def divergence(log_p, log_q, own_p, own_q):
            own_p = own_p * 1  # its gradient would be a view that keeps the whole tile's alive
            log_p = torch.cat([shared.student_log_probs(log_p), own_p[:, None].to(log_p.dtype)], dim=1)
            log_q = torch.cat([shared.teacher_log_probs(log_q), own_q[:, None].to(log_q.dtype)], dim=1)
            return (kl(log_p.log_softmax(-1), log_q.log_softmax(-1)),)

        student, teacher = (batch.student, chunks.student_first), (batch.teacher, chunks.teacher_first)
        (rows,) = over_tiles(divergence, self.tile(batch), student, teacher, own_p, own_q)
        return rows.sum() / num_items, batch.compared(chunks)
