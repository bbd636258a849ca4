"""Finds, for each teacher token, the student tokens that would continue it.

For a text x that ends with the teacher token t, and a student token u: is the end of t still a token boundary in the
teacher's tokenization of x + u? Where it is not, u *continues* t. The naive equivalent, for an x in which t is typical:

    encode(x + u)[: len(encode(x))] != encode(x)

Decisions.
- BPE needs no text before t. A sequence of tokens is the BPE encoding of its text if and only if each two neighbours are
  the encoding of theirs. So the boundary stays if and only if t and the first token of `encode(u)` are such a pair. They
  are not if a token on the right edge of t's merge tree and one on the left edge of the other's merge before either is
  merged into the next larger token of its own side.
- What the pre-tokenizer separates stays separate. The pre-tokenizer itself is called, once for each pair of character
  kinds; for runs of digits, which it may group by three, once for each token.
- WordPiece takes the longest piece: u continues t where u begins with the rest of a longer piece of t's kind. For Unigram
  the tokenizer itself is called for each u that begins with the rest of a longer piece. For any other tokenizer only the
  bytes are used: u continues t where u begins with the rest of a longer token.
- u is judged as if the text ended with it. Later tokens could still join it or split it. On real text that happens where a
  tokenizer has merges over digits (GPT-2's): `517` may be `5` and `17` although `51` is a token. `undecided` tells where.
- An added token at which a template's markup ends a section stands in the place of text: of what the other template writes there, which
  may join with t. Where its own template writes text before it, that text was no section's, and what t had read as one is undone.
- Other tokens that stand for no text (turn ends, control tokens, padding rows) continue nothing, and nothing continues an added
  token. Where a character takes several tokens, its bytes are merged like any others, and no pre-tokenizer cuts inside it.

Letters: V_T teacher ids, U distinct texts of student tokens, M merges.
"""

import json
import re
import unicodedata
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from typing import Any

import numpy as np

from .aligner import encode_as_text
from .token_bytes import TokenTable, token_table
from .turns import MarkupBeside


_RANK_BITS = 22  # the low bits of a merge's time hold its rank
_DIGITS = re.compile(rb"[0-9]{2}")
_SIGNS = re.compile(rb"[!-/:-@\[-`{-~]+(?=[A-Za-z])")


@dataclass(frozen=True)
class Merges:
    """
    The merges of a BPE tokenizer. Token ids are the teacher's. The *time* of a merge is the largest of its own rank and the
    ranks at which its two parts are made; ties are ordered by its own rank. Time and rank differ only where several merges
    spell one token (`tokenizer.json` files made from tiktoken or SentencePiece models) and a merge has to wait for its
    parts. `never` is later than all times.

    Attributes:
        edge_start (V_T + 1,): where each token's right edge begins in the next two arrays. The edge is the token, its right
            part, the right part of that, and so on.
        edge_token, edge_until (E,): a token of the edge, and the time at which it is merged into the next larger one.
        pair_start (V_T + 1,): where the merges with this token on the left begin in the next two arrays, in order of time.
        pair_right, pair_when (M,): the token on the right, and the time of the merge.
        first_token, first_until, first_text (F,): the left edge of the first teacher token of each student text, as token,
            time at which it is merged into the next larger one, and index of the text. Sorted by token, then latest time first.
        never (): scalar.
    """

    edge_start: np.ndarray
    edge_token: np.ndarray
    edge_until: np.ndarray
    pair_start: np.ndarray
    pair_right: np.ndarray
    pair_when: np.ndarray
    first_token: np.ndarray
    first_until: np.ndarray
    first_text: np.ndarray
    never: np.ndarray

    def candidates(self, token: int) -> np.ndarray:
        """Indices of the student texts whose first token merges with the right edge of `token`, sorted."""
        edge = slice(self.edge_start[token], self.edge_start[token + 1])
        rights, times = [], []
        for left, until in zip(self.edge_token[edge], self.edge_until[edge], strict=True):
            start, end = self.pair_start[left], self.pair_start[left + 1]
            end = start + np.searchsorted(self.pair_when[start:end], until, side="left")  # at a tie the left side wins
            rights.append(self.pair_right[start:end])
            times.append(self.pair_when[start:end])
        right, when = np.concatenate(rights), np.concatenate(times)
        low = np.searchsorted(self._key, right * (self.never + 1), side="left")
        high = np.searchsorted(self._key, right * (self.never + 1) + self.never - when, side="right")
        sizes = np.maximum(high - low, 0)
        at = np.arange(sizes.sum()) + np.repeat(low - (np.cumsum(sizes) - sizes), sizes)
        return np.unique(self.first_text[at])

    @property
    def _key(self) -> np.ndarray:
        """(F,) sort key: token, then latest time first."""
        if "key" not in self.__dict__:
            object.__setattr__(self, "key", self.first_token * (self.never + 1) + self.never - self.first_until)
        return self.__dict__["key"]


