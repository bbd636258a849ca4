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
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from .altered_text import MaskedStretch, read_altered
from .chunks import Side, bounds, synchronized_chunks
from .token_bytes import TokenTable, token_table


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
        teacher_continues: whether the teacher's tokenizer puts no space of its own before a text, as within a longer one.
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
        # by id, the last for all past the others; a control token may have an id past all those that spell something
        self._is_control = np.isin(np.arange(max(self._control_ids, default=0) + 2), list(self._control_ids))

    @property
    def student_table(self) -> TokenTable:
        return self._student

    @property
    def teacher_table(self) -> TokenTable:
        return self._teacher

    def occurrences(self, data: bytes) -> list[MaskedStretch]:
        """Of the masked strings in a text's bytes."""
        return _occurrences(self._markup, [data])

    def read_run(self, text: str, continues: bool) -> tuple[list[int], np.ndarray, np.ndarray, list[MaskedStretch]]:
        """The teacher's tokens of one text, where they end in its bytes (T,), how many each covers (T,), and what they do not
        spell; `continues`: within a longer text, where no space is put before it."""
        [tokens] = encode_as_text(self._teacher_tokenizer, [text])
        if continues:
            [tokens] = self._continued([tokens])
        pieces = self._without_controls(tokens)
        ids, counts = _flat([piece.ids for piece in pieces])
        reading = _teacher_reading([pieces], ids, counts, self._teacher)
        return reading.ids[0], reading.side.ends, reading.side.widths, reading.masked

    def __call__(self, completions: Sequence[Sequence[int]]) -> list[TextAlignment]:
        """Completions without padding. Ids past the vocabulary (padding rows of an LM head) stand for no text."""
        if not completions:
            return []
        texts, data, student, silent = _student_reading(completions, self._student)
        teacher = self._teacher_reading(texts)
        masked = sorted([*student.masked, *teacher.masked, *_occurrences(self._markup, data)], key=_place)
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

    def _teacher_reading(self, texts: Sequence[str]) -> "_Reading":
        encoded = encode_as_text(self._teacher_tokenizer, texts)
        pieces = [[tokens] for tokens in (self._continued(encoded) if self._continues else encoded)]
        ids, counts = _flat([tokens.ids for [tokens] in pieces])
        is_control = self._is_control[np.minimum(ids, len(self._is_control) - 1)]
        if is_control.any():
            for row in np.unique(np.repeat(np.arange(len(texts)), counts)[is_control]).tolist():
                pieces[row] = self._without_controls(*pieces[row])
            ids, counts = _flat([tokens.ids for text in pieces for tokens in text])
        return _teacher_reading(pieces, ids, counts, self._teacher)

    def _without_controls(self, tokens: "_Tokens") -> list["_Tokens"]:
        """The text encoded in pieces none of which becomes a control token."""
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
        """Texts encoded as the rests of longer ones, without the space that the tokenizer puts before a text: after a character
        that stays a token of its own, which is then left out. As they are where no such character is found."""
        return [
            _Tokens(tokens.text, rest, None) if rest else tokens
            for tokens, rest in zip(
                encoded, continuations(self._teacher_tokenizer, [tokens.text for tokens in encoded]), strict=True
            )
        ]

    def _cuts(self, tokens: "_Tokens", control_id: int) -> set[int]:
        """After the first character of every place where the text spells the token, or where the tokenizer found it."""
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
    """A text's ids and, where the tokenizer knows it, each token's span of characters."""

    text: str
    ids: list[int]
    token_to_chars: Callable[[int], tuple[int, int]] | None


class _Reading(NamedTuple):
    """A batch of texts as one side's tokens cover it: each text's ids, where the tokens end in the bytes of all texts,
    and what this side masks of these."""

    ids: list[list[int]]
    side: Side
    masked: list[MaskedStretch]

    def tokens(self, chunks: np.ndarray) -> list[AlignedTokens]:
        """Each text's, given the chunk of every token (N,)."""
        counts = self.side.counts
        parts = zip(self.ids, _split(chunks, counts), _split(self.side.widths, counts), strict=True)
        return [AlignedTokens(*part) for part in parts]


def _integers(values: Any) -> np.ndarray:
    return np.fromiter(values, dtype=np.int64)


def _lengths(parts: Sequence[Any]) -> np.ndarray:
    return _integers(map(len, parts))


def _by_text(masked: Sequence[MaskedStretch], starts: np.ndarray, bases: np.ndarray) -> list[list[MaskedStretch]]:
    """The batch's stretches as those of each text, which begin at `bases`."""
    texts: list[list[MaskedStretch]] = [[] for _ in bases[1:]]
    rows = np.searchsorted(bases, starts, side="right") - 1
    for stretch, row, base in zip(masked, rows.tolist(), bases[rows].tolist(), strict=True):
        texts[row].append(MaskedStretch(stretch.start - base, stretch.end - base, stretch.reason))
    return texts


