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
from itertools import accumulate, chain, compress, islice, pairwise
from typing import Any, NamedTuple

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


@dataclass(frozen=True, eq=False)
class AlignedTokens:
    """One side's N tokens of a completion.

    Attributes:
        ids: the student's as sampled, or the teacher's encoding of the text.
        chunks: (N,) the chunk of each token, -1 = takes no part.
        widths: (N,) bytes of the text that each token covers.
    """

    ids: list[int]
    chunks: np.ndarray
    widths: np.ndarray


@dataclass(frozen=True, eq=False)
class TextAlignment:
    """One completion, read by two tokenizers.

    Attributes:
        text: what the student wrote, U+FFFD for invalid UTF-8; what the teacher reads.
        student, teacher: its tokens on either side.
        num_chunks: how many chunks there are.
        masked: the stretches that no chunk holds, sorted; they may overlap.
    """

    text: str
    student: AlignedTokens
    teacher: AlignedTokens
    num_chunks: int
    masked: list[MaskedStretch]
    _spelled: bytes = field(repr=False)
    _spans: np.ndarray = field(repr=False)  # (C, 2) of each chunk in `_spelled`

    @property
    def student_ids(self) -> list[int]:
        return self.student.ids

    @property
    def teacher_ids(self) -> list[int]:
        return self.teacher.ids

    @cached_property
    def student_chunks(self) -> list[int]:
        """The chunk of each student token, -1 = takes no part."""
        return self.student.chunks.tolist()

    @cached_property
    def teacher_chunks(self) -> list[int]:
        """The chunk of each teacher token, -1 = takes no part."""
        return self.teacher.chunks.tolist()

    @cached_property
    def student_widths(self) -> list[int]:
        """Bytes of the text that each student token covers."""
        return self.student.widths.tolist()

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
        students = _student_readings(completions, self._student)
        teachers = self._teacher_readings([student.text for student in students])
        masked = [
            sorted(student.masked + teacher.masked + _occurrences(self._markup, student.data), key=_place)
            for student, teacher in zip(students, teachers, strict=True)
        ]
        sides = _side(students), _side(teachers)
        chunks = synchronized_chunks(*sides, _integers(len(s.data) for s in students), _stretches(masked))
        spans = np.stack([chunks.start, chunks.end], 1)
        return [
            TextAlignment(
                student.text,
                AlignedTokens(student.ids, np.where(student.silent, -1, student_chunks), student.widths),
                AlignedTokens(teacher.ids, teacher_chunks, teacher.widths),
                num_chunks=len(own_spans),
                masked=stretches,
                _spelled=student.data,
                _spans=own_spans,
            )
            for student, teacher, student_chunks, teacher_chunks, own_spans, stretches in zip(
                students,
                teachers,
                *(
                    np.split(of_side, np.cumsum(side.counts)[:-1])
                    for of_side, side in zip((chunks.student, chunks.teacher), sides, strict=True)
                ),
                np.split(spans, np.searchsorted(chunks.text, np.arange(1, len(students)))),
                masked,
                strict=True,
            )
        ]

    def _teacher_readings(self, texts: Sequence[str]) -> list["_Reading"]:
        tokens = encode_as_text(self._teacher_tokenizer, texts)
        pieces = [self._without_controls(*text) for text in zip(texts, tokens, strict=True)]
        readings = iter(_teacher_readings(list(chain.from_iterable(pieces)), self._teacher))
        return [_joined(list(islice(readings, len(own)))) for own in pieces]

    def _without_controls(self, text: str, tokens: Any) -> list[tuple[str, Any]]:
        """The text in the pieces that must be encoded apart, so that none becomes a control token."""
        controls = self._control_ids.intersection(tokens.ids)
        if not controls:
            return [(text, tokens)]
        cuts = sorted(set().union(*(self._cuts(text, tokens, i) for i in controls)))
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


class _Reading(NamedTuple):
    """A text as one side's tokens cover it: where each token ends in the text's bytes `data`, how many it covers, and
    whether it stands for no text at all (each (N,))."""

    text: str
    data: bytes
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
        np.concatenate([reading.ends for reading in readings]),
        np.concatenate([reading.widths for reading in readings]),
        _integers(len(reading.ids) for reading in readings),
    )


