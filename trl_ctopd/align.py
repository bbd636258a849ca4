"""One completion through two tokenizers: the student's own ids, the teacher's ids for the same text, their chunks.

Decisions.
- Student ids are never re-encoded: the sampled ids are the action, and their bytes come from the table. The text is
  those bytes as UTF-8, with U+FFFD where they are invalid; alignment goes on after an invalid stretch.
- Offsets are bytes of `text.encode()`. Where the teacher's tokens spell exactly that, alignment is exact; where its
  normalizer changed the text, the tokenizer's own offsets tell the altered stretch, which is masked.
- A dummy prefix space (SentencePiece's `▁` before the first word) has zero width on both sides. A lone `▁` belongs to
  the chunk that follows. Special tokens among the student's ids take no part.
- Nothing the student writes becomes a control token: special tokens are encoded as plain text, and a literal that the
  teacher's tokenizer would still turn into one is cut after its first character, both parts encoded apart. An id that
  survives even that is left out, and its text masked.
"""

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, compress, pairwise
from typing import Any

import numpy as np

from .alignment import Side, synchronized_chunks
from .token_bytes import TokenTable, token_table


REASONS = ("invalid_utf8", "whitespace", "unknown_token", "normalized", "markup")


@dataclass(frozen=True)
class MaskedStretch:
    """Bytes `start:end` of `text.encode()` that no chunk holds.

    `reason`: "invalid_utf8" (the student wrote it), "whitespace" (lost by the student's WordPiece), "unknown_token"
    (the teacher's vocabulary has none for it), "normalized" (the teacher's tokens do not spell the text as it stands:
    its normalizer changed it, or dropped whitespace), "markup".
    """

    start: int
    end: int
    reason: str


@dataclass(frozen=True)
class TextAlignment:
    """One completion, read by two tokenizers.

    Attributes:
        text: what the student wrote, U+FFFD for invalid UTF-8; what the teacher reads.
        student_ids, teacher_ids: the ids as sampled, and the teacher's encoding of `text`.
        student_chunks, teacher_chunks: the chunk of each token, -1 = takes no part.
        student_widths: bytes of the text that each student token covers.
        num_chunks: how many chunks there are.
        masked: the stretches that no chunk holds, sorted; they may overlap.
    """

    text: str
    student_ids: list[int]
    teacher_ids: list[int]
    student_chunks: list[int]
    teacher_chunks: list[int]
    student_widths: list[int]
    num_chunks: int
    masked: list[MaskedStretch]
    _spelled: bytes = field(repr=False, compare=False)
    _spans: np.ndarray = field(repr=False, compare=False)  # (C, 2) of each chunk in `_spelled`

    @cached_property
    def chunk_bytes(self) -> list[bytes]:
        """The bytes of each chunk, equal on both sides; index = chunk number."""
        return [self._spelled[start:end] for start, end in self._spans.tolist()]


def align_text(student_ids: Sequence[int], student_tokenizer: Any, teacher_tokenizer: Any) -> TextAlignment:
    """`TextAligner` for one completion."""
    return TextAligner(student_tokenizer, teacher_tokenizer)([student_ids])[0]


