"""Locates tokens in a text that they do not spell exactly: where each token comes from, and what no token spells.

A normalizer may compose letters, change case, drop or collapse whitespace; a vocabulary may lack a character. What the
tokens spell is then compared with the text cell by cell. A cell is the smallest group of neighbouring tokens that shares
no byte of the text with any other token.

Letters: K texts, which are parts of the bytes `data`. Their N tokens, one text after another, spell the bytes `spelled`.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from .chunks import bounds, runs
from .token_bytes import TokenTable


REASONS = ("invalid_utf8", "whitespace", "unknown_token", "normalized", "markup", "thought", "call")


@dataclass(frozen=True)
class MaskedStretch:
    """Bytes `start:end` of `text.encode()`, or of a whole batch, that belong to no chunk.

    `reason` is one of:
    "invalid_utf8": the student wrote it;
    "whitespace": the student's WordPiece tokenizer lost it;
    "unknown_token": the teacher's vocabulary has no token for it;
    "normalized": the teacher's tokens do not spell the text, because its normalizer changed it or dropped whitespace;
    "markup", "thought", "call": the teacher's template has no place for it;
    "tool": between two turns of one completion, a result and the markup around it, which nobody is scored on.
    """

    start: int
    end: int
    reason: str


def num_bytes_in(stretches: Iterable[MaskedStretch]) -> int:
    """Bytes in at least one of `stretches`, which may overlap."""
    count = end = 0
    for stretch in sorted(stretches, key=lambda own: own.start):
        count += max(0, stretch.end - max(stretch.start, end))
        end = max(end, stretch.end)
    return count


def read_altered(
    data: bytes,
    places: np.ndarray,
    spelled: Sequence[bytes],
    ids: np.ndarray,
    widths: np.ndarray,
    counts: np.ndarray,
    table: TokenTable,
    token_to_chars: Sequence[Callable[[int], tuple[int, int]] | None],
) -> tuple[np.ndarray, np.ndarray, list[MaskedStretch]]:
    """The end in `data` of each token (N,), the number of its bytes that each covers (N,), and the masked stretches.

    Args:
        data: bytes that hold the K texts.
        places: (K, 2) start and end of each text in `data`.
        spelled: the bytes that each text's tokens spell.
        ids, widths: (N,) the tokens, and how many of the spelled bytes belong to each.
        counts: (K,) tokens in each text, at least one.
        table: of the tokenizer.
        token_to_chars: for each text, a function from a token's index to its character span in the text, as the tokenizer
            gives it; None where the tokenizer gives none.
    """
    first = bounds(counts)
    if None in token_to_chars:
        lost = np.split(np.isin(ids, list(table.word_starts)), first[1:-1])
        texts = zip(places.tolist(), spelled, np.split(widths, first[1:-1]), lost, strict=True)
        spans = np.concatenate([at + _spans_by_difference(data[at:stop], *own) for (at, stop), *own in texts])
    else:
        spans = _spans_by_asking(data, places, b"".join(spelled), widths, first, token_to_chars)
    unknown = np.isin(ids, list(table.unknown))
    return _read_by_cells(data, places, b"".join(spelled), widths, first[:-1], spans, unknown)


_ASKED_EVERY = 16  # tokens


def _spans_by_asking(
    data: bytes,
    places: np.ndarray,
    spelled: bytes,
    widths: np.ndarray,
    first: np.ndarray,
    token_to_chars: Sequence[Callable[[int], tuple[int, int]]],
) -> np.ndarray:
    """(N, 2) start and end in `data` of each token's bytes; `first` (K + 1,): index of each text's first token, then N.

    Only one token in `_ASKED_EVERY` is looked up: the next one that ends a character, since offsets are in whole characters.
    Where the tokens of a group spell exactly the bytes found there in `data`, these are their places. In all other groups
    every token is looked up.
    """
    begins = np.append(np.flatnonzero(_begins_character(data)), len(data))
    characters_before = np.searchsorted(begins, places[:, 0])

    def ask(tokens: np.ndarray) -> np.ndarray:
        row = np.searchsorted(first, tokens, side="right") - 1
        answers = (token_to_chars[k](n) for k, n in zip(row.tolist(), (tokens - first[row]).tolist(), strict=True))
        characters = np.fromiter(chain.from_iterable(answers), dtype=np.int64).reshape(-1, 2)
        return begins[characters + characters_before[row][:, None]]

    sizes = np.diff(first)
    group = np.flatnonzero(runs(np.zeros_like(sizes), sizes) % _ASKED_EVERY == 0)  # the first token of each
    ends = np.cumsum(widths)
    at_border = np.flatnonzero(np.append(_begins_character(spelled), True)[ends])
    asked = at_border[np.searchsorted(at_border, group)]
    shift = ask(asked)[:, 1] - ends[asked]  # from an offset in `spelled` to the offset in `data`

    starts, members = ends - widths, np.diff(group, append=len(widths))
    spans = np.stack([starts, ends], 1) + np.repeat(shift, members)[:, None]
    begin, end = spans[group, 0], spans[group + members - 1, 1]
    row = np.searchsorted(first, group, side="right") - 1
    found = (begin >= places[row, 0]) & (end <= places[row, 1]) & (np.minimum.reduceat(widths, group) > 0)
    found &= _found(data, spelled, end - begin, begin)
    others = np.flatnonzero(~np.repeat(found, members))
    spans[others] = ask(others)
    return spans


def _begins_character(data: bytes) -> np.ndarray:
    """(L,) True for the first byte of a character."""
    return (np.frombuffer(data, np.uint8) & 0xC0) != 0x80


def _found(data: bytes, spelled: bytes, sizes: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(G,) `spelled` is made of G groups of `sizes` bytes: True where `data` has the same bytes from `start` on."""
    theirs = np.frombuffer(data, np.uint8).take(runs(start, sizes), mode="clip")
    return np.diff(bounds(theirs != np.frombuffer(spelled, np.uint8))[bounds(sizes)]) == 0