class Continuations:
    """
    For each teacher token, the student tokens that continue it.

    Args:
        student_tokenizer, teacher_tokenizer: of the two models.
        stops (collection of `int`): the student's ids that end its turn.
        merges (`Merges`, *optional*): an earlier result of `build_merges`.
        beside (`MarkupBeside`): the student's added tokens with the text beside them. They continue what the teacher's text there
            continues, and all that ends with the text that the student's template writes before them.

    Attributes:
        texts (U): the distinct texts of the student's tokens and of markup beside a section, sorted.
        merges: None where the teacher's tokenizer is not BPE.
        reverse (`Continuations` or None): the same the other way round: for each student token, the teacher tokens that continue
            it. None where the teacher's distributions are not known.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        stops: Collection[int] = (),
        merges: Merges | None = None,
        beside: MarkupBeside | None = None,
    ):
        self.reverse: Continuations | None = None
        beside = beside or MarkupBeside()
        by_text: dict[bytes, list[int]] = {}
        for token, row in enumerate(token_table(student_tokenizer).rows):
            if row and token not in stops:
                by_text.setdefault(row, []).append(token)
        for token, text in beside.joins.items():
            by_text.setdefault(text.encode(), []).append(token)
        self.texts = sorted(by_text)
        self._ids = [by_text[text] for text in self.texts]
        self._after = {token: text.encode() for token, text in beside.after.items()}
        self._rows = token_table(teacher_tokenizer).rows
        self._tokenizer = teacher_tokenizer
        self._teacher = _Teacher(teacher_tokenizer)
        self._known: dict[int, np.ndarray] = {}
        self._joins: dict[tuple[str, int], bool] = {}
        self._kinds: list[int] | None = None
        self.merges = merges
        if self._teacher.kind == "BPE" and merges is None:
            self.merges = build_merges(self._teacher, self.texts)
        self._longer = None if self._teacher.kind == "BPE" else self._teacher.in_order(self._rows)

    def of(self, teacher_id: int) -> np.ndarray:
        """The student ids that continue this teacher token, sorted."""
        if teacher_id not in self._known:
            numbers = self._going_on(teacher_id)
            ids = {token for number in numbers for token in self._ids[number]}
            row = self._rows[teacher_id] if teacher_id < len(self._rows) else b""
            ids.update(token for token, text in self._after.items() if row.endswith(text))
            self._known[teacher_id] = np.array(sorted(ids), dtype=np.int64)
        return self._known[teacher_id]

    def rows(self, teacher_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(K,) index into `teacher_ids` and (K,) student id, for each pair where the student id continues; sorted by index."""
        found = [self.of(token) for token in teacher_ids]
        sizes = [len(ids) for ids in found]
        ids = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
        return np.repeat(np.arange(len(sizes)), sizes), ids

    def undecided(self, teacher_id: int) -> bool:
        """Whether the next student token does not yet decide if the boundary after this teacher token stays: it ends in a digit, and
        the teacher's tokenizer lets a later digit undo what the next one decided."""
        return teacher_id < len(self._rows) and self._rows[teacher_id][-1:].isdigit() and self.later_digits_undo

    @cached_property
    def later_digits_undo(self) -> bool:
        """Of the teacher's tokenizer, as the function of that name."""
        return later_digits_undo(self._tokenizer)

    def _going_on(self, token: int) -> list[int]:
        teacher = self._teacher
        if token >= len(self._rows) or not self._rows[token] or token not in teacher.pieces:
            return []
        if teacher.kind == "BPE":
            found = self._joined(self._rows[token], self.merges.candidates(token).tolist())
            return sorted({*found, *self._taken(self._rows[token])})
        texts, found = self.texts, set()
        for rest in teacher.rests(token, self._rows, self._longer):
            found.update(range(bisect_left(texts, rest), _end_of_prefix(texts, rest)))
        numbers = self._joined(self._rows[token], sorted(found))
        if teacher.kind == "Unigram":
            numbers = [n for n in numbers if not teacher.cuts(self._rows[token], texts[n])]
        return numbers

    def _joined(self, row: bytes, numbers: list[int]) -> list[int]:
        """Those of the texts that the pre-tokenizer does not separate from `row`."""
        teacher = self._teacher
        if teacher.pre_tokenizer is None:
            return numbers
        text = row.decode(errors="ignore")
        if not text or not _is_whole(row):
            return numbers  # within a character
        if self._kinds is None:
            self._number_kinds()
        tail, kept = text[-4:], []
        digits = text[-1].isnumeric()
        for number in numbers:
            kind = self._kinds[number]
            if kind < 0:  # the text begins inside a character, and `row` does not end inside one
                continue
            if digits and self._samples[kind][0].isnumeric():
                if not teacher.cuts(row, self.texts[number]):
                    kept.append(number)
                continue
            if (tail, kind) not in self._joins:
                self._joins[tail, kind] = not teacher.splits(tail, self._samples[kind])
            if self._joins[tail, kind]:
                kept.append(number)
        return kept

    def _taken(self, row: bytes) -> list[int]:
        """The texts that make the pre-tokenizer split the spaces at the end of `row`: it gives the last one to the text."""
        text = row.decode(errors="ignore")
        if self._teacher.pre_tokenizer is None or not (len(text) > 1 and text[-1].isspace() and _is_whole(row)):
            return []
        if self._kinds is None:
            self._number_kinds()
        tail = text[-4:]
        taken = {kind for kind, sample in enumerate(self._samples) if self._teacher.takes_end(tail, sample)}
        return [number for number, kind in enumerate(self._kinds) if kind in taken]

    def _number_kinds(self):
        """Groups the texts by the kinds of their first characters. The first text of each group is its sample."""
        known: dict[tuple, int] = {}
        self._kinds, self._samples = [], []
        for text in self.texts:
            start = _beginning(text)
            if not start:
                self._kinds.append(-1)
                continue
            kind = (*map(_character_kind, start[:4]), len(start) > 4)
            if kind not in known:
                known[kind] = len(self._samples)
                self._samples.append(start)
            self._kinds.append(known[kind])


