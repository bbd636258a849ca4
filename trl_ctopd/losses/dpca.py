"""DPCA (arXiv 2606.09456): the reverse-KL policy gradient, its signal scaled chunk by chunk.

Decisions: the advantage is detached and clipped to ±`advantage_clip`. A chunk whose teacher budget is not finite takes
no part and is counted.
Where the published code differs: it drops chunks of more than six tokens, divides by L_S without the limit at zero, and
masks everything after the first place where its aligner gets stuck; here none of that is needed.
"""

from dataclasses import dataclass

import torch

from .base import Metrics, ScoredChunks
from .credit import CREDITS, gaps, shares, spread
from .policy_gradient import PolicyGradient, check_clip, clipped


@dataclass
class DPCA(PolicyGradient):
    """
    loss = −Σ_i clip(A_i, ±advantage_clip) · exp(log p_i − sg(log p_i)) / N,  A_i = (L_T − L_S) · w_i,

    and PPO's clipped ratio in place of the exponential where completions are used again.

    Args:
        credit (`str`, defaults to `"semantic"`): how a chunk's gap is shared among its student tokens, see
            [`~trl_ctopd.losses.credit.shares`].
        advantage_clip (`float` or `None`, defaults to `10.0`): bound on |A_i| in nats; `None` for no bound.
        clip_ratio_low, clip_ratio_high: of [`PolicyGradient`].
    """

    credit: str = "semantic"
    advantage_clip: float | None = 10.0

    def __post_init__(self):
        super().__post_init__()
        if self.credit not in CREDITS:
            raise ValueError(f"Unknown credit {self.credit!r}: choose one of {', '.join(CREDITS)}.")
        check_clip(self.advantage_clip)

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        return self.surrogate(batch, *self.advantages(batch), num_items)

    @torch.no_grad()
    def advantages(self, batch: ScoredChunks) -> tuple[torch.Tensor, torch.Tensor]:
        """A_i of shape (B, S), 0 where a token takes no part, and where the clip took hold (B, S)."""
        log_probs = batch.policy_log_probs
        gap, _ = gaps(log_probs, batch.teacher_log_probs, batch.student_chunks, batch.teacher_chunks, batch.num_chunks)
        share = shares(self.credit, log_probs, batch.student_chunks, batch.student_widths, batch.num_chunks)
        return clipped(spread(gap, batch.student_chunks) * share, self.advantage_clip)
