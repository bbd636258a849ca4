"""Where the student leaves a teacher's token closed, or might go on with it: what closed chunks read of a rollout.

Decisions
- At a chunk's end the student's next distribution tells how likely it is to leave the teacher's last token closed. That is
  the row which the next token is drawn from, whether this is scored or not, so it is projected anyway, or is one row more.
- The next token that was drawn did close it, whatever the table says of it: it is never among those that go on.
- After masked text a chunk begins where the teacher's token before it is closed, so what closes that one is told too.
- A text that was cut off has no next distribution at its end. Its last chunk takes no part, unless nothing can go on there.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..text.continuations import Continuations
from .pairing import Rollout, pad_rows


def ends(rollout: Rollout) -> np.ndarray:
    """(S + 1,) the teacher token that ends right before each student token, and before what would come next, where a chunk
    begins or ends there; -1 elsewhere."""
    found = np.full(len(rollout.student_ids) + 1, -1)
    teacher_ids = np.array(rollout.teacher_ids, dtype=np.int64)
    student_first, student_last = _outer(rollout.student_chunks, rollout.num_chunks)
    teacher_first, teacher_last = _outer(rollout.teacher_chunks, rollout.num_chunks)
    there = (student_last >= 0) & (teacher_last >= 0)
    begins = there & ~np.isin(teacher_first, [-1, 0, *rollout.teacher_starts])
    found[student_first[begins]] = teacher_ids[teacher_first[begins] - 1]
    found[student_last[there] + 1] = teacher_ids[teacher_last[there]]
    return found


def _outer(chunks: np.ndarray, num_chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """(C,) first and last place of each chunk's tokens; -1 for none."""
    places = np.flatnonzero(chunks >= 0)
    first, last = np.full(num_chunks, -1), np.full(num_chunks, -1)
    first[chunks[places[::-1]]] = places[::-1]
    last[chunks[places]] = places
    return first, last


def without_unclosed(rollout: Rollout, continuations: Continuations | None) -> Rollout:
    """Of a text that was cut off, without its last chunk, if the teacher's last token might go on there."""
    if continuations is None or rollout.ended or not len(rollout.student_chunks):
        return rollout
    token, chunk = ends(rollout)[-1], rollout.student_chunks.max()
    if token < 0 or not len(continuations.of(int(token))):
        return rollout
    student, teacher = (np.where(own == chunk, -1, own) for own in (rollout.student_chunks, rollout.teacher_chunks))
    return replace(rollout, student_chunks=student, teacher_chunks=teacher)


def add_going_on(batch: dict, rollouts: Sequence[Rollout], continuations: Sequence[Continuations | None]):
    """
    Gives what `collate` made of `rollouts` the `going_on` (2, K): places among the `scored` tokens, and the student ids that
    would go on with the teacher's token there; `scored` then counts the rows too that tell only how the chunk before closes.
    In the order that `ClosingLogProbFunction` reads them.
    """
    length, starts = batch["input_ids"].shape[1], batch["prompt_lengths"].tolist()
    tokens = [ends(rollout)[:-1] for rollout in rollouts]
    for own, table in zip(tokens, continuations, strict=True):
        own[[token >= 0 and (table is None or not len(table.of(token))) for token in own.tolist()]] = -1
    grid = pad_rows(tokens, length, -1, starts)[:, 1:]
    row, column = ((batch["student_chunks"] >= 0) | (grid >= 0)).nonzero(as_tuple=True)
    batch["scored"] = torch.stack([row, column - length])

    drawn = batch["input_ids"][row, column + 1].tolist()
    places, ids = [], []
    for place, (own, token, next_id) in enumerate(zip(row.tolist(), grid[row, column].tolist(), drawn, strict=True)):
        if token >= 0:
            found = continuations[own].of(token)
            found = found[found != next_id]
            places.append(np.full(len(found), place))
            ids.append(found)
    places, ids = (np.concatenate([np.zeros(0, dtype=np.int64), *parts]) for parts in (places, ids))
    order = np.argsort((ids >> 4).astype(np.uint16), kind="stable")
    batch["going_on"] = torch.from_numpy(np.stack([places[order], ids[order]]))