_undone: weakref.WeakKeyDictionary[Any, tuple[TokenTable, bool]] = weakref.WeakKeyDictionary()


def later_digits_undo(tokenizer: Any) -> bool:
    """Whether among the numbers of up to four digits there are two that begin with the same text and one more digit, and the tokenizer
    cuts after that text in only one of them. Cached until the tokenizer's tokens change."""
    table = token_table(tokenizer)
    if tokenizer not in _undone or _undone[tokenizer][0] is not table:
        _undone[tokenizer] = (table, _later_digits_undo(tokenizer, table.rows))
    return _undone[tokenizer][1]


def _later_digits_undo(tokenizer: Any, rows: list[bytes]) -> bool:
    if not any(map(_DIGITS.search, rows)):
        return False  # every digit is a token
    numbers = [f"{number:0{digits}}" for digits in (2, 3, 4) for number in range(10**digits)]
    decided: dict[str, bool] = {}
    for text, tokens in zip(numbers, encode_as_text(tokenizer, numbers), strict=True):
        read = b"".join(rows[token] for token in tokens.ids)
        if not read.endswith(text.encode()):  # it does not know some digit
            continue
        before = len(read) - len(text)  # a dummy prefix
        cuts = {end - before for end in accumulate(len(rows[token]) for token in tokens.ids)}
        for end in range(1, len(text)):
            if decided.setdefault(text[: end + 1], end in cuts) != (end in cuts):
                return True
    return False


