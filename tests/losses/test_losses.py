"""dpca, alm and sft against loops in Python floats; dpca against exact enumeration of all that a student can write."""

import itertools
import math
import random
from collections import defaultdict
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from chunk_rows import BAD, as_tensors, by_chunk, padded, random_rows, reference_budgets, reference_shares

from trl_ctopd.losses import ALM, DPCA, LOSSES, SFT, ScoredChunks, StrictSampled, build_loss
from trl_ctopd.losses.credit import CREDITS
from trl_ctopd.text.chunks import Side, synchronized_chunks


SHARES = [credit for credit in CREDITS if credit != "previous"]
DPCAS = [pytest.param(DPCA(credit, event="open"), id=credit) for credit in SHARES]
UNCLIPPED = [pytest.param(DPCA(credit, None, event="open"), id=credit) for credit in SHARES]
ALMS = [pytest.param(ALM(tau), id=f"alm-{tau}") for tau in (1.0, 100.0, math.inf)]
SFTS = [pytest.param(SFT(), id="sft")]
ALL = DPCAS + ALMS + SFTS
FLOOR = 1e-6  # nats that ALM takes off both budgets
# of float64, for tensors of unlike shapes: a processor computes what fills its vectors and what is left over by other code
LAST_DIGITS = {"rtol": 1e-12, "atol": 1e-12}


def scored(rows, dtype=torch.float64):
    return ScoredChunks(*as_tensors(rows, dtype))


def value_and_gradient(loss, batch, num_items=7):
    """The loss, and its gradient with respect to the student's log-probs (B, S)."""
    log_probs = batch.student_log_probs.detach().clone().requires_grad_()
    value, _ = loss(replace(batch, student_log_probs=log_probs), num_items)
    value.backward()
    return value.item(), log_probs.grad


# --- slow references: value and gradient of one row


def reference_dpca(loss, student, teacher):
    ours, theirs = reference_budgets(student), reference_budgets(teacher)
    bound = math.inf if loss.advantage_clip is None else loss.advantage_clip
    gradient = [0.0] * len(student)
    for i, share in enumerate(reference_shares(loss.credit, student)):
        if student[i][1] >= 0:
            chunk = student[i][1]
            gradient[i] = -max(-bound, min(bound, (theirs[chunk] - ours[chunk]) * share))
    return math.fsum(gradient), gradient


def reference_alm(loss, student, teacher):
    tau, value, gradient = loss.temperature, 0.0, [0.0] * len(student)
    ours, theirs = reference_budgets(student), reference_budgets(teacher)
    for chunk, inside in by_chunk(student).items():
        if tau == math.inf:
            a, b = FLOOR - theirs[chunk], FLOOR - ours[chunk]
            value += a * math.log(a / b) - a + b
            slope = 1 - a / b  # of the value in b = -L_S
            slope = -slope
        else:
            q, p = math.exp((theirs[chunk] - FLOOR) / tau), math.exp((ours[chunk] - FLOOR) / tau)
            value += tau * (q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)))
            slope = ((1 - q) / (1 - p) - q / p) * p
        for i in inside:
            gradient[i] = slope
    return value, gradient


def reference_sft(loss, student, teacher):
    gradient = [-1.0 if chunk >= 0 else 0.0 for _, chunk, _ in student]
    return math.fsum(-log_prob for log_prob, chunk, _ in student if chunk >= 0), gradient


REFERENCES = {DPCA: reference_dpca, ALM: reference_alm, SFT: reference_sft}


@pytest.mark.parametrize("loss", [*ALL, pytest.param(DPCA("semantic", 0.5, event="open"), id="clip"), UNCLIPPED[0]])
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_equal_a_loop_over_chunks(loss, seed):
    rows = random_rows(seed)
    value, gradient = value_and_gradient(loss, scored(rows), num_items=13)
    expected = [REFERENCES[type(loss)](loss, *row) for row in rows]
    assert value == pytest.approx(math.fsum(v for v, _ in expected) / 13, rel=1e-9, abs=1e-12)
    for row, (_, slopes) in enumerate(expected):
        slopes = [slope / 13 for slope in slopes] + [0.0] * (gradient.shape[1] - len(slopes))
        assert gradient[row].tolist() == pytest.approx(slopes, rel=1e-8, abs=1e-12)


