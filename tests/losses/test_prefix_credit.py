"""The credits `prefix` and `remaining`: against sums over all of the teacher's tokens, and what they do to the expectation."""

import math
from dataclasses import replace

import pytest
import torch
from test_logit_losses import TOYS, batch_of, toy_scene
from test_reverse_kl import DIGITS, closings, moved, noise, numbers

from trl_ctopd.losses import DPCA, ScoredChunks
from trl_ctopd.losses.prefix_credit import PREFIX_CREDITS, beginnings


def beginning(theirs, log_q, table, text):
    """The probability that the teacher's text begins with `text`, by a chunk's tokens (place, id), in sums over the vocabulary."""
    total, start, before = 0.0, 0, 1.0
    for place, token in theirs:
        if start < len(text):
            rest = text[start:]
            total += before * math.fsum(
                math.exp(log_q[place][w]) for w, row in enumerate(table) if row.startswith(rest)
            )
        start, before = start + len(table[token]), before * math.exp(log_q[place][token])
    return total


def reference(loss, batch):
    """(B, S) advantages and (B, S) of log p_close, one chunk after the other."""
    rows = batch.vocabulary.student_rows, batch.vocabulary.teacher_rows
    tokens, closing = (torch.zeros_like(batch.student_log_probs) for _ in range(2))
    close = batch.close_log_probs.tolist() if loss.event == "closed" else torch.zeros_like(tokens).tolist()
    length, several, spanning = tokens.shape[1], 0, 0
    for row in range(len(tokens)):
        log_q = batch.teacher.hidden[row].log_softmax(-1).tolist()
        for chunk in batch.scorable[row].nonzero()[:, 0].tolist():
            own = (batch.student_chunks[row] == chunk).nonzero()[:, 0].tolist()
            theirs = (batch.teacher_chunks[row] == chunk).nonzero()[:, 0].tolist()
            theirs = [(j, batch.teacher_ids[row, j].item()) for j in theirs]
            spelled = [rows[0][batch.student_ids[row, i]] for i in own]
            text, read = b"".join(spelled), b"".join(rows[1][token] for _, token in theirs)
            dummy = read[: len(read) - len(text)]
            alike = text and dummy + text == read and len(dummy) < 2
            first, last = own[0], own[-1]
            before, after = close[row][first], close[row][last + 1] if last + 1 < length else 0.0
            log_p = [batch.student_log_probs[row, i].item() for i in own]
            log_p[0] -= before
            gap = math.fsum(max(-100.0, batch.teacher_log_probs[row, j].item()) for j, _ in theirs)
            gap -= math.fsum(log_p) + after
            f, told = [0.0], [True]  # where it is not told, F is as if both models agreed
            for n in range(1, len(own) + 1):
                written = dummy + b"".join(spelled[:n])
                digits = any(text in written for text in map(b"%d".__mod__, range(10)))
                told.append(bool(alike) and not (digits and batch.vocabulary.later_digits_undo))
                f.append(math.log(beginning(theirs, log_q, rows[1], written)) if told[-1] else math.fsum(log_p[:n]))
            for n, i in enumerate(own):
                left = gap - (f[n] - math.fsum(log_p[:n]))
                step = f[n + 1] - f[n] - log_p[n]
                tokens[row, i] = step if loss.credit == "prefix" and i != last and told[n + 1] else left
            closing[row, first] -= gap
            if last + 1 < length and after:
                closing[row, last + 1] += gap - (f[-1] - math.fsum(log_p))
            elif last + 1 < length:
                closing[row, last + 1] += gap
            several += bool(alike) and len(own) > 1
            spanning += bool(alike) and len(own) > 1 < len(theirs)
    return tokens, closing, several, spanning


def with_closings(micro_batch, seed=0):
    """Random log p_close at half of the places at which a chunk may end."""
    batch = batch_of(micro_batch)
    generator = torch.Generator().manual_seed(seed)
    close = -3 * torch.rand(batch.student_chunks.shape, generator=generator, dtype=torch.float64)
    drawn = torch.rand(close.shape, generator=generator) < 0.5
    begins = (batch.student_chunks >= 0) & (batch.student_chunks != batch.student_chunks.roll(1, 1))
    begins[:, 0] = False
    leaf = batch.student_log_probs.detach().requires_grad_()
    return replace(batch, student_log_probs=leaf, close_log_probs=(close * drawn * begins).requires_grad_())


