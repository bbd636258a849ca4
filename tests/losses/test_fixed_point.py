"""Whether a student that has its teacher's law of texts stays, by exact expectation over all texts."""

from dataclasses import replace

import pytest
import torch
from fixed_points import SHAPES, World

from trl_ctopd.losses import ALM, DPCA, StrictSampled


def drift(world, loss):
    return world.expected_gradient(loss).abs().max().item()


@pytest.fixture(scope="module", params=SHAPES)
def world(request):
    return request.param, World(SHAPES[request.param])


def test_student_and_teacher_have_one_law_of_texts(world):
    _, world = world
    batch = world.batch
    torch.testing.assert_close(batch.student_log_probs.sum(1).exp(), world.law)
    torch.testing.assert_close(batch.teacher_log_probs.sum(1).exp(), world.law)


SHARES = ("macro", "semantic", "uniform", "byte_length", "last")
NO_TEACHER_TOKEN_WITHIN = ("1:1", "m:1", "m:1, digits")  # no student token holds several of the teacher's


@pytest.mark.parametrize("credit", SHARES)
def test_closed_chunks_leave_a_perfect_student_where_it_is(world, credit):
    """Not in expectation alone: each chunk's gap is nought."""
    _, world = world
    assert drift(world, DPCA(credit, None, "closed")) < 1e-10
    assert DPCA(credit, None, "closed").advantages(world.batch)[0].abs().max() < 1e-10


@pytest.mark.parametrize("credit", SHARES)
def test_where_the_teacher_does_not_tell_how_the_students_tokens_close_only_if_none_holds_several_of_its_own(
    world, credit
):
    shape, world = world

    def loss(batch, num_items):
        return DPCA(credit, None, "closed")(replace(batch, teacher_close_log_probs=None), num_items)

    found = drift(world, loss)
    assert found < 1e-10 if shape in NO_TEACHER_TOKEN_WITHIN else found > 1e-3


PUBLISHED = {
    "dpca semantic": DPCA("semantic", None, "open"),
    "dpca macro": DPCA("macro", None, "open"),
    "strict_sampled": StrictSampled(None),
    "alm": ALM(),
}


@pytest.mark.parametrize("loss", PUBLISHED.values(), ids=PUBLISHED)
def test_open_events_drive_a_perfect_student_away_wherever_tokens_nest(world, loss):
    shape, world = world
    found = drift(world, loss)
    assert found < 1e-10 if shape == "1:1" else found > 1e-3


def test_credit_previous_leaves_less_of_the_drift_of_numbers_and_none_of_one_to_one():
    world = World(SHAPES["m:1, digits"])
    assert drift(world, DPCA("previous", None)) < 0.7 * drift(world, DPCA("macro", None, "open"))
    assert drift(World(SHAPES["1:1"]), DPCA("previous", None)) < 1e-10


def test_a_student_that_is_not_its_teacher_is_led_back_on_numbers():
    """By exact steps: closed chunks bring the laws together, open ones take them apart."""
    world = World(SHAPES["m:1, digits"])

    def divergence_after(loss, steps=150):
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(world.logits.shape, generator=generator, dtype=torch.float64)
        logits = (world.logits + 0.5 * noise).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.05)
        for _ in range(steps):
            logits.grad = world.expected_gradient(loss, logits.detach())
            optimizer.step()
        log_p = world.scored(logits.detach()).student_log_probs.sum(1)
        return (log_p.exp() * (log_p - world.law.log())).sum().item()

    start, closed, openly = (
        divergence_after(loss, steps) for loss, steps in ((DPCA(), 0), (DPCA(), 150), (DPCA(event="open"), 150))
    )
    assert closed < 0.1 * start < start < openly
