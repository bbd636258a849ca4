"""What closed chunks read of a rollout, against a loop over its chunks, on random ones."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from trl_ctopd.rollouts.blending import blended
from trl_ctopd.rollouts.closing import (
    add_going_on,
    ends,
    folded,
    student_ends,
    teacher_going_on,
    unclosed,
    without,
    without_undecided,
)
from trl_ctopd.rollouts.pairing import Prompt, Rollout, collate


class Table:
    """As `Continuations`: with what each of `tokens` goes on, of `others`, and which are undecided. `reverse`: whether it has one."""

    def __init__(self, rng: random.Random, undecided: float = 0.0, reverse: bool = False, tokens=50, others=90):
        self.known = {token: sorted(rng.sample(range(others), rng.choice([0, 0, 3, 40]))) for token in range(tokens)}
        self.later_digits_undo = undecided > 0
        self.digits = {token for token in range(tokens) if rng.random() < undecided} if undecided else set()
        self.reverse = Table(rng, undecided, False, others, tokens) if reverse else None

    def undecided(self, token: int) -> bool:
        return token in self.digits

    def of(self, token: int) -> np.ndarray:
        return np.array(self.known[token], dtype=np.int64)


def random_rollout(rng: random.Random, ended: bool, name: str = "") -> Rollout:
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
        Prompt([1] * rng.randrange(1, 4), [2], teacher=name),
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


def exchanged(rollout: Rollout) -> Rollout:
    """The student in the teacher's place."""
    return replace(
        rollout,
        student_ids=rollout.teacher_ids,
        teacher_ids=rollout.student_ids,
        student_chunks=rollout.teacher_chunks,
        teacher_chunks=rollout.student_chunks,
    )


@rollouts
def test_the_same_holds_with_the_two_sides_exchanged(seed):
    rollout = random_rollout(random.Random(seed), ended=True)
    assert student_ends(rollout).tolist() == reference_ends(exchanged(rollout))


@rollouts
def test_the_teacher_is_asked_for_what_goes_on_with_the_students_tokens_but_for_what_it_reads_there(seed):
    rng = random.Random(seed)
    rollout, table = random_rollout(rng, ended=True), Table(rng, reverse=True)
    places, ids = teacher_going_on(rollout, table)
    wanted = {
        (place, token)
        for place, before in enumerate(reference_ends(exchanged(rollout))[:-1])
        if before >= 0
        for token in {*table.reverse.known[before]} - {rollout.teacher_ids[place]}
    }
    assert sorted(wanted) == sorted(zip(places.tolist(), ids.tolist(), strict=True))
    for none in (None, Table(rng)):
        assert not len(teacher_going_on(rollout, none)[0])


@rollouts
def test_folded_in_closings_are_taken_off_a_chunks_first_token_and_added_to_its_last(seed):
    rollout = random_rollout(random.Random(seed), ended=True)
    generator = torch.Generator().manual_seed(seed)
    log_probs, close = torch.randn(2, len(rollout.teacher_ids), generator=generator, dtype=torch.float64)
    wanted, chunks = log_probs.tolist(), rollout.teacher_chunks.tolist()
    for chunk in range(rollout.num_chunks):
        inside = [place for place, own in enumerate(chunks) if own == chunk]
        wanted[inside[0]] -= close[inside[0]].item()
        wanted[inside[-1]] += close[inside[-1] + 1].item() if inside[-1] + 1 < len(chunks) else 0.0
    found = folded(log_probs, close, rollout.teacher_chunks, rollout.num_chunks)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


@rollouts
@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("ended", [True, False])
def test_the_last_chunk_of_a_text_without_an_end_is_left_out_where_a_sides_token_might_go_on(seed, ended, reverse):
    rng = random.Random(seed)
    rollout, table = random_rollout(rng, ended), Table(rng, reverse=reverse)
    found = without(rollout, unclosed(rollout, {"": table}))
    token, own = reference_ends(rollout)[-1], reference_ends(exchanged(rollout))[-1]
    drops = token >= 0 and bool(table.known[token])
    drops |= reverse and own >= 0 and bool(table.reverse.known[own])
    drops = drops and not (ended and rollout.student_chunks[-1] >= 0)
    last = rollout.num_chunks - 1
    for own, left in ((rollout.student_chunks, found.student_chunks), (rollout.teacher_chunks, found.teacher_chunks)):
        assert left.tolist() == [-1 if drops and chunk == last else chunk for chunk in own]
    assert without(rollout, unclosed(rollout, {"": None})) is rollout


