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

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from .alignment import Side, synchronized_chunks
from .altered_text import MaskedStretch, read_by_cells, spans_by_asking, spans_by_difference
from .token_bytes import TokenTable, token_table
from .viewer.shown import Shown


@dataclass(frozen=True, eq=False)  # a comparison of its own, since arrays have none that is one answer
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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AlignedTokens):
            return NotImplemented
        arrays = zip((self.chunks, self.widths), (other.chunks, other.widths), strict=True)
        return self.ids == other.ids and all(np.array_equal(*pair) for pair in arrays)


@dataclass(frozen=True)
class TextAlignment(Shown):
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
    _spelled: bytes = field(repr=False, compare=False)
    _spans: np.ndarray = field(repr=False, compare=False)  # (C, 2) of each chunk in `_spelled`
    _tables: tuple[TokenTable, TokenTable] = field(repr=False, compare=False)  # what each side's ids stand for

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
        # by id, the last for all past the others; a control token may have an id past all those that spell something
        self._is_control = np.isin(np.arange(max(self._control_ids, default=0) + 2), list(self._control_ids))

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
                _tables=(self._student, self._teacher),
            )
            for student, teacher, student_chunks, teacher_chunks, own_spans, stretches in zip(
                students,
                teachers,
                _split(chunks.student, sides[0].counts),
                _split(chunks.teacher, sides[1].counts),
                _split(spans, np.bincount(chunks.text, minlength=len(students))),
                masked,
                strict=True,
            )
        ]

    def _teacher_readings(self, texts: Sequence[str]) -> list["_Reading"]:
        tokens = encode_as_text(self._teacher_tokenizer, texts)
        read = _read([own.ids for own in tokens], self._teacher)
        return [
            self._without_controls(text, own)
            if self._is_control[np.minimum(ids, len(self._is_control) - 1)].any()
            else _teacher_reading(text, own, *spelled, self._teacher)
            for text, own, (ids, *spelled) in zip(texts, tokens, read, strict=True)
        ]

    def _without_controls(self, text: str, tokens: Any) -> "_Reading":
        """Encodes anew, cut in pieces none of which becomes a control token."""
        cuts = sorted(set().union(*(self._cuts(text, tokens, i) for i in self._control_ids.intersection(tokens.ids))))
        if cuts:
            return _joined(self._teacher_readings([text[a:b] for a, b in pairwise([0, *cuts, len(text)])]))
        kept = {n: i for n, i in enumerate(tokens.ids) if i not in self._control_ids}
        token_to_chars = tokens.token_to_chars and [tokens.token_to_chars(n) for n in kept].__getitem__
        tokens = _Tokens(list(kept.values()), token_to_chars)
        [(_, *spelled)] = _read([tokens.ids], self._teacher)
        return _teacher_reading(text, tokens, *spelled, self._teacher)

    def _cuts(self, text: str, tokens: Any, control_id: int) -> set[int]:
        """After the first character of every place where the text spells the token, or where the tokenizer found it."""
        literal = self._teacher_tokenizer.convert_ids_to_tokens(control_id)
        starts = {match.start() for match in re.finditer(f"(?={re.escape(literal)})", text)}
        if starts and len(literal) > 1:
            return {start + 1 for start in starts}
        if tokens.token_to_chars is None:
            return set()
        spans = (tokens.token_to_chars(n) for n, i in enumerate(tokens.ids) if i == control_id)
        return {start + 1 for start, end in spans if end - start > 1}


@dataclass(frozen=True)
class _Tokens:
    """As `tokenizers.Encoding` has them: ids and, where the tokenizer knows it, each token's span of characters."""

    ids: list[int]
    token_to_chars: Callable[[int], tuple[int, int]] | None = None


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


def _split(values: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """`values` of the batch, a part a text."""
    return [values[first:last] for first, last in pairwise(np.append(0, np.cumsum(counts)).tolist())]


def _read(texts: Sequence[Sequence[int]], table: TokenTable) -> list[tuple[np.ndarray, bytes, np.ndarray, np.ndarray]]:
    """For each list of N ids: they themselves (N,), the bytes that they spell, and how many of those are each token's
    and up to its end (N,)."""
    counts = [len(ids) for ids in texts]
    ids = np.fromiter(chain.from_iterable(texts), dtype=np.int64, count=sum(counts))
    if ids.min(initial=0) < 0:
        raise ValueError(f"token id {ids.min()} among a completion's ids: strip the padding first")
    spelled, widths = table.read(ids)
    ends = np.cumsum(widths)
    before = np.append(0, ends)[np.append(0, np.cumsum(counts))]  # (B + 1,) bytes before each text
    ends -= np.repeat(before[:-1], counts)
    parts = [spelled[start:stop] for start, stop in pairwise(before.tolist())]
    return list(zip(_split(ids, counts), parts, _split(widths, counts), _split(ends, counts), strict=True))


def _without_first_byte(spelled: bytes, widths: np.ndarray, ends: np.ndarray) -> tuple[bytes, np.ndarray, np.ndarray]:
    """What tokens spell but for the first byte, which the first of them with any loses."""
    return spelled[1:], np.where(ends == widths, np.maximum(widths - 1, 0), widths), np.maximum(ends - 1, 0)


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


def _student_reading(
    ids: np.ndarray, written: bytes, widths: np.ndarray, ends: np.ndarray, table: TokenTable
) -> _Reading:
    silent, masked = widths == 0, []
    if table.prefix_space != "never" and written.startswith(b" "):
        written, widths, ends = _without_first_byte(written, widths, ends)
    if table.word_starts:
        starts = ends - widths
        spaced = (starts > 0) & np.isin(ids, list(table.word_starts))
        written = np.insert(np.frombuffer(written, np.uint8), starts[spaced], ord(" ")).tobytes()
        ends = ends + np.cumsum(spaced)
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
    """Each text's tokens, special tokens spelled out as plain text."""
    if not texts:
        return []
    if hasattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer"):  # mistral-common: never reads control text
        return [_Tokens(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded.encodings or [_Tokens(ids) for ids in encoded["input_ids"]]


def _teacher_reading(
    text: str, tokens: Any, spelled: bytes, widths: np.ndarray, ends: np.ndarray, table: TokenTable
) -> _Reading:
    data, ids, masked = text.encode(), tokens.ids, []
    if spelled != data and _has_prefix_space(spelled, data, table):
        spelled, widths, ends = _without_first_byte(spelled, widths, ends)
    if not ids and data:
        masked = [MaskedStretch(0, len(data), "normalized")]
    elif spelled != data:
        if tokens.token_to_chars is None:
            spans = spans_by_difference(data, spelled, widths, np.isin(ids, list(table.word_starts)))
        else:
            spans = spans_by_asking(data, spelled, widths, ends, tokens.token_to_chars)
        ends, widths, masked = read_by_cells(data, spelled, widths, spans, np.isin(ids, list(table.unknown)))
    return _Reading(text, data, ids, ends, widths, np.zeros(len(ids), dtype=bool), masked)


def _has_prefix_space(spelled: bytes, data: bytes, table: TokenTable) -> bool:
    """Whether the first space of the teacher's tokens is its own doing."""
    if table.prefix_space == "never" or not spelled.startswith(b" "):
        return False
    return spelled[1:] == data or table.prefix_space == "always" or not data.startswith(b" ")


if __name__ == "__main__":  # python -m trl_ctopd.align
    from .viewer.cli import main

    main()
