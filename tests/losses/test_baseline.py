"""vOPD's baseline: against sums over byte strings, the expectation that it keeps, and the noise that it takes away."""

import math
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from test_logit_losses import TOYS, Pair, batch_of, toy_scene
from test_reverse_kl import DIGITS, NUMBERS, closings, moved, noise, numbers, written_by_both

from trl_ctopd.losses import DPCA, ScoredChunks, build_loss
from trl_ctopd.losses.baseline import next_token_kl


BOUND = 6.0


def by_outcome(batch, row, place, keep):
    """What the student may write next, by its bytes (True for the end of its turn), and its probability; without the end of a turn that
    the teacher has no token for."""
    found, total = defaultdict(float), 0.0
    log_p = batch.student.hidden[row, place].log_softmax(-1).exp().tolist()
    stops = set(batch.vocabulary._student.stops)
    for token, p in enumerate(log_p):
        if keep(token):
            total += p
            if token not in stops or batch.vocabulary.bridged:
                found[True if token in stops else batch.vocabulary.student_rows[token] or None] += p
    return {outcome: p / total for outcome, p in found.items()}


def teachers(batch, row, place, dummy, student_texts, known):
    """The same of the teacher: each token stands for the longest of `student_texts` that what is left of it begins with. The last is
    what `known` tokens leave."""
    found = defaultdict(float)
    q = batch.teacher.hidden[row, place].log_softmax(-1).exp().tolist()
    likeliest = sorted(range(len(q)), key=lambda w: -q[w])[: len(q) if known is None else known]
    stops = set(batch.vocabulary._teacher.stops) if batch.vocabulary.bridged else set()
    rest = 0.0 if known is None else 1 - math.fsum(q[w] for w in likeliest)
    for w in likeliest:
        text = batch.vocabulary.teacher_rows[w]
        if dummy and not (text.startswith(dummy) and len(text) > len(dummy)):
            continue
        left = text[len(dummy) :]
        whole = [left[:n] for n in range(len(left), 0, -1) if left[:n] in student_texts]
        found[True if w in stops and not dummy else whole[0] if whole else None] += q[w]
    total = math.fsum(found.values()) + rest
    return {outcome: mass / total for outcome, mass in found.items()}, rest / total


def reference(batch, closed, known):
    """{(row, chunk): K_c}."""
    result, vocabulary = {}, batch.vocabulary
    texts = {row for row in vocabulary.student_rows if row}
    for row, chunk in batch.scorable.nonzero().tolist():
        own, theirs = (
            (chunks[row] == chunk).nonzero()[:, 0].tolist() for chunks in (batch.student_chunks, batch.teacher_chunks)
        )
        if vocabulary.student_puts_a_space and (own[0] == 0 or batch.student_chunks[row, own[0] - 1] < 0):
            continue
        spelled = b"".join(vocabulary.student_rows[batch.student_ids[row, i]] for i in own)
        read = b"".join(vocabulary.teacher_rows[batch.teacher_ids[row, j]] for j in theirs)
        end_of_turn = not spelled
        dummy = b"" if end_of_turn else read[: len(read) - len(spelled)]
        if len(read) < len(spelled):
            continue
        if (
            dummy and dummy == vocabulary.teacher_rows[batch.teacher_ids[row, theirs[0]]]
        ):  # a token of its own, and read
            dummy, theirs = b"", theirs[1:]
        before, going_on = batch.student_chunks[row, own[0] - 1].item() if own[0] else -1, set()
        if closed and before >= 0 and batch.scorable[row, before]:
            last = (batch.teacher_chunks[row] == before).nonzero()[-1, 0]
            going_on = {*vocabulary.continuations.of(batch.teacher_ids[row, last].item()).tolist()}
        p = by_outcome(batch, row, own[0], lambda token, out=going_on: token not in out)
        t, rest = teachers(batch, row, theirs[0], dummy, texts, known)
        if known is not None:
            untold = [outcome for outcome in p if not t.get(outcome)]
            t[()] = rest
            p[()] = math.fsum(p.pop(outcome) for outcome in untold)
        log = lambda x: math.log(max(x, 1e-35))  # noqa: E731
        result[row, chunk] = math.fsum(
            mass * max(-BOUND, min(BOUND, log(mass) - log(t.get(outcome, 0.0)))) for outcome, mass in p.items()
        )
    return result


@pytest.mark.parametrize("pair", TOYS)
@pytest.mark.parametrize(("closed", "known"), [(True, None), (False, None), (True, 20)])
def test_it_is_the_kl_of_the_next_token_where_a_chunk_begins(pair, closed, known):
    batch = batch_of(toy_scene(pair, seed=1))
    kl, told = next_token_kl(batch, closed, BOUND, known)
    expected = reference(batch, closed, known)
    assert {tuple(place) for place in told.nonzero().tolist()} == expected.keys() and expected
    for (row, chunk), value in expected.items():
        assert kl[row, chunk].item() == pytest.approx(value, abs=1e-9)
    assert not kl[~told].any()


