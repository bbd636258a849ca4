"""Where the student leaves a teacher's token closed, or might go on with it, and the teacher a student's: what closed chunks read of
a rollout.

Decisions
- At a chunk's end the student's next distribution tells how likely it is to leave the teacher's last token closed. That is
  the row which the next token is drawn from, whether this is scored or not, so it is projected anyway, or is one row more.
- The same holds the other way round, with the teacher's distribution before its next token: a student whose tokens hold several of the
  teacher's says by a short one that none of the longer ones is meant, and the teacher's token does not say so.
- The next token that was drawn did close it, whatever the table says of it: it is never among those that go on.
- After masked text a chunk begins where the teacher's token before it is closed, so what closes that one is told too.
- A text that was cut off has no next distribution at its end. Its last chunk takes no part, unless nothing can go on there. The same
  holds for the teacher's where the end of the turn is masked, since the teacher does not read it then.
- Whether it takes part rests on the tokens that were drawn. A loss that adds what it expects of tokens that were not drawn would then
  miss these, and move a perfect student. For losses on distributions the chunk stays, and its gap is 0 (`ScoredChunks.unclosed`).
- Where the next token does not decide whether the boundary stays (`Continuations.undecided`), no chunk ends. This rests on the
  text before alone: were it to rest on what follows, the chunks' gaps would no longer be 0 for a perfect student.
- In a mixture of teachers each closes its own token, and log p_close is the weighted mean of theirs (rollouts/blending.py). The row
  of a place where several tell it is projected once for each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..models.closing import in_tile_order
from ..text.continuations import Continuations
from .pairing import Rollout, pad_rows


Tables = Mapping[str, Continuations | None]  # by a teacher's name, with what its tokens go on


def ends(rollout: Rollout) -> np.ndarray:
    """(S + 1,) the teacher token that ends right before each student token, and before what would come next, where a chunk
    begins or ends there; -1 elsewhere."""
    sides = (rollout.teacher_ids, rollout.teacher_chunks), (rollout.student_ids, rollout.student_chunks)
    return _before(*sides, rollout.num_chunks, rollout.teacher_starts)


def student_ends(rollout: Rollout) -> np.ndarray:
    """(T + 1,) the student token that ends right before each teacher token, as `ends`."""
    sides = (rollout.student_ids, rollout.student_chunks), (rollout.teacher_ids, rollout.teacher_chunks)
    return _before(*sides, rollout.num_chunks, [stop for _, stop in rollout.given])


def _before(ended, beginning, num_chunks: int, starts: Sequence[int]) -> np.ndarray:
    """(L + 1,) the token of one side, its ids and chunks, that ends right before each of the L of the other, where a chunk begins or
    ends. `starts`: places of the first at which a turn begins."""
    (ids, chunks), (others, other_chunks) = ended, beginning
    found, ids = np.full(len(others) + 1, -1), np.array(ids, dtype=np.int64)
    first, last = _outer(chunks, num_chunks)
    other_first, other_last = _outer(other_chunks, num_chunks)
    there = (last >= 0) & (other_last >= 0)
    begins = there & ~np.isin(first, [-1, 0, *starts])
    found[other_first[begins]] = ids[first[begins] - 1]
    found[other_last[there] + 1] = ids[last[there]]
    return found


def _outer(chunks: np.ndarray, num_chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """(C,) first and last place of each chunk's tokens; -1 for none."""
    places = np.flatnonzero(chunks >= 0)
    first, last = np.full(num_chunks, -1), np.full(num_chunks, -1)
    first[chunks[places[::-1]]] = places[::-1]
    last[chunks[places]] = places
    return first, last


def views(rollout: Rollout) -> Iterator[tuple[float, Rollout]]:
    """Of each teacher that reads the rollout: its weight, and the rollout as it reads it, with the chunks of all."""
    if not rollout.num_chunks:
        return
    if not rollout.parts:
        yield 1.0, rollout
    for part in rollout.parts:
        own = {"student_chunks": rollout.student_chunks, "teacher_chunks": part.chunks}
        yield part.weight, replace(part.rollout, num_chunks=rollout.num_chunks, **own)


def _may_go_on(table: Continuations | None, token: int) -> bool:
    return token >= 0 and table is not None and len(table.of(token)) > 0


def _undecided(table: Continuations | None, token: int) -> bool:
    return token >= 0 and table is not None and table.undecided(token)


def _reverse(table: Continuations | None) -> Continuations | None:
    return None if table is None else table.reverse


def without_undecided(rollout: Rollout, tables: Tables) -> Rollout:
    """With each chunk that ends after an undecided token, of a teacher's or of the student's, joined with the next one, if that follows at
    once. The joined chunk has the number of the first."""
    told = []  # a table, the tokens that end before each of one side, and that side's chunks
    for _, view in views(rollout):
        table = tables[view.prompt.teacher]
        for own, found, chunks in (
            (table, ends, view.student_chunks),
            (_reverse(table), student_ends, view.teacher_chunks),
        ):
            if own is not None and own.later_digits_undo:
                told.append((own, found(view), _outer(chunks, rollout.num_chunks)[0]))
    if not told:
        return rollout
    teachers = [part.chunks for part in rollout.parts] or [rollout.teacher_chunks]
    joins = np.arange(rollout.num_chunks) > 0  # with the one before
    for side in (rollout.student_chunks, *teachers):
        first, last = _outer(side, rollout.num_chunks)
        joins[1:] &= (last[:-1] >= 0) & (first[1:] == last[:-1] + 1)
    for chunk in np.flatnonzero(joins):
        joins[chunk] = any(_undecided(table, int(before[first[chunk]])) for table, before, first in told)
    number = np.maximum.accumulate(np.where(joins, 0, np.arange(rollout.num_chunks)))

    def renumbered(chunks: np.ndarray) -> np.ndarray:
        return np.where(chunks >= 0, number[chunks], -1)

    return replace(
        rollout,
        student_chunks=renumbered(rollout.student_chunks),
        teacher_chunks=renumbered(rollout.teacher_chunks),
        parts=tuple(replace(part, chunks=renumbered(part.chunks)) for part in rollout.parts),
    )


