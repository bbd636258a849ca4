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
        ends: (N,) byte offset in its own text at which each token ends; never falls within a text.
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
        text, start, end: (C,) each chunk's text, and its bytes `start:end` in it; sorted.
    """

    student: np.ndarray
    teacher: np.ndarray
    text: np.ndarray
    start: np.ndarray
    end: np.ndarray


def synchronized_chunks(student: Side, teacher: Side, lengths: np.ndarray, masked: np.ndarray) -> Chunks:
    """The intervals between neighbouring shared boundaries.

    Args:
        student, teacher: the two sides, of the same B texts.
        lengths: (B,) bytes in each text.
        masked: (M, 3) text, start and end in bytes of each stretch that takes no part; start < end, any order.
    """
    bases = np.concatenate([[0], np.cumsum(lengths)])
    stretch_start, stretch_end = bases[masked[:, 0]] + masked[:, 1], bases[masked[:, 0]] + masked[:, 2]

    shared = _boundaries(student, bases) & _boundaries(teacher, bases)
    shared &= ~_covered(stretch_start + 1, stretch_end, bases[-1] + 1)
    shared[bases] = True
    bounds = np.flatnonzero(shared)  # the i-th interval of the batch is bounds[i]:bounds[i + 1]

    masked_bytes = np.concatenate([[0], np.cumsum(_covered(stretch_start, stretch_end, bases[-1]))])
    kept = masked_bytes[bounds[1:]] == masked_bytes[bounds[:-1]]
    start, end = bounds[:-1][kept], bounds[1:][kept]
    text = np.searchsorted(bases, start, side="right") - 1
    first_chunk = np.searchsorted(start, bases[:-1])  # (B,) chunks before each text
    number = np.full(len(bounds), -1)
    number[:-1][kept] = np.arange(len(start)) - first_chunk[text]

    begun = np.cumsum(shared) - 1  # (L + 1,) the interval that begins at or before each position
    return Chunks(
        _chunk_of(student, bases, begun, number),
        _chunk_of(teacher, bases, begun, number),
        text,
        start - bases[text],
        end - bases[text],
    )


def _positions(side: Side, bases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) each token's end in the batch's bytes, (N,) the end of its text there."""
    return np.repeat(bases[:-1], side.counts) + side.ends, np.repeat(bases[1:], side.counts)


def _boundaries(side: Side, bases: np.ndarray) -> np.ndarray:
    """(L + 1,) True where a token begins or ends."""
    end, _ = _positions(side, bases)
    marks = np.zeros(bases[-1] + 1, dtype=bool)
    marks[end] = marks[end - side.widths] = True
    return marks


def _covered(start: np.ndarray, end: np.ndarray, length: int) -> np.ndarray:
    """(length,) True inside any of the intervals start:end."""
    depth = np.zeros(length + 1, dtype=np.int64)
    np.add.at(depth, start, 1)
    np.add.at(depth, np.maximum(start, end), -1)
    return np.cumsum(depth[:-1]) > 0


def _chunk_of(side: Side, bases: np.ndarray, begun: np.ndarray, number: np.ndarray) -> np.ndarray:
    """(N,) number of the chunk that a token's first byte is in or, without width, that begins at it or contains it."""
    end, text_end = _positions(side, bases)
    start = end - side.widths
    return np.where(start == text_end, -1, number[begun[start]])
