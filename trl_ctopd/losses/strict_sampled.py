"""Strict matching on sampled tokens (SimpleOPD, arXiv 2608.14277): plain on-policy distillation where both tokenizers
cut the same token, and nothing elsewhere.

Decisions: a text's first token counts where only one side puts a dummy prefix space before it: it is one event on both
sides. N stays the count of all scored student tokens, not of the matched ones, so that the figure is comparable with
the other losses and a micro-batch needs to know nothing of the others; the share that is matched is logged. A teacher's
log-prob of -inf counts as -100 nats, so that the clip decides. A perfect student stays only where all chunks are one token on each
side (docs/fixed-point.md).
"""

from dataclasses import dataclass

import torch

from .base import Metrics, ScoredChunks
from .credit import floored, gaps, spread
from .policy_gradient import PolicyGradient, check_clip, clipped


@dataclass
class StrictSampled(PolicyGradient):
    """
    loss = −Σ_i clip(log q_i − log p_i, ±advantage_clip) · exp(log p_i − sg(log p_i)) / N over the chunks of one token on
    each side.

    A perfect student stays only where all chunks are one token on each side.

    Args:
        advantage_clip (`float` or `None`, defaults to `10.0`): bound on the log-ratio in nats; `None` for no bound.
        clip_ratio_low, clip_ratio_high: of [`PolicyGradient`].
    """

    advantage_clip: float | None = 10.0

    def __post_init__(self):
        super().__post_init__()
        check_clip(self.advantage_clip)

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        matched = (batch.student_tokens == 1) & (batch.teacher_tokens == 1)
        scores = batch.policy_log_probs, floored(batch.teacher_log_probs)
        gap, neutral = gaps(*scores, batch.student_chunks, batch.teacher_chunks, batch.num_chunks)
        matched &= ~neutral
        advantages = spread(gap.masked_fill(~matched, 0), batch.student_chunks)
        value, metrics = self.surrogate(batch, *clipped(advantages, self.advantage_clip), num_items)
        return value, {**metrics, "loss/compared_fraction": (matched.sum(), batch.scored_tokens)}