class TextAligner:
    """Aligns an optimizer step's completions at once: one call to the teacher's tokenizer, one intersection.

    Args:
        student_tokenizer, teacher_tokenizer: read when this is built; tokens added later are not seen.
        masked_strings: every occurrence in a text is masked, for the reason "markup".
        teacher_control_ids: tokens, besides the special ones, that no text may become.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        masked_strings: Sequence[str] = (),
        teacher_control_ids: Collection[int] = (),
    ):
        if "" in masked_strings:
            raise ValueError("masked_strings holds an empty string, which occurs everywhere")
        self._student = token_table(student_tokenizer)
        self._teacher = token_table(teacher_tokenizer)
        self._teacher_tokenizer = teacher_tokenizer
        self._markup = [string.encode() for string in masked_strings]
        self._control_ids = self._teacher.special | frozenset(teacher_control_ids)

    def __call__(self, completions: Sequence[Sequence[int]]) -> list[TextAlignment]:
        """Completions without padding. Ids past the vocabulary (padding rows of an LM head) stand for no text."""
        if not completions:
            return []
        students = [_student_reading(ids, self._student) for ids in completions]
        teachers = self._teacher_readings([student.text for student in students])
        data = [student.text.encode() for student in students]
        masked = [
            sorted(student.masked + teacher.masked + _occurrences(self._markup, bytes_), key=lambda m: (m.start, m.end))
            for student, teacher, bytes_ in zip(students, teachers, data, strict=True)
        ]
        chunks = synchronized_chunks(_side(students), _side(teachers), _integers(map(len, data)), _stretches(masked))
        spans = np.stack([chunks.start, chunks.end], 1)
        of_texts = np.split(spans, np.searchsorted(chunks.text, np.arange(1, len(data))))
        return [
            TextAlignment(
                text=student.text,
                student_ids=student.ids,
                teacher_ids=teacher.ids,
                student_chunks=student_chunks,
                teacher_chunks=teacher_chunks,
                student_widths=student.widths.tolist(),
                num_chunks=len(own_spans),
                masked=stretches,
                _spelled=bytes_,
                _spans=own_spans,
            )
            for student, teacher, student_chunks, teacher_chunks, bytes_, own_spans, stretches in zip(
                students,
                teachers,
                _split(chunks.student, students),
                _split(chunks.teacher, teachers),
                data,
                of_texts,
                masked,
                strict=True,
            )
        ]

    def _teacher_readings(self, texts: Sequence[str]) -> list["_Reading"]:
        readings = []
        for text, tokens in zip(texts, encode_as_text(self._teacher_tokenizer, texts), strict=True):
            pieces = [_teacher_reading(*piece, self._teacher) for piece in self._without_controls(text, tokens)]
            readings.append(pieces[0] if len(pieces) == 1 else _joined(pieces))
        return readings

    def _without_controls(self, text: str, tokens: Any) -> list[tuple[str, Any]]:
        """The text in the pieces that must be encoded apart, so that none becomes a control token."""
        if self._control_ids.isdisjoint(tokens.ids):
            return [(text, tokens)]
        cuts = sorted(set().union(*(self._cuts(text, tokens, i) for i in self._control_ids.intersection(tokens.ids))))
        if not cuts:
            keep = [i not in self._control_ids for i in tokens.ids]
            offsets = tokens.offsets and list(compress(tokens.offsets, keep))
            return [(text, _Tokens(list(compress(tokens.ids, keep)), offsets))]
        parts = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
        encoded = zip(parts, encode_as_text(self._teacher_tokenizer, parts), strict=True)
        return [piece for part, part_tokens in encoded for piece in self._without_controls(part, part_tokens)]

    def _cuts(self, text: str, tokens: Any, control_id: int) -> set[int]:
        """After the first character of every place where the text spells the token, or where the tokenizer found it."""
        literal = self._teacher_tokenizer.convert_ids_to_tokens(control_id)
        starts = {match.start() for match in re.finditer(f"(?={re.escape(literal)})", text)}
        if starts and len(literal) > 1:
            return {start + 1 for start in starts}
        spans = zip(tokens.ids, tokens.offsets or [], strict=False)
        return {start + 1 for i, (start, end) in spans if i == control_id and end - start > 1}


@dataclass(frozen=True)
class _Tokens:
    """As `tokenizers.Encoding` has them: ids and, where the tokenizer knows them, character spans in the text."""

    ids: list[int]
    offsets: list[tuple[int, int]] | None


@dataclass(frozen=True)
class _Reading:
    """A text as one side's tokens cover it: where each token ends in the text's bytes, how many it covers (both (N,)),
    and which tokens take no part whatever they cover.
    """

    text: str
    ids: list[int]
    ends: np.ndarray
    widths: np.ndarray
    silent: np.ndarray
    masked: list[MaskedStretch]


def _integers(values: Any) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _stretches(masked: Sequence[Sequence[MaskedStretch]]) -> np.ndarray:
    """(M, 3) text, start, end."""
    rows = ((row, stretch.start, stretch.end) for row, stretches in enumerate(masked) for stretch in stretches)
    return _integers(chain.from_iterable(rows)).reshape(-1, 3)


def _side(readings: Sequence[_Reading]) -> Side:
    return Side(
        np.concatenate([_integers([]), *(reading.ends for reading in readings)]),
        np.concatenate([_integers([]), *(reading.widths for reading in readings)]),
        _integers(len(reading.ids) for reading in readings),
    )


def _split(chunks: np.ndarray, readings: Sequence[_Reading]) -> list[list[int]]:
    """(N,) of the batch to a list a text."""
    starts = accumulate((len(reading.ids) for reading in readings), initial=0)
    own = (chunks[start : start + len(reading.ids)] for reading, start in zip(readings, starts, strict=False))
    return [
        (np.where(reading.silent, -1, part) if reading.silent.any() else part).tolist()
        for reading, part in zip(readings, own, strict=True)
    ]


def _joined(pieces: Sequence[_Reading]) -> _Reading:
    """Neighbouring pieces of a text as one."""
    starts = list(accumulate((len(piece.text.encode()) for piece in pieces), initial=0))[:-1]
    return _Reading(
        "".join(piece.text for piece in pieces),
        [i for piece in pieces for i in piece.ids],
        np.concatenate([piece.ends + start for piece, start in zip(pieces, starts, strict=True)]),
        np.concatenate([piece.widths for piece in pieces]),
        np.concatenate([piece.silent for piece in pieces]),
        [
            MaskedStretch(m.start + start, m.end + start, m.reason)
            for piece, start in zip(pieces, starts, strict=True)
            for m in piece.masked
        ],
    )


def _occurrences(strings: list[bytes], data: bytes) -> list[MaskedStretch]:
    """Overlapping ones too: `(?=...)` finds the second `aa` of `aaa`."""
    return [
        MaskedStretch(match.start(), match.start() + len(string), "markup")
        for string in strings
        for match in re.finditer(b"(?=%b)" % re.escape(string), data)
    ]


# --- the student's side


def _student_reading(ids: Sequence[int], table: TokenTable) -> _Reading:
    numbers = _integers(ids)
    ids = numbers.tolist()
    if numbers.min(initial=0) < 0:
        raise ValueError(f"token id {numbers.min()} among a completion's ids: strip the padding first")
    (rows, widths), masked = table.read(numbers), []
    silent, covered = widths == 0, widths
    if table.word_starts:
        first = next((n for n, row in enumerate(rows) if row), len(rows))
        spaces = _integers(n > first and i in table.word_starts for n, i in enumerate(ids))
        rows = [b" " * space + row for space, row in zip(spaces.tolist(), rows, strict=True)]
        covered = widths + spaces
        lost = np.cumsum(covered)[spaces > 0] - widths[spaces > 0]
        masked = [MaskedStretch(end - 1, end, "whitespace") for end in lost.tolist()]
    elif table.prefix_space != "never":
        _strip_prefix_space(rows, widths)
    ends = np.cumsum(covered)
    text, invalid = _decoded(b"".join(rows))
    if not invalid:
        return _Reading(text, ids, ends, widths, silent, masked)
    starts, ends = _in_text(ends - widths, invalid), _in_text(ends, invalid)
    replaced = _in_text(_integers(start for start, _ in invalid), invalid).tolist()
    masked += [MaskedStretch(start, start + 3, "invalid_utf8") for start in replaced]
    return _Reading(text, ids, ends, ends - starts, silent, masked)


def _decoded(data: bytes) -> tuple[str, list[tuple[int, int]]]:
    """`data.decode(errors="replace")`, and the bytes `start:end` that each U+FFFD put there stands for."""
    parts, invalid, at = [], [], 0
    while True:
        try:
            return "".join([*parts, data[at:].decode()]), invalid
        except UnicodeDecodeError as error:
            parts.append(data[at : at + error.start].decode() + "\N{REPLACEMENT CHARACTER}")
            invalid.append((at + error.start, at + error.end))
            at += error.end


def _in_text(offsets: np.ndarray, invalid: list[tuple[int, int]]) -> np.ndarray:
    """Offsets in the written bytes as offsets in the text, where 1 to 3 invalid bytes have become the 3 of U+FFFD.

    An offset inside an invalid stretch stays strictly inside it.
    """
    grown = np.cumsum([0, *(3 - (end - start) for start, end in invalid)])
    return offsets + grown[np.searchsorted([end for _, end in invalid], offsets, side="right")]


def _strip_prefix_space(rows: list[bytes], widths: np.ndarray):
    """Takes the space off the front of the first token that spells anything."""
    first = next((n for n, row in enumerate(rows) if row), None)
    if first is not None and rows[first].startswith(b" "):
        rows[first] = rows[first][1:]
        widths[first] -= 1


# --- the teacher's side


def encode_as_text(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    """Each text's `ids` and `offsets`, special tokens spelled out as plain text."""
    if not texts:
        return []
    if hasattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer"):  # mistral-common: never reads control text
        return [_Tokens(tokenizer.encode(text, add_special_tokens=False), None) for text in texts]
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded.encodings or [_Tokens(ids, None) for ids in encoded["input_ids"]]


