"""Two sequences of byte boundaries in, the minimal synchronized chunks out. Integers only: no tokenizer, no text.

A chunk is the interval between neighbouring elements of B_S ∩ B_T, the byte offsets at which a token ends on both
sides (DPCA, arXiv 2606.09456; the paper's dual pointers find the same set one step at a time). The naive equivalent:

    shared = sorted(set(student_ends) & set(teacher_ends))

Decisions.
- A token without width belongs to the chunk that follows it: a lone SentencePiece dummy prefix `▁` is part of what its
  model pays for the first word. After the last chunk of a text it takes no part.
- A boundary strictly inside a masked stretch is none, and a chunk that a stretch overlaps takes no part.
- Nothing is searched: one array of marks over the bytes of the whole batch, so time and memory are linear in it.

Letters: B texts, N tokens and L bytes of all texts together, M masked stretches, C chunks that take part.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Side:
    """One tokenizer's view of a batch of texts, the tokens of all texts one after the other.

    Attributes:
        ends: (N,) byte offset in the batch's bytes at which each token ends; never falls within a text.
        widths: (N,) bytes of the text that each token covers, `end - width : end`. Tokens do not overlap; bytes that no
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
        student, teacher: (N,) the chunk of each token, numbered from 0 within its text; -1 = takes no part.
        counts: (B,) chunks in each text.
        start, end: (C,) the bytes `start:end` of each chunk in its own text; sorted within it.
    """

    student: np.ndarray
    teacher: np.ndarray
    counts: np.ndarray
    start: np.ndarray
    end: np.ndarray


def synchronized_chunks(student: Side, teacher: Side, lengths: np.ndarray, masked: np.ndarray) -> Chunks:
    """The intervals between neighbouring shared boundaries.

    Args:
        student, teacher: the two sides, of the same B texts.
        lengths: (B,) bytes in each text.
        masked: (M, 2) start and end, in the batch's bytes, of each stretch that takes no part; start < end, none across
            two texts, any order.
    """
    bases = bounds(lengths)
    shared = _boundaries(student, bases) & _boundaries(teacher, bases)
    stretch_start, stretch_end = masked.T
    shared[runs(stretch_start + 1, stretch_end - stretch_start - 1)] = False
    shared[bases] = True
    edges = np.flatnonzero(shared)  # the i-th interval of the batch is edges[i]:edges[i + 1]
    begun = np.cumsum(shared)
    begun -= 1  # (L + 1,) the interval that begins at or before each position

    kept = np.ones(len(edges) - 1, dtype=bool)
    kept[begun[stretch_start]] = False  # no edge is left within a stretch: one interval holds all of it
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
    """(B + 1,) where each of B neighbours begins, and where the last one ends."""
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
    """(N,) number of the chunk that a token's first byte is in or, without width, that begins at it or contains it."""
    start = side.ends - side.widths
    return np.where(start == np.repeat(bases[1:], side.counts), -1, number[begun[start]])
