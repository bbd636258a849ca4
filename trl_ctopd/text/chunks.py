"""Two sequences of byte boundaries in, the minimal synchronized chunks out. Integers only: no tokenizer, no text.

A chunk is the interval between neighbouring elements of B_S ∩ B_T, the byte offsets at which a token ends on both
sides (DPCA, arXiv 2606.09456; the paper's dual pointers find the same set one step at a time). The naive equivalent:

    shared = sorted(set(student_ends) & set(teacher_ends))

Decisions.
- A token without width belongs to the chunk that follows it: the log-prob of a lone SentencePiece dummy prefix `▁`
  belongs to the first word. After the last chunk of a text such a token takes no part.
- A boundary strictly inside a masked stretch does not count. A chunk that overlaps a masked stretch takes no part.
- There is no search: one array of marks over the bytes of the whole batch, so time and memory are linear in it.

Letters: B texts with N tokens and L bytes in all, M masked stretches, C chunks that take part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Side:
    """The tokens of a batch of texts on one side, one text after another.

    Attributes:
        ends: (N,) byte offset in the batch at which each token ends; does not decrease within a text.
        widths: (N,) bytes of the text that each token covers, `end - width : end`. Tokens do not overlap. Bytes that no
            token covers must be masked.
        counts: (B,) tokens in each text.
    """

    ends: np.ndarray
    widths: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Chunks:
    """The minimal synchronized chunks of a batch.

    Attributes:
        student, teacher: (N,) chunk of each token, numbered from 0 within its text; -1 = takes no part.
        counts: (B,) chunks in each text.
        start, end: (C,) start and end of each chunk in the bytes of its own text, in order.
    """

    student: np.ndarray
    teacher: np.ndarray
    counts: np.ndarray
    start: np.ndarray
    end: np.ndarray


def synchronized_chunks(
    student: Side, teacher: Side, lengths: np.ndarray, masked: np.ndarray, joined: Sequence[int] = ()
) -> Chunks:
    """The intervals between neighbouring shared boundaries.

    Args:
        student, teacher: the two sides, of the same B texts.
        lengths: (B,) bytes in each text.
        masked: (M, 2) start and end, in the batch's bytes, of each stretch that takes no part. In any order, start < end, none
            crosses from one text into another.
        joined: positions in the batch's bytes, within a text, that are no boundary.
    """
    bases = bounds(lengths)
    shared = _boundaries(student, bases) & _boundaries(teacher, bases)
    stretch_start, stretch_end = masked.T
    shared[runs(stretch_start + 1, stretch_end - stretch_start - 1)] = False
    shared[list(joined)] = False
    shared[bases] = True
    edges = np.flatnonzero(shared)  # interval i of the batch is edges[i]:edges[i + 1]
    begun = np.cumsum(shared)
    begun -= 1  # (L + 1,) the interval that begins at or before each position

    kept = np.ones(len(edges) - 1, dtype=bool)
    kept[begun[stretch_start]] = False  # no edge is left inside a stretch, so one interval holds all of it
    before = bounds(kept)  # chunks before each interval
    first = begun[bases]  # each text's first interval
    counts = np.diff(before[first])
    number = np.full(len(edges), -1)
    number[:-1][kept] = np.arange(before[-1]) - np.repeat(before[first[:-1]], counts)

    base = np.repeat(bases[:-1], counts)
    return Chunks(
        _chunk_of(student, bases, begun, number),
        _chunk_of(teacher, bases, begun, number),
        counts,
        edges[:-1][kept] - base,
        edges[1:][kept] - base,
    )


def bounds(sizes: np.ndarray) -> np.ndarray:
    """(B + 1,) start of each of B consecutive parts, then the end of the last."""
    at = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=at[1:])
    return at


def runs(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """`np.concatenate([np.arange(start, start + size) for start, size in zip(starts, sizes)])`."""
    numbers = np.repeat(starts - bounds(sizes)[:-1], sizes)
    numbers += np.arange(len(numbers))
    return numbers


def _boundaries(side: Side, bases: np.ndarray) -> np.ndarray:
    """(L + 1,) True where a token begins or ends."""
    marks = np.zeros(bases[-1] + 1, dtype=bool)
    marks[side.ends] = marks[side.ends - side.widths] = True
    return marks


def _chunk_of(side: Side, bases: np.ndarray, begun: np.ndarray, number: np.ndarray) -> np.ndarray:
    """(N,) number of the chunk that holds a token's first byte or, for a token without width, its position."""
    start = side.ends - side.widths
    return np.where(start == np.repeat(bases[1:], side.counts), -1, number[begun[start]])
