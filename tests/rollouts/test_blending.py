"""Mixtures of teachers against plain loops over sets of boundaries."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from trl_ctopd.rollouts.blending import blended, mixed, weights_of
from trl_ctopd.rollouts.pairing import Prompt, Rollout


def random_chunks(rng, size):
    """Chunks of `size` student tokens as an alignment makes them, some masked, and a teacher's chunks."""
    student, number = [], 0
    while len(student) < size:
        run = min(rng.choice([1, 1, 2, 3]), size - len(student))
        if rng.random() < 0.15:
            student += [-1] * run
        else:
            student += [number] * run
            number += 1
    teacher = []
    for chunk in range(number):
        teacher += [-1] * (rng.random() < 0.1) + [chunk] * rng.choice([1, 1, 2, 3])
    return student, teacher, number


def rollout_of(student, teacher, number):
    widths = np.ones(len(student), dtype=np.int64)
    return Rollout(
        Prompt([], []), [0] * len(student), np.array(student, dtype=np.int64), widths, [7] * len(teacher),
        np.array(teacher, dtype=np.int64), number, True, False, None, [],
    )  # fmt: skip


def reference(sides, weights, log_probs):
    """Student tokens of each chunk of the mixture, its log-prob, and its number of tokens."""
    size = len(sides[0][0])
    shared = set(range(size + 1))
    for student, _, _ in sides:
        inside = {e for e in range(1, size) if student[e - 1] >= 0 and student[e - 1] == student[e]}
        shared -= inside
    edges = sorted(shared)
    found = []
    for begin, end in zip(edges, edges[1:], strict=False):
        if any(student[t] < 0 for student, _, _ in sides for t in range(begin, end)):
            continue
        value, most = 0.0, 0
        for (student, teacher, _), weight, scores in zip(sides, weights, log_probs, strict=True):
            own = {student[t] for t in range(begin, end)}
            chosen = [score for chunk, score in zip(teacher, scores, strict=True) if chunk in own]
            value, most = value + weight * math.fsum(chosen), max(most, len(chosen))
        found.append((list(range(begin, end)), value, most))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_the_mixture_is_that_of_plain_loops_over_common_boundaries(seed):
    rng = random.Random(seed)
    size, teachers = rng.randrange(0, 25), rng.choice([2, 2, 3])
    sides = [random_chunks(rng, size) for _ in range(teachers)]
    weights = [rng.random() for _ in sides]
    log_probs = [[-5 * rng.random() for _ in teacher] for _, teacher, _ in sides]
    rollout = blended(Prompt([], []), weights, [rollout_of(*side) for side in sides])
    tokens = mixed(rollout, [torch.tensor(own, dtype=torch.float64) for own in log_probs])
    wanted = reference(sides, weights, log_probs)
    assert rollout.num_chunks == len(wanted) and len(tokens) == len(rollout.teacher_ids)
    for chunk, (places, value, most) in enumerate(wanted):
        assert np.flatnonzero(rollout.student_chunks == chunk).tolist() == places
        own = tokens[torch.as_tensor(rollout.teacher_chunks) == chunk]
        assert len(own) == most and own.sum().item() == pytest.approx(value, abs=1e-9)
    taken = {place for places, _, _ in wanted for place in places}
    assert all(rollout.student_chunks[place] == -1 for place in range(size) if place not in taken)


def test_what_one_teacher_rules_out_the_mixture_rules_out_and_what_one_cannot_score_it_does_not():
    side = rollout_of([0, 1, 2], [0, 1, 2], 3)
    rollout = blended(Prompt([], []), [0.9, 0.1], [side, side])
    tokens = mixed(rollout, [torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-torch.inf, torch.nan, -2.0])]).tolist()
    assert tokens[0] == -math.inf and math.isnan(tokens[1]) and tokens[2] == pytest.approx(-1.1)


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"teacher": "a"}, {"a": 1.0}),
        ({"teachers": ["a", "b"]}, {"a": 0.5, "b": 0.5}),
        ({"teacher_weights": {"a": 1, "b": 3}}, {"b": 0.75, "a": 0.25}),
        ({"teacher_weights": '{"a": 2.0}'}, {"a": 1.0}),
        ({"teacher_weights": {"a": None, "b": 0.1}, "teacher": None}, {"b": 1.0}),
        ({}, {"b": 1.0}),
    ],
)
def test_a_row_names_its_teachers_in_one_of_three_columns(row, wanted):
    found = weights_of(row, ["a", "b"], {"b": 5})
    assert found == wanted and list(found) == list(wanted)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"teacher": "a", "teacher_weights": {"b": 1}}, "in the columns teacher_weights and teacher: leave one"),
        ({"teacher_weights": {"c": 1}}, "its column `teacher_weights` is 'c', and the teachers are 'a', 'b'"),
        ({"teachers": []}, "weights are numbers of at least 0, and one above 0"),
        ({"teacher_weights": {"a": -1, "b": 2}}, "is {'a': -1, 'b': 2}: weights are numbers"),
        ({"teacher_weights": {"a": float("nan")}}, "weights are numbers"),
        ({"teacher_weights": "half"}, "is 'half': give weights by name"),
        ({"teachers": "a"}, "`teachers` is 'a': give weights by name, or a list of names"),
        ({}, "its column `teacher` is None"),
    ],
)
def test_a_row_whose_teachers_mean_nothing_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        weights_of(row, ["a", "b"], None)


def test_a_mixture_is_unread_where_one_of_its_teachers_cannot_read_the_text():
    read = rollout_of([0, 1], [0, 1], 2)
    for rollouts in ([read, replace(read, unread=True)], [replace(read, unread=True), read]):
        assert blended(Prompt([], []), [0.5, 0.5], rollouts).unread
    assert not blended(Prompt([], []), [0.5, 0.5], [read, read]).unread
