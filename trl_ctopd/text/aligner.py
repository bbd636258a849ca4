"""Aligns one completion under two tokenizers: the student's own ids, the teacher's ids for the same text, their chunks.

Decisions.
- Student ids are never re-encoded: the sampled ids are the action, and the token table gives their bytes. The text is
  those bytes as UTF-8, with U+FFFD where they are invalid. Alignment continues after an invalid stretch.
- Offsets are bytes of `text.encode()`. Where the teacher's tokens spell exactly this text, alignment is exact. Where its
  normalizer changed the text, the tokenizer's own offsets locate the altered stretch, which is masked.
- A dummy prefix space (SentencePiece's `▁` before the first word) has zero width on both sides. A lone `▁` belongs to
  the chunk that follows it. Special tokens among the student's ids take no part.
- No text of the student becomes a control token. Special tokens are encoded as plain text. A literal that the teacher's
  tokenizer would still turn into a control token is cut after its first character, and both parts are encoded
  separately. A control id that is left even then is dropped, and its text is masked.
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from .altered_text import MaskedStretch, num_bytes_in, read_altered
from .chunks import Side, bounds, synchronized_chunks
from .token_bytes import TokenTable, token_table


@dataclass(frozen=True, eq=False)  # `__eq__` below: comparing arrays gives no single truth value
class AlignedTokens:
    """The N tokens of a completion on one side.

    Attributes:
        ids: the student's ids as sampled, or the teacher's encoding of the text.
        chunks: (N,) chunk of each token, -1 = takes no part.
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
class TextAlignment:
    """One completion under two tokenizers.

    Attributes:
        text: what the student wrote, with U+FFFD for invalid UTF-8. The teacher reads this text.
        student, teacher: the tokens on each side.
        num_chunks: number of chunks.
        masked: the stretches that belong to no chunk, sorted. They may overlap.
        from_tools: how many of the student's and of the teacher's tokens are results of tools, which count in no figure.
    """

    text: str
    student: AlignedTokens
    teacher: AlignedTokens
    num_chunks: int
    masked: list[MaskedStretch]
    _spelled: bytes = field(repr=False, compare=False)
    _spans: np.ndarray = field(repr=False, compare=False)  # (C, 2): start and end of each chunk in `_spelled`
    _tables: tuple[TokenTable, TokenTable] = field(repr=False, compare=False)  # of the student and of the teacher
    from_tools: tuple[int, int] = (0, 0)

    @property
    def student_ids(self) -> list[int]:
        return self.student.ids

    @property
    def teacher_ids(self) -> list[int]:
        return self.teacher.ids

    @cached_property
    def student_chunks(self) -> list[int]:
        """Chunk of each student token, -1 = takes no part."""
        return self.student.chunks.tolist()

    @cached_property
    def teacher_chunks(self) -> list[int]:
        """Chunk of each teacher token, -1 = takes no part."""
        return self.teacher.chunks.tolist()

    @cached_property
    def student_widths(self) -> list[int]:
        """Bytes of the text that each student token covers."""
        return self.student.widths.tolist()

    @cached_property
    def chunk_bytes(self) -> list[bytes]:
        """Bytes of each chunk, the same on both sides; index = chunk number."""
        return [self._spelled[start:end] for start, end in self._spans.tolist()]

    @property
    def num_bytes(self) -> int:
        """Bytes of the text in which `masked` are places, without the results of tools."""
        return len(self._spelled) - self.num_masked("tool")

    def num_masked(self, *reasons: str) -> int:
        """Bytes of the text that are masked for one of `reasons` at least."""
        return num_bytes_in(own for own in self.masked if own.reason in reasons)


def align_text(student_ids: Sequence[int], student_tokenizer: Any, teacher_tokenizer: Any) -> TextAlignment:
    """Aligns one completion. See [`TextAligner`]."""
    return TextAligner(student_tokenizer, teacher_tokenizer)([student_ids])[0]