class _Teacher:
    """The teacher's tokenizer, as this module needs it. `kind`: "BPE", "Unigram", "WordPiece", or "" for all others."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.kind, self.pieces, self.pre_tokenizer, self.normalizer = "", {}, None, None
        if backend is None:
            self.pieces = dict.fromkeys(range(len(token_table(tokenizer).rows)), "")
            return
        self.model, self.pre_tokenizer, self.normalizer = backend.model, backend.pre_tokenizer, backend.normalizer
        name = type(backend.model).__name__
        self.kind = name if name in ("BPE", "Unigram", "WordPiece") else ""
        self.vocabulary = backend.get_vocab(with_added_tokens=False)
        self.pieces = {token: piece for piece, token in self.vocabulary.items()}
        decoder = "" if backend.decoder is None else backend.decoder.__getstate__().decode()
        self.byte_level = '"ByteLevel"' in decoder
        self.spaced = "▁" in self.vocabulary and not self.byte_level
        self.prefix = json.loads(decoder)["prefix"] if name == "WordPiece" else ""

    def spell(self, text: bytes) -> str | None:
        """`text` in the alphabet of the vocabulary's pieces; None where that is impossible."""
        if self.byte_level:
            return "".join(map(_BYTE_CHARACTERS.__getitem__, text))
        try:
            own = text.decode()
        except UnicodeDecodeError:
            return None
        return own.replace(" ", "▁") if self.spaced else own

    def pre_tokens(self, text: str) -> list[tuple[int, int]]:
        """The spans of `text` that the pre-tokenizer makes. No token crosses from one into another."""
        if self.pre_tokenizer is None:
            return [(0, len(text))]
        marked = text.replace(" ", "▁") if self.spaced and self.normalizer is not None else text
        return [span for _, span in self.pre_tokenizer.pre_tokenize_str(marked)]

    def splits(self, before: str, after: str) -> bool:
        """Whether the pre-tokenizer separates the two."""
        at = len(before)
        return not any(start < at < end for start, end in self.pre_tokens(before + after))

    def takes_end(self, before: str, after: str) -> bool:
        """Whether the pre-tokenizer joins only the end of `before` with `after`."""
        at = len(before)
        return any(0 < start < at < end for start, end in self.pre_tokens(before + after))

    def cuts(self, row: bytes, text: bytes) -> bool:
        """Whether the encoding of row + text has a token boundary between the two."""
        try:
            joined, at = (row + text).decode(), len(row.decode())
        except UnicodeDecodeError:
            return True
        for start, end in self.pre_tokens(joined):
            if start < at < end:
                length = 0
                for token in self.model.tokenize(self.spell(joined[start:end].encode())):
                    length += len(self.pieces[token.id])
                    if length == len(self.spell(joined[start:at].encode())):
                        return True
                return False
        return True

    def first_token(self, text: bytes) -> int:
        """The first token of `text` as a continuation of other text; -1 if there is none."""
        try:
            decoded = text.decode()
        except UnicodeDecodeError:
            spelled = self.spell(text) if self.byte_level else None
        else:
            spans = self.pre_tokens(decoded)
            spelled = self.spell(decoded[: spans[0][1]].encode()) if spans else None
        tokens = self.model.tokenize(spelled) if spelled else []
        return tokens[0].id if tokens else -1

    def in_order(self, rows: list[bytes]) -> dict[bool, list[bytes]]:
        """Sorted texts of the pieces that begin a word (True) and of those that continue one (False). Tokenizers other than
        WordPiece have all pieces under True."""
        kinds: dict[bool, list[bytes]] = {True: [], False: []}
        for token, piece in self.pieces.items():
            if token < len(rows) and rows[token]:
                kinds[self._begins(piece)].append(rows[token])
        return {kind: sorted(texts) for kind, texts in kinds.items()}

    def rests(self, token: int, rows: list[bytes], ordered: dict[bool, list[bytes]]) -> set[bytes]:
        """For each longer token of the same kind that begins with this token's text: the rest of it."""
        row, texts = rows[token], ordered[self._begins(self.pieces[token])]
        return {text[len(row) :] for text in texts[bisect_right(texts, row) : _end_of_prefix(texts, row)]}

    def _begins(self, piece: str) -> bool:
        return not self.prefix or not piece.startswith(self.prefix)


