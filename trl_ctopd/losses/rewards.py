"""Rewards of whole completions, normalised within the completions of one prompt as in GRPO (arXiv 2402.03300, section 4.1.2).

Decisions, as in TRL's `GRPOTrainer`: NaN is a reward that was not given, and takes no part; a completion that got none has
advantage 0; the standard deviation is the sample's. Here a prompt with fewer than two rewarded completions tells nothing: all
its advantages are 0.
"""

import torch


_SMALL = 1e-4  # TRL's: keeps a prompt whose rewards hardly differ from being blown up


def total_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(N, K) rewards of K functions and (K,) weights in, (N,) weighted sums of those that were given out; NaN where none was."""
    total = (rewards * weights).nansum(1)
    return total.masked_fill(rewards.isnan().all(1), torch.nan)


def group_advantages(total: torch.Tensor, size: int, scale: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What each completion's reward is above the mean of its prompt's; with `scale`, in their standard deviations.

    Args:
        total (`torch.Tensor` of shape (N,)): rewards, NaN where none was given; N / `size` prompts one after the other.
        size (`int`): completions of a prompt.
        scale (`bool`): divide by the standard deviation plus 1e-4.

    Returns:
        advantages (N,), and the prompts' standard deviations (N / `size`,), NaN with fewer than two rewards.
    """
    groups = total.view(-1, size)
    count = (~groups.isnan()).sum(1)
    centred = groups - groups.nanmean(1, keepdim=True)
    std = (centred.square().nansum(1) / (count - 1).clamp(min=1)).sqrt().masked_fill(count < 2, torch.nan)
    advantages = centred / (std[:, None] + _SMALL) if scale else centred.masked_fill(std.isnan()[:, None], torch.nan)
    return advantages.nan_to_num(nan=0.0).flatten(), std