class TextAligner:
    """Aligns a batch of completions: one call to the teacher's tokenizer and one set intersection for all of them.

    Args:
        student_tokenizer, teacher_tokenizer: read once, here. Tokens that are added later are not seen.
        masked_strings: every occurrence of one of these in a text is masked, with the reason "markup".
        teacher_control_ids: further teacher ids that no text may become, besides the special tokens.
        teacher_continues: True encodes each text as the continuation of another one: the teacher's tokenizer then puts
            no space of its own before it.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        masked_strings: Sequence[str] = (),
        teacher_control_ids: Collection[int] = (),
        teacher_continues: bool = False,
    ):
        if "" in masked_strings:
            raise ValueError("masked_strings holds an empty string, which occurs everywhere")
        self._student = token_table(student_tokenizer)
        self._teacher = token_table(teacher_tokenizer)
        self._teacher_tokenizer = teacher_tokenizer
        self._continues = teacher_continues and self._teacher.prefix_space != "never"
        self._markup = [string.encode() for string in masked_strings]
        self._control_ids = self._teacher.special | frozenset(teacher_control_ids)
        # (max id + 2,) by id; the last entry is for all larger ids. A control id may be larger than all ids that spell text.
        self._is_control = np.isin(np.arange(max(self._control_ids, default=0) + 2), list(self._control_ids))

    @property
    def student_table(self) -> TokenTable:
        return self._student

    @property
    def teacher_table(self) -> TokenTable:
        return self._teacher

    def occurrences(self, data: bytes) -> list[MaskedStretch]:
        """Where the masked strings occur in the bytes of a text."""
        return occurrences(self._markup, [data])

    def read_run(self, text: str, continues: bool) -> tuple[list[int], np.ndarray, np.ndarray, list[MaskedStretch]]:
        """
        The teacher's tokens for one text: ids, the byte offset at which each ends (T,), the bytes that each covers (T,), and
        the stretches that they do not spell. `continues`: the text continues another one, so no space is put before it.
        """
        [tokens] = encode_as_text(self._teacher_tokenizer, [text])
        if continues:
            [tokens] = self._continued([tokens])
        pieces = self._without_controls(tokens)
        ids, counts = _flat([piece.ids for piece in pieces])
        reading = _teacher_reading([pieces], ids, counts, self._teacher)
        return reading.ids[0], reading.side.ends, reading.side.widths, reading.masked

    def __call__(
        self,
        completions: Sequence[Sequence[int]],
        student_continues: Sequence[bool] | None = None,
        teacher_continues: Sequence[bool] | None = None,
    ) -> list[TextAlignment]:
        """
        One [`TextAlignment`] for each completion, a list of student ids without padding. Ids past the vocabulary (padding rows
        of an LM head) stand for no text. `student_continues`, `teacher_continues`: for each completion, whether that side has it after
        other text, so that a space before it is its own. Raises `ValueError` for a negative id.
        """
        if not completions:
            return []
        texts, data, student, silent = _student_reading(completions, self._student, student_continues)
        teacher = self._teacher_reading(texts, teacher_continues)
        masked = sorted([*student.masked, *teacher.masked, *occurrences(self._markup, data)], key=_place)
        places = _integers(chain.from_iterable(map(_place, masked))).reshape(-1, 2)
        lengths = _lengths(data)
        chunks = synchronized_chunks(student.side, teacher.side, lengths, places)
        chunks.student[silent] = -1
        return [
            TextAlignment(text, ours, theirs, len(spans), stretches, spelled, spans, (self._student, self._teacher))
            for text, ours, theirs, spans, stretches, spelled in zip(
                texts,
                student.tokens(chunks.student),
                teacher.tokens(chunks.teacher),
                _split(np.stack([chunks.start, chunks.end], 1), chunks.counts),
                _by_text(masked, places[:, 0], bounds(lengths)),
                data,
                strict=True,
            )
        ]

    def _teacher_reading(self, texts: Sequence[str], continues: Sequence[bool] | None = None) -> "_Reading":
        encoded = encode_as_text(self._teacher_tokenizer, texts)
        if self._continues:
            encoded = self._continued(encoded)
        elif continues is not None and any(continues) and self._teacher.prefix_space != "never":
            rows = np.flatnonzero(continues).tolist()
            found = dict(zip(rows, self._continued([encoded[row] for row in rows]), strict=True))
            encoded = [found.get(row, tokens) for row, tokens in enumerate(encoded)]
        pieces = [[tokens] for tokens in encoded]
        ids, counts = _flat([tokens.ids for [tokens] in pieces])
        is_control = self._is_control[np.minimum(ids, len(self._is_control) - 1)]
        if is_control.any():
            for row in np.unique(np.repeat(np.arange(len(texts)), counts)[is_control]).tolist():
                pieces[row] = self._without_controls(*pieces[row])
            ids, counts = _flat([tokens.ids for text in pieces for tokens in text])
        return _teacher_reading(pieces, ids, counts, self._teacher)

    def _without_controls(self, tokens: "_Tokens") -> list["_Tokens"]:
        """The tokens of the text, encoded in pieces so that none becomes a control token."""
        text, controls = tokens.text, self._control_ids.intersection(tokens.ids)
        if not controls:
            return [tokens]
        cuts = sorted(set().union(*(self._cuts(tokens, i) for i in controls)))
        if cuts:
            parts = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
            encoded = encode_as_text(self._teacher_tokenizer, parts)
            encoded = [encoded[0], *self._continued(encoded[1:])]
            return [piece for part in encoded for piece in self._without_controls(part)]
        kept = {n: i for n, i in enumerate(tokens.ids) if i not in self._control_ids}
        token_to_chars = tokens.token_to_chars and [tokens.token_to_chars(n) for n in kept].__getitem__
        return [_Tokens(text, list(kept.values()), token_to_chars)]

    def _continued(self, encoded: Sequence["_Tokens"]) -> list["_Tokens"]:
        """
        The same texts encoded as continuations, without the space that the tokenizer puts before a text: each is encoded after
        a guard character that stays a token of its own, and that token is dropped. A text for which no guard works is
        returned as it was.
        """
        return [
            _Tokens(tokens.text, rest, None) if rest else tokens
            for tokens, rest in zip(
                encoded, continuations(self._teacher_tokenizer, [tokens.text for tokens in encoded]), strict=True
            )
        ]

    def _cuts(self, tokens: "_Tokens", control_id: int) -> set[int]:
        """Where to cut: after the first character of each place that spells the control token, or that became it."""
        literal = self._teacher_tokenizer.convert_ids_to_tokens(control_id)
        starts = {match.start() for match in re.finditer(f"(?={re.escape(literal)})", tokens.text)}
        if starts and len(literal) > 1:
            return {start + 1 for start in starts}
        if tokens.token_to_chars is None:
            return set()
        spans = (tokens.token_to_chars(n) for n, i in enumerate(tokens.ids) if i == control_id)
        return {start + 1 for start, end in spans if end - start > 1}


_GUARDS = ("\n", "x", ".", "0", "é")


@dataclass(frozen=True)
class _Tokens:
    """A text's ids and, where the tokenizer gives it, the character span of each token."""

    text: str
    ids: list[int]
    token_to_chars: Callable[[int], tuple[int, int]] | None


