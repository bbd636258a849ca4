"""Reads the log-probs in a server's answer, or says why it holds none."""

import math
from collections.abc import Sequence

import torch


_ZERO_PROBABILITY = -9999.0  # what vLLM sends for -inf
_ROUNDING = 1e-3
_FLOOR = -100.0  # lower log-probs count as this in comparisons


class AnswerError(Exception):
    """An answer that does not hold the scores that were requested."""


def scores(entries: Sequence[dict[int, object] | None], ids: Sequence[int], first: int) -> torch.Tensor:
    """
    The log-probs of `ids[first:]`, in nats, on the CPU. `entries`: one dict a token, log-probs by id.

    Raises `AnswerError` where the scores are missing, are those of other tokens, or are not log-probs.
    """
    if len(entries) != len(ids):
        raise AnswerError(f"{len(entries)} scores for {len(ids)} tokens")
    values = []
    for place in range(1, len(ids)):
        entry = entries[place] or {}
        if ids[place] not in entry:
            raise AnswerError(
                f"token {place} was {ids[place]}, and the answer scores {', '.join(map(str, entry)) or None}"
            )
        if place >= first:
            values.append(_log_prob(entry[ids[place]], place))
    return torch.tensor(values)


def likeliest(entries: Sequence[dict[int, object] | None], first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Ids and log-probs, both (T, `count`), of the most likely tokens at each place from `first` on. The token that was sent also has a
    score; it counts only where it is among the most likely. Raises `AnswerError` where there are fewer scores.
    """
    ids, values = [], []
    for place in range(first, len(entries)):
        entry = entries[place] or {}
        if len(entry) < count:
            raise AnswerError(f"token {place} has {len(entry)} log-probs, and the {count} most likely were requested")
        found = sorted(((_log_prob(value, place), -token) for token, value in entry.items()), reverse=True)[:count]
        ids.append([-token for _, token in found])
        values.append([value for value, _ in found])
    shape = len(ids), count
    return torch.tensor(ids, dtype=torch.long).view(shape), torch.tensor(values).view(shape)


def agree(hits: int, draws: int, probability: float) -> bool:
    """Whether `hits` of `draws` agree with an event of that `probability`; wrong by chance less than once in a million times."""
    variance = draws * max(probability * (1 - probability), 0.0)
    return abs(hits - draws * probability) <= 6 * math.sqrt(variance) + 3


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean absolute difference in nats a token."""
    return (one.clamp(min=_FLOOR) - other.clamp(min=_FLOOR)).abs().mean().item()


def _log_prob(value: object, place: int) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        raise AnswerError(f"token {place} has the log-prob {value}")
    if value > _ROUNDING:
        raise AnswerError(
            f"token {place} has the log-prob {value}, above 0: the server has to score with raw log-probs (vLLM: "
            "`--logprobs-mode raw_logprobs`)"
        )
    return -math.inf if value <= _ZERO_PROBABILITY else min(float(value), 0.0)