def test_alm_tends_to_its_limit_as_tau_grows():
    batch = scored(random_rows(0))
    limit, slope = value_and_gradient(ALM(math.inf), batch)
    distances = [abs(value_and_gradient(ALM(tau), batch)[0] - limit) for tau in (1e3, 1e4, 1e5)]
    assert distances[0] > 9 * distances[1] > 81 * distances[2] > 0  # the error falls with 1/τ
    assert torch.allclose(value_and_gradient(ALM(1e6), batch)[1], slope, atol=1e-4)


@pytest.mark.parametrize("loss", ALMS)
def test_alm_is_zero_where_the_likelihoods_agree_and_positive_elsewhere(loss):
    def alm(student, teacher):
        return value_and_gradient(loss, scored([([(student, 0, 1)], [(teacher, 0)])]))[0]

    assert alm(-2.0, -2.0) == pytest.approx(0, abs=1e-12)
    assert alm(-2.0, -2.1) > 1e-6 and alm(-2.0, -1.9) > 1e-6
    assert alm(-2.0, -4.0) != pytest.approx(alm(-4.0, -2.0), rel=0.05)  # teacher first


# --- what the losses are for


@pytest.mark.parametrize("loss", DPCAS + ALMS)
def test_descent_makes_likelier_what_the_teacher_likes_more_and_only_that(loss):
    student = [(-1.0, 0, 1), (-2.0, 0, 1), (-1.0, 1, 1), (-2.0, 1, 1)]
    _, gradient = value_and_gradient(loss, scored([(student, [(-1.0, 0), (-9.0, 1)])]))
    first, second = gradient[0, :2], gradient[0, 2:]
    assert first.max() <= 0 and first.min() < 0  # L_T = -1 > L_S = -3
    assert second.min() >= 0 and second.max() > 0  # L_T = -9 < L_S = -3


def tied(rows):
    """Every teacher as its row's student: one tokenizer, one model."""
    return [(student, [(log_prob, chunk) for log_prob, chunk, _ in student]) for student, _ in rows]


@pytest.mark.parametrize("loss", DPCAS + ALMS)
@pytest.mark.parametrize("one_to_one", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(loss, one_to_one, dtype):
    value, gradient = value_and_gradient(loss, scored(tied(random_rows(3, one_to_one=one_to_one)), dtype))
    assert abs(value) < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("loss", UNCLIPPED)
def test_one_to_one_everywhere_is_plain_on_policy_distillation_down_to_the_logits(loss):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 8, 11, generator=generator, dtype=torch.float64) * 3
    tokens = torch.randint(11, (3, 8), generator=generator)
    chunks = torch.arange(8).expand(3, 8)
    student.requires_grad_()
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    sampled_p, sampled_q = (x.gather(-1, tokens[..., None])[..., 0] for x in (log_p, log_q))
    value, _ = loss(ScoredChunks(sampled_p, sampled_q, chunks, chunks, torch.ones_like(chunks), 8), 24)
    value.backward()

    expected_value, expected = 0.0, torch.zeros_like(student)
    for b, s in itertools.product(range(3), range(8)):
        token = tokens[b, s]
        advantage = log_q[b, s, token].item() - log_p[b, s, token].item()
        expected_value -= advantage / 24
        for v in range(11):  # d log p(token) / d logit v
            expected[b, s, v] = -advantage * (float(v == token) - math.exp(log_p[b, s, v].item())) / 24
    assert value.item() == pytest.approx(expected_value, abs=1e-12)
    assert (student.grad - expected).abs().max() < 1e-12


@pytest.mark.parametrize("loss", [loss for loss in UNCLIPPED if loss.id != "macro"])
def test_dpcas_value_is_the_sampled_reverse_kl_a_token_whatever_the_share(loss):
    rows = random_rows(4)
    nats = [sum(reference_budgets(s).values()) - sum(reference_budgets(t).values()) for s, t in rows]
    assert value_and_gradient(loss, scored(rows), 5)[0] == pytest.approx(sum(nats) / 5, abs=1e-12)