def _place(stretch: MaskedStretch) -> tuple[int, int]:
    return stretch.start, stretch.end


def _split(values: Any, counts: np.ndarray) -> list[Any]:
    """`values` of the batch, a part a text."""
    return [values[first:last] for first, last in pairwise(bounds(counts).tolist())]


def _flat(texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All ids (N,), and how many of them are each text's (B,)."""
    counts = _lengths(texts)
    ids = np.fromiter(chain.from_iterable(texts), dtype=np.int64, count=counts.sum())
    if ids.min(initial=0) < 0:
        raise ValueError(f"token id {ids.min()} among a completion's ids: strip the padding first")
    return ids, counts


def _read(ids: np.ndarray, counts: np.ndarray, table: TokenTable) -> tuple[list[bytes], np.ndarray]:
    """What each text's tokens spell, and how many bytes are each token's (N,)."""
    spelled, widths = table.read(ids)
    return _split(spelled, np.diff(bounds(widths)[bounds(counts)])), widths


def _drop_first_byte(spelled: list[bytes], widths: np.ndarray, rows: list[int]) -> None:
    """Of some texts; the first of their tokens with any loses it."""
    starts = bounds(_lengths(spelled))[rows]
    widths[np.searchsorted(np.cumsum(widths), starts, side="right")] -= 1
    for row in rows:
        spelled[row] = spelled[row][1:]


def _occurrences(strings: list[bytes], texts: Sequence[bytes]) -> list[MaskedStretch]:
    """In the bytes of all texts. Overlapping ones too: `(?=...)` finds the second `aa` of `aaa`."""
    return [
        MaskedStretch(base + match.start(), base + match.start() + len(string), "markup")
        for string in strings
        for text, base in zip(texts, bounds(_lengths(texts))[:-1].tolist(), strict=True)
        for match in re.finditer(b"(?=%b)" % re.escape(string), text)
    ]


# --- the student's side


def _student_reading(
    completions: Sequence[Sequence[int]], table: TokenTable
) -> tuple[list[str], list[bytes], _Reading, np.ndarray]:
    """The texts, their bytes, what the tokens cover of them, and which tokens stand for no text at all (N,)."""
    ids, counts = _flat(completions)
    written, widths = _read(ids, counts, table)
    silent, masked = widths == 0, []
    if table.prefix_space != "never":
        _drop_first_byte(written, widths, [row for row, own in enumerate(written) if own.startswith(b" ")])
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
    """`own.decode(errors="replace")` of each text, and the bytes `start:end` of all that each U+FFFD put there stands
    for."""
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
    """Offsets in the written bytes as offsets in the text, where 1 to 3 invalid bytes have become the 3 of U+FFFD.

    An offset inside an invalid stretch stays strictly inside it.
    """
    grown = np.cumsum([0, *(3 - (end - start) for start, end in invalid)])
    return offsets + grown[np.searchsorted([end for _, end in invalid], offsets, side="right")]


# --- the teacher's side


def encode_as_text(tokenizer: Any, texts: Sequence[str]) -> list[_Tokens]:
    """Each text's tokens, special tokens spelled out as plain text."""
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
        tokens.append(_Tokens(text, own.ids, own.token_to_chars if offsets else _asked_later(backend, text)))
    return tokens


def continuations(tokenizer: Any, texts: Sequence[str]) -> list[list[int] | None]:
    """The ids of texts that go on from another one, control strings spelled out: without the space that a tokenizer may put
    before a text. None where they cannot be told, or the tokenizer puts none."""
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
    """`tokenizers.Encoding`s; without `offsets`, which cost a quarter of the time, these know no characters."""
    if backend.truncation is not None:  # setting what is set would be refused while another thread encodes
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True
    return (backend.encode_batch if offsets else backend.encode_batch_fast)(texts, add_special_tokens=False)


def _may_alter(normalizer: Any, text: str) -> bool:
    """Whether it does is seen by the tokens; this only spares to encode twice."""
    kind = type(normalizer).__name__
    if kind == "Sequence":
        return any(_may_alter(part, text) for part in normalizer)
    return not unicodedata.is_normalized("NFC", text) if kind == "NFC" else normalizer is not None


def _asked_later(backend: Any, text: str) -> Callable[[int], tuple[int, int]]:
    encoding = cache(lambda: _encode(backend, [text], offsets=True)[0])
    return lambda token: encoding().token_to_chars(token)


def _teacher_reading(
    pieces: Sequence[Sequence[_Tokens]], ids: np.ndarray, counts: np.ndarray, table: TokenTable
) -> _Reading:
    """Of texts encoded in pieces; `ids` (N,) of all, `counts` of a piece."""
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
    """Whether the first space of the teacher's tokens is its own doing."""
    if table.prefix_space == "never" or not spelled.startswith(b" "):
        return False
    return spelled[1:] == data or table.prefix_space == "always" or not data.startswith(b" ")
