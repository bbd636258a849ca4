"""Metrics of completions before they are scored: (sum, weight) each, which add up over micro-batches and processes."""

from collections.abc import Sequence

from ..text.altered_text import REASONS
from .pairing import Rollout


def rollout_metrics(
    rollouts: Sequence[Rollout], on_policy: Sequence[bool] | None = None
) -> dict[str, tuple[float, float]]:
    """Metrics of completions before they are scored. `alignment/masked_fraction` counts every masked token, and each reason for
    masking has a metric of its own, in bytes. Padding rows and results of tools do not count.

    `on_policy`: whether the student wrote each, all of them when `None`; what `completions/*` tell of the others is `given/*`.
    """
    kinds = [True] * len(rollouts) if on_policy is None else on_policy
    real = [(rollout, kind) for rollout, kind in zip(rollouts, kinds, strict=True) if not rollout.prompt.is_padding]
    rollouts = [rollout for rollout, _ in real]
    rows = len(rollouts)
    tokens = sum(len(rollout.student_ids) - rollout.num_given for rollout in rollouts)
    num_bytes = sum(rollout.alignment.num_bytes for rollout in rollouts)
    masked = {reason: sum(rollout.alignment.num_masked(reason) for rollout in rollouts) for reason in REASONS}
    return {
        "alignment/masked_fraction": (
            sum((rollout.student_chunks < 0).sum() - rollout.num_given for rollout in rollouts),
            tokens,
        ),
        **{f"masked_bytes/{reason}": (count, num_bytes) for reason, count in masked.items()},
        "alignment/teacher_context_exceeded_fraction": (sum(rollout.unread for rollout in rollouts), rows),
        **_lengths("", [rollout for rollout, kind in real if kind]),
        **_lengths("given/", [rollout for rollout, kind in real if not kind]),
    }


def _lengths(whose: str, rollouts: Sequence[Rollout]) -> dict[str, tuple[float, float]]:
    tokens, rows = sum(len(rollout.student_ids) - rollout.num_given for rollout in rollouts), len(rollouts)
    empty = sum(len(rollout.student_ids) <= rollout.ended for rollout in rollouts)
    return {
        f"{whose}completions/mean_length": (tokens, rows),
        f"{whose}completions/truncated_fraction": (sum(not rollout.ended for rollout in rollouts), rows),
        f"{whose}completions/empty_fraction": (empty, rows),
    }