@rollouts
def test_a_text_that_was_cut_off_after_an_undecided_token_loses_its_last_chunk(seed):
    rng = random.Random(seed)
    rollout, table = random_rollout(rng, False), Table(rng, undecided=1.0)
    found = without(rollout, unclosed(rollout, {"": table}))
    last = rollout.num_chunks - 1 if reference_ends(rollout)[-1] >= 0 else None
    assert found.student_chunks.tolist() == [-1 if chunk == last else chunk for chunk in rollout.student_chunks]


@rollouts
@pytest.mark.parametrize("reverse", [True, False])
def test_chunks_after_whose_end_the_next_token_does_not_decide_are_joined_with_the_next(seed, reverse):
    rng = random.Random(seed)
    rollout, table = random_rollout(rng, True), Table(rng, undecided=0.3 if reverse else 0.5, reverse=reverse)
    wanted = [rollout.student_chunks.tolist(), rollout.teacher_chunks.tolist()]
    for chunk in range(1, rollout.num_chunks):
        places = [side.index(number) for side, number in zip(wanted, (chunk, chunk), strict=True)]
        before = [rollout.student_chunks[places[0] - 1], rollout.teacher_chunks[places[1] - 1]] if min(places) else []
        undecided = rollout.teacher_ids[places[1] - 1] in table.digits if min(places) else False
        if reverse and min(places):
            undecided |= rollout.student_ids[places[0] - 1] in table.reverse.digits
        if before == [chunk - 1] * 2 and undecided:
            for side in wanted:
                number = side[side.index(chunk) - 1]
                side[:] = [number if own == chunk else own for own in side]
    found = without_undecided(rollout, {"": table})
    assert [found.student_chunks.tolist(), found.teacher_chunks.tolist()] == wanted
    assert all(without_undecided(rollout, {"": none}) is rollout for none in (Table(rng), None))


@rollouts
def test_chunks_of_a_mixture_are_joined_where_any_teachers_token_is_undecided(seed):
    rng = random.Random(seed)
    tables = {"a": Table(rng, undecided=0.3), "b": Table(rng, undecided=0.3), "c": None, "d": Table(rng)}
    size = rng.randrange(1, 9)
    rollout = blended(Prompt([1], [2], teacher="a"), [0.25] * 4, [one_text(rng, size, name) for name in tables])
    found = without_undecided(rollout, tables)
    ends_undecided = set()
    for part in rollout.parts:
        table = tables[part.rollout.prompt.teacher]
        for place, token in zip(*edges(rollout.student_chunks, part.rollout), strict=True):
            if table is not None and token in table.digits:
                ends_undecided.add(place)
    wanted = rollout.student_chunks.tolist()
    for place in range(1, size):
        if place in ends_undecided and min(rollout.student_chunks[place - 1 : place + 1]) >= 0:
            own = rollout.student_chunks[place]
            wanted = [wanted[place - 1] if chunk == own else chunk for chunk in wanted]
    assert found.student_chunks.tolist() == wanted
    for part in found.parts:
        told = part.places >= 0
        assert np.array_equal(found.teacher_chunks[part.places[told]], part.chunks[told])


def test_some_of_these_chunks_are_joined_and_some_are_not():
    rngs = [random.Random(seed) for seed in range(40)]
    before = [random_rollout(rng, True) for rng in rngs]
    after = [
        without_undecided(rollout, {"": Table(rng, undecided=0.5)}) for rollout, rng in zip(before, rngs, strict=True)
    ]
    counts = [sum(len({*rollout.student_chunks} - {-1}) for rollout in rows) for rows in (before, after)]
    assert 0.5 * counts[0] < counts[1] < 0.95 * counts[0]


