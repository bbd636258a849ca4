"""The policy gradient that the losses on sampled tokens share: one update a rollout, so the ratio is 1 with a gradient
and needs no trust region.
"""

import torch

from .base import Metrics, ScoredChunks


def check_clip(advantage_clip: float | None):
    """Raises `ValueError` for a clip that would let nothing through."""
    if advantage_clip is not None and not advantage_clip > 0:
        raise ValueError(f"advantage_clip must be positive or None, got {advantage_clip}.")


def clipped(advantages: torch.Tensor, advantage_clip: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages within ±`advantage_clip`, and where the clip took hold."""
    bound = float("inf") if advantage_clip is None else advantage_clip
    return advantages.clamp(-bound, bound), advantages.abs() > bound


def policy_gradient(
    batch: ScoredChunks, advantages: torch.Tensor, cut: torch.Tensor, num_items: torch.Tensor | int
) -> tuple[torch.Tensor, Metrics]:
    """−Σ_i A_i · exp(log p_i − sg(log p_i)) / N, of detached advantages (B, S); `cut` tells which ones met the clip."""
    log_probs = batch.student_log_probs
    ratio = torch.exp(log_probs - log_probs.detach())
    return -(advantages * ratio).sum() / num_items, {"advantage/clipped_fraction": (cut.sum(), batch.scored_tokens)}