@pytest.mark.parametrize("pair", TOYS)
@pytest.mark.parametrize("event", ["closed", "open"])
@pytest.mark.parametrize("credit", PREFIX_CREDITS)
def test_gradient_equals_a_loop_over_chunks_and_vocabulary(credit, event, pair):
    batch = with_closings(toy_scene(pair, seed=1))
    loss = DPCA(credit, None, event)
    value, metrics = loss(batch, 1)
    leaves = [batch.student_log_probs, batch.close_log_probs] if event == "closed" else [batch.student_log_probs]
    found = torch.autograd.grad(value, leaves)
    tokens, closing, several, _ = reference(loss, batch)
    torch.testing.assert_close(-found[0], tokens.detach(), rtol=1e-9, atol=1e-9)
    if event == "closed":
        torch.testing.assert_close(-found[1], closing.detach(), rtol=1e-9, atol=1e-9)
    assert several
    total, weight = metrics["credit/without_prefix_fraction"]
    assert total == ((batch.student_tokens > 1) & batch.scorable).sum() - several
    assert weight == (batch.student_tokens > 0).sum()


def test_in_some_toys_a_later_digit_undoes_a_boundary_and_in_some_not():
    assert {TOYS[pair]().vocabulary.later_digits_undo for pair in TOYS} == {True, False}


def test_some_chunks_of_the_toys_have_several_tokens_on_both_sides():
    scenes = [with_closings(toy_scene(pair, seed=1)) for pair in TOYS]
    assert sum(reference(DPCA("remaining", None), batch)[3] for batch in scenes) > 1


@pytest.mark.parametrize("tile_tokens", [1, 16])
def test_tiles_change_nothing(tile_tokens):
    batch = with_closings(toy_scene(DIGITS))
    ends = torch.ones_like(batch.scorable)
    whole, parts = (beginnings(replace(batch, tile_tokens=tile), ends) for tile in (1024, tile_tokens))
    torch.testing.assert_close(parts.after, whole.after)
    assert whole.known.any() and whole.after.min() < -0.1


@pytest.mark.parametrize("credit", PREFIX_CREDITS)
def test_the_advantages_of_a_chunk_add_up_to_its_gap_with_credit_prefix_alone(credit):
    batch = with_closings(toy_scene(DIGITS))
    loss = DPCA(credit, None, "open")
    total, gap = batch.student_sum(loss.advantages(batch)[0]), loss._gaps(batch)
    if credit == "prefix":
        torch.testing.assert_close(total, gap.detach())
    else:
        assert (total - gap).abs().max() > 0.1


def closed_on(world, credit):
    loss = DPCA(credit, None, "closed")

    def call(batch, num_items):
        close = closings(replace(world.micro_batch, student_logits=batch.student.hidden))
        return loss(replace(batch, close_log_probs=close), num_items)

    return call


def test_remaining_has_the_expectation_of_macro_and_less_noise_and_prefix_another():
    world = numbers(DIGITS)
    student = moved(world, by=0.2)
    macro, remaining, prefix = (closed_on(world, credit) for credit in ("macro", *reversed(PREFIX_CREDITS)))
    expected = world.expected_gradient(macro, student)
    assert expected.abs().max() > 0.01
    assert (world.expected_gradient(remaining, student) - expected).abs().max() < 1e-10
    assert (world.expected_gradient(prefix, student) - expected).abs().max() > 0.01
    noises = [noise(world, loss, student) for loss in (macro, remaining, prefix)]
    assert noises[0] > 1.1 * noises[1] > 1.2 * noises[2]


def test_a_batch_without_distributions_is_refused_with_the_way_out():
    ids = torch.zeros(1, 1, dtype=torch.long)
    batch = ScoredChunks(ids.double(), ids.double(), ids, ids, ids, 1)
    with pytest.raises(
        ValueError, match="prefix and remaining read the teacher's distributions.*teacher in this process"
    ):
        DPCA("prefix", event="open")(batch, 1)
