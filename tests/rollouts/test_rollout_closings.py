"""What closed chunks read of a rollout, against a loop over its chunks, on random ones."""

import random

import numpy as np
import pytest
import torch

from trl_ctopd.rollouts.closing import add_going_on, ends, without_unclosed
from trl_ctopd.rollouts.pairing import Prompt, Rollout, collate


class Table:
    """As `Continuations`: with what each teacher token goes on."""

    def __init__(self, rng: random.Random):
        self.known = {token: sorted(rng.sample(range(90), rng.choice([0, 0, 3, 40]))) for token in range(50)}

    def of(self, token: int) -> np.ndarray:
        return np.array(self.known[token], dtype=np.int64)


def random_rollout(rng: random.Random, ended: bool) -> Rollout:
    """Chunks of one to three tokens a side, with masked stretches between them, of which a side may have no token."""
    sides, chunk = ([], []), 0
    for _ in range(rng.randrange(8)):
        masked = rng.random() < 0.3
        for side in sides:
            side += [-1 if masked else chunk] * rng.randrange(0 if masked else 1, 4)
        chunk += not masked
    student, teacher = (np.array(side, dtype=np.int64) for side in sides)
    ids = [[rng.randrange(size) for _ in side] for size, side in zip((90, 50), (student, teacher), strict=True)]
    return Rollout(
        Prompt([1] * rng.randrange(1, 4), [2]),
        student_ids=ids[0],
        student_chunks=student,
        student_widths=np.ones_like(student),
        teacher_ids=ids[1],
        teacher_chunks=teacher,
        num_chunks=chunk,
        ended=ended,
        unread=False,
        alignment=None,
        teacher_prompt_ids=[2],
    )


def reference_ends(rollout: Rollout) -> list[int]:
    """At each chunk's two edges, the teacher token that lies before."""
    found = [-1] * (len(rollout.student_ids) + 1)
    for chunk in range(rollout.num_chunks):
        inside = [
            [i for i, c in enumerate(side) if c == chunk] for side in (rollout.student_chunks, rollout.teacher_chunks)
        ]
        if inside[1][0] > 0:
            found[inside[0][0]] = rollout.teacher_ids[inside[1][0] - 1]
    for chunk in range(rollout.num_chunks):  # an end says more than a beginning
        inside = [
            [i for i, c in enumerate(side) if c == chunk] for side in (rollout.student_chunks, rollout.teacher_chunks)
        ]
        found[inside[0][-1] + 1] = rollout.teacher_ids[inside[1][-1]]
    return found


rollouts = pytest.mark.parametrize("seed", range(40))


@rollouts
def test_a_chunks_edges_have_the_teachers_token_that_lies_before_them(seed):
    rollout = random_rollout(random.Random(seed), ended=True)
    assert ends(rollout).tolist() == reference_ends(rollout)


@rollouts
@pytest.mark.parametrize("ended", [True, False])
def test_the_last_chunk_of_a_text_that_was_cut_off_is_left_out_where_its_token_might_go_on(seed, ended):
    rng = random.Random(seed)
    rollout, table = random_rollout(rng, ended), Table(rng)
    found = without_unclosed(rollout, table)
    token = reference_ends(rollout)[-1]
    drops = not ended and token >= 0 and bool(table.known[token])
    last = rollout.num_chunks - 1
    for own, left in ((rollout.student_chunks, found.student_chunks), (rollout.teacher_chunks, found.teacher_chunks)):
        assert left.tolist() == [-1 if drops and chunk == last else chunk for chunk in own]
    assert without_unclosed(rollout, None) is rollout


def test_some_of_these_texts_lose_a_chunk_and_some_do_not():
    rngs = [random.Random(seed) for seed in range(40)]
    lost = [
        without_unclosed(rollout, Table(rng)) is not rollout for rng in rngs for rollout in [random_rollout(rng, False)]
    ]
    assert 5 < sum(lost) < 35


@rollouts
def test_the_pairs_are_the_places_and_tokens_that_go_on_there_without_the_one_that_was_drawn(seed):
    rng = random.Random(seed)
    rows = [random_rollout(rng, ended=True) for _ in range(4)]
    tables = [Table(rng), None, Table(rng), Table(rng)]
    batch = collate(rows, 0)
    add_going_on(batch, rows, tables)
    wanted, scored = {}, set()
    for row, (rollout, table) in enumerate(zip(rows, tables, strict=True)):
        begin = len(rollout.prompt.student_ids)
        for place, token in enumerate(reference_ends(rollout)[:-1]):
            goes_on = table.known[token] if table is not None and token >= 0 else []
            if goes_on or rollout.student_chunks[place] >= 0:
                scored.add((row, begin + place - 1))
            if goes_on:
                wanted[row, begin + place - 1] = {*goes_on} - {rollout.student_ids[place]}
    length = batch["input_ids"].shape[1]
    places = [(row, column + length) for row, column in batch["scored"].T.tolist()]
    assert set(places) == scored and len(places) == len(scored)
    found: dict[tuple[int, int], set[int]] = {}
    for place, token in batch["going_on"].T.tolist():
        assert token not in found.setdefault(places[place], set())
        found[places[place]].add(token)
    assert found == {place: tokens for place, tokens in wanted.items() if tokens}
    blocks = batch["going_on"][1] >> 4
    assert torch.equal(blocks, blocks.sort().values), "in the order in which the head's tiles come"
