"""The reverse KL across tokenizers: where a student that equals its teacher stays, and what the expectation is."""

import functools
import math
from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
import torch
from test_logit_losses import (
    TOYS,
    Completion,
    Pair,
    batch_of,
    completion,
    padded,
    toy_scene,
    value_and_gradient,
)
from test_logit_losses import Scene as MicroBatch

from trl_ctopd.losses import DPCA, ReverseKL, build_loss


DIGITS = "byte-level to byte-level"  # one a token on the student's side, up to three on the teacher's
NOTHING = -1e4  # the logit of what is never written


# --- two models of one law


@dataclass(frozen=True, eq=False)
class World:
    """Every text that is written, with its probability, and both models' log-probs of all their tokens after each beginning of
    a text."""

    pair: Pair
    rows: list[Completion]
    weights: torch.Tensor  # (Y,)

    @functools.cached_property
    def micro_batch(self) -> MicroBatch:
        sides = []
        for ids, size in (("student_ids", self.pair.sizes[0]), ("teacher_ids", self.pair.sizes[1])):
            written = [tuple(getattr(row, ids)) for row in self.rows]
            mass = defaultdict(float)
            for tokens, weight in zip(written, self.weights.tolist(), strict=True):
                for end in range(len(tokens) + 1):
                    mass[tokens[:end]] += weight
            table = torch.full((len(self.rows), max(map(len, written)), size), NOTHING, dtype=torch.float64)
            after = defaultdict(list)
            for tokens in mass:
                if tokens:
                    after[tokens[:-1]].append(tokens[-1])
            for row, tokens in enumerate(written):
                for place in range(len(tokens)):
                    for token in after[tokens[:place]]:
                        share = mass[(*tokens[:place], token)] / mass[tokens[:place]]
                        table[row, place, token] = math.log(share)
            sides.append(table)
        return MicroBatch(
            self.pair,
            *(padded([getattr(row, ids) for row in self.rows], 0) for ids in ("student_ids", "teacher_ids")),
            *(
                padded([getattr(row, chunks) for row in self.rows], -1)
                for chunks in ("student_chunks", "teacher_chunks")
            ),
            padded([row.widths for row in self.rows], 0),
            *sides,
        )

    @functools.cached_property
    def prefixes(self) -> torch.Tensor:
        """(Y, S) which beginning of a text each position stands after."""
        names: dict[tuple[int, ...], int] = {}
        rows = [
            [names.setdefault(tuple(row.student_ids[:i]), len(names)) for i in range(len(row.student_ids))]
            for row in self.rows
        ]
        return padded(rows, 0)

    def log_probs(self, student_logits: torch.Tensor) -> torch.Tensor:
        """(Y, S) of all tokens."""
        all_scored = padded([[0] * len(row.student_ids) for row in self.rows], -1)
        return batch_of(
            replace(self.micro_batch, student_chunks=all_scored, student_logits=student_logits)
        ).student_log_probs

    def expected_gradient(
        self, loss, student_logits: torch.Tensor | None = None, writer: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(prefixes, V_S) of the loss, over all texts as the student writes them; or as `writer`, other logits, does, with each token
        weighted by the ratio of the two."""
        student_logits = self.micro_batch.student_logits if student_logits is None else student_logits
        own, weighted = self.log_probs(student_logits), loss
        if writer is not None:
            drawn, now = self.log_probs(writer), own
            weighted = lambda batch, count: loss(replace(batch, importance=(now - drawn).exp()), count)  # noqa: E731
            own = drawn
        _, gradient = value_and_gradient(weighted, replace(self.micro_batch, student_logits=student_logits), 1)
        gradient = gradient * own.sum(1).exp()[:, None, None]
        return self._by_prefix(gradient)

    def reached(self, student_logits: torch.Tensor) -> torch.Tensor:
        """(prefixes, 1) how likely a text of the student has each beginning."""
        law = self.log_probs(student_logits).sum(1).exp()
        there = padded([[1] * len(row.student_ids) for row in self.rows], 0)
        return self._by_prefix((law[:, None] * there)[..., None])

    def _by_prefix(self, values: torch.Tensor) -> torch.Tensor:
        size = int(self.prefixes.max()) + 1
        return values.new_zeros(size, values.shape[2]).index_add(0, self.prefixes.flatten(), values.flatten(0, 1))


def written_by_both(pair: Pair, texts: list[str], seed: int = 0) -> World:
    """Each text as both tokenizers write it, with random probabilities."""
    rows = [completion(pair, pair.student.encode(text, add_special_tokens=False), ended=True) for text in texts]
    weights = torch.rand(len(texts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return World(pair, rows, weights / weights.sum())


NUMBERS = [f"{n}." for n in (*range(60), 123, 124, 130, 456, 457)]


@functools.cache
def numbers(name: str) -> World:
    return written_by_both(TOYS[name](), NUMBERS)


def moved(world: World, seed: int = 0, by: float = 1.0) -> torch.Tensor:
    """(Y, S, V_S) the student's log-probs after a random step: the same after the same beginning of a text, and nothing else is
    written."""
    start = world.micro_batch.student_logits
    step = by * torch.randn(
        int(world.prefixes.max()) + 1, start.shape[2], generator=torch.Generator().manual_seed(seed), dtype=start.dtype
    )
    return (start + step[world.prefixes]).log_softmax(-1)


def closings(micro_batch: MicroBatch) -> torch.Tensor:
    """(B, S) log p_close, of the student's logits."""
    table, teacher = micro_batch.pair.vocabulary.continuations, (micro_batch.teacher_ids, micro_batch.teacher_chunks)
    return _closings(table, teacher, (micro_batch.student_ids, micro_batch.student_chunks), micro_batch.student_logits)


def teacher_closings(micro_batch: MicroBatch) -> torch.Tensor:
    """(B, T) log p_close of the student's tokens, of the teacher's logits."""
    table, student = micro_batch.pair.vocabulary.continuations, (micro_batch.student_ids, micro_batch.student_chunks)
    teacher = micro_batch.teacher_ids, micro_batch.teacher_chunks
    return _closings(table.reverse, student, teacher, micro_batch.teacher_logits)


def _closings(table, ended, beginning, logits: torch.Tensor) -> torch.Tensor:
    (ids, chunks), (others, other_chunks) = ended, beginning
    going_on = torch.zeros_like(logits, dtype=torch.bool)
    for row, own in enumerate(other_chunks.tolist()):
        for place in range(1, len(own)):
            if own[place] != own[place - 1] >= 0 and own[place] >= 0:
                last = max(j for j, c in enumerate(chunks[row].tolist()) if c == own[place - 1])
                going_on[row, place, table.of(int(ids[row, last]))] = True
                going_on[row, place, others[row, place]] = False
    closed = logits.log_softmax(-1).exp().masked_fill(going_on, 0).sum(-1).log()
    return closed * going_on.any(-1)


def noise(world: World, loss, student_logits: torch.Tensor) -> float:
    """The variance of the gradient of one text over the squared mean, with respect to log-probs."""
    micro_batch = replace(world.micro_batch, student_logits=student_logits)
    _, each = value_and_gradient(loss, micro_batch, 1)
    own = batch_of(micro_batch).student_log_probs.sum(1).exp()
    mean = world.expected_gradient(loss, student_logits)
    return ((own * each.square().sum((1, 2))).sum() / mean.square().sum()).item() - 1


KNOWN = [None, 0, 1, 4, 20]


@pytest.mark.parametrize("top_k", KNOWN)
def test_a_student_of_the_teachers_own_law_is_left_where_it_is(top_k):
    """A digit a token, of a teacher with up to three: the published gradient is not nought there."""
    world = numbers(DIGITS)
    chunks = {
        (row.student_chunks.count(c), row.teacher_chunks.count(c)) for row in world.rows for c in row.student_chunks
    }
    assert chunks == {(1, 1), (2, 1), (3, 1)}
    assert world.expected_gradient(DPCA("macro", event="open")).abs().max() > 0.01
    assert world.expected_gradient(ReverseKL(top_k=top_k)).abs().max() < 1e-10


@pytest.mark.parametrize("top_k", KNOWN)
def test_what_the_teacher_tells_changes_the_noise_and_not_the_expectation(top_k):
    world = numbers(DIGITS)
    student = moved(world)
    expected = world.expected_gradient(ReverseKL(top_k=0, advantage_clip=None), student)
    assert expected.abs().max() > 0.01
    found = world.expected_gradient(ReverseKL(top_k=top_k, advantage_clip=None), student)
    assert (found - expected).abs().max() < 1e-10


def test_the_more_is_told_the_less_noise():
    world = numbers(DIGITS)
    student = moved(world)
    found = [noise(world, ReverseKL(top_k=top_k), student) for top_k in (0, 4, None)]
    assert found[0] > found[1] > found[2]
    assert found[0] > 2 * found[2], found


@pytest.mark.parametrize("masked", [None, 0, 1], ids=["whole", "its beginning masked", "its middle masked"])
@pytest.mark.parametrize("marked", [False, True])
def test_nothing_told_is_dpca_with_closed_chunks(marked, masked):
    """Where the teacher has nothing for a token, where the student spelled a text otherwise, and beside text that takes no part, too."""
    world = numbers(DIGITS)
    whole, marks, clip = replace(world.micro_batch, student_logits=moved(world)), {}, None
    sides = {name: getattr(whole, name) for name in ("student_chunks", "teacher_chunks")}
    if masked is not None:
        sides = {name: chunks.masked_fill(chunks == masked, -1) for name, chunks in sides.items()}
    scored = replace(whole, **sides)
    if marked:
        generator, clip, batch = torch.Generator().manual_seed(0), 10.0, batch_of(scored)
        impossible = torch.rand(batch.teacher_log_probs.shape, generator=generator) < 0.1
        other = torch.rand(batch.student_chunks.shape, generator=generator) < 0.2
        marks["teacher_log_probs"] = batch.teacher_log_probs.masked_fill(impossible, -torch.inf)
        marks["other_spelling"] = other & (batch.student_chunks >= 0)

    def gradient(loss) -> torch.Tensor:
        student = whole.student_logits.clone().requires_grad_()
        closed = closings(replace(whole, student_logits=student))
        assert closed.min() < -0.1
        batch = replace(batch_of(replace(scored, student_logits=student)), close_log_probs=closed, **marks)
        return torch.autograd.grad(loss(batch, 1)[0], student)[0]

    expected = gradient(DPCA(event="closed", credit="macro", advantage_clip=clip))
    torch.testing.assert_close(gradient(ReverseKL(top_k=0, advantage_clip=clip)), expected)


def test_what_another_sampler_wrote_weighs_all_that_was_drawn():
    """Its tokens, and that chunks go on and end where they do."""

    def gradient(ratio) -> torch.Tensor:
        def loss(batch, num_items):
            return ReverseKL(top_k=0)(
                replace(batch, importance=torch.full_like(batch.student_log_probs, ratio)), num_items
            )

        return value_and_gradient(loss, toy_scene(DIGITS))[1]

    torch.testing.assert_close(gradient(2.0), 2 * gradient(1.0))


def test_a_chunk_of_one_token_on_either_side_gives_the_reverse_kl_over_the_vocabulary():
    """The student has the teacher's tokenizer, and nothing goes on."""
    tokenizer = TOYS[DIGITS]().student
    pair = Pair(tokenizer, tokenizer, [0], [0], [0], extra=(5, 5))
    world = written_by_both(pair, NUMBERS[:8])
    student = moved(world).requires_grad_()
    teacher = world.micro_batch.teacher_logits.log_softmax(-1)
    log_p = student.log_softmax(-1)
    scored = (world.micro_batch.student_chunks >= 0)[..., None]
    kl = (log_p.exp() * (log_p - teacher).clamp(-10, 10) * scored).sum()
    (expected,) = torch.autograd.grad((log_p.exp() * (log_p - teacher).detach().clamp(-10, 10) * scored).sum(), student)
    _, found = value_and_gradient(ReverseKL(), replace(world.micro_batch, student_logits=student.detach()), 1)
    assert kl > 0.1
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("top_k", [0, 4])
def test_weighted_text_of_an_older_student_teaches_after_each_beginning_what_the_students_own_would(top_k):
    """One token a chunk. How often a beginning is met is the older student's; what is learned there is not."""
    tokenizer = TOYS[DIGITS]().student
    world = written_by_both(Pair(tokenizer, tokenizer, [0], [0], [0], extra=(5, 5)), NUMBERS[:12])
    now, older, loss = moved(world), moved(world, 1), ReverseKL(top_k=top_k, advantage_clip=None)
    own = world.expected_gradient(loss, now) / world.reached(now)
    other = world.expected_gradient(loss, now, writer=older) / world.reached(older)
    torch.testing.assert_close(other, own, rtol=1e-8, atol=1e-10)
    assert own.abs().max() > 1e-2 and not torch.allclose(world.reached(now), world.reached(older))


def test_a_token_that_goes_on_where_the_teacher_cut_after_all_closes_nothing_and_is_counted():
    """Later text can part again what a token had joined. Divided by the small chance of a cut it would drown all else."""
    micro_batch = toy_scene(DIGITS)
    batch = batch_of(micro_batch)
    _, metrics = ReverseKL()(batch, 1)
    count = metrics["closing/contradicted_fraction"][0]
    first = [
        (row, place)
        for row, chunks in enumerate(micro_batch.student_chunks.tolist())
        for place in range(1, len(chunks))
        if chunks[place] > chunks[place - 1] >= 0
    ]
    row, place = first[0]
    pair = replace(micro_batch.pair)  # its own vocabulary
    head = micro_batch.teacher_ids[row][micro_batch.teacher_chunks[row] == micro_batch.student_chunks[row, place - 1]][
        -1
    ].item()
    token = micro_batch.student_ids[row, place].item()
    known = pair.vocabulary.continuations.of(head)
    pair.vocabulary.continuations._known[head] = torch.tensor(sorted({*known.tolist(), token})).numpy()
    _, metrics = ReverseKL()(batch_of(replace(micro_batch, pair=pair)), 1)
    assert metrics["closing/contradicted_fraction"][0] > count
    assert value_and_gradient(ReverseKL(), replace(micro_batch, pair=pair))[1].isfinite().all()


def test_what_closing_costs_is_logged_as_dpca_does_beside_text_that_takes_no_part_too():
    world = numbers(DIGITS)
    whole = replace(world.micro_batch, student_logits=moved(world))
    inner = {name: getattr(whole, name) for name in ("student_chunks", "teacher_chunks")}
    masked = replace(whole, **{name: chunks.masked_fill(chunks == 1, -1) for name, chunks in inner.items()})
    closed = closings(whole)
    beside = closed[:, 1:][(masked.student_chunks[:, 1:] < 0) & (masked.student_chunks[:, :-1] >= 0)]
    assert beside.min() < -0.1
    batch = replace(batch_of(masked), close_log_probs=closed)
    found, wanted = (
        [float(part) for part in loss(batch, 1)[1]["closing/nats_per_chunk"]]
        for loss in (ReverseKL(), DPCA(event="closed"))
    )
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("name", TOYS)
def test_a_token_with_several_decisions_beyond_the_clip_counts_once_in_any_micro_batches(name):
    scene = toy_scene(name)

    def clipped(clip, rows=slice(None)) -> tuple[int, int]:
        batch = batch_of(scene[rows])
        left = torch.where(batch.student_chunks < 0, -0.5, 0.0).double()  # to leave a chunk beside what takes no part
        count, tokens = ReverseKL(clip)(replace(batch, close_log_probs=left), 1)[1]["advantage/clipped_fraction"]
        return int(count), int(tokens)

    assert clipped(None)[0] == 0
    every, tokens = clipped(1e-9)
    assert 0 < every <= tokens
    apart = [clipped(1e-9, slice(row, row + 1)) for row in range(len(scene.student_ids))]
    assert (every, tokens) == tuple(map(sum, zip(*apart, strict=True)))


@pytest.mark.parametrize("seed", range(5))
def test_a_reward_adds_the_score_function_of_the_scored_tokens_times_itself(seed):
    micro_batch = toy_scene(DIGITS, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(micro_batch.student_ids), generator=generator, dtype=torch.float64)
    importance = torch.rand(micro_batch.student_ids.shape, generator=generator, dtype=torch.float64)

    def gradient(**given):
        return value_and_gradient(
            lambda batch, num_items: ReverseKL()(replace(batch, **given), num_items), micro_batch
        )[1]

    found = gradient(importance=importance, rewards=rewards) - gradient(importance=importance)
    for row, chunks in enumerate(micro_batch.student_chunks.tolist()):
        for place, chunk in enumerate(chunks):
            weight = rewards[row].item() * importance[row, place].item() / 7 if chunk >= 0 else 0.0
            chances = micro_batch.student_logits[row, place].double().softmax(0).tolist()
            drawn = int(micro_batch.student_ids[row, place])
            wanted = [weight * (chance - (token == drawn)) for token, chance in enumerate(chances)]
            assert found[row, place].tolist() == pytest.approx(wanted, abs=1e-6)


def test_the_expectation_of_what_a_reward_adds_is_the_slope_of_the_expected_reward():
    world = numbers(DIGITS)
    start = moved(world)
    rewards = torch.randn(len(world.rows), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def rewarded(batch, num_items):
        return ReverseKL()(replace(batch, rewards=rewards), num_items)

    found = world.expected_gradient(rewarded, start) - world.expected_gradient(ReverseKL(), start)
    step = torch.zeros_like(found, requires_grad=True)
    logits = (start + step[world.prefixes]).log_softmax(-1)
    own = batch_of(replace(world.micro_batch, student_logits=logits)).student_log_probs.sum(1).exp()
    (slope,) = torch.autograd.grad((own * rewards).sum(), step)
    assert slope.abs().max() > 1e-3
    torch.testing.assert_close(found, -slope, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("knobs", "message"), [({"top_k": -1}, "top_k .*-1"), ({"advantage_clip": 0.0}, "advantage_clip .*0.0")]
)
def test_knobs_out_of_range_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        build_loss("reverse_kl", **knobs)
