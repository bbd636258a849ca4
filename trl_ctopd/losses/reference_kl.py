"""The distance of a student from its start, as a term beside any loss on text that the student writes.

Σ ½ (log p_i − log p_ref,i)² over its tokens: where token i is drawn from p, the mean of its gradient, (log p_i − log p_ref,i) ∇log p_i, is
that of KL(p ‖ p_ref) given the text before. This estimator is known as k2 (Schulman 2020, "Approximating KL divergence"); the
gradient of k3, which GRPO's code uses, is that of another divergence.
"""

import torch

from .base import Metrics, ScoredChunks


def reference_kl(batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
    """
    Args:
        batch (`ScoredChunks`): with `reference_log_probs`.
        num_items (`torch.Tensor` or `int`): N, the scored student tokens of the whole optimizer step.

    Returns:
        Σ_i ½ (log p_i − log p_ref,i)² / N over the scored student tokens (scalar), and `reference/nats_per_token`, the mean of
        log p_i − log p_ref,i, a sampled KL in nats.
    """
    distance = (batch.student_log_probs - batch.reference_log_probs) * (batch.student_chunks >= 0)
    metrics = {"reference/nats_per_token": (distance.detach().sum(), batch.scored_tokens)}
    return 0.5 * distance.square().sum() / num_items, metrics
