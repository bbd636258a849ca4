"""Closed chunks of a mixture of teachers, by exact expectation over all texts: where a perfect student stays."""

import pytest
import torch
from fixed_points import Shape, World, words

from trl_ctopd.losses import DPCA, ScoredChunks
from trl_ctopd.rollouts.blending import blended, mixed
from trl_ctopd.rollouts.pairing import Prompt, Rollout


DIGITS = "01"
ONE, TWO, THREE = (words(DIGITS, longest) for longest in (1, 2, 3))  # the digits that a teacher's token has at most
MIXTURES = {"one and three digits": (ONE, THREE), "two and three digits": (TWO, THREE)}
CLOSED, OPEN = DPCA("macro", None, "closed"), DPCA("macro", None, "open")
WEIGHTS = (0.4, 0.6)


def world(teacher, law: int = 0) -> World:
    return World(Shape(ONE, teacher, DIGITS, 5), law)


class Mixture(World):
    """All texts, read by the teachers of several worlds that have one student."""

    def __init__(self, worlds):
        self._worlds, self.logits = worlds, worlds[0].logits
        parts = [world._fixed for world in worlds]
        chunks, scores, read = [], [], []
        for row in range(len(parts[0]["student_chunks"])):
            sides = [
                Rollout(
                    Prompt([], []), [0] * len(own["student_chunks"][row]), own["student_chunks"][row].numpy(),
                    own["student_widths"][row].numpy(), [0] * own["teacher_chunks"].shape[1],
                    own["teacher_chunks"][row].numpy(), own["num_chunks"], True, False, None, [],
                )
                for own in parts
            ]  # fmt: skip
            rollout = blended(Prompt([], []), WEIGHTS, sides)
            chunks.append(torch.as_tensor(rollout.student_chunks))
            read.append(torch.as_tensor(rollout.teacher_chunks))
            scores.append(mixed(rollout, [own["teacher_log_probs"][row] for own in parts]))
        pad = torch.nn.utils.rnn.pad_sequence
        self._fixed = {
            "teacher_log_probs": pad(scores, True),
            "student_chunks": torch.stack(chunks),
            "teacher_chunks": pad(read, True, -1),
            "student_widths": parts[0]["student_widths"],
            "num_chunks": parts[0]["num_chunks"],
        }
        self.batch = self.scored(self.logits)

    def scored(self, logits):
        own = [world.scored(logits) for world in self._worlds]
        close = sum(weight * part.close_log_probs for weight, part in zip(WEIGHTS, own, strict=True))
        return ScoredChunks(student_log_probs=own[0].student_log_probs, close_log_probs=close, **self._fixed)


def away(logits, by):
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return logits + by * noise


def weighted(worlds, logits):
    """The weighted mean of the gradients that the teachers alone give."""
    return sum(weight * world.expected_gradient(CLOSED, logits) for weight, world in zip(WEIGHTS, worlds, strict=True))


@pytest.mark.parametrize("tokens", MIXTURES.values(), ids=MIXTURES)
def test_a_student_that_equals_all_its_teachers_stays_with_closed_chunks_and_not_with_open_ones(tokens):
    mixture = Mixture([world(own) for own in tokens])
    assert CLOSED.advantages(mixture.batch)[0].abs().max() < 1e-10
    assert mixture.expected_gradient(CLOSED).abs().max() < 1e-10
    assert mixture.expected_gradient(OPEN).abs().max() > 1e-3


@pytest.mark.parametrize("by", [0.0, 0.5])
def test_teachers_of_one_tokenizer_give_the_weighted_mean_of_their_gradients(by):
    worlds = [world(THREE, law) for law in (0, 1)]
    logits = away(worlds[0].logits, by)
    expected = weighted(worlds, logits)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(Mixture(worlds).expected_gradient(CLOSED, logits), expected, rtol=0, atol=1e-12)


def cosine(tokens, laws, by, loss):
    """Of a mixture's gradient with the weighted mean of its teachers' own."""
    worlds = [world(*own) for own in zip(tokens, laws, strict=True)]
    logits = away(worlds[0].logits, by)
    found, expected = Mixture(worlds).expected_gradient(loss, logits), weighted(worlds, logits)
    return torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0)


def test_where_one_tokenizer_cuts_wherever_another_does_the_gradient_is_nearly_the_weighted_mean():
    for laws in ((0, 0), (0, 1), (2, 3)):
        assert cosine((ONE, THREE), laws, 0.1, CLOSED) > 0.98
    assert cosine((ONE, THREE), (0, 0), 0.1, OPEN) < 0.7


def test_where_each_cuts_elsewhere_it_is_so_only_near_teachers_that_agree():
    assert cosine((TWO, THREE), (0, 0), 0.1, CLOSED) > 0.95 > 0.5 > cosine((TWO, THREE), (0, 0), 0.1, OPEN)
    assert cosine((TWO, THREE), (0, 1), 0.1, CLOSED) < 0.9