# --- exact enumeration

STUDENT = ["a", "b", "ab", "ba", "aab"]
LENGTH = 3  # tokens in a completion


def in_pairs(text):
    """A teacher whose boundaries no later text can move: two bytes a token, the rest at the end."""
    return [text[i : i + 2] for i in range(0, len(text), 2)]


def greedy(text):
    """A teacher that looks ahead: `ba` is one token, so whether `b` ends one depends on what comes next."""
    tokens = []
    while text:
        token = next(token for token in ("ba", "a", "b") if text.startswith(token))
        tokens.append(token)
        text = text[len(token) :]
    return tokens


class Table:
    """Any autoregressive model: logits for each prefix of tokens, drawn when first asked for."""

    def __init__(self, vocabulary, seed):
        self.vocabulary, self.generator, self.logits = vocabulary, torch.Generator().manual_seed(seed), {}

    def log_prob(self, prefix, token):
        if prefix not in self.logits:
            logits = 2 * torch.randn(len(self.vocabulary), generator=self.generator, dtype=torch.float64)
            self.logits[prefix] = logits.requires_grad_()
        return self.logits[prefix].log_softmax(-1)[self.vocabulary.index(token)]

    def log_probs(self, tokens):
        return torch.stack([self.log_prob(tuple(tokens[:i]), token) for i, token in enumerate(tokens)])


