"""Warnings in words about a run's metrics, as an expert in the method would give them."""

import math
from collections.abc import Sequence

from ...config import CrossTokenizerGKDConfig
from ..history import GAP


RECENT = 5  # logs; their mean is judged
LONG = 20  # logs; fewer do not tell whether a gap stands still
CLOSED = 0.01  # nats a byte; a smaller gap need not move


def advice(log_history: Sequence[dict], args: CrossTokenizerGKDConfig, teacher_context: int | None = None) -> list[str]:
    """
    One or two sentences for each training metric that is out of bounds in the last few logs, with what to do about it.

    Args:
        log_history: the trainer state's.
        args: the run's settings, whose values are quoted.
        teacher_context: in tokens, if known.
    """
    kept = {
        name: [entry[name] for entry in log_history if isinstance(entry.get(name), int | float)]
        for name in {name for entry in log_history for name in entry}
    }
    recent = {name: sum(values[-RECENT:]) / len(values[-RECENT:]) for name, values in kept.items() if values}

    def above(name: str, bound: float) -> bool:
        return recent.get(name, 0) > bound

    said = []
    if not all(math.isfinite(value) for value in [*kept.get("loss", []), *kept.get("grad_norm", [])]):
        said.append("A loss or a gradient norm was not finite: lower learning_rate, or train in bf16 rather than fp16.")
    if above("completions/truncated_fraction", 0.1):
        said.append(
            f"{_share(recent['completions/truncated_fraction'])} of completions are truncated: raise max_new_tokens "
            f"(now {args.max_new_tokens}). A completion that is cut off has no end to learn from."
        )
    if above("completions/empty_fraction", 0.05):
        said.append(
            f"{_share(recent['completions/empty_fraction'])} of completions are empty: the student ends its turn at once. "
            "Look at how a prompt is rendered, and lower learning_rate if the share grows."
        )
    if above("alignment/masked_fraction", 0.2):
        reasons = {
            name.removeprefix("masked_bytes/"): v for name, v in recent.items() if name.startswith("masked_bytes/")
        }
        most = max(reasons, key=reasons.get, default=None)
        why = f", mostly for {most}" if most and reasons[most] > 0 else ""
        said.append(
            f"{_share(recent['alignment/masked_fraction'])} of the student's tokens take no part{why}. Masked text costs the "
            "student nothing, and the gap says nothing of it: look at the completions, and lower learning_rate if the share "
            "grows."
        )
    if above("alignment/teacher_context_exceeded_fraction", 0.01):
        said.append(
            f"{_share(recent['alignment/teacher_context_exceeded_fraction'])} of texts are longer than the teacher's context"
            f"{'' if teacher_context is None else f' of {teacher_context:,} tokens'} and teach nothing: filter long prompts "
            "out, or lower max_new_tokens."
        )
    if above("alignment/neutralised_fraction", 0.01):
        said.append(
            f"In {_share(recent['alignment/neutralised_fraction'])} of chunks the teacher's log-probs are not finite: load "
            "it in bfloat16 or float32 (teacher_model_init_kwargs)."
        )
    if above("advantage/clipped_fraction", 0.1):
        said.append(
            f"{_share(recent['advantage/clipped_fraction'])} of the student's tokens meet advantage_clip={args.advantage_clip}: "
            "the two models are far apart there. It should fall; if it does not, lower learning_rate."
        )
    if above("ratio/clipped_fraction", 0.2):
        said.append(
            f"{_share(recent['ratio/clipped_fraction'])} of ratios meet PPO's bounds: lower rollout_reuse (now "
            f"{args.rollout_reuse}) or learning_rate."
        )
    if growth := _growth(kept.get(GAP, [])):
        before, now = growth
        said.append(
            f"The gap has grown from {before:.3f} to {now:.3f} nats a byte: the student moves away from its teacher. Lower "
            "learning_rate."
        )
    elif _stands_still(kept.get(GAP, [])):
        said.append(
            f"The gap has not moved in {len(kept[GAP])} logs. Raise learning_rate (now {args.learning_rate:g}): an adapter takes "
            "1e-4 to 3e-4 and should reach every linear layer (target_modules='all-linear'), a whole student 1e-6 to 1e-5."
        )
    return said


def _growth(gaps: Sequence[float]) -> tuple[float, float] | None:
    """Means of the first and the last quarter, if the last is larger by more than the noise of both explains; else None."""
    if len(gaps) < 8:
        return None
    before, now, error = _ends(gaps)
    return (before, now) if now - before > 3 * error and now > 1.1 * before else None


def _stands_still(gaps: Sequence[float]) -> bool:
    """Whether a gap that is there to be closed has fallen, in many logs, by less than a tenth, and noise does not hide more."""
    if len(gaps) < LONG:
        return False
    before, now, error = _ends(gaps)
    return before > CLOSED and before - now + 2 * error < 0.1 * before


def _ends(gaps: Sequence[float]) -> tuple[float, float, float]:
    """Means of the first and the last quarter, and the standard error of their difference."""
    count = len(gaps) // 4
    parts = gaps[:count], gaps[-count:]
    means = [sum(part) / count for part in parts]
    errors = [
        sum((value - mean) ** 2 for value in part) / (count - 1) / count
        for part, mean in zip(parts, means, strict=True)
    ]
    return means[0], means[1], math.sqrt(sum(errors))


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"
