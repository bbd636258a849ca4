"""DPCA with closed chunks: against the formula, one chunk after the other, with the gradient through all three terms."""

import math
from dataclasses import replace

import pytest
import torch
from chunk_rows import as_tensors, by_chunk, random_rows, reference_shares

from trl_ctopd.losses import DPCA, ScoredChunks
from trl_ctopd.losses.credit import CREDITS


SHARES = [credit for credit in CREDITS if credit != "previous"]


def closed_batch(seed, dtype=torch.float64):
    """Random chunks, with a log p_close at half of the positions."""
    rows = random_rows(seed)
    batch = ScoredChunks(*as_tensors(rows, dtype))
    generator = torch.Generator().manual_seed(seed)
    close = -4 * torch.rand(batch.student_chunks.shape, generator=generator, dtype=dtype)
    close = close * (torch.rand(close.shape, generator=generator) < 0.5)
    return rows, replace(batch, close_log_probs=close)


def gradients(loss, batch, num_items=7):
    """Value, and gradients with respect to both kinds of log-probs (B, S)."""
    leaves = [batch.student_log_probs.detach().requires_grad_(), batch.close_log_probs.detach().requires_grad_()]
    value, metrics = loss(replace(batch, student_log_probs=leaves[0], close_log_probs=leaves[1]), num_items)
    return value.item(), *torch.autograd.grad(value, leaves), metrics


