"""Rewards, normalised within a prompt's completions, beside loops in Python floats; and what they add to a loss."""

import math
import random
import statistics

import pytest
import torch
from chunk_rows import as_tensors, random_rows

from trl_ctopd.losses import DPCA, ScoredChunks, StrictSampled
from trl_ctopd.losses.rewards import group_advantages, total_rewards


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_a_completions_advantage_is_its_distance_from_the_mean_of_its_prompts_rewards(seed, scale):
    rng = random.Random(seed)
    size, prompts, functions = rng.randint(2, 5), rng.randint(1, 4), rng.randint(1, 3)
    weights = [rng.uniform(-1, 2) for _ in range(functions)]
    given = [
        [rng.choice([rng.gauss(0, 3), rng.gauss(0, 3), None]) for _ in range(functions)] for _ in range(size * prompts)
    ]

    totals = [
        math.fsum(w * r for w, r in zip(weights, row, strict=True) if r is not None)
        if any(r is not None for r in row)
        else None
        for row in given
    ]
    expected = []
    for start in range(0, len(totals), size):
        group = [total for total in totals[start : start + size] if total is not None]
        for total in totals[start : start + size]:
            if total is None or len(group) < 2:
                expected.append(0.0)
            else:
                distance = total - statistics.mean(group)
                expected.append(distance / (statistics.stdev(group) + 1e-4) if scale else distance)

    rewards = torch.tensor([[math.nan if r is None else r for r in row] for row in given], dtype=torch.float64)
    total = total_rewards(rewards, torch.tensor(weights, dtype=torch.float64))
    found, _ = group_advantages(total, size, scale)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_equal_rewards_move_nothing():
    found, std = group_advantages(torch.tensor([2.0, 2.0, 2.0, 5.0, 5.0, 5.0]), 3)
    assert found.tolist() == [0.0] * 6 and std.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss", [DPCA(event="open"), DPCA(event="open", credit="macro"), StrictSampled()], ids=repr)
@pytest.mark.parametrize("seed", range(5))
def test_a_reward_adds_the_score_function_of_the_scored_tokens_times_itself(loss, seed):
    student, teacher, student_chunks, teacher_chunks, widths, num_chunks = as_tensors(random_rows(seed))
    rewards = torch.randn(len(student), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def gradient(rewards):
        leaf = student.clone().requires_grad_()
        batch = ScoredChunks(leaf, teacher, student_chunks, teacher_chunks, widths, num_chunks, rewards=rewards)
        loss(batch, 7)[0].backward()
        return leaf.grad

    plain = gradient(None)
    expected = [
        [g - (reward / 7 if chunk >= 0 else 0.0) for g, chunk in zip(own, chunks, strict=True)]
        for own, chunks, reward in zip(plain.tolist(), student_chunks.tolist(), rewards.tolist(), strict=True)
    ]
    torch.testing.assert_close(gradient(rewards), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
