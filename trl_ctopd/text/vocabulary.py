"""What two vocabularies have in common, by bytes. Built once for a pair of tokenizers, outside of the training steps.

Decisions.
- Tokens are compared by their bytes: `Ġthe`, `▁the` and ` the` are one token. Several ids that spell the same bytes (a
  byte row `<0x41>` and `A`) are one outcome, and their probabilities add up.
- The end of a turn is one outcome: all stop ids of a side together. It is shared where both sides have stop ids.
- Special tokens, padding rows of an LM head and unknown tokens stand for no text and are not shared.
- Each structure is built on first use, with dictionaries and binary search over sorted bytes, and cached on disk under a
  hash of both tokenizers.

Letters: V_S and V_T are the rows of the two LM heads, C the shared outcomes, n the positions that a loss reads.
"""

import hashlib
import json
import os
import tempfile
import zipfile
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from .aligner import encode_as_text
from .continuations import Continuations, Merges, later_digits_undo
from .one_tokenizer import is_one_tokenizer
from .token_bytes import token_bytes, token_table
from .turns import MarkupBeside


CACHE_DIR = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "trl_ctopd"
SPELLED_BYTES = 32  # longer tokens are cut to this
PROJECTED_TOKENS = 4
_FORMAT = "1"  # of the cache files


@dataclass(frozen=True)
class _Structure:
    def to(self, device: torch.device | str) -> Self:
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Shared(_Structure):
    """
    The outcomes that both vocabularies have.

    Attributes:
        student_ids, teacher_ids (C,): the smallest id of each outcome.
        student_class, teacher_class (V_S,), (V_T,): outcome of each id, -1 for none.
        student_repeated, teacher_repeated (D,): the outcomes that several ids stand for.
        student_members, teacher_members (D, M): the ids of these outcomes, filled up with -1.
        student_rest, teacher_rest (U,): the ids that stand for no shared outcome.
    """

    student_ids: torch.Tensor
    teacher_ids: torch.Tensor
    student_class: torch.Tensor
    teacher_class: torch.Tensor
    student_repeated: torch.Tensor
    teacher_repeated: torch.Tensor
    student_members: torch.Tensor
    teacher_members: torch.Tensor
    student_rest: torch.Tensor
    teacher_rest: torch.Tensor

    def student_log_probs(self, full: torch.Tensor) -> torch.Tensor:
        """Log-probs of the student's tokens (n, V_S) to log-probs of the shared outcomes (n, C)."""
        return _outcome_log_probs(full, self.student_ids, self.student_repeated, self.student_members)

    def teacher_log_probs(self, full: torch.Tensor) -> torch.Tensor:
        """Log-probs of the teacher's tokens (n, V_T) to log-probs of the shared outcomes (n, C)."""
        return _outcome_log_probs(full, self.teacher_ids, self.teacher_repeated, self.teacher_members)


def _outcome_log_probs(full, ids, repeated, members):
    found = full[:, ids]
    if not len(repeated):
        return found
    spelled = full[:, members.clamp(min=0)].masked_fill(members < 0, -torch.inf)  # (n, D, M)
    return found.index_copy(1, repeated, spelled.logsumexp(-1))


