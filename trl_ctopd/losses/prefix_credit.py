"""Credit by what the teacher says of the beginning of a chunk: its probability that the text goes on with the bytes written so far.

F(e) is the log of the teacher's probability that the text from the chunk's start s on begins with b[s:e]. It is summed over the place
g where the teacher's last token of b[s:e] starts,

    exp F(e) = Σ_g Q(s:g) · Σ_{w: bytes(w) begins with b[g:e]} q(w | text before g),

Q(s:g) being the probability of the teacher's tokens between s and g; F(s) = 0. (Vieira et al. 2024, arXiv 2410.09303, equation 5, from a
chunk's start on.) Here g runs over the boundaries of the teacher's own tokens of the text, so that no further forward pass is needed
and F is at most the exact one. No paper uses F as credit.

Decisions: a prefix's tokens are a range of the vocabulary in the order of its bytes, so that a sum over them is the difference of two
cumulated probabilities, in float64. A chunk of which the two sides spell different bytes (markup of two templates, the end of a turn)
has no F. Where a later digit can undo the teacher's boundary, its boundaries within a number are not known before it ends: after the first
digit of a chunk, F is not known.

Letters as in `credit`; n teacher positions, R prefixes at one of them at most.
"""

from collections import defaultdict
from typing import NamedTuple

import torch

from .base import ScoredChunks
from .credit import FLOOR, closing, floored, outer_positions, spread
from .distributions import over_tiles


PREFIX_CREDITS = ("prefix", "remaining")
_COPIES = 8  # of a tile's logits that are alive at once; float64 counts twice


class Beginnings(NamedTuple):
    """
    log F where it is known, float64.

    `before`, `after` (B, S): F at the beginning and at the end of each student token, of the text that begins at its chunk's start.
    `after` of a chunk's last token does not say that the teacher's token ends there. `told` (B, S): where `after` is known. `known`
    (B, C): chunks that have F.
    """

    before: torch.Tensor
    after: torch.Tensor
    told: torch.Tensor
    known: torch.Tensor


class _Entries(NamedTuple):
    """What the F of a token adds up: `target` its position, counted through the rows of the batch one after the other; at the teacher
    position `place`, the tokens that begin with `prefix`, after tokens of the probability e^`log_q`."""

    target: int
    place: int
    prefix: bytes
    log_q: float


