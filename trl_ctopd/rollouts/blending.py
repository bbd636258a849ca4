"""Several teachers blended for one row: each reads the text in its own tokens, and their log-probs are mixed chunk by chunk.

    L(c) = Σ_k w_k L_k(c),     Σ_k w_k = 1

L_k(c) is teacher k's log-prob of the text of chunk c. The chunks are the smallest stretches of student tokens that are whole chunks
of every teacher: their boundaries are those that all teachers and the student have in common. A chunk's gap is then the weighted mean
of its gaps to the teachers, and so is the text's; its expectation is the weighted mean of the reverse KLs.

Decisions
- Text that takes no part with one teacher takes none: its chunk is dropped. It is counted as masked, as ever.
- What one teacher rules out (log-prob −inf) the mixture rules out; what one cannot score (NaN) takes no part.
- The mixture has as many tokens in a chunk as the teacher with most of them, the first of which has all of L(c): a chunk is 1:1 only
  where it is for every teacher.
- A row with one teacher of weight above 0 is that teacher's row.
- Closed chunks: L_k(c) says that teacher k's last token is closed, so the student's log-prob of it counts the weighted mean of
  log p_close,k (rollouts/closing.py). A student that equals all its teachers then has gap 0 in every chunk.

Left out: arithmetic mixtures; tools; closed chunks of each teacher by itself, which would be exact where tokenizers cut at unlike
places and teachers disagree (docs/blending.md).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from .frames import shares_of
from .pairing import Part, Prompt, Rollout


def weights_of(
    example: Mapping[str, Any], teachers: Iterable[str], default: Mapping[str, float] | None
) -> dict[str, float]:
    """
    The weights, which sum to 1, of the teachers that a dataset row names, the heaviest first: by its column `teacher_weights`
    (weights by name; missing or None: 0), `teachers` (a list of names of equal weight) or `teacher` (one name); `default` for a row
    that has none of them.

    Raises `ValueError` for a row that names none of `teachers`, names another, names some in two columns, or has weights that mean
    nothing.
    """
    columns = ("teacher_weights", "teachers", "teacher")
    given = {name: example[name] for name in columns if example.get(name) is not None}
    if len(given) > 1:
        raise ValueError(f"it names teachers in the columns {' and '.join(given)}: leave one of them")
    known = ", ".join(map(repr, teachers))
    if not given:
        if default is None:
            raise ValueError(
                f"its column `teacher` is None, and the teachers are {known}: give every row one of these, or `teacher_weights` by name"
            )
        given = {"teacher_weights": default}
    [(column, value)] = given.items()
    whose = f"its column `{column}`" if column in example else "`teacher_weights` of the config"
    if column == "teacher_weights" and isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if column != "teacher_weights":
        names = value if column == "teachers" else [value]
        value = {name: names.count(name) for name in names} if isinstance(names, list) else None
    if not isinstance(value, Mapping):
        raise ValueError(f"{whose} is {given[column]!r}: give weights by name, or a list of names")
    found = {name: 0 if weight is None else weight for name, weight in value.items()}
    if other := [name for name in found if name not in teachers]:
        raise ValueError(f"{whose} is {other[0]!r}, and the teachers are {known}: give every row one of these")
    numbers = all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in found.values())
    total = sum(found.values()) if numbers else 0
    if not total > 0:
        raise ValueError(f"{whose} is {dict(found)}: weights are numbers of at least 0, and one above 0")
    return {name: found[name] / total for name in sorted(found, key=lambda name: -found[name]) if found[name]}


def prompts_of(prompt: Prompt) -> dict[str, tuple[float, Prompt]]:
    """By teacher, its weight and the prompt as it reads it. Empty for the row of one teacher."""
    return {
        own.teacher: (
            own.weight,
            replace(prompt, teacher=own.teacher, teacher_ids=own.ids, frame=own.frame, blend=""),
        )
        for own in shares_of(prompt.blend)
    }


def blended(prompt: Prompt, weights: Sequence[float], rollouts: Sequence[Rollout]) -> Rollout:
    """One rollout of the mixture of `rollouts`, which are of one completion and each its teacher's. The first gives what is shown."""
    segments = _segments([rollout.student_chunks for rollout in rollouts])
    student_chunks = np.full(len(segments), -1)
    in_all = np.all([rollout.student_chunks >= 0 for rollout in rollouts], axis=0)
    whole = np.ones(segments.max(initial=-1) + 1, dtype=bool)
    whole[segments[~in_all]] = False
    numbers = np.where(whole, np.cumsum(whole) - 1, -1)
    if len(segments):
        student_chunks = numbers[segments]
    count = int(whole.sum())
    of_tokens = []  # for each teacher, the mixture's chunk of each of its tokens
    for rollout in rollouts:
        of_chunk = np.full(rollout.num_chunks + 1, -1)  # the last for tokens of chunk -1
        inside = rollout.student_chunks >= 0
        of_chunk[rollout.student_chunks[inside]] = student_chunks[inside]
        of_tokens.append(of_chunk[rollout.teacher_chunks])
    sizes = np.max([np.bincount(own[own >= 0], minlength=count) for own in of_tokens], axis=0)
    starts = np.append(0, np.cumsum(sizes))
    parts = tuple(
        Part(weight, rollout, np.where(own >= 0, starts[own.clip(0)], -1), own)
        for weight, rollout, own in zip(weights, rollouts, of_tokens, strict=True)
    )
    return replace(
        rollouts[0],
        prompt=prompt,
        student_chunks=student_chunks,
        teacher_ids=[0] * int(starts[-1]),
        teacher_chunks=np.repeat(np.arange(count), sizes),
        num_chunks=count,
        unread=any(rollout.unread for rollout in rollouts),
        other_ends=(),
        parts=parts,
    )


def _segments(chunkings: Sequence[np.ndarray]) -> np.ndarray:
    """(S,) number of the smallest stretch of student tokens that no chunk of any teacher leads out of."""
    size = len(chunkings[0])
    crossed = np.zeros(size + 1, dtype=np.int64)  # by how many chunks, right before each token
    for chunks in chunkings:
        places = np.flatnonzero(chunks >= 0)
        if not len(places):
            continue
        first, last = np.full(chunks.max() + 1, size), np.full(chunks.max() + 1, -1)
        np.minimum.at(first, chunks[places], places)
        np.maximum.at(last, chunks[places], places)
        there = last >= 0
        np.add.at(crossed, first[there] + 1, 1)
        np.add.at(crossed, last[there] + 1, -1)
    begins = np.cumsum(crossed)[:size] == 0
    return np.cumsum(begins) - 1


def mixed(rollout: Rollout, log_probs: Sequence[torch.Tensor]) -> torch.Tensor:
    """(T,) log-probs in nats of the mixture's tokens, from those (T_k,) of each part's teacher."""
    found = log_probs[0].new_zeros(len(rollout.teacher_ids))
    for part, own in zip(rollout.parts, log_probs, strict=True):
        places = torch.as_tensor(part.places, device=own.device)
        inside = places >= 0
        found = found.index_add(0, places[inside], part.weight * own[: len(places)][inside])
    return found