class _Reading(NamedTuple):
    """How one side's tokens cover a batch of texts: each text's ids, the tokens' ends and widths in the bytes of all texts,
    and the stretches that this side masks."""

    ids: list[list[int]]
    side: Side
    masked: list[MaskedStretch]

    def tokens(self, chunks: np.ndarray) -> list[AlignedTokens]:
        """The tokens of each text, for the chunks (N,) of all tokens."""
        counts = self.side.counts
        parts = zip(self.ids, _split(chunks, counts), _split(self.side.widths, counts), strict=True)
        return [AlignedTokens(*part) for part in parts]


def _integers(values: Any) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _lengths(parts: Sequence[Any]) -> np.ndarray:
    return _integers(map(len, parts))


def _by_text(masked: Sequence[MaskedStretch], starts: np.ndarray, bases: np.ndarray) -> list[list[MaskedStretch]]:
    """The stretches of each text, in its own offsets. `bases` (B + 1,): where the texts begin in the batch's bytes."""
    texts: list[list[MaskedStretch]] = [[] for _ in bases[1:]]
    rows = np.searchsorted(bases, starts, side="right") - 1
    for stretch, row, base in zip(masked, rows.tolist(), bases[rows].tolist(), strict=True):
        texts[row].append(MaskedStretch(stretch.start - base, stretch.end - base, stretch.reason))
    return texts


def _place(stretch: MaskedStretch) -> tuple[int, int]:
    return stretch.start, stretch.end


def _split(values: Any, counts: np.ndarray) -> list[Any]:
    """`values` of the whole batch, cut into B parts of `counts` (B,) items."""
    return [values[first:last] for first, last in pairwise(bounds(counts).tolist())]


