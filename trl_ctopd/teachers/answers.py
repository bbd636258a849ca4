"""What an answer of vLLM's `POST /v1/completions` with `prompt_logprobs` says, or why it says nothing."""

import math
from collections.abc import Sequence

import torch


_ZERO_PROBABILITY = -9999.0  # vLLM's stand-in for -inf
_ROUNDING = 1e-3
_FLOOR = -100.0  # in comparisons


class AnswerError(Exception):
    """An answer that is no score of what was asked."""


def choice(answer: dict) -> dict:
    """The only one."""
    choices = answer.get("choices")
    if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
        raise AnswerError("an answer without one choice")
    return choices[0]


def entries(answer: dict) -> list[dict | None]:
    """What is said of each token of the prompt, by id; nothing of the first."""
    found = choice(answer).get("prompt_logprobs")
    if not isinstance(found, list):
        raise AnswerError("an answer without `prompt_logprobs`")
    return found


def scores(answer: dict, ids: Sequence[int], first: int) -> torch.Tensor:
    """The log-probs of `ids[first:]`. Raises `AnswerError` where `answer` has others, or none."""
    found = entries(answer)
    if len(found) != len(ids):
        raise AnswerError(f"{len(found)} scores for {len(ids)} tokens")
    values = []
    for place in range(1, len(ids)):
        entry = found[place]
        if not isinstance(entry, dict) or str(ids[place]) not in entry:
            raise AnswerError(f"token {place} was {ids[place]}, and the answer scores {_keys(entry)}")
        if place >= first:
            values.append(_log_prob(entry[str(ids[place])], place))
    return torch.tensor(values)


def drawn(answer: dict) -> list[int] | None:
    """The new token of each choice; None where they have no ids."""
    choices = answer.get("choices")
    if not (isinstance(choices, list) and choices and all(isinstance(choice, dict) for choice in choices)):
        raise AnswerError("an answer without choices")
    ids = [choice.get("token_ids") for choice in choices]
    return None if None in ids else [first for [first, *_] in ids]


def come_as_often(hits: int, draws: int, probability: float) -> bool:
    """Whether `hits` of `draws` are what an event of that `probability` gives, but for a chance below one in a million."""
    variance = draws * max(probability * (1 - probability), 0.0)
    return abs(hits - draws * probability) <= 6 * math.sqrt(variance) + 3


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Nats a token, in the mean."""
    return (one.clamp(min=_FLOOR) - other.clamp(min=_FLOOR)).abs().mean().item()


def _keys(entry: object) -> str:
    return ", ".join(map(str, entry)) if isinstance(entry, dict) else repr(entry)


def _log_prob(score: object, place: int) -> float:
    value = score.get("logprob") if isinstance(score, dict) else None
    if not isinstance(value, int | float) or math.isnan(value):
        raise AnswerError(f"token {place} has the log-prob {value}")
    if value > _ROUNDING:
        raise AnswerError(
            f"token {place} has the log-prob {value}, above 0: the server has to run with `--logprobs-mode raw_logprobs`"
        )
    return -math.inf if value <= _ZERO_PROBABILITY else min(float(value), 0.0)