class World:
    """All 125 completions of three student tokens, and both models' log-probs of each."""

    def __init__(self, tokenize, seed):
        self.completions = list(itertools.product(STUDENT, repeat=LENGTH))
        self.tokenize = tokenize
        self.student, self.teacher = Table(STUDENT, seed), Table(["a", "b", "aa", "ab", "ba", "bb"], seed + 1)
        self.log_p = torch.stack([self.student.log_probs(y) for y in self.completions])  # (125, 3)
        self.p = self.log_p.sum(1).exp()
        self.parameters = [self.student.logits[prefix] for prefix in sorted(self.student.logits)]

    def chunks(self):
        """Student chunks (125, 3) and teacher chunks (list a completion), by the library's intersection."""
        texts = ["".join(y) for y in self.completions]
        splits = self.completions, [self.tokenize(text) for text in texts]
        widths = [[np.array([len(token) for token in tokens]) for tokens in split] for split in splits]
        counts = [np.array([*map(len, rows)]) for rows in widths]
        widths = [*map(np.concatenate, widths)]
        sides = [*map(Side, map(np.cumsum, widths), widths, counts)]
        lengths = np.array([*map(len, texts)])
        chunks = synchronized_chunks(*sides, lengths, np.zeros((0, 2), dtype=np.int64))
        return tuple(
            [part.tolist() for part in np.split(numbers, np.cumsum(side.counts)[:-1])]
            for numbers, side in zip((chunks.student, chunks.teacher), sides, strict=True)
        )

    def batch(self):
        """All completions as the loss is given them, with the leaf that its gradient is taken for."""
        student_chunks, teacher_chunks = self.chunks()
        teacher = [self.teacher.log_probs(self.tokenize("".join(y))).detach().tolist() for y in self.completions]
        teacher = [[*zip(scores, chunks, strict=True)] for scores, chunks in zip(teacher, teacher_chunks, strict=True)]
        return ScoredChunks(
            student_log_probs=self.log_p.detach().requires_grad_(),
            teacher_log_probs=padded(teacher, 0, 0.0, torch.float64),
            student_chunks=torch.tensor(student_chunks),
            teacher_chunks=padded(teacher, 1, -1, torch.long),
            student_widths=torch.tensor([[len(token) for token in y] for y in self.completions]),
            num_chunks=LENGTH,
        )

    def gradient(self, value):
        """Of a scalar, with respect to all of the student's logits at once."""
        return torch.cat(torch.autograd.grad(value, self.parameters, retain_graph=True))

    def expected_gradient(self, loss):
        """Σ_y p(y) · gradient of the loss sampled at y."""
        batch = self.batch()
        value, _ = loss(batch, 1)
        (slopes,) = torch.autograd.grad(value, batch.student_log_probs)
        return self.gradient((self.p.detach()[:, None] * slopes * self.log_p).sum())

    def chunk_reverse_kl(self):
        """Σ_h sg(p(h)) · KL(p(· | h) ‖ q(· | h)), where h is all text before a chunk and · all that the chunk can be.

        Chunks are grown token by token until pairs and student tokens end together: at an even byte, or at the end.
        """
        total = torch.zeros((), dtype=torch.float64)
        heads = [((), torch.zeros((), dtype=torch.float64))]  # student tokens before the chunk, their log-prob
        while heads:
            head, log_p_head = heads.pop()
            open_chunks = [(head, torch.zeros((), dtype=torch.float64))]
            mass = 0.0
            while open_chunks:
                tokens, log_p = open_chunks.pop()
                if tokens == head or (len(tokens) < LENGTH and len("".join(tokens)) % 2):
                    for token in STUDENT:
                        open_chunks.append(((*tokens, token), log_p + self.student.log_prob(tokens, token)))
                    continue
                before, after = in_pairs("".join(head)), in_pairs("".join(tokens))
                log_q = self.teacher.log_probs(after)[len(before) :].sum().detach()
                total = total + log_p_head.exp().detach() * log_p.exp() * (log_p - log_q)
                mass += log_p.exp().item()
                if len(tokens) < LENGTH:
                    heads.append((tokens, log_p_head + log_p))
            assert mass == pytest.approx(1, abs=1e-12)  # a distribution over chunks
        return total

    def sequence_reverse_kl(self):
        """Σ_y p(y) · (log p(y) − log q(y))."""
        log_q = [self.teacher.log_probs(self.tokenize("".join(y))).sum().item() for y in self.completions]
        return (self.p * (self.log_p.sum(1) - torch.tensor(log_q, dtype=torch.float64))).sum()


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_macros_expected_gradient_is_that_of_the_reverse_kl_of_each_chunk_given_the_text_before(seed, record_property):
    world = World(in_pairs, seed)
    assert world.p.sum().item() == pytest.approx(1, abs=1e-12)
    assert {max(chunks) for chunks in world.chunks()[0]} == {0, 1, 2}
    expected = world.gradient(world.chunk_reverse_kl())
    assert expected.norm() > 0.1
    assert (world.expected_gradient(DPCA("macro", None, event="open")) - expected).abs().max() < 1e-12
    for credit in CREDITS:
        found = cosine(world.expected_gradient(DPCA(credit, None, event="open")), expected)
        record_property(f"cosine {credit}", found)
        print(f"seed {seed} {credit:12s} cosine with the chunk-level reverse KL's gradient {found:.4f}")


def test_macro_lacks_only_what_a_chunk_does_to_the_gaps_of_later_chunks():
    """The rest of the whole text's reverse KL is Σ_y p(y) Σ_i ∇log p_i · (gaps of the chunks after i's)."""
    world = World(in_pairs, 0)
    whole, macro = (
        world.gradient(world.sequence_reverse_kl()),
        world.expected_gradient(DPCA("macro", None, event="open")),
    )
    assert (whole - macro).norm() > 0.1 * whole.norm()
    batch = world.batch()
    gap = batch.student_sum(batch.student_log_probs) - batch.teacher_sum(batch.teacher_log_probs)
    gap = gap.tolist()
    later = [[sum(gap[y][chunk + 1 :]) for chunk in chunks] for y, chunks in enumerate(batch.student_chunks.tolist())]
    rest = world.gradient((world.p.detach()[:, None] * torch.tensor(later, dtype=torch.float64) * world.log_p).sum())
    assert (macro + rest - whole).abs().max() < 1e-12