def test_some_of_these_texts_lose_a_chunk_and_some_do_not():
    rngs = [random.Random(seed) for seed in range(40)]
    lost = [unclosed(rollout, {"": Table(rng)}) >= 0 for rng in rngs for rollout in [random_rollout(rng, False)]]
    assert 5 < sum(lost) < 35


@rollouts
def test_the_pairs_are_the_places_and_tokens_that_go_on_there_without_the_one_that_was_drawn(seed):
    rng = random.Random(seed)
    tables = {"a": Table(rng), "b": None, "c": Table(rng), "d": Table(rng)}
    rows = [random_rollout(rng, ended=True, name=name) for name in tables]
    batch = collate(rows, 0)
    add_going_on(batch, rows, tables)
    wanted, scored = {}, set()
    for row, (rollout, table) in enumerate(zip(rows, tables.values(), strict=True)):
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


@rollouts
def test_each_teacher_of_a_mixture_tells_what_goes_on_with_its_own_tokens(seed):
    rng = random.Random(seed)
    tables = {"a": Table(rng), "b": Table(rng), "c": None}
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    size = rng.randrange(1, 9)
    sides = [one_text(rng, size, name) for name in tables]
    rollout = blended(Prompt([1, 1], [2], teacher="a"), [*weights.values()], sides)
    single = random_rollout(rng, ended=True, name="b")
    batch = collate([single, rollout], 0)
    add_going_on(batch, [single, rollout], tables)

    wanted = {}
    for row, own in enumerate([[(1.0, "b", single)], list(zip(weights.values(), weights, sides, strict=True))]):
        chunks = [single, rollout][row].student_chunks
        for weight, name, side in own:
            for place, token in zip(*edges(chunks, side), strict=True):
                if tables[name] is not None and tables[name].known[token] and place < len(chunks):
                    ids = {*tables[name].known[token]} - {side.student_ids[place]}
                    wanted.setdefault((row, place), []).append((pytest.approx(weight), ids))
    places = torch.cat([batch["scored"], batch["scored_again"]], 1).T.tolist()
    starts, length = batch["prompt_lengths"].tolist(), batch["input_ids"].shape[1]
    goes_on = [set() for _ in places]
    for place, token in batch["going_on"].T.tolist():
        goes_on[place].add(token)
    found = {}
    for (row, column), weight, ids in zip(places, batch["close_weights"].tolist(), goes_on, strict=True):
        if ids:
            found.setdefault((row, column + length + 1 - starts[row]), []).append((weight, ids))
    assert found == {
        place: [pair for pair in pairs if pair[1]] for place, pairs in wanted.items() if any(p[1] for p in pairs)
    }


def one_text(rng: random.Random, size: int, name: str) -> Rollout:
    """A teacher's rollout of a text of `size` student tokens, all of which take part."""
    chunks = sorted(rng.randrange(size) for _ in range(size))
    chunks = [sorted({*chunks}).index(chunk) for chunk in chunks]
    read = [chunk for chunk in range(max(chunks) + 1) for _ in range(rng.randrange(1, 3))]
    return replace(
        random_rollout(rng, ended=True, name=name), student_ids=[*range(size)], student_chunks=np.array(chunks),
        student_widths=np.ones(size, dtype=np.int64), teacher_ids=[rng.randrange(50) for _ in read],
        teacher_chunks=np.array(read), num_chunks=max(chunks) + 1,
    )  # fmt: skip


def edges(chunks, side: Rollout) -> tuple[list[int], list[int]]:
    """Where `chunks`, of which each is one or more of `side`'s, begin after another token or end, and the teacher's token before."""
    places, tokens = [], []
    for place in range(1, len(chunks) + 1):
        before = chunks[place - 1]
        if before >= 0 and (place == len(chunks) or chunks[place] != before):
            own = side.student_chunks[place - 1]
            places.append(place)
            tokens.append([t for t, c in zip(side.teacher_ids, side.teacher_chunks, strict=True) if c == own][-1])
        elif before < 0 and place < len(chunks) and chunks[place] >= 0:
            first = [n for n, c in enumerate(side.teacher_chunks) if c == side.student_chunks[place]][0]
            if first:
                places.append(place)
                tokens.append(side.teacher_ids[first - 1])
    return places, tokens
