"""Cuts a text into segments for display, each with its tokens on both sides, in the order of the text."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from ...text.aligner import TextAlignment
from ...text.altered_text import REASONS
from .visible import graphemes, is_rtl, num_bytes


WHY = {  # a short label for below the stretch, and a sentence
    "invalid_utf8": ("not UTF-8", "these bytes are no UTF-8 text; the teacher reads U+FFFD in their place"),
    "whitespace": ("lost space", "the student's tokenizer does not keep this whitespace"),
    "unknown_token": ("unknown", "the teacher's vocabulary has no token for this"),
    "normalized": ("altered", "the teacher's tokenizer alters this text before it reads it"),
    "markup": ("markup", "chat markup without an equivalent on the other side"),
    "thought": ("thought", "the teacher's template has no place for a thought"),
    "call": ("call", "the teacher's template has no place for this call of a tool, or writes it otherwise"),
    "tool": ("tool", "what a tool returned, with the template's markup around it: the student did not write it"),
    "teacher_context": ("too long", "prompt and completion are longer than the teacher's context"),
    "left_out": (
        "left out",
        "the run did not compare this: a gate or an early stop left it out, the text was cut off here, or it is too long for the teacher",
    ),
    "no_text": ("no text", "these tokens stand for no text"),
    "no_part": ("no part", "these tokens have no counterpart"),
}
_ORDER = {reason: place for place, reason in enumerate((*REASONS, "tool", "teacher_context", "left_out"))}


@dataclass(frozen=True)
class Segment:
    """
    A chunk, or a stretch between two chunks that takes no part.

    Attributes:
        start, end: its bytes in the text.
        chunk: its number, -1 for a stretch that takes no part.
        student, teacher: positions of its tokens on each side.
        reasons: why it takes no part, keys of `WHY`.
    """

    start: int
    end: int
    chunk: int
    student: list[int]
    teacher: list[int]
    reasons: tuple[str, ...] = ()

    @property
    def one_to_one(self) -> bool:
        return self.chunk >= 0 and len(self.student) == len(self.teacher) == 1


@dataclass(frozen=True)
class Group:
    """Neighbouring segments that begin and end at grapheme boundaries, so that they can be shown as one piece of text."""

    data: bytes
    segments: list[Segment]


@dataclass(frozen=True)
class Line:
    """Groups up to a line break. `rtl`: read from right to left."""

    groups: list[Group]
    rtl: bool


def lines(alignment: TextAlignment) -> list[Line]:
    """The lines of the text, each group with its segments."""
    found, groups = [], []
    for group in _groups(alignment):
        groups.append(group)
        if group.data.endswith(b"\n"):
            found.append(groups)
            groups = []
    found += [groups] if groups else []
    return [Line(own, is_rtl(b"".join(g.data for g in own).decode("utf-8", "replace"))) for own in found]


def _groups(alignment: TextAlignment) -> Iterator[Group]:
    data = alignment._spelled
    borders = {0, *accumulate(map(num_bytes, graphemes(data)))}
    held: list[Segment] = []
    for segment in segments(alignment):
        held.append(segment)
        if segment.end in borders:
            yield Group(data[held[0].start : segment.end], held)
            held = []


def segments(alignment: TextAlignment) -> list[Segment]:
    """Segments that hold every byte of the text and every token of both sides once. A token without text between two segments
    gets one of its own."""
    spans = [(start, end, chunk) for chunk, (start, end) in enumerate(alignment._spans.tolist())]
    pieces, at = [], 0
    for start, end, chunk in [*spans, (len(alignment._spelled), 0, None)]:
        if at < start:
            pieces.append((at, start, -1))
        if chunk is not None:
            pieces.append((start, end, chunk))
            at = end
    tokens: list[tuple[list[int], list[int]]] = [([], []) for _ in pieces]
    between: list[tuple[list[int], list[int]]] = [([], []) for _ in range(len(pieces) + 1)]  # before each piece
    of_chunk = {chunk: place for place, (_, _, chunk) in enumerate(pieces)}
    for side, chunks in enumerate((alignment.student_chunks, alignment.teacher_chunks)):
        placed = [of_chunk[chunk] if chunk >= 0 else None for chunk in chunks]
        before = [-1, *accumulate((-1 if place is None else place for place in placed), max)]
        after = [*accumulate((len(pieces) if place is None else place for place in reversed(placed)), min)][::-1]
        for token, (low, high) in enumerate(zip(before, after, strict=False)):
            if placed[token] is not None:
                tokens[placed[token]][side].append(token)
            elif low == high:  # inside a chunk
                tokens[low][side].append(token)
            else:
                gap = next((place for place in range(low + 1, high) if pieces[place][2] < 0), None)
                (between[high] if gap is None else tokens[gap])[side].append(token)
    found = []
    for place, silent in enumerate(between):
        if any(silent):
            at = pieces[place][0] if place < len(pieces) else len(alignment._spelled)
            found.append(Segment(at, at, -1, *silent, reasons=("no_text",)))
        if place < len(pieces):
            found += _split(alignment, Segment(*pieces[place], *tokens[place]))
    return found


def _split(alignment: TextAlignment, segment: Segment) -> Iterator[Segment]:
    """Splits a stretch that takes no part by reason, where both sides cut it. If the teacher reads none of it, each student token is a
    segment."""
    if segment.chunk >= 0:
        yield segment
        return
    ends, theirs = (
        [*accumulate((int(side.widths[token]) for token in tokens), initial=segment.start)]
        for side, tokens in ((alignment.student, segment.student), (alignment.teacher, segment.teacher))
    )
    parts = [(segment.start, segment.end, segment.student, segment.teacher)]
    if ends[-1] == segment.end and not segment.teacher:
        parts = [(ends[n], ends[n + 1], [token], []) for n, token in enumerate(segment.student)]
    elif ends[-1] == theirs[-1] == segment.end > segment.start:
        cuts = sorted({*ends} & {*theirs})
        sides = (_dealt(segment.student, ends, cuts), _dealt(segment.teacher, theirs, cuts))
        parts = [*zip(cuts, cuts[1:], *sides, strict=False)]
    for start, end, student, teacher in parts:
        yield Segment(start, end, -1, student, teacher, _reasons(alignment, start, end))


def _dealt(tokens: list[int], starts: list[int], cuts: list[int]) -> list[list[int]]:
    """The tokens that begin between each two of `cuts`; those that begin at the end belong to the last."""
    dealt: list[list[int]] = [[] for _ in cuts[1:]]
    for token, start in zip(tokens, starts, strict=False):
        dealt[min(bisect_right(cuts, start), len(dealt)) - 1].append(token)
    return dealt


def _reasons(alignment: TextAlignment, start: int, end: int) -> tuple[str, ...]:
    found = {m.reason for m in alignment.masked if m.start < end and start < m.end}
    return tuple(sorted(found, key=_ORDER.__getitem__)) or (("no_text",) if start == end else ("no_part",))


def token_data(alignment: TextAlignment, side: int, token: int) -> tuple[bytes, str]:
    """The bytes that a token stands for, and its name if it stands for none. `side`: 0 student, 1 teacher."""
    table, i = alignment._tables[side], (alignment.student_ids, alignment.teacher_ids)[side][token]
    row = table.rows[i] if i < len(table.rows) else b""
    return row, "" if row else table.names.get(i, f"id {i}")


def figures(alignments: Iterable[TextAlignment]) -> dict:
    """
    How much two tokenizers differ over some texts. Results of tools, which nobody wrote or is scored on, count in nothing.

    Returns:
        Counts of `texts`, `bytes`, `student_tokens`, `teacher_tokens`, `chunks`, `one_to_one_chunks`; `coverage`, the share
        of bytes inside chunks; `one_to_one_fraction`, the share of all student tokens in a chunk of one token on each side;
        `student_tokens_per_chunk`, `teacher_tokens_per_chunk`; `masked_bytes` by reason. A share with nothing to divide by is
        None.
    """
    names = ("texts", "bytes", "student_tokens", "teacher_tokens", "chunks", "one_to_one_chunks")
    counts, inside, covered, masked = dict.fromkeys(names, 0), [0, 0], 0, {}
    for alignment in alignments:
        sides = [side.chunks[side.chunks >= 0] for side in (alignment.student, alignment.teacher)]
        sizes = [np.bincount(chunks, minlength=alignment.num_chunks) for chunks in sides]
        counts["texts"] += 1
        counts["bytes"] += alignment.num_bytes
        counts["student_tokens"] += len(alignment.student_ids) - alignment.from_tools[0]
        counts["teacher_tokens"] += len(alignment.teacher_ids) - alignment.from_tools[1]
        counts["chunks"] += alignment.num_chunks
        counts["one_to_one_chunks"] += int(((sizes[0] == 1) & (sizes[1] == 1)).sum())
        covered += int((alignment._spans[:, 1] - alignment._spans[:, 0]).sum())
        inside = [count + len(chunks) for count, chunks in zip(inside, sides, strict=True)]
        for reason in dict.fromkeys(stretch.reason for stretch in alignment.masked):
            masked[reason] = masked.get(reason, 0) + alignment.num_masked(reason)
    return {
        **counts,
        "coverage": _share(covered, counts["bytes"]),
        "one_to_one_fraction": _share(counts["one_to_one_chunks"], counts["student_tokens"]),
        "student_tokens_per_chunk": _share(inside[0], counts["chunks"]),
        "teacher_tokens_per_chunk": _share(inside[1], counts["chunks"]),
        "masked_bytes": masked,
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
