"""The policy gradient that the losses on sampled tokens share.

Decisions: in the first update after a rollout the ratio is 1 with a gradient and no bound holds; where the rollout is used
again (`ScoredChunks.old_log_probs`), PPO's bounds on the ratio do (arXiv 1707.06347, equation 7), the upper one apart from
the lower as in the paper of DPCA. Advantages stay those of the policy that wrote.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss, Metrics, ScoredChunks


_LARGEST_LOG_RATIO = 20.0  # finite in any precision, and far out of bounds


def check_clip(advantage_clip: float | None):
    """Raises `ValueError` for a clip that would let nothing through."""
    if advantage_clip is not None and not advantage_clip > 0:
        raise ValueError(f"advantage_clip must be positive or None, got {advantage_clip}.")


def clipped(advantages: torch.Tensor, advantage_clip: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages within ±`advantage_clip`, and where the clip took hold."""
    bound = float("inf") if advantage_clip is None else advantage_clip
    return advantages.clamp(-bound, bound), advantages.abs() > bound


@dataclass(kw_only=True)
class PolicyGradient(Loss):
    """
    −Σ_i min(A_i ρ_i, A_i clip(ρ_i, 1 − clip_ratio_low, 1 + clip_ratio_high)) / N, with ρ_i = exp(log p_i − log p_i of the
    policy that wrote).

    Args:
        clip_ratio_low (`float`, defaults to `0.2`), clip_ratio_high (`float`, defaults to `0.28`): PPO's bounds on the
            ratio, where completions are used again.
    """

    policy: ClassVar[str] = "on"
    weighs_by_ratio: ClassVar[bool] = True
    weighs_by_importance: ClassVar[bool] = True
    takes_rewards: ClassVar[bool] = True

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.28

    def __post_init__(self):
        if not (0 < self.clip_ratio_low <= 1 and self.clip_ratio_high > 0):
            raise ValueError(
                "clip_ratio_low must be above 0 and at most 1, and clip_ratio_high above 0, got "
                f"{self.clip_ratio_low} and {self.clip_ratio_high}."
            )

    def surrogate(
        self,
        batch: ScoredChunks,
        advantages: torch.Tensor,
        cut: torch.Tensor,
        num_items: torch.Tensor | int,
        close_advantages: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Metrics]:
        """The loss of detached advantages (B, S); `cut` (B, S) tells which of them met their clip. Where another sampler drew
        the tokens, each advantage counts `ScoredChunks.importance` times. `close_advantages` (B, S) are those of
        `close_log_probs`. Rewards come on top of the clipped advantages of the tokens that were drawn."""
        if batch.rewards is not None:
            advantages = advantages + batch.rewards[:, None] * (batch.student_chunks >= 0)
        value, outside = self._bounded(batch, advantages, batch.student_log_probs, batch.policy_log_probs)
        if close_advantages is not None:
            scores = batch.close_log_probs, batch.policy_close_log_probs
            closing = self._bounded(batch, close_advantages, *scores)[0]
            # the gradient alone: the end of a row's last chunk may lie in its padding, whose width would change the value
            value = value + closing - closing.detach()
        metrics = {"advantage/clipped_fraction": (cut.sum(), batch.scored_tokens)}
        if batch.old_log_probs is not None:
            metrics["ratio/clipped_fraction"] = (outside.sum(), batch.scored_tokens)
        return -value.sum() / num_items, metrics

    def _bounded(
        self, batch: ScoredChunks, advantages: torch.Tensor, log_probs: torch.Tensor, old: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S) what each advantage adds, and where PPO's bounds took hold of it."""
        if batch.importance is not None:
            advantages = advantages * batch.importance
        low, high = 1 - self.clip_ratio_low, 1 + self.clip_ratio_high
        ratio = torch.exp((log_probs - old).clamp(max=_LARGEST_LOG_RATIO))
        outside = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
        return torch.minimum(advantages * ratio, advantages * ratio.clamp(low, high)), outside