def build_merges(teacher: _Teacher, texts: Sequence[bytes]) -> Merges:
    """The merges of the teacher's tokenizer, and the first teacher token of each of the student's texts."""
    state = json.loads(teacher.model.__getstate__())
    vocabulary = teacher.vocabulary
    pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in state["merges"]]
    left = np.array([vocabulary[a] for a, _ in pairs], dtype=np.int64)
    right = np.array([vocabulary[b] for _, b in pairs], dtype=np.int64)
    made = [vocabulary[a + b] for a, b in pairs]
    size = max(vocabulary.values(), default=-1) + 1
    lengths = [len(teacher.pieces.get(token, "")) for token in range(size)]
    never = (len(pairs) << _RANK_BITS) + len(pairs)
    when, first, second = _last_merges(left.tolist(), right.tolist(), made, lengths, never)

    edges = _edges(np.arange(size), second, when, never)
    order = np.argsort(edges[0], kind="stable")
    edge_of, edge_token, edge_until = (column[order] for column in edges)
    starts = np.arange(size + 1)

    rank = np.arange(len(pairs))
    at = (np.maximum(rank, np.maximum(when[left] >> _RANK_BITS, when[right] >> _RANK_BITS)) << _RANK_BITS) + rank
    order = np.lexsort((at, left))
    left, right, at = left[order], right[order], at[order]

    heads = _heads(teacher, texts)
    text_of, token, until = _edges(np.array([t for _, t in heads], dtype=np.int64), first, when, never)
    numbers = np.array([number for number, _ in heads], dtype=np.int64)[text_of] if heads else text_of
    order = np.lexsort((-until, token))
    return Merges(
        np.searchsorted(edge_of, starts),
        edge_token,
        edge_until,
        np.searchsorted(left, starts),
        right,
        at,
        token[order],
        until[order],
        numbers[order],
        np.array(never),
    )


def _heads(teacher: _Teacher, texts: Sequence[bytes]) -> list[tuple[int, int]]:
    """(index of a text, its first token). One for most texts. Several for digits, of which the pre-tokenizer may take a few,
    and for punctuation before a word, which it may join to the punctuation before it."""
    heads = []
    for number, text in enumerate(texts):
        lengths = {len(text)}
        if text.isdigit():
            lengths.update(range(1, len(text)))
        elif signs := _SIGNS.match(text):
            lengths.add(signs.end())
        heads += {(number, teacher.first_token(text[:length])) for length in sorted(lengths)}
    return [head for head in heads if head[1] >= 0]


