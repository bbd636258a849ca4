"""KAT against plain loops, and why rollouts that were cut stay in its memory."""

import math
import random

import pytest
import torch

from trl_ctopd.losses.kat import GAP_CAP, KAT, divergences


def random_completion(rng):
    """(chunk of each token, log-prob of each) of the student and of the teacher; some tokens take no part."""
    sides = [([], []), ([], [])]
    for chunk in range(rng.randrange(1, 12)):
        for chunks, log_probs in sides:
            for _ in range(rng.choice([0, 1, 1, 2, 3])):
                chunks.append(chunk if rng.random() < 0.9 else -1)
                log_probs.append(rng.choice([0.0, -1e-9, -3 * rng.random(), -9 * rng.random()]))
    return sides


def reference_divergences(student, teacher):
    found = []
    for chunk in student[0]:
        own, theirs = ([value for c, value in zip(*side, strict=True) if c == chunk] for side in (student, teacher))
        if chunk < 0 or not theirs:
            found.append(math.nan)
            continue
        gap = min(math.fsum(theirs) - math.fsum(own), GAP_CAP)
        found.append((math.exp(gap) - 1 - gap) / len(own))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_a_tokens_divergence_is_its_share_of_its_chunks(seed):
    student, teacher = random_completion(random.Random(seed))
    tensors = [torch.tensor(side[1], dtype=torch.float64) for side in (student, teacher)]
    chunks = [torch.tensor(side[0], dtype=torch.long) for side in (student, teacher)]
    found = divergences(*tensors, *chunks)
    wanted = torch.tensor(reference_divergences(student, teacher), dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_the_expected_divergence_of_a_token_is_the_reverse_kl():
    generator = torch.Generator().manual_seed(0)
    own, theirs = (torch.rand(7, generator=generator, dtype=torch.float64).softmax(0).log() for _ in range(2))
    chunks = torch.arange(7)
    found = divergences(own, theirs, chunks, chunks)  # each token that may be drawn, as a chunk
    assert (own.exp() * found).sum().item() == pytest.approx((own.exp() * (own - theirs)).sum().item())


def test_a_teachers_certainty_that_a_text_cannot_be_is_a_large_divergence_and_nan_is_none():
    own, chunks = torch.tensor([-1.0, -1.0, -1.0]), torch.arange(3)
    found = divergences(own, torch.tensor([-torch.inf, torch.nan, -1.0]), chunks, chunks).tolist()
    assert found[0] == pytest.approx(98, abs=1) and math.isnan(found[1]) and found[2] == 0


def reference_cut(values, rule, threshold):
    """The paper's rule, token by token: the place where the first low window of the row of `patience` begins."""
    run, first = 0, None
    for t in range(rule.exempt + rule.window - 1, len(values)):
        window = values[t - rule.window + 1 : t + 1]
        if sum(window) / rule.window < threshold:
            first = t if run == 0 else first
            run += 1
        else:
            run = 0
        if run == rule.patience:
            return first - rule.window + 1
    return None


@pytest.mark.parametrize("seed", range(30))
def test_a_rollout_is_cut_where_the_first_of_several_low_windows_begins(seed):
    rng = random.Random(seed)
    values = [rng.random() ** 3 for _ in range(rng.randrange(0, 60))]
    rule = KAT(window=rng.randrange(1, 8), patience=rng.randrange(1, 4), exempt=rng.choice([0, 0, 5]))
    means = rule.means(torch.tensor(values, dtype=torch.float64))
    for threshold in (0.05, 0.2, 0.35, 2.0):
        assert rule.cut(means, threshold) == reference_cut(values, rule, threshold)
    assert rule.cut(means, None) is None


def test_the_threshold_is_a_quantile_of_the_last_rollouts_once_there_are_enough():
    rule = KAT(memory=5, warmup_steps=2, warmup_rollouts=3, quantile=0.5)
    rule.remember([9.0, 9.0])
    assert rule.threshold(10) is None
    rule.remember([1.0, 2.0, 3.0, 4.0])
    assert rule.threshold(1) is None
    assert rule.threshold(2) == 3.0  # of 9, 1, 2, 3, 4: the first 9 is forgotten


def test_cut_rollouts_in_the_memory_leave_the_share_of_cuts_and_without_them_the_threshold_rises():
    """The lowest windows of rollouts are drawn from one distribution; one that is cut is seen only down to the threshold."""

    def share_of_cuts(remember_cut):
        rng = random.Random(0)
        rule = KAT(quantile=0.3, memory=400, warmup_steps=0, warmup_rollouts=400)
        rule.remember(rng.random() for _ in range(400))
        cuts = 0
        for step in range(60):
            threshold = rule.threshold(step)
            lowest = [rng.random() for _ in range(50)]
            cuts = sum(value < threshold for value in lowest)
            seen = [threshold - 1e-6 if value < threshold else value for value in lowest]
            rule.remember(value for value in seen if remember_cut or value >= threshold)
        return cuts / 50

    assert abs(share_of_cuts(True) - 0.3) < 0.2
    assert share_of_cuts(False) > 0.6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"patience": 1.5}, "patience must be a whole number"),
        ({"quantile": 1.0}, "between 0 and 1, got 1.0"),
        ({"memory": 10}, "warmup_rollouts=512 is more than its memory=10"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KAT(**settings)
