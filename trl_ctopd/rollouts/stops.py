"""Stop tokens of the student's with which a text ends alike.

A student may have several (`<|eot_id|>` and `<|end_of_text|>`), and for each the teacher reads the same end. Held against one of them alone, the
whole of the teacher's probability to end would be each one's share, and the student would learn to end twice as often. So the log-prob of
an end is that of all of them together, log Σ_s p(s).
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from .pairing import Rollout


def add_other_stops(batch: dict, rollouts: Sequence[Rollout], alike: Callable[[Rollout], Mapping[int, Sequence[int]]]):
    """
    Gives what `collate` made of `rollouts`, where one has such an end, the `scored_ends` (2, m), places as `scored`, and `other_stops` (m,), an id
    each that might have ended the text there as well.

    Args:
        alike: of a rollout, for each stop token the others with which a text ends alike.
    """
    length, found = batch["input_ids"].shape[1], []
    for row, rollout in enumerate(rollouts):
        others, begin = alike(rollout), len(rollout.prompt.student_ids) - 1 - length
        for place, token in enumerate(rollout.student_ids if others else ()):
            if token in others and rollout.student_chunks[place] >= 0:
                found += [(row, begin + place, other) for other in others[token]]
    if found:
        *ends, batch["other_stops"] = torch.tensor(found).T
        batch["scored_ends"] = torch.stack(ends)


def with_other_stops(log_probs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(B, S) log-probs, and the probabilities of the other stop tokens, 0 where there are none: the log-prob of all of them together."""
    some = others > 0
    together = torch.logaddexp(log_probs, others.masked_fill(~some, 1).log())
    return torch.where(some, together, log_probs)