def test_where_the_teachers_boundaries_hang_on_later_text_macro_is_not_the_reverse_kl_of_the_chunk():
    """The chunk's own law is then p(chunk | h) times how likely the text after leaves its ends boundaries."""
    world = World(greedy, 0)
    chunk_mass, head_mass, log_q = defaultdict(float), defaultdict(float), {}
    for y, p, numbers in zip(world.completions, world.p, world.chunks()[0], strict=True):
        for chunk in set(numbers):
            first, last = numbers.index(chunk), LENGTH - numbers[::-1].index(chunk)
            tokens = greedy("".join(y[:last]))
            before = len(greedy("".join(y[:first])))
            chunk_mass[y[:first], y[:last]] += p
            head_mass[y[:first]] += p
            log_q[y[:first], y[:last]] = world.teacher.log_probs(tokens)[before:].sum().detach()
    kl = sum(
        head_mass[head].detach() * (law := mass / head_mass[head]) * (law.log() - log_q[head, tokens])
        for (head, tokens), mass in chunk_mass.items()
    )
    macro = world.expected_gradient(DPCA("macro", None, event="open"))
    assert cosine(macro, world.gradient(kl)) < 0.999


def test_on_a_completion_of_one_chunk_macro_is_the_whole_texts_reverse_kl_whatever_the_teacher_reads():
    world = World(greedy, 5)
    world.chunks = lambda: ([[0] * LENGTH] * 125, [[0] * len(greedy("".join(y))) for y in world.completions])
    found, expected = (
        world.expected_gradient(DPCA("macro", None, event="open")),
        world.gradient(world.sequence_reverse_kl()),
    )
    assert (found - expected).abs().max() < 1e-12


# --- batches


def wider(batch, student=3, teacher=4, chunks=2):
    """The same with padding at the end of everything."""

    def pad(x, extra, value):
        return torch.nn.functional.pad(x, (0, extra), value=value)

    return ScoredChunks(
        pad(batch.student_log_probs, student, 0.0),
        pad(batch.teacher_log_probs, teacher, 0.0),
        pad(batch.student_chunks, student, -1),
        pad(batch.teacher_chunks, teacher, -1),
        pad(batch.student_widths, student, 0),
        batch.num_chunks + chunks,
    )


def cut(batch, rows):
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: value[rows] for name, value in values.items() if isinstance(value, torch.Tensor)})


@pytest.mark.parametrize("loss", ALL)
def test_batched_equals_one_by_one_without_padding(loss):
    rows = random_rows(11)
    value, gradient = value_and_gradient(loss, scored(rows))
    alone = [value_and_gradient(loss, scored([row])) for row in rows]
    assert value == pytest.approx(sum(v for v, _ in alone), abs=1e-12)
    for row, (student, _) in enumerate(rows):
        own = alone[row][1][0]
        assert (gradient[row, : len(student)] - own[: len(student)]).abs().sum() < 1e-12
        assert not gradient[row, len(student) :].any()


@pytest.mark.parametrize("loss", ALL)
def test_padding_changes_nothing_and_gets_no_gradient(loss):
    batch = scored(random_rows(12))
    value, gradient = value_and_gradient(loss, batch)
    padded_value, padded_gradient = value_and_gradient(loss, wider(batch))
    assert padded_value == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(padded_gradient[:, :-3], gradient, **LAST_DIGITS)
    assert not padded_gradient[:, -3:].any()


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_of_one_step_add_up_to_the_whole_batch(loss, size):
    batch = scored(random_rows(13), torch.float32)
    value, gradient = value_and_gradient(loss, batch)
    parts = [value_and_gradient(loss, cut(batch, slice(start, start + size))) for start in range(0, 6, size)]
    assert value == pytest.approx(sum(v for v, _ in parts), rel=1e-5)
    assert (torch.cat([g for _, g in parts]) - gradient).abs().max() < 1e-5


