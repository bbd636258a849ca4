"""Texts that begin alike: a system message, tools or examples that all prompts of a run have in common are read once."""

from collections.abc import Sequence
from itertools import pairwise


def begin_alike(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many tokens."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def families(texts: Sequence[Sequence[int]], worth: int) -> list[tuple[range, int]]:
    """
    Those of `texts`, in alphabetical order, whose beginnings are worth reading apart, and the length of each beginning.

    Args:
        worth: tokens that a further forward pass costs as much as.

    Returns:
        Places in `texts` and a number of tokens with which these begin alike, each text with one token more at least. Of all ways to cut
        `texts` wherever two neighbours share fewer than some number of tokens, the one that saves most.
    """
    alike = [min(begin_alike(*pair), *(len(text) - 1 for text in pair)) for pair in pairwise(texts)]
    most, found = 0, []
    for least in sorted(set(alike)):
        cuts = [0, *(place for place, shared in enumerate(alike, start=1) if shared < least), len(texts)]
        runs = [(range(*run), min(alike[run[0] : run[1] - 1], default=0)) for run in pairwise(cuts)]
        saved = [(len(run) - 1) * shared - worth for run, shared in runs]
        if (total := sum(tokens for tokens in saved if tokens > 0)) > most:
            most, found = total, [run for run, tokens in zip(runs, saved, strict=True) if tokens > 0]
    return found