@torch.no_grad()
def beginnings(batch: ScoredChunks, closes: torch.Tensor) -> Beginnings:
    """
    F of all tokens but each chunk's last; of that too where `closes` (B, C) is True. Raises `ValueError` for a batch without the
    teacher's distributions.
    """
    if batch.teacher is None or batch.vocabulary is None:
        raise ValueError(
            f"The credits {' and '.join(PREFIX_CREDITS)} read the teacher's distributions, and the batch has none: choose another "
            "credit, or a teacher in this process."
        )
    entries, known = _entries(batch, closes.tolist())
    shape, device = batch.student_chunks.shape, batch.student_chunks.device
    places = sorted({entry.place for entry in entries})
    of_place: dict[int, list[_Entries]] = {place: [] for place in places}
    for entry in entries:
        of_place[entry.place].append(entry)
    most = max(map(len, of_place.values()), default=1)
    ranks = torch.zeros(len(places), most, 2, dtype=torch.long)
    slots, targets, log_q = [], [], []
    for row, found in enumerate(of_place.values()):
        for column, entry in enumerate(found):
            ranks[row, column] = torch.tensor(batch.vocabulary.places_beginning_with(entry.prefix))
            slots.append(row * most + column)
            targets.append(entry.target)
            log_q.append(entry.log_q)

    by_place = batch.vocabulary.prefixes.place.argsort()

    def masses(log_probs, ranks):
        upto = torch.nn.functional.pad(log_probs[:, by_place].double().exp().cumsum(1), (1, 0))
        low, high = ranks.unbind(2)
        return (upto.gather(1, high) - upto.gather(1, low),)

    at = torch.tensor(places, dtype=torch.long, device=device)
    tile = max(1, batch.tile_tokens // _COPIES)
    [found] = over_tiles(masses, tile, None, (batch.teacher, at), ranks.to(device))
    parts = found.flatten()[torch.tensor(slots, dtype=torch.long, device=device)].clamp(min=0)
    parts = parts * torch.tensor(log_q, dtype=torch.float64, device=device).exp()
    targets = torch.tensor(targets, dtype=torch.long, device=device)
    told = torch.zeros(shape.numel(), dtype=torch.bool, device=device).index_fill(0, targets, True).view(shape)
    mass = torch.zeros(shape.numel(), dtype=torch.float64, device=device).index_add(0, targets, parts).view(shape)
    after = mass.log().clamp(min=FLOOR).masked_fill(~told, 0)
    return Beginnings(_at_the_next_token(after, batch.student_chunks), after, told, known)


def _entries(batch: ScoredChunks, closes: list[list[bool]]) -> tuple[list[_Entries], torch.Tensor]:
    """What F adds up, and (B, C) the chunks that have it."""
    rows = batch.vocabulary.student_rows, batch.vocabulary.teacher_rows
    sides = [
        _by_chunk(chunks, ids)
        for chunks, ids in ((batch.student_chunks, batch.student_ids), (batch.teacher_chunks, batch.teacher_ids))
    ]
    log_probs = floored(batch.teacher_log_probs).flatten().tolist()
    entries, known = [], torch.zeros_like(batch.scorable)
    for row, chunk in batch.scorable.nonzero().tolist():
        own, theirs = (
            [(at, table[token]) for at, token in side[row, chunk]] for side, table in zip(sides, rows, strict=True)
        )
        text, read = (b"".join(token for _, token in side) for side in (own, theirs))
        dummy = len(read) - len(text)  # bytes that the teacher's dummy prefix puts before the text
        if not text or not 0 <= dummy <= 1 or not read.endswith(text):
            continue
        known[row, chunk] = True
        starts, start, log_q = [], 0, 0.0
        for place, token in theirs:
            starts.append((start, place, log_q))
            start, log_q = start + len(token), log_q + log_probs[place]
        end = dummy
        for target, token in own if closes[row][chunk] else own[:-1]:
            end += len(token)
            if batch.vocabulary.later_digits_undo and any(byte in b"0123456789" for byte in token):
                break
            entries += [_Entries(target, place, read[begin:end], q) for begin, place, q in starts if begin < end]
    return entries, known


def _by_chunk(chunks: torch.Tensor, ids: torch.Tensor) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """By row and chunk, position and id of each token."""
    found = defaultdict(list)
    for row, (numbers, tokens) in enumerate(zip(chunks.tolist(), ids.tolist(), strict=True)):
        for place, (chunk, token) in enumerate(zip(numbers, tokens, strict=True)):
            if chunk >= 0:
                found[row, chunk].append((row * len(numbers) + place, token))
    return found


def _at_the_next_token(values: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
    """(B, S) the value of the token before in the same chunk, 0 for a chunk's first; tokens of a chunk follow each other."""
    before = torch.nn.functional.pad(values, (1, 0))[:, :-1]
    same = torch.nn.functional.pad(chunks, (1, 0), value=-1)[:, :-1] == chunks
    return before.masked_fill(~same | (chunks < 0), 0)


class PrefixAdvantages(NamedTuple):
    """`tokens` (B, S): A_i; `close` (B, C): of the log p_close that ends a chunk, unlike its tokens'."""

    tokens: torch.Tensor
    close: torch.Tensor


@torch.no_grad()
def prefix_advantages(
    credit: str, batch: ScoredChunks, gap: torch.Tensor, close_log_probs: torch.Tensor | None
) -> tuple[PrefixAdvantages, torch.Tensor]:
    """
    With P_i = Σ log p of the chunk's tokens before i (closed chunks: less log p_close at its start),

        remaining  A_i = gap − [F(e_{i−1}) − P_i]
        prefix     A_i = F(e_i) − F(e_{i−1}) − (P_{i+1} − P_i), and a chunk's last token as with `remaining`, so that Σ_i A_i = gap.

    In both, log p_close at a chunk's end has gap − [F(e) − P] after its last token. `remaining` takes off what rests on the text before
    token i alone, so that the expectation is that of credit `macro` where no later text moves a boundary of the teacher's.

    Args:
        credit: one of `PREFIX_CREDITS`.
        batch: with distributions.
        gap (B, C): of the chunks.
        close_log_probs (B, S): of the policy, for closed chunks, else None.

    Returns:
        The advantages; where a chunk has no F, each is its gap. And (B, C) the chunks of several student tokens that have none.
    """
    chunks, count = batch.student_chunks, batch.num_chunks
    before, after = (torch.zeros_like(gap),) * 2 if close_log_probs is None else closing(close_log_probs, chunks, count)
    f = beginnings(batch, after != 0)
    first, last = outer_positions(chunks, count)
    position = torch.arange(chunks.shape[1], device=chunks.device).expand_as(chunks)
    ends = position == spread(last, chunks)
    own = batch.policy_log_probs - spread(before, chunks) * (position == spread(first, chunks))
    own = own.masked_fill(chunks < 0, 0)
    written = own.cumsum(1)
    start = written.gather(1, first.clamp(max=chunks.shape[1] - 1)) - own.gather(
        1, first.clamp(max=chunks.shape[1] - 1)
    )
    upto = written - spread(start, chunks)  # P_{i+1}
    told_before = _at_the_next_token(f.told, chunks)
    past = (f.before - (upto - own)).to(gap.dtype) * told_before  # F - P, of the text before a token
    now = (f.after - upto).to(gap.dtype) * f.told
    left = spread(gap, chunks) - past
    tokens = left if credit == "remaining" else torch.where(f.told & ~ends, now - past, left)
    close = gap - now.gather(1, last.clamp(min=0)) * (after != 0)
    unknown = ~f.known & (batch.student_tokens > 1) & batch.scorable
    return PrefixAdvantages(tokens.masked_fill(chunks < 0, 0), close), unknown