def _joined(pieces: Sequence[_Reading]) -> _Reading:
    """Neighbouring pieces of a text as one."""
    if len(pieces) == 1:
        return pieces[0]
    starts = list(accumulate((len(piece.data) for piece in pieces), initial=0))[:-1]
    return _Reading(
        "".join(piece.text for piece in pieces),
        b"".join(piece.data for piece in pieces),
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


def _place(stretch: MaskedStretch) -> tuple[int, int]:
    return stretch.start, stretch.end


def _read(texts: Sequence[Sequence[int]], table: TokenTable) -> list[tuple[np.ndarray, bytes, np.ndarray]]:
    """For each list of N ids: they themselves (N,), the bytes that they spell, how many each of them does (N,)."""
    counts = [len(ids) for ids in texts]
    ids = np.fromiter(chain.from_iterable(texts), dtype=np.int64, count=sum(counts))
    if ids.min(initial=0) < 0:
        raise ValueError(f"token id {ids.min()} among a completion's ids: strip the padding first")
    spelled, widths = table.read(ids)
    token_at = np.cumsum([0, *counts])
    byte_at = np.concatenate([[0], np.cumsum(widths)])[token_at]
    return [
        (ids[first:last], spelled[start:end], widths[first:last])
        for (first, last), (start, end) in zip(pairwise(token_at.tolist()), pairwise(byte_at.tolist()), strict=True)
    ]


def _without_first_byte(widths: np.ndarray) -> np.ndarray:
    """`widths` with one byte less for the first token that has any."""
    widths = widths.copy()
    widths[np.argmax(widths > 0)] -= 1
    return widths


def _occurrences(strings: list[bytes], data: bytes) -> list[MaskedStretch]:
    """Overlapping ones too: `(?=...)` finds the second `aa` of `aaa`."""
    return [
        MaskedStretch(match.start(), match.start() + len(string), "markup")
        for string in strings
        for match in re.finditer(b"(?=%b)" % re.escape(string), data)
    ]


# --- the student's side


def _student_readings(completions: Sequence[Sequence[int]], table: TokenTable) -> list[_Reading]:
    return [_student_reading(*read, table) for read in _read(completions, table)]


def _student_reading(ids: np.ndarray, written: bytes, widths: np.ndarray, table: TokenTable) -> _Reading:
    silent, masked = widths == 0, []
    if table.prefix_space != "never" and written.startswith(b" "):
        widths, written = _without_first_byte(widths), written[1:]
    ends = np.cumsum(widths)
    if table.word_starts:
        starts = ends - widths
        spaced = (starts > 0) & np.isin(ids, list(table.word_starts))
        written = np.insert(np.frombuffer(written, np.uint8), starts[spaced], ord(" ")).tobytes()
        ends += np.cumsum(spaced)
        masked = [MaskedStretch(at - 1, at, "whitespace") for at in (ends - widths)[spaced].tolist()]
    text, invalid = _decoded(written)
    if not invalid:
        return _Reading(text, written, ids.tolist(), ends, widths, silent, masked)
    starts, ends = _in_text(ends - widths, invalid), _in_text(ends, invalid)
    replaced = _in_text(_integers(start for start, _ in invalid), invalid).tolist()
    masked += [MaskedStretch(start, start + 3, "invalid_utf8") for start in replaced]
    return _Reading(text, text.encode(), ids.tolist(), ends, ends - starts, silent, masked)


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


def _teacher_readings(pieces: Sequence[tuple[str, Any]], table: TokenTable) -> list[_Reading]:
    ids = [tokens.ids for _, tokens in pieces]
    return [
        _teacher_reading(text, tokens, own_ids, *read, table)
        for (text, tokens), own_ids, (_, *read) in zip(pieces, ids, _read(ids, table), strict=True)
    ]


def _teacher_reading(
    text: str, tokens: Any, ids: list[int], spelled: bytes, widths: np.ndarray, table: TokenTable
) -> _Reading:
    data = text.encode()
    silent = np.zeros(len(ids), dtype=bool)
    if spelled != data and _has_prefix_space(spelled, data, table):
        widths, spelled = _without_first_byte(widths), spelled[1:]
    if spelled == data:
        return _Reading(text, data, ids, np.cumsum(widths), widths, silent, [])
    if (offsets := tokens.offsets) is None:
        spans = _spans_by_difference(data, spelled, widths, np.isin(ids, list(table.word_starts)))
    else:
        spans = _byte_spans(data, offsets)
    ends, widths, masked = _by_cells(data, spelled, widths, spans, np.isin(ids, list(table.unknown)))
    return _Reading(text, data, ids, ends, widths, silent, masked)


def _has_prefix_space(spelled: bytes, data: bytes, table: TokenTable) -> bool:
    """Whether the first space of the teacher's tokens is its own doing."""
    if table.prefix_space == "never" or not spelled.startswith(b" "):
        return False
    return spelled[1:] == data or table.prefix_space == "always" or not data.startswith(b" ")


def _byte_spans(data: bytes, offsets: list[tuple[int, int]]) -> np.ndarray:
    """(N, 2) spans of characters as spans of bytes."""
    begins_character = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
    at = np.append(np.flatnonzero(begins_character), len(data))
    return at[_integers(chain.from_iterable(offsets)).reshape(-1, 2)]


def _cells(spans: np.ndarray) -> np.ndarray:
    """The first token of each cell: tokens (N, 2) grouped so that no two cells share a byte. An empty span joins the
    next."""
    starts, ends = spans.T
    apart = np.maximum.accumulate(ends)[:-1] <= np.minimum.accumulate(starts[::-1])[::-1][1:]
    first = np.flatnonzero(np.concatenate([[True], apart]))
    empty = np.minimum.reduceat(starts, first) == np.maximum.reduceat(ends, first)
    return first[np.concatenate([[True], ~empty[:-1]])]


def _by_cells(
    data: bytes, spelled: bytes, widths: np.ndarray, spans: np.ndarray, unknown: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[MaskedStretch]]:
    """Ends, widths (N,) and masked stretches of tokens that do not spell `data` as a whole.

    A cell whose bytes are the text's, up to the end of its span, is exact; it may begin before its span, since offsets
    leave out the space that `▁` stands for. Any other cell is masked, its last token covering it, and so is the text
    that no exact cell covers.
    """
    if not len(widths):
        return widths, widths, [MaskedStretch(0, len(data), "normalized")]
    first = _cells(spans)
    sizes, end = np.add.reduceat(widths, first), np.maximum.reduceat(spans[:, 1], first)
    done, start = np.append(0, end[:-1]), end - sizes
    unknown = np.logical_or.reduceat(unknown, first)
    shift = start - (np.cumsum(sizes) - sizes)  # from a byte's place in `spelled` to its place in `data`
    place = np.arange(len(spelled)) + np.repeat(shift, sizes)
    is_other = np.frombuffer(data, np.uint8).take(place, mode="clip") != np.frombuffer(spelled, np.uint8)
    others = np.concatenate([[0], np.cumsum(is_other)])[np.cumsum([0, *sizes])]
    exact = ~unknown & (sizes > 0) & (start >= done) & (np.diff(others) == 0)

    cell = np.repeat(np.arange(len(first)), np.diff(first, append=len(widths)))
    ends = np.where(exact[cell], np.cumsum(widths) + shift[cell], done[cell])
    widths = np.where(exact[cell], widths, 0)
    last = np.append(first[1:], len(widths))[~exact] - 1
    ends[last], widths[last] = end[~exact], (end - done)[~exact]

    done, stop = np.append(done, end[-1]), np.append(np.where(exact, start, end), len(data))
    masked = [
        MaskedStretch(int(done[n]), int(stop[n]), "unknown_token" if n < len(first) and unknown[n] else "normalized")
        for n in np.flatnonzero(done < stop)
    ]
    return ends, widths, masked


_DIFF_UNIT = re.compile(rb"[A-Za-z0-9]+|[\xc0-\xff][\x80-\xbf]*|[\x00-\xff]")


def _spans_by_difference(data: bytes, spelled: bytes, widths: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """(N, 2) where in `data` each token's bytes come from, for a tokenizer that gives no offsets: by `difflib`.

    Tokens that touch an altered stretch get the whole of it. Where a WordPiece lost whitespace, a space stands in for
    it while comparing, so that words find their like.
    """
    rows = [spelled[end - width : end] for end, width in zip(np.cumsum(widths).tolist(), widths.tolist(), strict=True)]
    written = [b" " * is_lost + row for row, is_lost in zip(rows, lost.tolist(), strict=True)]
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
    spans = [
        (min(span), max(span)) if row else (low, max(low, high))
        for span, row, low, high in zip(spans, rows, before, after, strict=False)
    ]
    return np.array(spans, dtype=np.int64).reshape(-1, 2)