@pytest.mark.parametrize("loss", ALL)
def test_renumbering_the_chunks_changes_nothing(loss):
    batch = scored(random_rows(14))
    shuffle = torch.tensor([*random.Random(0).sample(range(batch.num_chunks), batch.num_chunks), -1])
    assert shuffle.tolist() != sorted(shuffle.tolist())
    renumbered = replace(
        batch, student_chunks=shuffle[batch.student_chunks], teacher_chunks=shuffle[batch.teacher_chunks]
    )
    value, gradient = value_and_gradient(loss, batch)
    other_value, other_gradient = value_and_gradient(loss, renumbered)
    assert other_value == pytest.approx(value, abs=1e-12)
    assert (other_gradient - gradient).abs().max() < 1e-12


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_lower_precision_stays_close_to_float64(loss, dtype, tolerance):
    """Of a mean over the scored tokens; the inputs are what the lower precision can hold."""
    for seed in range(20):
        low = scored(random_rows(seed, batch=8), dtype)
        student, teacher = low.student_log_probs.double(), low.teacher_log_probs.double()
        high = replace(low, student_log_probs=student, teacher_log_probs=teacher)
        num_items = (low.student_chunks >= 0).sum()
        value, gradient = value_and_gradient(loss, low, num_items)
        exact_value, exact_gradient = value_and_gradient(loss, high, num_items)
        assert abs(value - exact_value) < tolerance * max(1, abs(exact_value))
        assert (gradient - exact_gradient).abs().max() < tolerance * max(1, exact_gradient.abs().max())


# --- hard cases


def without(batch, row, chunk):
    """The same batch in which that chunk's tokens take no part."""
    student_chunks, teacher_chunks = batch.student_chunks.clone(), batch.teacher_chunks.clone()
    for chunks in (student_chunks, teacher_chunks):
        chunks[row][chunks[row] == chunk] = -1
    return replace(batch, student_chunks=student_chunks, teacher_chunks=teacher_chunks)


NOT_FINITE = [(loss, bad) for loss in DPCAS for bad in BAD if bad != -math.inf] + [
    (a, bad) for a in ALMS for bad in BAD
]