def _last_merges(
    left: list[int], right: list[int], made: list[int], lengths: list[int], never: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each token, the time at which BPE makes it, and its two parts; -1 for tokens that no merge makes. Where several
    merges spell a token, the one is taken whose parts are neighbours when BPE encodes the token's own text."""
    when, first, second = ([-1] * len(lengths) for _ in range(3))
    ways: dict[int, list[int]] = {}
    for number, token in enumerate(made):
        ways.setdefault(token, []).append(number)
    ranks = {pair: number for number, pair in enumerate(zip(left, right, strict=True))} if len(ways) < len(made) else {}

    def time(number, a, b):
        return (max(number, when[a] >> _RANK_BITS, when[b] >> _RANK_BITS) << _RANK_BITS) + number

    def edge(token, part):
        until, found = never, []
        while token >= 0:
            found.append((token, until))
            until, token = when[token], part[token]
        return found

    def undisturbed(number):
        own = time(number, left[number], right[number])
        for (a, a_until), (b, b_until) in product(edge(left[number], second), edge(right[number], first)):
            other = ranks.get((a, b), number)
            if other != number and (found := time(other, a, b)) < min(a_until, own) and found <= min(b_until, own):
                return False
        return True

    for token in sorted(ways, key=lengths.__getitem__):  # a token's parts come before it
        numbers = ways[token]
        number = numbers[0] if len(numbers) == 1 else next(filter(undisturbed, numbers), numbers[0])
        when[token], first[token], second[token] = (
            time(number, left[number], right[number]),
            left[number],
            right[number],
        )
    return np.array(when), np.array(first), np.array(second)


def _edges(tokens: np.ndarray, part: np.ndarray, when: np.ndarray, never: int) -> tuple[np.ndarray, ...]:
    """The edge of each token (n,) on one side, down to tokens that no merge makes: (E,) index of the token, token of the
    edge, and the time at which that one is merged into the next larger."""
    columns = []
    own, until = np.arange(len(tokens)), np.full(len(tokens), never)
    while len(tokens):
        columns.append((own, tokens, until))
        own, until, tokens = (column[part[tokens] >= 0] for column in (own, when[tokens], part[tokens]))
    if not columns:
        return own, tokens, until
    return tuple(np.concatenate(column) for column in zip(*columns, strict=True))


def _end_of_prefix(texts: Sequence[bytes], prefix: bytes) -> int:
    """The index in the sorted `texts` after the last one that begins with `prefix`."""
    stem = prefix.rstrip(b"\xff")
    return bisect_left(texts, stem[:-1] + bytes([stem[-1] + 1])) if stem else len(texts)


def _is_whole(row: bytes) -> bool:
    """Whether it ends with a complete character."""
    try:
        row[-4:].decode()
    except UnicodeDecodeError as error:
        return error.end < len(row[-4:]) or error.reason == "invalid start byte"
    return True


def _beginning(text: bytes) -> str:
    """The characters that `text` begins with. If the first one is incomplete, some character that begins with these bytes;
    "" where `text` begins inside a character."""
    decoded = text.decode(errors="ignore")
    if 0x80 <= text[0] < 0xC0:
        return ""
    try:
        text[: _length(text[0])].decode()
        return decoded
    except UnicodeDecodeError:
        missing = _length(text[0]) - len(text)
        for byte in (0x80, 0xA0, 0x90):
            try:
                return (text + bytes([byte, 0x80, 0x80])[:missing]).decode()
            except UnicodeDecodeError:
                continue
        return ""


def _length(lead: int) -> int:
    """Number of bytes of the UTF-8 character that begins with this byte."""
    return 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)


def _character_kind(character: str) -> Any:
    """The distinctions that pre-tokenizers may make: ASCII punctuation and the letters of English contractions each count by
    themselves, all other characters by category and block."""
    if character in "strevmldSTREVMLD" or (character.isascii() and not character.isalnum()):
        return character
    return unicodedata.category(character), ord(character) >> 8


def _byte_characters() -> list[str]:
    """GPT-2's `bytes_to_unicode`."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


_BYTE_CHARACTERS = _byte_characters()