def _flat(texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All ids (N,) and the number of ids in each text (B,). Raises `ValueError` for a negative id."""
    counts = _lengths(texts)
    ids = np.fromiter(chain.from_iterable(texts), dtype=np.int64, count=counts.sum())
    if ids.min(initial=0) < 0:
        raise ValueError(f"token id {ids.min()} among a completion's ids: strip the padding first")
    return ids, counts


def _read(ids: np.ndarray, counts: np.ndarray, table: TokenTable) -> tuple[list[bytes], np.ndarray]:
    """The bytes that each text's tokens spell, and the number of bytes of each token (N,)."""
    spelled, widths = table.read(ids)
    return _split(spelled, np.diff(bounds(widths)[bounds(counts)])), widths


def _drop_first_byte(spelled: list[bytes], widths: np.ndarray, rows: list[int]) -> None:
    """Drops the first byte of the texts `rows`, in place. Their first token that has bytes gets one byte narrower."""
    starts = bounds(_lengths(spelled))[rows]
    widths[np.searchsorted(np.cumsum(widths), starts, side="right")] -= 1
    for row in rows:
        spelled[row] = spelled[row][1:]


def occurrences(strings: list[bytes], texts: Sequence[bytes]) -> list[MaskedStretch]:
    """Where `strings` occur in the bytes of all texts, overlaps included: `(?=...)` finds the second `aa` of `aaa`."""
    return [
        MaskedStretch(base + match.start(), base + match.start() + len(string), "markup")
        for string in strings
        for text, base in zip(texts, bounds(_lengths(texts))[:-1].tolist(), strict=True)
        for match in re.finditer(b"(?=%b)" % re.escape(string), text)
    ]


# --- the student's side


def _student_reading(
    completions: Sequence[Sequence[int]], table: TokenTable, continues: Sequence[bool] | None = None
) -> tuple[list[str], list[bytes], _Reading, np.ndarray]:
    """The texts, their bytes, how the student's tokens cover them, and True for the tokens that stand for no text (N,)."""
    ids, counts = _flat(completions)
    written, widths = _read(ids, counts, table)
    silent, masked = widths == 0, []
    if table.prefix_space != "never":
        begins = [True] * len(written) if continues is None else [not own for own in continues]
        spaced = [row for row, own in enumerate(written) if begins[row] and own.startswith(b" ")]
        _drop_first_byte(written, widths, spaced)
    ends = np.cumsum(widths)
    if table.word_starts:
        starts, bases = ends - widths, bounds(_lengths(written))
        spaced = np.isin(ids, list(table.word_starts)) & (starts > np.repeat(bases[:-1], counts))
        joined = np.insert(np.frombuffer(b"".join(written), np.uint8), starts[spaced], ord(" ")).tobytes()
        written = _split(joined, np.diff(bases + bounds(spaced)[bounds(counts)]))
        ends += np.cumsum(spaced)
        masked = [MaskedStretch(at - 1, at, "whitespace") for at in (ends - widths)[spaced].tolist()]
    texts, invalid = decoded(written)
    if invalid:
        starts, ends = in_text(ends - widths, invalid), in_text(ends, invalid)
        written, widths = [text.encode() for text in texts], ends - starts
        replaced = in_text(_integers(start for start, _ in invalid), invalid).tolist()
        masked += [MaskedStretch(start, start + 3, "invalid_utf8") for start in replaced]
    return texts, written, _Reading(_split(ids.tolist(), counts), Side(ends, widths, counts), masked), silent


def decoded(written: Sequence[bytes]) -> tuple[list[str], list[tuple[int, int]]]:
    """`own.decode(errors="replace")` of each text, and the `start:end` of each invalid stretch that became a U+FFFD, in the
    bytes of all texts."""
    texts, invalid, base = [], [], 0
    for own in written:
        parts, at = [], 0
        while at < len(own):
            try:
                parts.append(own[at:].decode())
                at = len(own)
            except UnicodeDecodeError as error:
                parts.append(own[at : at + error.start].decode() + "\N{REPLACEMENT CHARACTER}")
                invalid.append((base + at + error.start, base + at + error.end))
                at += error.end
        texts.append("".join(parts))
        base += len(own)
    return texts, invalid


def in_text(offsets: np.ndarray, invalid: list[tuple[int, int]]) -> np.ndarray:
    """Offsets in the written bytes, converted to offsets in the text, where 1 to 3 invalid bytes became the 3 of U+FFFD.

    An offset inside an invalid stretch stays strictly inside it.
    """
    grown = np.cumsum([0, *(3 - (end - start) for start, end in invalid)])
    return offsets + grown[np.searchsorted([end for _, end in invalid], offsets, side="right")]


# --- the teacher's side


def encode_as_text(tokenizer: Any, texts: Sequence[str]) -> list[_Tokens]:
    """The tokens of each text, with special tokens encoded as plain text."""
    if not texts:
        return []
    if hasattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer"):  # mistral-common: never reads control text
        return [_Tokens(text, tokenizer.encode(text, add_special_tokens=False), None) for text in texts]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [_Tokens(text, ids, None) for text, ids in zip(texts, encoded["input_ids"], strict=True)]
    normalizer = backend.normalizer
    altered = [_may_alter(normalizer, text) for text in texts]
    encoded = {
        offsets: iter(
            _encode(backend, [text for text, own in zip(texts, altered, strict=True) if own == offsets], offsets)
        )
        for offsets in (True, False)
    }
    tokens = []
    for text, offsets in zip(texts, altered, strict=True):
        own = next(encoded[offsets])
        tokens.append(_Tokens(text, own.ids, own.token_to_chars if offsets else _Offsets(backend, text)))
    return tokens


def continuations(tokenizer: Any, texts: Sequence[str]) -> list[list[int] | None]:
    """The ids of each text as the continuation of another one: without the space that the tokenizer puts before a text, and
    with special tokens encoded as plain text. None where the tokenizer puts no space, or where no guard character works."""
    table, found = token_table(tokenizer), [None] * len(texts)
    if table.prefix_space == "never":
        return found
    for guard in _GUARDS:
        left = [n for n, text in enumerate(texts) if text and found[n] is None]
        alone, *both = encode_as_text(tokenizer, [guard, *(guard + texts[n] for n in left)])
        for n, tokens in zip(left, both, strict=True):
            rest = tokens.ids[len(alone.ids) :]
            if tokens.ids[: len(alone.ids)] == alone.ids and b"".join(table.rows[i] for i in rest) == texts[n].encode():
                found[n] = rest
    return found


def _encode(backend: Any, texts: list[str], offsets: bool) -> list[Any]:
    """`tokenizers.Encoding`s. Without `offsets`, which take a quarter of the time, they give no character spans."""
    if backend.truncation is not None:  # setting it again would raise an error while another thread encodes
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True
    return (backend.encode_batch if offsets else backend.encode_batch_fast)(texts, add_special_tokens=False)


def _may_alter(normalizer: Any, text: str) -> bool:
    """Whether the normalizer may alter the text. Only saves encoding twice: the tokens show whether it did."""
    kind = type(normalizer).__name__
    if kind == "Sequence":
        return any(_may_alter(part, text) for part in normalizer)
    return not unicodedata.is_normalized("NFC", text) if kind == "NFC" else normalizer is not None


class _Offsets:
    """The character span of each token of a text that was encoded without offsets. Asked for the first, it encodes the text again."""

    __slots__ = ("_backend", "_encoding", "_text")

    def __init__(self, backend: Any, text: str):
        self._backend, self._text, self._encoding = backend, text, None

    def __call__(self, token: int) -> tuple[int, int]:
        if self._encoding is None:
            [self._encoding] = _encode(self._backend, [self._text], offsets=True)
        return self._encoding.token_to_chars(token)


def _teacher_reading(
    pieces: Sequence[Sequence[_Tokens]], ids: np.ndarray, counts: np.ndarray, table: TokenTable
) -> _Reading:
    """The teacher's reading of texts encoded in pieces; `ids` (N,) of all pieces, `counts` (pieces,) ids in each."""
    flat = [piece for text in pieces for piece in text]
    data = [piece.text.encode() for piece in flat]
    spelled, widths = _read(ids, counts, table)
    altered = [row for row, own in enumerate(data) if spelled[row] != own]
    _drop_first_byte(spelled, widths, [row for row in altered if _has_prefix_space(spelled[row], data[row], table)])
    altered = [row for row in altered if spelled[row] != data[row]]
    ends, masked = np.cumsum(widths), []
    if altered:
        bases = bounds(_lengths(data))
        ends += np.repeat((bases - bounds(_lengths(spelled)))[:-1], counts)
        masked = [MaskedStretch(*bases[row : row + 2].tolist(), "normalized") for row in altered if not counts[row]]
    if altered := [row for row in altered if counts[row]]:
        own = np.repeat(np.isin(np.arange(len(flat)), altered), counts)
        ends[own], widths[own], found = read_altered(
            b"".join(data),
            np.stack([bases[:-1], bases[1:]], 1)[altered],
            [spelled[row] for row in altered],
            ids[own],
            widths[own],
            counts[altered],
            table,
            [flat[row].token_to_chars for row in altered],
        )
        masked += found
    read = [text[0].ids if len(text) == 1 else [i for piece in text for i in piece.ids] for text in pieces]
    return _Reading(read, Side(ends, widths, _lengths(read)), masked)


def _has_prefix_space(spelled: bytes, data: bytes, table: TokenTable) -> bool:
    """Whether the first space of the teacher's tokens was put there by the tokenizer."""
    if table.prefix_space == "never" or not spelled.startswith(b" "):
        return False
    return spelled[1:] == data or table.prefix_space == "always" or not data.startswith(b" ")