def _teacher_reading(text: str, tokens: Any, table: TokenTable) -> _Reading:
    data = text.encode()
    rows, widths = table.read(_integers(tokens.ids))
    spelled = b"".join(rows)
    if spelled != data and _has_prefix_space(spelled, data, table):
        _strip_prefix_space(rows, widths)
        spelled = spelled[1:]
    silent = np.zeros(len(rows), dtype=bool)
    if spelled == data:
        return _Reading(text, tokens.ids, np.cumsum(widths), widths, silent, [])
    if tokens.offsets is None:
        spans = _spans_by_difference(data, rows, [i in table.word_starts for i in tokens.ids])
    else:
        at = list(accumulate((len(character.encode()) for character in text), initial=0))
        spans = [(at[start], at[end]) for start, end in tokens.offsets]
    unknown = [i in table.unknown for i in tokens.ids]
    ends, widths, masked = _by_cells(data, rows, spans, unknown)
    return _Reading(text, tokens.ids, ends, widths, silent, masked)


def _has_prefix_space(spelled: bytes, data: bytes, table: TokenTable) -> bool:
    """Whether the first space of the teacher's tokens is its own doing."""
    if table.prefix_space == "never" or not spelled.startswith(b" "):
        return False
    return spelled[1:] == data or table.prefix_space == "always" or not data.startswith(b" ")