def unclosed(rollout: Rollout, tables: Tables) -> int:
    """Of a text that was cut off, or whose end is masked, its last chunk, if nothing tells of a side's last token whether it goes on
    there and it might; else -1."""
    last = []
    for _, view in views(rollout):
        table = tables[view.prompt.teacher]
        last += [(table, int(ends(view)[-1])), (_reverse(table), int(student_ends(view)[-1]))]
    if not any(_may_go_on(*own) or _undecided(*own) for own in last):
        return -1
    if rollout.ended and rollout.student_chunks[-1] >= 0:  # the end itself is the last chunk
        return -1
    return int(rollout.student_chunks.max())


def without(rollout: Rollout, chunk: int) -> Rollout:
    """With a chunk that takes no part; the same where `chunk` is -1."""
    if chunk < 0:
        return rollout
    student, teacher = (np.where(own == chunk, -1, own) for own in (rollout.student_chunks, rollout.teacher_chunks))
    return replace(rollout, student_chunks=student, teacher_chunks=teacher)


def look_up(texts: Sequence[tuple[Rollout, Continuations | None]]):
    """Finds what `teacher_going_on` reads of these texts and tables, which remember it: another thread can then call that."""
    for view, table in texts:
        if (reverse := _reverse(table)) is not None:
            for token in student_ends(view).tolist():
                if token >= 0:
                    reverse.of(token)


def teacher_going_on(view: Rollout, table: Continuations | None) -> tuple[np.ndarray, np.ndarray]:
    """(K,) places among the teacher's tokens, and (K,) teacher ids with which the student's token before that place would go on, without
    the id that is there."""
    reverse, places, ids = _reverse(table), [], []
    if reverse is not None:
        for place, (token, read) in enumerate(zip(student_ends(view).tolist(), view.teacher_ids, strict=False)):
            if token >= 0:
                found = reverse.of(token)
                ids.append(found[found != read])
                places.append(np.full(len(ids[-1]), place))
    nothing = np.zeros(0, dtype=np.int64)
    return np.concatenate([nothing, *places]), np.concatenate([nothing, *ids])


def folded(log_probs: torch.Tensor, close: torch.Tensor, chunks: np.ndarray, num_chunks: int) -> torch.Tensor:
    """(T,) a teacher's log-probs with those of closing (T,) in them: taken off each chunk's first token, added to its last."""
    first, last = (torch.as_tensor(own[own >= 0], device=close.device) for own in _outer(chunks, num_chunks))
    after = nn.functional.pad(close, (0, 1))[last + 1]
    return log_probs.index_add(0, first, -close[first]).index_add(0, last, after)


def add_going_on(batch: dict, rollouts: Sequence[Rollout], tables: Tables):
    """
    Gives what `collate` made of `rollouts` the `going_on` (2, K): places among the `scored` tokens, and the student ids that
    would go on with the teacher's token there; `scored` then counts the rows too that tell only how the chunk before closes.
    In the order of `in_tile_order`.

    With mixtures of teachers, also `scored_again` (2, m), places that come after the `scored`, for the second and further teachers'
    tokens; and `close_weights` (n + m,), what log p_close at each counts.
    """
    length, starts = batch["input_ids"].shape[1], batch["prompt_lengths"].tolist()
    told = [[(weight, view.prompt.teacher, ends(view)) for weight, view in views(rollout)] for rollout in rollouts]
    most = max(1, *map(len, told))
    weights, grids = torch.zeros(most, len(told)), []
    for n in range(most):  # every row's n-th teacher
        tokens = [np.full(0, -1)] * len(told)
        for row, own in enumerate(told):
            if n < len(own):
                weights[n, row], name, found = own[n]
                tokens[row] = np.array([t if _may_go_on(tables[name], t) else -1 for t in found[:-1].tolist()])
        grids.append(pad_rows(tokens, length, -1, starts)[:, 1:])
    grid = torch.stack(grids)

    once = (batch["student_chunks"] >= 0) | (grid >= 0).any(0)
    again = (grid >= 0).index_fill(0, torch.tensor(0), False)
    nth, row, column = torch.cat([once[None].nonzero(), again.nonzero()]).T
    batch["scored"], scored_again = torch.stack([row, column - length]).split([int(once.sum()), int(again.sum())], 1)
    if any(rollout.parts for rollout in rollouts):
        batch["scored_again"], batch["close_weights"] = scored_again, weights[nth, row]

    drawn = batch["input_ids"][row, column + 1].tolist()
    places, ids = [], []
    for place, (n, own, token, next_id) in enumerate(
        zip(nth.tolist(), row.tolist(), grid[nth, row, column].tolist(), drawn, strict=True)
    ):
        if token >= 0:
            found = tables[told[own][n][1]].of(token)
            found = found[found != next_id]
            places.append(np.full(len(found), place))
            ids.append(found)
    batch["going_on"] = in_tile_order(places, ids)
