"""A text that its tokens do not spell as it stands: where each of them comes from in it, and what no token spells.

A normalizer may compose letters, change case, drop or collapse whitespace; a vocabulary may lack a character. What the
tokens spell is then compared with the text, cell by cell: the fewest neighbouring tokens that share no byte of the text
with any other.

Letters: N tokens, which spell the bytes `spelled`, of a text whose bytes are `data`.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np


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


_ASKED_EVERY = 16  # tokens


def spans_by_asking(
    data: bytes, spelled: bytes, widths: np.ndarray, ends: np.ndarray, token_to_chars: Callable[[int], tuple[int, int]]
) -> np.ndarray:
    """(N, 2) where in `data` each token's bytes come from.

    The tokenizer is asked for one token in `_ASKED_EVERY`. Where the tokens up to the next one spell what stands there
    in `data`, their places follow from its own; elsewhere it is asked for each.
    """
    begins_character = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
    at = np.append(np.flatnonzero(begins_character), len(data))

    def ask(tokens: np.ndarray) -> np.ndarray:
        return at[np.array([token_to_chars(token) for token in tokens.tolist()], dtype=np.int64).reshape(-1, 2)]

    first = np.arange(0, len(widths), _ASKED_EVERY)
    shift = ask(first)[:, 1] - ends[first]  # from a byte's place in `spelled` to its place in `data`
    start = ends[first] - widths[first] + shift
    found = _found(data, spelled, np.add.reduceat(widths, first), start) & (np.minimum.reduceat(widths, first) > 0)
    spans = np.stack([ends - widths, ends], 1) + np.repeat(shift, _ASKED_EVERY)[: len(widths), None]
    others = np.flatnonzero(~np.repeat(found, _ASKED_EVERY)[: len(widths)])
    spans[others] = ask(others)
    return spans


def _found(data: bytes, spelled: bytes, sizes: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(G,) of groups of bytes that make up `spelled`, whether each stands in `data` from `start` on."""
    begin = np.cumsum(sizes) - sizes
    place = np.arange(len(spelled)) + np.repeat(start - begin, sizes)
    differs = np.frombuffer(data, np.uint8).take(place, mode="clip") != np.frombuffer(spelled, np.uint8)
    return np.diff(np.append(0, np.cumsum(differs))[np.append(begin, len(spelled))]) == 0


def _cells(spans: np.ndarray) -> np.ndarray:
    """The first token of each cell: tokens (N, 2) grouped so that no two cells share a byte. An empty span joins the
    next."""
    starts, ends = spans.T
    apart = np.maximum.accumulate(ends)[:-1] <= np.minimum.accumulate(starts[::-1])[::-1][1:]
    first = np.flatnonzero(np.concatenate([[True], apart]))
    empty = np.minimum.reduceat(starts, first) == np.maximum.reduceat(ends, first)
    return first[np.concatenate([[True], ~empty[:-1]])]


def read_by_cells(
    data: bytes, spelled: bytes, widths: np.ndarray, spans: np.ndarray, unknown: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[MaskedStretch]]:
    """Ends, widths (N,) and masked stretches of tokens that do not spell `data` as a whole.

    A cell whose bytes are the text's, up to the end of its span, is exact; it may begin before its span, since offsets
    leave out the space that `▁` stands for. Any other cell is masked, its last token covering it, and so is the text
    that no exact cell covers.
    """
    first = _cells(spans)
    sizes, end = np.add.reduceat(widths, first), np.maximum.reduceat(spans[:, 1], first)
    done, start = np.append(0, end[:-1]), end - sizes
    unknown = np.logical_or.reduceat(unknown, first)
    exact = ~unknown & (sizes > 0) & (start >= done) & _found(data, spelled, sizes, start)
    shift = start - (np.cumsum(sizes) - sizes)

    cell = np.repeat(np.arange(len(first)), np.diff(first, append=len(widths)))
    ends = np.where(exact[cell], np.cumsum(widths) + shift[cell], done[cell])
    widths = np.where(exact[cell], widths, 0)
    last = np.append(first[1:], len(widths))[~exact] - 1
    ends[last], widths[last] = end[~exact], (end - done)[~exact]

    done, stop = np.append(done, end[-1]), np.append(np.where(exact, start, end), len(data))
    unknown = np.append(unknown, False)
    masked = [
        MaskedStretch(int(done[n]), int(stop[n]), "unknown_token" if unknown[n] else "normalized")
        for n in np.flatnonzero(done < stop)
    ]
    return ends, widths, masked


_DIFF_UNIT = re.compile(rb"[A-Za-z0-9]+|[\xc0-\xff][\x80-\xbf]*|[\x00-\xff]")


def spans_by_difference(data: bytes, spelled: bytes, widths: np.ndarray, lost: np.ndarray) -> np.ndarray:
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
