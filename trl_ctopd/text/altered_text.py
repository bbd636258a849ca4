"""A text that its tokens do not spell as it stands: where each of them comes from in it, and what no token spells.

A normalizer may compose letters, change case, drop or collapse whitespace; a vocabulary may lack a character. What the
tokens spell is then compared with the text, cell by cell: the fewest neighbouring tokens that share no byte of the text
with any other.

Letters: K texts, parts of the bytes `data`, and their N tokens one after the other, which spell the bytes `spelled`.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from .chunks import bounds, runs
from .token_bytes import TokenTable


REASONS = ("invalid_utf8", "whitespace", "unknown_token", "normalized", "markup", "thought", "call")


@dataclass(frozen=True)
class MaskedStretch:
    """Bytes `start:end` that no chunk holds, of `text.encode()` or of a whole batch's.

    `reason`: "invalid_utf8" (the student wrote it), "whitespace" (lost by the student's WordPiece), "unknown_token"
    (the teacher's vocabulary has none for it), "normalized" (the teacher's tokens do not spell the text as it stands:
    its normalizer changed it, or dropped whitespace), "markup", "thought" and "call" (the teacher's template has no place
    for one).
    """

    start: int
    end: int
    reason: str


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
    """Where in `data` each token ends (N,), how many of its bytes it covers (N,), and what is masked.

    Args:
        data: bytes that hold the K texts.
        places: (K, 2) each text's first byte in `data`, and the one after its last.
        spelled: what each text's tokens spell.
        ids, widths: (N,) the tokens, and how many of the bytes that they spell are each one's.
        counts: (K,) tokens in each text, at least one.
        table: of their tokenizer.
        token_to_chars: its word on where a text's n-th token comes from, in characters; None where it has none.
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
    """(N, 2) where in `data` each token's bytes come from; `first` (K + 1,) tokens before each text and in all.

    The tokenizer is asked for one token in `_ASKED_EVERY`, the next that ends a character, since it answers in whole ones.
    Where a group's tokens spell what then stands in their place in `data`, that is where they come from; in other
    groups it is asked for each.
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
    shift = ask(asked)[:, 1] - ends[asked]  # from a byte's place in `spelled` to its place in `data`

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
    """(L,) whether a byte is the first of its character."""
    return (np.frombuffer(data, np.uint8) & 0xC0) != 0x80


def _found(data: bytes, spelled: bytes, sizes: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(G,) of groups of bytes that make up `spelled`, whether each stands in `data` from `start` on."""
    theirs = np.frombuffer(data, np.uint8).take(runs(start, sizes), mode="clip")
    return np.diff(bounds(theirs != np.frombuffer(spelled, np.uint8))[bounds(sizes)]) == 0


def _cells(spans: np.ndarray, leading: np.ndarray) -> np.ndarray:
    """The first token of each cell: tokens (N, 2) grouped so that no two cells share a byte. An empty span joins the
    next, but for one that is `leading` (N,), the first of a text."""
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
    """Ends, widths (N,) and masked stretches of tokens of which `leading` (K,) begin a text.

    A cell whose bytes are the text's, up to the end of its span, is exact; it may begin before its span, since offsets
    leave out the space that `▁` stands for. Any other cell is masked, its last token covering it, and so is the text
    that no exact cell covers.
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

    done = np.append(done, end[np.append(leads[1:], len(first)) - 1])  # what follows each text's last cell, too
    stop = np.append(np.where(exact, start, end), places[:, 1])
    unknown = np.append(unknown, np.zeros(len(places), dtype=bool))
    masked = [
        MaskedStretch(int(done[n]), int(stop[n]), "unknown_token" if unknown[n] else "normalized")
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
