"""DPCA (arXiv 2606.09456): the reverse-KL policy gradient, its signal scaled chunk by chunk.

Decisions: one update a rollout, so the ratio is 1 with a gradient and no trust region is needed; the advantage is
detached and clipped to ±`advantage_clip`. A chunk whose teacher budget is not finite takes no part and is counted.
Where the published code differs: it drops chunks of more than six tokens, divides by L_S without the limit at zero, and
masks everything after the first place where its aligner gets stuck; here none of that is needed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..credit import CREDITS, gaps, shares, spread
from .base import Loss, Metrics, ScoredChunks


@dataclass
class DPCA(Loss):
    """
    loss = −Σ_i clip(A_i, ±advantage_clip) · exp(log p_i − sg(log p_i)) / N,  A_i = (L_T − L_S) · w_i.

    Args:
        credit (`str`, defaults to `"semantic"`): how a chunk's gap is shared among its student tokens, see
            [`~trl_ctopd.credit.shares`].
        advantage_clip (`float` or `None`, defaults to `10.0`): bound on |A_i| in nats; `None` for no bound.
    """

    policy: ClassVar[str] = "on"

    credit: str = "semantic"
    advantage_clip: float | None = 10.0

    def __post_init__(self):
        if self.credit not in CREDITS:
            raise ValueError(f"Unknown credit {self.credit!r}: choose one of {', '.join(CREDITS)}.")
        if self.advantage_clip is not None and self.advantage_clip <= 0:
            raise ValueError(f"advantage_clip must be positive or None, got {self.advantage_clip}.")

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        log_probs = batch.student_log_probs
        advantages, clipped = self.advantages(batch)
        ratio = torch.exp(log_probs - log_probs.detach())
        loss = -(advantages * ratio).sum() / num_items
        scored = (batch.student_chunks >= 0).sum()
        return loss, {"advantage/clipped_fraction": (clipped.sum(), scored)}

    @torch.no_grad()
    def advantages(self, batch: ScoredChunks) -> tuple[torch.Tensor, torch.Tensor]:
        """A_i of shape (B, S), 0 where a token takes no part, and where the clip took hold (B, S)."""
        log_probs = batch.student_log_probs.detach()
        gap, _ = gaps(log_probs, batch.teacher_log_probs, batch.student_chunks, batch.teacher_chunks, batch.num_chunks)
        share = shares(self.credit, log_probs, batch.student_chunks, batch.student_widths, batch.num_chunks)
        raw = spread(gap, batch.student_chunks) * share
        bound = float("inf") if self.advantage_clip is None else self.advantage_clip
        return raw.clamp(-bound, bound), raw.abs() > bound
