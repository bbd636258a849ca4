"""CompassOPD: against a loop over chunks in Python floats, and where it leaves which student."""

import math
from dataclasses import replace

import pytest
import torch
from chunk_rows import as_tensors, by_chunk, random_rows
from fixed_points import SHAPES, World

from trl_ctopd.losses import ScoredChunks
from trl_ctopd.losses.compass import COMPASS_SHARES, Compass


def with_references(seed):
    """Random chunks with the log-probs of a reference teacher and of a start."""
    rows = random_rows(seed)
    batch = ScoredChunks(*as_tensors(rows))
    generator = torch.Generator().manual_seed(seed)
    draw = lambda like: -3 * torch.rand(like.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return rows, replace(
        batch,
        student_log_probs=batch.student_log_probs.requires_grad_(),
        reference_log_probs=draw(batch.student_log_probs),
        reference_teacher_log_probs=draw(batch.teacher_log_probs),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("share", COMPASS_SHARES)
def test_gradient_equals_a_loop_over_chunks(share, clip, seed):
    rows, batch = with_references(seed)
    value, metrics = Compass(alpha=0.7, share=share, advantage_clip=clip)(batch, 13)
    [found] = torch.autograd.grad(value, batch.student_log_probs)
    expected, total = torch.zeros_like(found), 0.0
    bound = math.inf if clip is None else clip
    for row, (student, teacher) in enumerate(rows):
        theirs = by_chunk(teacher)
        for chunk, inside in by_chunk(student).items():
            difference = math.fsum(
                teacher[j][0] - batch.reference_teacher_log_probs[row, j].item() for j in theirs[chunk]
            )
            total += difference
            for i in inside:
                part = difference / len(theirs[chunk] if share == "mean" else inside)
                advantage = part - 0.7 * (student[i][0] - batch.reference_log_probs[row, i].item())
                expected[row, i] = -max(-bound, min(bound, advantage)) / 13
    torch.testing.assert_close(found, expected)
    assert metrics["compass/difference_nats_per_chunk"][0].item() == pytest.approx(total)
    assert metrics["compass/neutralised_fraction"][0] == 0


def test_a_chunk_that_one_teacher_could_not_score_takes_no_part_and_is_counted_and_zero_probability_is_bounded():
    _, batch = with_references(0)
    scores = batch.reference_teacher_log_probs.clone()
    place = (batch.teacher_chunks[0] == 0).nonzero()[0, 0]
    scores[0, place] = math.nan
    value, metrics = Compass()(replace(batch, reference_teacher_log_probs=scores), 1)
    [found] = torch.autograd.grad(value, batch.student_log_probs)
    assert not found[0][batch.student_chunks[0] == 0].any() and found.isfinite().all() and found.any()
    assert metrics["compass/neutralised_fraction"][0] == 1
    used = int((batch.student_tokens > 0).sum()) - 1
    assert metrics["compass/difference_nats_per_chunk"][1] == used
    scores[0, place] = -math.inf
    value, metrics = Compass()(replace(batch, reference_teacher_log_probs=scores), 1)
    [found] = torch.autograd.grad(value, batch.student_log_probs)
    assert (found[0][batch.student_chunks[0] == 0] == -10).all() and metrics["compass/neutralised_fraction"][0] == 0


def drift(shape, student, teacher, reference, start, alpha, share="even"):
    """Of a student of the law of World number `student`, and so on."""
    own, theirs, second, first = (World(SHAPES[shape], seed) for seed in (student, teacher, reference, start))

    def loss(batch, num_items):
        return Compass(alpha=alpha, share=share, advantage_clip=None)(
            replace(
                batch,
                teacher_log_probs=theirs.batch.teacher_log_probs,
                reference_teacher_log_probs=second.batch.teacher_log_probs,
                reference_log_probs=first.batch.student_log_probs,
            ),
            num_items,
        )

    return own.expected_gradient(loss).abs().max().item()


@pytest.mark.parametrize("share", COMPASS_SHARES)
@pytest.mark.parametrize("shape", SHAPES)
def test_its_target_stays_where_all_chunks_are_one_token_on_each_side(shape, share):
    """With alpha 1 and a start of the reference teacher's law, the target start * exp(difference) has the teacher's law."""
    found = drift(shape, 0, 0, 1, 1, 1.0, share)
    assert found < 1e-10 if shape == "1:1" else found > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_a_perfect_student_moves_unless_the_two_teachers_and_the_start_are_it(shape):
    assert drift(shape, 0, 0, 1, 1, 0.5) > 1e-3
    assert drift(shape, 0, 0, 1, 0, 0.5) > 1e-3
    assert drift(shape, 0, 0, 0, 0, 0.5) < 1e-10


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"alpha": -1.0}, "alpha .*-1.0"), ({"share": "whole"}, "'whole'.*mean, even"), ({"advantage_clip": 0.0}, "0.0")],
)
def test_knobs_out_of_range_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        Compass(**knobs)


def test_a_batch_without_a_second_teacher_is_an_error_that_names_the_setting():
    _, batch = with_references(0)
    with pytest.raises(ValueError, match="reference_teacher_log_probs.*with `reference_teacher`"):
        Compass()(replace(batch, reference_teacher_log_probs=None), 1)