def _cells(spans: np.ndarray, leading: np.ndarray) -> np.ndarray:
    """Index of the first token of each cell; `spans` (N, 2). No two cells share a byte. A token with an empty span joins the
    next cell, unless it is `leading`, (N,) True for the first token of a text."""
    starts, ends = spans.T
    apart = np.maximum.accumulate(ends)[:-1] <= np.minimum.accumulate(starts[::-1])[::-1][1:]
    first = np.flatnonzero(np.concatenate([[True], apart]))
    empty = np.minimum.reduceat(starts, first) == np.maximum.reduceat(ends, first)
    return first[leading[first] | np.concatenate([[True], ~empty[:-1]])]


def _read_by_cells(
    data: bytes,
    places: np.ndarray,
    spelled: bytes,
    widths: np.ndarray,
    leading: np.ndarray,
    spans: np.ndarray,
    unknown: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, list[MaskedStretch]]:
    """Ends (N,), widths (N,) and masked stretches. `leading` (K,): index of each text's first token.

    A cell is exact if its bytes are those of the text up to the end of its span. It may begin before its span, since
    offsets leave out the space that `▁` stands for. Any other cell is masked, and its last token covers it. Text that no
    exact cell covers is masked too.
    """
    is_leading = np.zeros(len(widths), dtype=bool)
    is_leading[leading] = True
    first = _cells(spans, is_leading)
    sizes, end = np.add.reduceat(widths, first), np.maximum.reduceat(spans[:, 1], first)
    leads = np.flatnonzero(is_leading[first])  # each text's first cell
    done, start = np.append(0, end[:-1]), end - sizes
    done[leads] = places[:, 0]
    unknown = np.logical_or.reduceat(unknown, first)
    exact = ~unknown & (sizes > 0) & (start >= done) & _found(data, spelled, sizes, start)
    shift = start - bounds(sizes)[:-1]

    cell = np.repeat(np.arange(len(first)), np.diff(first, append=len(widths)))
    ends = np.where(exact[cell], np.cumsum(widths) + shift[cell], done[cell])
    widths = np.where(exact[cell], widths, 0)
    last = np.append(first[1:], len(widths))[~exact] - 1
    ends[last], widths[last] = end[~exact], (end - done)[~exact]

    done = np.append(done, end[np.append(leads[1:], len(first)) - 1])  # also what follows each text's last cell
    stop = np.append(np.where(exact, start, end), places[:, 1])
    unknown = np.append(unknown, np.zeros(len(places), dtype=bool))
    masked = [
        MaskedStretch(int(done[n]), int(stop[n]), "unknown_token" if unknown[n] else "normalized")
        for n in np.flatnonzero(done < stop)
    ]
    return ends, widths, masked


_DIFF_UNIT = re.compile(rb"[A-Za-z0-9]+|[\xc0-\xff][\x80-\xbf]*|[\x00-\xff]")


def _spans_by_difference(data: bytes, spelled: bytes, widths: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """(N, 2) start and end in `data` of each token's bytes, by `difflib`, for a tokenizer that gives no offsets.

    A token that touches an altered stretch gets the whole of it. Where a WordPiece tokenizer lost whitespace, a space is
    inserted for the comparison, so that equal words match.
    """
    rows = [spelled[end - width : end] for end, width in zip(np.cumsum(widths).tolist(), widths.tolist(), strict=True)]
    written = [b" " * is_lost + row for row, is_lost in zip(rows, lost.tolist(), strict=True)]
    ours, theirs = _DIFF_UNIT.findall(data), _DIFF_UNIT.findall(b"".join(written))
    our_at = list(accumulate(map(len, ours), initial=0))
    their_at = list(accumulate(map(len, theirs), initial=0))
    begin = np.full(their_at[-1] + 1, len(data))  # for a token whose first byte is at this index
    end = np.zeros(their_at[-1] + 1, dtype=np.int64)  # for a token that ends before this index
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        (i1, i2), (j1, j2) = (our_at[i1], our_at[i2]), (their_at[j1], their_at[j2])
        begin[j1:j2] = np.arange(i1, i2) if kind == "equal" else i1
        end[j1 + 1 : j2 + 1] = np.arange(i1 + 1, i2 + 1) if kind == "equal" else i2
    ends = accumulate(map(len, written))
    spans = [(int(begin[stop - len(row)]), int(end[stop])) for stop, row in zip(ends, rows, strict=True)]
    # An unknown token has no bytes to compare. It may stand for all the text between its neighbours.
    before = accumulate((stop if row else 0 for (_, stop), row in zip(spans, rows, strict=True)), max, initial=0)
    starts = [start if row else len(data) for (start, _), row in zip(spans, rows, strict=True)]
    after = [*accumulate(reversed(starts), min)][::-1]
    spans = [
        (min(span), max(span)) if row else (low, max(low, high))
        for span, row, low, high in zip(spans, rows, before, after, strict=False)
    ]
    return np.array(spans, dtype=np.int64).reshape(-1, 2)