def reference(loss, rows, batch, num_items):
    """-Σ_c G_c · [Σ_i w_i log p_i - log p_close before + log p_close after] / N, with G_c and w_i plain numbers."""
    bound = math.inf if loss.advantage_clip is None else loss.advantage_clip
    tokens = torch.zeros_like(batch.student_log_probs)
    close = torch.zeros_like(tokens)
    found = batch.close_log_probs.tolist()
    for row, (student, teacher) in enumerate(rows):
        shares, theirs = reference_shares(loss.credit, student), by_chunk(teacher)
        for chunk, inside in by_chunk(student).items():
            before, after = min(inside), max(inside) + 1
            ends = after < tokens.shape[1]
            ours = math.fsum(student[i][0] for i in inside) - found[row][before]
            ours += found[row][after] if ends else 0.0
            gap = math.fsum(teacher[j][0] for j in theirs[chunk]) - ours
            for i in inside:
                tokens[row, i] -= max(-bound, min(bound, gap * shares[i]))
            gap = max(-bound, min(bound, gap))
            close[row, before] += gap
            if ends:
                close[row, after] -= gap
    return tokens / num_items, close / num_items


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("clip", [10.0, 0.5, None])
@pytest.mark.parametrize("credit", SHARES)
def test_gradient_equals_a_loop_over_chunks(credit, clip, seed):
    rows, batch = closed_batch(seed)
    loss = DPCA(credit, clip, event="closed")
    _, tokens, close, _ = gradients(loss, batch, 13)
    expected_tokens, expected_close = reference(loss, rows, batch, 13)
    torch.testing.assert_close(tokens, expected_tokens, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(close, expected_close, rtol=1e-9, atol=1e-12)
    assert close.abs().max() > 0.01


@pytest.mark.parametrize("credit", SHARES)
def test_where_nothing_can_go_on_closed_chunks_are_open_ones(credit):
    _, batch = closed_batch(3)
    batch = replace(batch, close_log_probs=torch.zeros_like(batch.close_log_probs))
    _, tokens, _, _ = gradients(DPCA(credit, event="closed"), batch)
    leaf = batch.student_log_probs.clone().requires_grad_()
    open_loss, _ = DPCA(credit, event="open")(replace(batch, student_log_probs=leaf), 7)
    torch.testing.assert_close(tokens, torch.autograd.grad(open_loss, leaf)[0])


def test_a_later_update_weighs_both_kinds_by_their_own_ratio_within_ppos_bounds():
    """The closing of a chunk that the update made likelier than the bound allows is left alone, as a token is."""
    chunks = torch.tensor([[0, 1]])
    scores = torch.tensor([[-1.0, -1.0]], dtype=torch.float64)
    batch = ScoredChunks(
        student_log_probs=scores,
        teacher_log_probs=torch.tensor([[-1.0, -3.0]], dtype=torch.float64),
        student_chunks=chunks,
        teacher_chunks=chunks,
        student_widths=torch.ones_like(chunks),
        num_chunks=2,
        close_log_probs=torch.tensor([[0.0, -1.0]], dtype=torch.float64),
        old_log_probs=scores,
    )
    for old, moved in ((-1.0, True), (-1.1, True), (-1.5, False), (-0.5, True)):
        later = replace(batch, old_close_log_probs=torch.tensor([[0.0, old]], dtype=torch.float64))
        _, tokens, close, _ = gradients(DPCA(event="closed"), later, 1)
        first, second = -1.0 - (-1.0 + old), -3.0 - (-1.0 - old)
        assert tokens.tolist() == [pytest.approx([-first, -second])]
        pull = (first - second) * math.exp(-1.0 - old)
        assert close[0, 1].item() == pytest.approx(-pull if moved else 0.0)


def test_a_chunk_that_is_spelled_otherwise_is_never_made_likelier():
    rows, batch = closed_batch(1)
    other = torch.rand(batch.student_chunks.shape, generator=torch.Generator().manual_seed(5)) < 0.3
    marked = replace(batch, other_spelling=other & (batch.student_chunks >= 0))
    loss = DPCA("macro", None, event="closed")
    plain, found = (loss.advantages(own)[0] for own in (batch, marked))
    bounded = kept = 0
    for row, (student, _) in enumerate(rows):
        for inside in by_chunk(student).values():
            spelled_otherwise = any(marked.other_spelling[row, i] for i in inside)
            for i in inside:
                expected = min(plain[row, i].item(), 0.0) if spelled_otherwise else plain[row, i].item()
                assert found[row, i].item() == expected
            bounded += spelled_otherwise and plain[row, inside[0]] > 0
            kept += not spelled_otherwise and plain[row, inside[0]] > 0
    assert bounded and kept
    assert torch.equal(*(DPCA(event="open").advantages(own)[0] for own in (batch, marked))), (
        "open ones are as published"
    )


def test_another_samplers_tokens_weigh_both_kinds():
    _, batch = closed_batch(1)
    weights = torch.rand(batch.student_chunks.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, tokens, close, _ = gradients(DPCA(event="closed"), batch)
    _, weighed_tokens, weighed_close, _ = gradients(DPCA(event="closed"), replace(batch, importance=weights))
    torch.testing.assert_close(weighed_tokens, tokens * weights)
    torch.testing.assert_close(weighed_close, close * weights)


def test_what_closing_costs_is_logged_a_chunk():
    rows, batch = closed_batch(2)
    *_, metrics = gradients(DPCA(event="closed"), batch)
    total, weight = metrics["closing/nats_per_chunk"]
    assert weight == sum(len(by_chunk(student)) for student, _ in rows)
    ends = [(row, max(inside) + 1) for row, (student, _) in enumerate(rows) for inside in by_chunk(student).values()]
    close = batch.close_log_probs
    assert total.item() == pytest.approx(-sum(close[row, at].item() for row, at in ends if at < close.shape[1]))


def test_closed_chunks_without_what_they_read_are_an_error_that_says_so():
    _, batch = closed_batch(0)
    with pytest.raises(ValueError, match="close_log_probs.*event='open'"):
        DPCA(event="closed")(replace(batch, close_log_probs=None), 1)


@pytest.mark.parametrize("credit", [None, "macro"])
def test_log_probs_alone_are_read_as_published_where_no_event_was_asked_for(credit):
    batch = ScoredChunks(*as_tensors(random_rows(0), torch.float64))
    [(value, _), (published, _)] = (loss(batch, 7) for loss in (DPCA(credit), DPCA(credit, event="open")))
    assert value.item() == published.item()


@pytest.mark.parametrize(
    ("kwargs", "credit", "event"),
    [
        ({"event": "closed"}, "macro", "closed"),
        ({"event": "open"}, "semantic", "open"),
        ({"credit": "previous"}, "previous", "open"),
        ({"event": "closed", "credit": "last"}, "last", "closed"),
    ],
)
def test_credit_and_event_go_together(kwargs, credit, event):
    loss = DPCA(**kwargs)
    assert (loss.credit, loss.event) == (credit, event)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="'ajar'.*closed, open"):
        DPCA(event="ajar")
    with pytest.raises(ValueError, match="credit='previous'.*event='open'"):
        DPCA(credit="previous", event="closed")