def test_a_servers_likeliest_tokens_tell_what_the_same_teacher_here_does():
    batch = batch_of(toy_scene(DIGITS))
    values, ids = batch.teacher.hidden.log_softmax(-1).topk(30, dim=-1)
    served = replace(batch, teacher=None, teacher_likeliest=(ids, values))
    found, expected = (next_token_kl(own, True, BOUND, 20)[0] for own in (served, batch))
    torch.testing.assert_close(found, expected)


def test_one_tokenizer_gives_the_log_ratio_plus_the_kl_of_each_position():
    tokenizer = TOYS[DIGITS]().student
    world = written_by_both(Pair(tokenizer, tokenizer, [0], [0], [0], extra=(5, 5)), NUMBERS[:8])
    micro_batch = replace(world.micro_batch, student_logits=moved(world))
    batch = batch_of(micro_batch)
    log_p, log_q = micro_batch.student_logits.log_softmax(-1), micro_batch.teacher_logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected = (batch.teacher_log_probs - batch.student_log_probs + kl) * (batch.student_chunks >= 0)
    found, _ = DPCA("macro", None, "open", baseline="kl").advantages(batch)
    assert kl.max() > 0.1
    torch.testing.assert_close(found, expected)


def closed_on(world, **knobs):
    loss = build_loss("dpca", event="closed", advantage_clip=None, **knobs)

    def call(batch, num_items):
        close = closings(replace(world.micro_batch, student_logits=batch.student.hidden))
        return loss(replace(batch, close_log_probs=close), num_items)

    return call


@pytest.mark.parametrize("credit", ["macro", "remaining"])
def test_closed_chunks_keep_their_expected_gradient_and_lose_some_noise(credit):
    world = numbers(DIGITS)
    student = moved(world)
    plain = closed_on(world, credit=credit)
    expected = world.expected_gradient(plain, student)
    assert expected.abs().max() > 0.01
    knobs = [{"baseline": "kl"}, *({"baseline": "kl", "baseline_top_k": k} for k in (4, 20) if credit == "macro")]
    for own in knobs:
        loss = closed_on(world, credit=credit, **own)
        assert (world.expected_gradient(loss, student) - expected).abs().max() < 1e-10
        assert noise(world, loss, student) < noise(world, plain, student), own


def test_with_one_tokenizer_it_keeps_the_expectation_and_its_noise_is_not_less():
    tokenizer = TOYS[DIGITS]().student
    world = written_by_both(Pair(tokenizer, tokenizer, [0], [0], [0], extra=(5, 5)), NUMBERS)
    student = moved(world)
    plain, steady = (
        build_loss("dpca", event="open", credit="macro", advantage_clip=None, baseline=b) for b in (None, "kl")
    )
    expected = world.expected_gradient(plain, student)
    assert (world.expected_gradient(steady, student) - expected).abs().max() < 1e-10 < expected.abs().max()
    assert noise(world, steady, student) > 1.1 * noise(world, plain, student)
    assert noise(world, build_loss("reverse_kl", advantage_clip=None), student) < 0.5 * noise(world, plain, student)


def test_with_open_chunks_or_another_credit_the_expectation_is_another_where_tokens_nest():
    world = numbers(DIGITS)
    student = moved(world)
    for knobs in ({"event": "open", "credit": "macro"}, {"event": "open", "credit": "semantic"}):
        plain, steady = (build_loss("dpca", advantage_clip=None, **knobs, baseline=b) for b in (None, "kl"))
        both = [world.expected_gradient(loss, student) for loss in (plain, steady)]
        assert (both[0] - both[1]).abs().max() > 1e-3
    both = [world.expected_gradient(closed_on(world, credit="semantic", baseline=b), student) for b in (None, "kl")]
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_what_it_reads_is_asked_for_and_its_absence_is_an_error_with_the_way_out():
    loss = DPCA(baseline="kl", baseline_top_k=5)
    assert (loss.signal, loss.likeliest) == ("logits", 5) and DPCA().signal == "logprobs"
    assert DPCA("remaining", baseline="kl", baseline_top_k=5).likeliest is None
    ids = torch.zeros(1, 1, dtype=torch.long)
    batch = ScoredChunks(ids.double(), ids.double(), ids, ids, ids, 1)
    with pytest.raises(
        ValueError, match="baseline='kl' reads .*baseline_top_k for a teacher behind a server.*baseline=None"
    ):
        loss(batch, 1)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"baseline": "mean"}, "Unknown baseline 'mean'.*kl"),
        ({"baseline": "kl", "baseline_top_k": 0}, "baseline_top_k=0.*at least 1"),
        ({"baseline_top_k": 4}, "baseline_top_k=4 with baseline=None.*needs baseline='kl'"),
    ],
)
def test_knobs_that_make_no_sense_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        build_loss("dpca", **knobs)
