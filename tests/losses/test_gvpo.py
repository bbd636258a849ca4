"""GVPO: against loops in Python floats, and its expectation against the sequence-level reverse KL by exact sums."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from chunk_rows import as_tensors, random_rows, reference_budgets
from fixed_points import SHAPES, World

from trl_ctopd.losses import GVPO, ScoredChunks, build_loss


def value_and_gradient(loss, batch, num_items=1):
    leaf = batch.student_log_probs.detach().requires_grad_()
    value, metrics = loss(replace(batch, student_log_probs=leaf), num_items)
    return value.item(), torch.autograd.grad(value, leaf)[0], metrics


@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_value_equals_a_loop_over_prompts(seed, power):
    rows = random_rows(seed, batch=8)
    prompts = [3, 3, 0, 3, 0, 7, 9, 9]
    value, gradient, metrics = value_and_gradient(
        GVPO(power), ScoredChunks(*as_tensors(rows), prompts=torch.tensor(prompts)), 13
    )
    found = {}
    for prompt, (student, teacher) in zip(prompts, rows, strict=True):
        ours, theirs = reference_budgets(student), reference_budgets(teacher)
        if ours:
            length = sum(token[1] >= 0 for token in student)
            ratio = math.fsum(ours.values()) - math.fsum(theirs.values())
            found.setdefault(prompt, []).append(ratio / length**power)
    expected = 0.0
    for ratios in found.values():
        mean = math.fsum(ratios) / len(ratios)
        if len(ratios) > 1:
            expected += 0.5 * len(ratios) * math.fsum((x - mean) ** 2 for x in ratios) / (len(ratios) - 1)
    assert value == pytest.approx(expected / 13, rel=1e-9)
    assert gradient.any() and not gradient[5].any(), "alone with its prompt"
    alone = sum(len(ratios) == 1 for ratios in found.values())
    assert metrics["gvpo/alone_fraction"][0] == alone and metrics["gvpo/log_ratio_std"][1] == len(found) - alone


def whole(world, logits, rows):
    """The batch of these texts."""
    batch = world.scored(logits)
    tensors = {
        name: value[rows] for name, value in vars(batch).items() if isinstance(value, torch.Tensor) and value.ndim
    }
    return replace(batch, **tensors)


@pytest.mark.parametrize("shape", ["1:1", "m:1", "m:n"])
def test_on_own_texts_the_expectation_is_that_of_the_sequence_level_reverse_kl(shape):
    """Over all pairs of texts that a student, which is not its teacher, may write."""
    world = World(replace(SHAPES[shape], longest=2))
    noise = torch.randn(world.logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = (world.logits + 0.5 * noise).requires_grad_()
    log_p = world.scored(leaf).student_log_probs.sum(1)
    kl = (log_p.exp() * (log_p - world.law.log())).sum()
    [expected] = torch.autograd.grad(kl, leaf, retain_graph=True)
    p, found = log_p.exp().tolist(), torch.zeros_like(expected)
    for pair in itertools.product(range(len(p)), repeat=2):
        value, _ = GVPO()(whole(world, leaf, list(pair)), 2)
        found += p[pair[0]] * p[pair[1]] * torch.autograd.grad(value, leaf)[0]
    mass = math.fsum(p)  # what a student off its teacher writes beside the texts of the world
    assert expected.abs().max() > 0.01
    if mass == pytest.approx(1, abs=1e-9):
        torch.testing.assert_close(found, expected)
    else:
        pytest.fail(f"the world has {mass} of what the student writes")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power", [0.0, 1.0])
def test_a_perfect_student_stays_whatever_the_tokens(shape, power):
    world = World(SHAPES[shape])
    _, gradient, _ = value_and_gradient(GVPO(power), world.batch)
    assert gradient.abs().max() < 1e-10
    _, moved, _ = value_and_gradient(GVPO(power), world.scored(world.logits * 0.9))
    assert moved.abs().max() > 1e-3


def test_what_cannot_be_scored_counts_on_neither_side_and_no_chance_is_bounded():
    rows = [([(-1.0, 0, 1), (-2.0, 1, 1)], [(-1.5, 0), (-2.5, 1)]), ([(-1.0, 0, 1)], [(-3.0, 0)])]
    batch = ScoredChunks(*as_tensors(rows))
    whole, _, _ = value_and_gradient(GVPO(), batch)
    assert whole == pytest.approx((1.0 - 2.0) ** 2 / 2)
    scores = batch.teacher_log_probs.clone()
    scores[0, 1] = math.nan
    value, gradient, _ = value_and_gradient(GVPO(), replace(batch, teacher_log_probs=scores))
    assert value == pytest.approx((0.5 - 2.0) ** 2 / 2) and gradient[0, 1] == 0 and gradient[0, 0] != 0
    scores[0, 1] = -math.inf
    value, gradient, _ = value_and_gradient(GVPO(), replace(batch, teacher_log_probs=scores))
    assert value == pytest.approx((98.5 - 2.0) ** 2 / 2) and gradient.isfinite().all()


def test_a_negative_power_is_refused():
    with pytest.raises(ValueError, match="gvpo's length_power must be at least 0, got -1.0"):
        build_loss("gvpo", length_power=-1.0)


@pytest.mark.parametrize("own", [True, False])
def test_a_student_that_is_not_its_teacher_is_led_back_by_groups_of_its_own_and_of_its_teachers_texts(own):
    """Where tokens nest on both sides, so that no alignment could be right."""
    world, generator = World(SHAPES["m:n"]), torch.Generator().manual_seed(1)
    noise = torch.randn(world.logits.shape, generator=generator, dtype=torch.float64)
    logits = (world.logits + 0.5 * noise).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)

    def divergence():
        log_p = world.scored(logits.detach()).student_log_probs.sum(1)
        return (log_p.exp() * (log_p - world.law.log())).sum().item()

    start = divergence()
    prompts = torch.arange(8).repeat_interleave(4)
    for _ in range(150):
        law = world.scored(logits.detach()).student_log_probs.sum(1).exp() if own else world.law
        rows = torch.multinomial(law, 32, replacement=True, generator=generator)
        value, _ = GVPO()(replace(whole(world, logits, rows), prompts=prompts), 32)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert divergence() < 0.3 * start