@dataclass(frozen=True)
class Prefixes(_Structure):
    """
    How the student writes each teacher token, from every byte position inside it.

    Outcomes are student ids: the smallest id of those that spell the same bytes, one id for all stop ids, and V_S for
    everything else. An *entry* belongs to a teacher token w and a byte position k in it: `w[:k]` is written, and `w[k:]` is
    still to be written.

    Attributes:
        student_outcome (V_S,): outcome of each student id.
        first_outcome (V_T,): outcome for each teacher id at k = 0.
        start, length (V_T,): index of each teacher token's first entry, and the number of its entries; length 0 = no text.
        outcome (E,): the longest student token that `w[k:]` begins with.
        place (V_T,): rank of each teacher token in the order of their bytes. Tokens without text come last.
        low, high (E,): `low:high` are the ranks of the teacher tokens that begin with `w[:k]` and are longer.
        head (E,): the smallest teacher id that spells `w[:k]`, -1 for none.
        longer_low, longer_high (V_T,): ranks of the teacher tokens that begin with this token and are longer.
        alike (V_T, M): the teacher ids that spell the same as this token, itself included, filled up with -1.
        order (W_S,): the student's text tokens in the order of their bytes.
        completing_low, completing_high (E,): the slice of `order` whose tokens begin with `w[k:]`.
    """

    student_outcome: torch.Tensor
    first_outcome: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    outcome: torch.Tensor
    place: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    order: torch.Tensor
    completing_low: torch.Tensor
    completing_high: torch.Tensor
    head: torch.Tensor
    longer_low: torch.Tensor
    longer_high: torch.Tensor
    alike: torch.Tensor

    def going_on(self, teacher_ids: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        """(n, V_T) True for the teacher tokens that are possible at each of n positions, where the first `written` (n,) bytes of
        token `teacher_ids` (n,) are written. Where `written` is 0, every token is."""
        entry = (self.start[teacher_ids] + written).clamp(max=len(self.low) - 1)
        first = written == 0
        low = self.low[entry].masked_fill(first, 0)[:, None]
        high = self.high[entry].masked_fill(first, len(self.place))[:, None]
        return (self.place >= low) & (self.place < high)

    def by_outcome(self, values: torch.Tensor) -> torch.Tensor:
        """Sums (n, V_S + 1) over the student tokens of each outcome of `values` (n, V_S)."""
        found = values.new_empty(len(values), len(self.student_outcome) + 1)
        found[:, :-1] = values
        found[:, -1] = 0
        found[:, self._moved] = 0
        return found.index_add_(1, self.student_outcome[self._moved], values[:, self._moved])

    def by_student_token(self, values: torch.Tensor) -> torch.Tensor:
        """(n, V_S) that of each student token's outcome, of `values` (n, V_S + 1), which are overwritten."""
        values[:, self._moved] = values[:, self.student_outcome[self._moved]]
        return values[:, :-1]

    @cached_property
    def _moved(self) -> torch.Tensor:
        """The student ids that are not their own outcome: few beside all of them."""
        own = torch.arange(len(self.student_outcome), device=self.student_outcome.device)
        return (self.student_outcome != own).nonzero()[:, 0]

    def longer_tokens(self, teacher_ids: torch.Tensor, where: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(K,) rows, among those `where` (n,) is True, and (K,) teacher tokens that begin with all of the row's `teacher_ids` (n,)
        and go on."""
        low = self.longer_low[teacher_ids]
        count = (self.longer_high[teacher_ids] - low).clamp(min=0) * where
        row = torch.arange(len(low), device=low.device).repeat_interleave(count)
        begin = (count.cumsum(0) - count)[row]
        return row, self._by_place[low[row] + torch.arange(len(row), device=low.device) - begin]

    @cached_property
    def _by_place(self) -> torch.Tensor:
        """(V_T,) the teacher token at each place."""
        return self.place.argsort()

    def entries(self, written: torch.Tensor) -> torch.Tensor:
        """(n, V_T) index of each teacher token's entry at byte position `written` (n,). Valid only where `going_on` is True
        and the token has text."""
        return (self.start + written[:, None]).clamp(max=len(self.outcome) - 1)


@dataclass(frozen=True)
class Spellings(_Structure):
    """
    The bytes of each token without spaces, padded, for edit distances.

    Attributes:
        student, teacher (V_S, 32), (V_T, 32): bytes, padded with 0.
        student_length, teacher_length (V_S,), (V_T,): number of bytes, which may be more than 32; -1 = no text.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    student_length: torch.Tensor
    teacher_length: torch.Tensor


@dataclass(frozen=True)
class Projection(_Structure):
    """
    The matrix W of X-Token (arXiv 2605.21699), sparse: what share of each student token's probability goes to each teacher token.

    Attributes:
        student, teacher, weight (Z,): student id, teacher id and weight of each non-zero element. The weights of a student
            token sum to 1, or it has none.
        teacher_first (V_T,): the smallest id that spells the same bytes; the id itself if it has no text.
    """

    student: torch.Tensor
    teacher: torch.Tensor
    weight: torch.Tensor
    teacher_first: torch.Tensor


class VocabularyPair:
    """
    Two tokenizers' vocabularies, as the rows of two LM heads.

    Args:
        student_tokenizer, teacher_tokenizer: of the two models.
        student_size, teacher_size (`int`): V_S and V_T, at least as many as the tokenizers have ids.
        student_stops, teacher_stops (collections of `int`): the ids that end each side's turn; empty where no single token
            does.
        student_markup (collection of `int`): ids with which the student's template writes what stands between the sections of a turn.
        beside (pair of `MarkupBeside`, *optional*): of the student's and of the teacher's ids, `beside` of [`Continuations`].
        device: where the structures are kept.
        cache_dir (`Path`, *optional*): folder of the disk cache; `None` for no cache.

    Raises:
        ValueError: a tokenizer has more ids than its head has rows.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        student_size: int,
        teacher_size: int,
        student_stops: Collection[int] = (),
        teacher_stops: Collection[int] = (),
        student_markup: Collection[int] = (),
        beside: tuple[MarkupBeside, MarkupBeside] | None = None,
        device: torch.device | str = "cpu",
        cache_dir: Path | None = None,
    ):
        self.student_size, self.teacher_size = student_size, teacher_size
        self._names = type(student_tokenizer).__name__, type(teacher_tokenizer).__name__
        self._tokenizers = student_tokenizer, teacher_tokenizer
        self._student = _Side.of(student_tokenizer, student_size, student_stops)
        self._teacher = _Side.of(teacher_tokenizer, teacher_size, teacher_stops)
        self.bridged = bool(self._student.stops and self._teacher.stops)
        self._device, self._cache_dir, self._beside = device, cache_dir, beside or (MarkupBeside(), MarkupBeside())
        self._student_markup = {*student_markup} - {*student_stops} | (set() if self.bridged else {*student_stops})

    @cached_property
    def shared(self) -> Shared:
        """Raises `ValueError` where the two vocabularies have no text in common."""
        self._check_overlap()
        return self._structure(Shared, _shared)

    @cached_property
    def prefixes(self) -> Prefixes:
        """Raises `ValueError` where the two vocabularies have no text in common."""
        self._check_overlap()
        return self._structure(Prefixes, _prefixes)

    @cached_property
    def projection(self) -> Projection:
        """Raises `ValueError` where the two vocabularies have no text in common."""
        self._check_overlap()
        return self._structure(Projection, lambda student, teacher: _projection(student, teacher, self._tokenizers[1]))

    @cached_property
    def continuations(self) -> Continuations:
        """The student tokens that continue each teacher token, and, as its `reverse`, the teacher tokens that continue each student
        token. Stays on the CPU."""
        student, teacher = self._tokenizers
        ours, theirs = self._beside
        found = self._continuations(student, teacher, self._student.stops, ours, Merges.__name__)
        found.reverse = self._continuations(teacher, student, self._teacher.stops, theirs, f"{Merges.__name__}-reverse")
        return found

    def _continuations(self, student, teacher, stops, beside, name: str) -> Continuations:
        texts = repr(sorted({*beside.joins.values()})).encode()  # each is a text of its own
        name = f"{self._hash}-{name}-{hashlib.sha256(texts).hexdigest()[:8]}.npz"
        path = None if self._cache_dir is None else Path(self._cache_dir) / name
        kept = None if path is None else _load(Merges, path)
        if kept is not None:
            kept = Merges(*(getattr(kept, field.name).numpy() for field in fields(Merges)))
        found = Continuations(student, teacher, stops, kept, beside)
        if path is not None and kept is None and found.merges is not None:
            _save(found.merges, path)
        return found

    @cached_property
    def spellings(self) -> Spellings:
        (student, student_length), (teacher, teacher_length) = _spelled(self._student), _spelled(self._teacher)
        return Spellings(student, teacher, student_length, teacher_length).to(self._device)

    @cached_property
    def is_one_tokenizer(self) -> bool:
        """Whether both sides have the same tokenizer. The teacher then reads the student's own ids, and none continues
        another."""
        return is_one_tokenizer(*self._tokenizers)

    @property
    def student_stops(self) -> list[int]:
        """The ids that end the student's turn, in order."""
        return self._student.stops

    @property
    def teacher_stops(self) -> list[int]:
        """The ids that end the teacher's turn, in order."""
        return self._teacher.stops

    @property
    def student_rows(self) -> list[bytes]:
        """The bytes of each of the V_S ids; none for a stop id."""
        return self._student.rows

    @property
    def teacher_rows(self) -> list[bytes]:
        """The bytes of each of the V_T ids; none for a stop id."""
        return self._teacher.rows

    def places_beginning_with(self, text: bytes) -> tuple[int, int]:
        """`low:high` of the places (`Prefixes.place`) of the teacher tokens that begin with `text`, which is not empty."""
        return bisect_left(self._teacher_texts, text), _end_of_prefix(self._teacher_texts, text)

    @cached_property
    def _teacher_texts(self) -> list[bytes]:
        return _in_order(self._teacher)[1]

    @cached_property
    def student_stems(self) -> torch.Tensor:
        """(V_S + 1,) for each outcome of [`Prefixes`] that of the longest shorter student token that its text begins with; V_S for none."""
        _, texts = _in_order(self._student)
        stems = torch.full((self.student_size + 1,), self.student_size)
        begun: list[tuple[bytes, int]] = []  # each begins with the one before
        for text in dict.fromkeys(texts):
            while begun and not text.startswith(begun[-1][0]):
                begun.pop()
            own = self._student.by_bytes[text][0]
            stems[own] = begun[-1][1] if begun else self.student_size
            begun.append((text, own))
        return stems.to(self._device)

    @cached_property
    def student_widths(self) -> torch.Tensor:
        """(V_S,) bytes of each student id."""
        return torch.tensor([len(row) for row in self._student.rows], device=self._device)

    @cached_property
    def teacher_widths(self) -> torch.Tensor:
        """(V_T,) bytes of each teacher id."""
        return torch.tensor([len(row) for row in self._teacher.rows], device=self._device)

    @cached_property
    def undone_by_markup(self) -> torch.Tensor:
        """(V_T,) True for teacher ids that end with text of which a later token of the student's markup tells that it was no text."""
        ends = tuple({text.encode() for text in self._beside[0].after.values()})
        return torch.tensor([row.endswith(ends) for row in self._teacher.rows], dtype=torch.bool, device=self._device)

    @cached_property
    def student_whitespace(self) -> torch.Tensor:
        """(V_S,) True for tokens that are only whitespace."""
        return torch.tensor([bool(row) and not row.strip() for row in self._student.rows], device=self._device)

    @cached_property
    def without_counterpart(self) -> torch.Tensor:
        """(n,) the student's ids that no teacher token stands for by its bytes, and that a turn has all the same: markup, and the
        end of a turn that the teacher writes in several tokens."""
        return torch.tensor(sorted(self._student_markup), dtype=torch.long, device=self._device)

    @cached_property
    def student_puts_a_space(self) -> bool:
        """Whether the student's tokenizer puts a space before a text, so that the first token of a turn is not compared."""
        return not self.is_one_tokenizer and token_table(self._tokenizers[0]).prefix_space != "never"

    @cached_property
    def later_digits_undo(self) -> bool:
        """Whether the teacher's boundaries within a number depend on later digits."""
        return not self.is_one_tokenizer and later_digits_undo(self._tokenizers[1])

    @cached_property
    def student_digits(self) -> torch.Tensor:
        """(V_S,) True for tokens that end in a digit."""
        return torch.tensor([row[-1:].isdigit() for row in self._student.rows], device=self._device)

    def _check_overlap(self):
        if self._student.by_bytes.keys().isdisjoint(self._teacher.by_bytes):
            raise ValueError(
                f"The student's tokenizer ({self._names[0]}, {len(self._student.by_bytes)} different texts) and the "
                f"teacher's ({self._names[1]}, {len(self._teacher.by_bytes)}) share no token, so there is nothing to "
                "compare their distributions on: use a loss on log-probs, such as dpca or alm."
            )

    def _structure(self, kind: type[_Structure], build: Callable) -> Any:
        path = None if self._cache_dir is None else Path(self._cache_dir) / f"{self._hash}-{kind.__name__}.npz"
        structure = None if path is None else _load(kind, path)
        if structure is None:
            structure = build(self._student, self._teacher)
            if path is not None:
                _save(structure, path)
        return structure.to(self._device)

    @cached_property
    def _hash(self) -> str:
        digest = hashlib.sha256(_FORMAT.encode())
        for side, tokenizer in zip((self._student, self._teacher), self._tokenizers, strict=True):
            digest.update(repr((len(side.rows), side.stops, [len(row) for row in side.rows])).encode())
            digest.update(b"".join(side.rows))
            backend = getattr(tokenizer, "backend_tokenizer", None)
            state = {} if backend is None else json.loads(backend.to_str())
            state |= {"padding": None, "truncation": None}  # calls of the tokenizer change these
            digest.update(repr((type(tokenizer).__name__, state)).encode())
        return digest.hexdigest()[:32]


@dataclass(frozen=True)
class _Side:
    """`rows`: the bytes of each id of the head, b"" for a stop id. `by_bytes`: the ids of each text."""

    rows: list[bytes]
    stops: list[int]
    by_bytes: dict[bytes, list[int]]

    @classmethod
    def of(cls, tokenizer: Any, size: int, stops: Collection[int]) -> "_Side":
        rows = token_bytes(tokenizer)
        if len(rows) > size:
            raise ValueError(
                f"{type(tokenizer).__name__} has {len(rows)} ids, but the model's LM head only {size} rows: this is not "
                "the model's tokenizer, or `model.resize_token_embeddings(len(tokenizer))` is missing."
            )
        rows += [b""] * (size - len(rows))
        for token in stops:
            rows[token] = b""
        by_bytes: dict[bytes, list[int]] = {}
        for token, row in enumerate(rows):
            if row:
                by_bytes.setdefault(row, []).append(token)
        return cls(rows, sorted(stops), by_bytes)


def _shared(student: _Side, teacher: _Side) -> Shared:
    pairs = [(ids, teacher.by_bytes[text]) for text, ids in student.by_bytes.items() if text in teacher.by_bytes]
    if student.stops and teacher.stops:
        pairs.append((student.stops, teacher.stops))
    student_parts = _outcomes([ids for ids, _ in pairs], len(student.rows))
    teacher_parts = _outcomes([ids for _, ids in pairs], len(teacher.rows))
    return Shared(*(part for parts in zip(student_parts, teacher_parts, strict=True) for part in parts))


def _outcomes(groups: list[list[int]], size: int) -> tuple[torch.Tensor, ...]:
    """One side of `Shared`; `groups`: the ids of each outcome."""
    outcome = np.full(size, -1)
    outcome[[token for ids in groups for token in ids]] = [number for number, ids in enumerate(groups) for _ in ids]
    repeated = [number for number, ids in enumerate(groups) if len(ids) > 1]
    most = max((len(groups[number]) for number in repeated), default=0)
    members = [groups[number] + [-1] * (most - len(groups[number])) for number in repeated]
    return (
        torch.tensor([ids[0] for ids in groups], dtype=torch.long),
        torch.from_numpy(outcome),
        torch.tensor(repeated, dtype=torch.long),
        torch.tensor(members, dtype=torch.long).view(len(repeated), most),
        torch.from_numpy(np.flatnonzero(outcome < 0)),
    )


def _prefixes(student: _Side, teacher: _Side) -> Prefixes:
    nothing = len(student.rows)
    first_id = {text: ids[0] for text, ids in student.by_bytes.items()}
    longest = max(map(len, first_id), default=0)
    order, texts = _in_order(student)
    teacher_order, teacher_texts = _in_order(teacher)

    # Entries of one token after another. The halves of a token are numbered, so that each distinct half is looked up once.
    lengths = [len(row) for row in teacher.rows]
    halves = [(row[:k], row[k:]) for row, length in zip(teacher.rows, lengths, strict=True) for k in range(length)]
    written, rest = (
        {text: number for number, text in enumerate(dict.fromkeys(side))} for side in zip(*halves, strict=True)
    )
    before = np.array([written[head] for head, _ in halves])
    after = np.array([rest[tail] for _, tail in halves])
    low = np.array([bisect_right(teacher_texts, head) for head in written])[before]
    high = np.array([_end_of_prefix(teacher_texts, head) for head in written])[before]
    outcome = np.array([_longest_prefix(tail, first_id, longest, nothing) for tail in rest])[after]
    completing_low = np.array([bisect_left(texts, tail) for tail in rest])[after]
    completing_high = np.array([_end_of_prefix(texts, tail) for tail in rest])[after]
    start = list(accumulate(lengths, initial=0))[:-1]
    heads = np.array([teacher.by_bytes.get(head, [-1])[0] for head in written])[before]
    longer = [
        (bisect_right(teacher_texts, row), _end_of_prefix(teacher_texts, row)) if row else (0, 0)
        for row in teacher.rows
    ]
    alike = np.full((len(teacher.rows), max(map(len, teacher.by_bytes.values()), default=1)), -1)
    alike[:, 0] = np.arange(len(teacher.rows))
    for ids in teacher.by_bytes.values():
        alike[ids, : len(ids)] = ids

    student_outcome, first_outcome = np.full(nothing, nothing), np.full(len(teacher.rows), nothing)
    student_outcome[order] = [first_id[text] for text in texts]
    has_text = np.array(lengths) > 0
    first_outcome[has_text] = outcome[np.array(start)[has_text]]
    if student.stops and teacher.stops:
        student_outcome[student.stops] = first_outcome[teacher.stops] = student.stops[0]
    place = np.full(len(teacher.rows), len(teacher_order))
    place[teacher_order] = np.arange(len(teacher_order))
    arrays = (student_outcome, first_outcome, start, lengths, outcome, place, low, high, order)
    arrays += (completing_low, completing_high, heads, *zip(*longer, strict=True), alike)
    return Prefixes(*(torch.as_tensor(np.asarray(array)) for array in arrays))


def _in_order(side: _Side) -> tuple[list[int], list[bytes]]:
    """The ids that have text, in the order of their bytes, and those bytes."""
    order = [token for text in sorted(side.by_bytes) for token in side.by_bytes[text]]
    return order, [side.rows[token] for token in order]


def _end_of_prefix(texts: Sequence[bytes], prefix: bytes) -> int:
    """The index in the sorted `texts` after the last one that begins with `prefix`."""
    stem = prefix.rstrip(b"\xff")
    return bisect_left(texts, stem[:-1] + bytes([stem[-1] + 1])) if stem else len(texts)


def _longest_prefix(text: bytes, known: dict[bytes, int], longest: int, otherwise: int) -> int:
    """The value in `known` of the longest key that `text` begins with, or `otherwise`."""
    for length in range(min(len(text), longest), 0, -1):
        if (found := known.get(text[:length])) is not None:
            return found
    return otherwise


def _projection(student: _Side, teacher: _Side, teacher_tokenizer: Any) -> Projection:
    """A shared token goes to its partner, any other to the tokens of its teacher encoding with weights `.9 * .1^i`."""
    exact = [(ids, teacher.by_bytes[text][0]) for text, ids in student.by_bytes.items() if text in teacher.by_bytes]
    if student.stops and teacher.stops:
        exact.append((student.stops, teacher.stops[0]))
    entries = [(token, partner, 1.0) for ids, partner in exact for token in ids]
    others = [text for text in student.by_bytes if text not in teacher.by_bytes]
    readable = {text: decoded for text in others if (decoded := _decoded(text)) is not None}
    encoded = encode_as_text(teacher_tokenizer, list(readable.values()))
    spelled = {text: tokens.ids for text, tokens in zip(readable, encoded, strict=True)}
    first_id = {text: ids[0] for text, ids in teacher.by_bytes.items()}
    longest = max(map(len, first_id), default=0)
    for text in others:
        rows = [teacher.rows[piece] for piece in spelled.get(text, [])]
        if b"".join(rows) != text:  # because of a dummy prefix, a normalizer, or half a character
            rows = _longest_match(text, first_id, teacher.rows, longest)
        pieces = [first_id[row] for row in rows[:PROJECTED_TOKENS]]
        shares = np.array([0.9 * 0.1**i for i in range(len(pieces))])
        parts = list(zip(pieces, shares / shares.sum(), strict=True))
        entries += [(token, piece, share) for token in student.by_bytes[text] for piece, share in parts]
    students, teachers, weights = zip(*entries, strict=True)
    teacher_first = np.arange(len(teacher.rows))
    for ids in (*teacher.by_bytes.values(), teacher.stops):
        if len(ids) > 1:
            teacher_first[ids] = ids[0]
    return Projection(
        torch.tensor(students),
        torch.tensor(teachers),
        torch.tensor(weights, dtype=torch.float64),
        torch.from_numpy(teacher_first),
    )


def _decoded(text: bytes) -> str | None:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return None


def _longest_match(text: bytes, first_id: dict[bytes, int], rows: list[bytes], longest: int) -> list[bytes]:
    """`text` cut greedily from the left into the longest tokens; empty where that is impossible."""
    pieces = []
    while text:
        token = _longest_prefix(text, first_id, longest, -1)
        if token < 0:
            return []
        pieces.append(rows[token])
        text = text[len(rows[token]) :]
    return pieces


def _spelled(side: _Side) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded bytes (V, 32) and lengths (V,)."""
    rows = [row.replace(b" ", b"") for row in side.rows]
    data = b"".join(row[:SPELLED_BYTES].ljust(SPELLED_BYTES, b"\0") for row in rows)
    lengths = [len(row) if full else -1 for row, full in zip(rows, side.rows, strict=True)]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, SPELLED_BYTES), torch.tensor(lengths)


def _load(kind: type, path: Path) -> Any | None:
    """The cached structure; None where there is none, or where the file cannot be read and will be written again."""
    try:
        with np.load(path) as kept:
            return kind(*(torch.from_numpy(kept[field.name]) for field in fields(kind)))
    except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile):
        return None


def _save(structure: Any, path: Path):
    """By one atomic rename, so that no process ever reads half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder) / path.name
        np.savez(file, **{field.name: np.asarray(getattr(structure, field.name)) for field in fields(structure)})
        os.replace(file, path)