def _cells(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Tokens grouped where their spans overlap; a token with an empty span joins the next. Each cell is tokens
    `first:last` that share the text's bytes `start:end` and no byte with any other token."""
    cells: list[tuple[int, int, int, int]] = []
    for token, (start, end) in enumerate(spans):
        first = token
        while cells and (start < cells[-1][3] or cells[-1][2] == cells[-1][3]):
            first, _, start_before, end_before = cells.pop()
            start, end = min(start_before, start), max(end_before, end)
        cells.append((first, token + 1, start, end))
    return cells


def _by_cells(
    data: bytes, rows: Sequence[bytes], spans: Sequence[tuple[int, int]], unknown: Sequence[bool]
) -> tuple[np.ndarray, np.ndarray, list[MaskedStretch]]:
    """Ends, widths (N,) and masked stretches of tokens that do not spell `data` as a whole.

    A cell whose bytes are the text's, up to the end of its span, is exact; it may begin before its span, since offsets
    leave out the space that `▁` stands for. Any other cell is masked, its last token covering it, and so is the text
    that no exact cell covers.
    """
    ends, widths, masked = [0] * len(rows), [0] * len(rows), []
    done = 0
    for first, last, _, end in _cells(spans):
        reason = "unknown_token" if any(unknown[first:last]) else "normalized"
        spelled = rows[first] if last == first + 1 else b"".join(rows[first:last])
        start = end - len(spelled)
        if reason == "normalized" and spelled and start >= done and data.startswith(spelled, start):
            at = start
            for token in range(first, last):
                widths[token] = len(rows[token])
                ends[token] = at = at + widths[token]
        else:
            start = end
            ends[first:last] = [done] * (last - first)
            ends[last - 1], widths[last - 1] = end, end - done
        if done < start:
            masked.append(MaskedStretch(done, start, reason))
        done = end
    if done < len(data):
        masked.append(MaskedStretch(done, len(data), "normalized"))
    return _integers(ends), _integers(widths), masked


_DIFF_UNIT = re.compile(rb"[A-Za-z0-9]+|[\xc0-\xff][\x80-\xbf]*|[\x00-\xff]")


def _spans_by_difference(data: bytes, rows: Sequence[bytes], word_starts: Sequence[bool]) -> list[tuple[int, int]]:
    """Where in `data` each token's bytes come from, for a tokenizer that gives no offsets: by `difflib`.

    Tokens that touch an altered stretch get the whole of it. Where a WordPiece lost whitespace, a space stands in for
    it while comparing, so that words find their like.
    """
    written = [b" " * lost + row for row, lost in zip(rows, word_starts, strict=True)]
    ours, theirs = _DIFF_UNIT.findall(data), _DIFF_UNIT.findall(b"".join(written))
    our_at = list(accumulate(map(len, ours), initial=0))
    their_at = list(accumulate(map(len, theirs), initial=0))
    begin = np.full(their_at[-1] + 1, len(data))  # of a token whose first byte is this one
    end = np.zeros(their_at[-1] + 1, dtype=np.int64)  # of a token whose last byte is the one before
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        (i1, i2), (j1, j2) = (our_at[i1], our_at[i2]), (their_at[j1], their_at[j2])
        begin[j1:j2] = np.arange(i1, i2) if kind == "equal" else i1
        end[j1 + 1 : j2 + 1] = np.arange(i1 + 1, i2 + 1) if kind == "equal" else i2
    ends = accumulate(map(len, written))
    spans = [(int(begin[stop - len(row)]), int(end[stop])) for stop, row in zip(ends, rows, strict=True)]
    # An unknown token has no bytes to compare: it may stand for all that is between its neighbours.
    before = accumulate((stop if row else 0 for (_, stop), row in zip(spans, rows, strict=True)), max, initial=0)
    starts = [start if row else len(data) for (start, _), row in zip(spans, rows, strict=True)]
    after = [*accumulate(reversed(starts), min)][::-1]
    return [
        (min(span), max(span)) if row else (low, max(low, high))
        for span, row, low, high in zip(spans, rows, before, after, strict=False)
    ]