@pytest.mark.parametrize(
    ("loss", "bad"), [pytest.param(*loss.values, bad, id=f"{loss.id}-{bad}") for loss, bad in NOT_FINITE]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_teacher_log_prob_that_is_not_finite_takes_out_its_chunk_and_nothing_else(loss, bad, dtype):
    clean = scored(random_rows(15), dtype)
    broken = clean.teacher_log_probs.clone()
    broken[0, (clean.teacher_chunks[0] == 1).nonzero()[0]] = bad
    value, gradient = value_and_gradient(loss, replace(clean, teacher_log_probs=broken))
    expected_value, expected_gradient = value_and_gradient(loss, without(clean, 0, 1))
    assert value == pytest.approx(expected_value, rel=1e-6)
    assert torch.equal(gradient, expected_gradient)
    assert value != pytest.approx(value_and_gradient(loss, clean)[0], rel=1e-3)


@pytest.mark.parametrize("loss", [*DPCAS, pytest.param(StrictSampled(), id="strict_sampled")])
def test_what_the_teacher_never_writes_costs_the_whole_clip(loss):
    impossible = scored([([(-1.0, 0, 1)], [(-math.inf, 0)])])
    assert value_and_gradient(loss, impossible, 1)[1].tolist() == [[10.0]]


@pytest.mark.parametrize("bad", BAD)
def test_sft_reads_no_teacher(bad):
    batch = scored(random_rows(15))
    broken = replace(batch, teacher_log_probs=torch.full_like(batch.teacher_log_probs, bad))
    assert value_and_gradient(SFT(), broken)[0] == value_and_gradient(SFT(), batch)[0]


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("bad", [*BAD, -50.0])
def test_a_teacher_token_without_part_is_never_read(loss, bad):
    batch = scored(random_rows(16))
    assert (batch.teacher_chunks[0] < 0).any()
    broken = replace(batch, teacher_log_probs=batch.teacher_log_probs.masked_fill(batch.teacher_chunks < 0, bad))
    value, gradient = value_and_gradient(loss, batch)
    broken_value, broken_gradient = value_and_gradient(loss, broken)
    assert value == broken_value
    assert torch.equal(gradient, broken_gradient)


@pytest.mark.parametrize("loss", ALL)
def test_a_student_token_without_part_within_a_chunk_is_never_read_and_gets_no_gradient(loss):
    def row(middle):
        return [(-1.0, 0, 2), (middle, -1, 9), (-2.0, 0, 1)], [(-1.5, 0)]

    value, gradient = value_and_gradient(loss, scored([row(-0.3)]))
    other_value, other_gradient = value_and_gradient(loss, scored([row(-40.0)]))
    short_value, short_gradient = value_and_gradient(loss, scored([([(-1.0, 0, 2), (-2.0, 0, 1)], [(-1.5, 0)])]))
    assert value == other_value == pytest.approx(short_value, rel=1e-12)
    assert gradient.tolist() == other_gradient.tolist()
    assert gradient[0, 1] == 0
    torch.testing.assert_close(gradient[:, ::2], short_gradient, **LAST_DIGITS)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("log_prob", [0.0, 1e-7, -1e-7, -1e-5, 1e-3, -200.0])
@pytest.mark.parametrize("teacher", [0.0, 1e-7, -1e-7, 1e-3, -3.0, -200.0, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_certain_and_hopeless_chunks_keep_loss_and_gradient_finite(loss, log_prob, teacher, dtype):
    rows = [([(log_prob, 0, 1), (log_prob, 0, 1), (-1.0, 1, 1)], [(teacher, 0), (-2.0, 1)])]
    value, gradient = value_and_gradient(loss, scored(rows, dtype))
    assert math.isfinite(value)
    assert gradient.isfinite().all()
    assert gradient[0, 2] != 0


@pytest.mark.parametrize("loss", ALMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alms_gradient_is_right_where_the_student_is_nearly_certain(loss, dtype):
    row = [(-2e-6, 0, 1)], [(-2.0, 0)]
    found = value_and_gradient(loss, scored([row], dtype), 1)[1].item()
    _, (expected,) = reference_alm(loss, *row)
    assert found == pytest.approx(expected, rel=2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("loss", ALL)
def test_a_chunk_that_the_student_has_no_token_in_gives_nothing(loss):
    student = [(-1.0, 0, 1), (-2.0, 2, 1)]
    value, gradient = value_and_gradient(loss, scored([(student, [(-1.5, 0), (-7.0, 1), (-0.5, 2)])]))
    expected_value, expected_gradient = value_and_gradient(loss, scored([(student, [(-1.5, 0), (-0.5, 2)])]))
    assert value == pytest.approx(expected_value, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, **LAST_DIGITS)


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("rows", [[([(-1.0, -1, 1)] * 3, [(-2.0, -1)] * 2)] * 2, [([], [])]])
def test_nothing_scored_is_a_zero_loss_with_a_zero_gradient(loss, rows):
    value, gradient = value_and_gradient(loss, scored(rows), num_items=1)
    assert value == 0
    assert gradient.shape == (len(rows), max(1, len(rows[0][0]))) and not gradient.any()


@pytest.mark.parametrize("credit", CREDITS)
def test_no_advantage_exceeds_the_clip_and_the_metric_counts_those_cut(credit):
    student = [(-1.0, 0, 1), (-3.0, 0, 1), (-2.0, 1, 1), (-5.0, -1, 1), (-1.0, 2, 1)]
    rows = [(student, [(-90.0, 0), (-2.5, 1), (-0.1, 2)])]
    _, gradient = value_and_gradient(DPCA(credit, 2.0, event="open"), scored(rows), 1)
    _, free = value_and_gradient(DPCA(credit, None, event="open"), scored(rows), 1)
    assert free.max() > 20
    assert torch.equal(gradient, free.clamp(-2, 2))
    _, metrics = DPCA(credit, 2.0, event="open")(scored(rows), 1)
    cut_tokens, weight = metrics["advantage/clipped_fraction"]
    assert (cut_tokens.item(), weight.item()) == ((free.abs() > 2).sum().item(), 4)
    assert DPCA(credit, None, event="open")(scored(rows), 1)[1]["advantage/clipped_fraction"][0] == 0


def test_the_clip_holds_on_both_sides_and_leaves_what_is_on_the_bound():
    rows = [([(-30.0, 0, 1), (-1.0, 1, 1), (-12.0, 2, 1)], [(-1.0, 0), (-30.0, 1), (-2.0, 2)])]
    assert value_and_gradient(DPCA(event="open"), scored(rows), 1)[1].tolist() == [[-10.0, 10.0, -10.0]]
    assert DPCA(event="open")(scored(rows), 1)[1]["advantage/clipped_fraction"][0] == 2


@pytest.mark.parametrize("loss", DPCAS)
def test_advantages_carry_no_gradient(loss):
    batch = scored(random_rows(17))
    batch.student_log_probs.requires_grad_()
    batch.teacher_log_probs.requires_grad_()
    value, _ = loss(batch, 1)
    value.backward()
    assert batch.teacher_log_probs.grad is None
    advantages, _ = loss.advantages(batch)
    assert not advantages.requires_grad
    assert torch.equal(batch.student_log_probs.grad, -advantages)


# --- names and knobs


def test_every_loss_is_built_by_name_with_its_knobs():
    assert build_loss("dpca", credit="last", advantage_clip=None) == DPCA("last", None)
    assert build_loss("alm", temperature=3.0) == ALM(3.0)
    assert build_loss("sft") == SFT()
    assert [build_loss(name).policy for name in ("dpca", "alm", "sft", "gold")] == ["on", "both", "off", "both"]
    assert [build_loss(name).signal for name in ("dpca", "alm", "sft", "gold")] == [
        "logprobs",
        "logprobs",
        "none",
        "logits",
    ]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("dcpa", {}, "'dcpa'.*" + ".*".join(LOSSES)),
        ("dpca", {"clip": 3}, "'dpca'.*'clip'.*credit, advantage_clip"),
        ("alm", {"tau": 3}, "'alm'.*'tau'.*temperature"),
        ("sft", {"credit": "last"}, "'sft'.*'credit'.*takes none"),
        ("dpca", {"credit": "fair"}, "'fair'.*" + ".*".join(CREDITS)),
        ("dpca", {"advantage_clip": 0}, "advantage_clip.*0"),
        ("dpca", {"advantage_clip": -1.0}, "advantage_clip.*-1.0"),
        ("alm", {"temperature": 0.0}, "temperature.*0.0"),
        ("strict_topk", {"top_k": 0}, "strict_topk's top_k.*at least 1 or None.*0"),
        ("strict_topk", {"top_k": 2.5}, r"strict_topk's top_k must be int \| None, got 2.5"),
        ("cdm", {"top_k": "4"}, "cdm's top_k must be int, got '4'"),
        ("cdm", {"threshold": -1}, "cdm's threshold must be between 0 and 1, got -1"),
        ("bpm", {"mask_whitespace": "no"}, "bpm's mask_whitespace must be bool, got 'no'"),
        ("bpm", {"beta": 1.0}, "bpm's beta.*below 1, got 1.0"),
        ("gold", {"beta": 2}, "gold's beta must be between 0 and 1, got 2"),
        ("gold", {"beta": True}, "gold's beta must be float, got True"),
        ("gold", {"matched_weight": -1.0}, "GOLD's matched_weight must not be negative, got -1.0"),
        ("gold", {"matched_weight": 2.0}, "gold's matched_weight is 2.0.*set both"),
        ("gold", {"unmatched_weight": math.nan}, "gold's unmatched_weight.*nan"),
        ("uld", {"uld_pairing": "word"}, "'word'.*position, chunk"),
        ("uld", {"cross_entropy_weight": -1.0}, "ULD's cross_entropy_weight.*-1.0"),
        ("multi_level_ot", {"epsilon": 0.0}, "multi_level_ot's epsilon must be positive, got 0.0"),
        ("multi_level_ot", {"log_weight": -1.0}, "MultiLevelOT's log_weight.*-1.0"),
        ("alm", {"temperature": math.nan}, "temperature.*nan"),
    ],
)
def test_an_unknown_name_or_knob_is_an_error_that_names_the_known(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_loss(name, **kwargs)


def test_a_callable_is_its_own_loss_and_takes_no_knobs():
    def own(batch, num_items):
        return batch.student_log_probs.sum() / num_items, {}

    assert build_loss(own) is own
    with pytest.raises(ValueError, match="credit"):
        build_loss(own, credit="last")
    with pytest.raises(ValueError, match=r"not a class: SFT\(...\)"):
        build_loss(SFT)
