"""The log-prob of closing, read off the tiles of TRL's kernel, against the same from whole logits in float64."""

import pytest
import torch
from torch.nn.functional import linear

from trl_ctopd.models.closing import ClosingLogProbFunction


N, H, V = 23, 16, 211


def case(seed, bias):
    """Random states and head; a row without tokens that go on, one with nearly all, the others with some."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, H, generator=generator) for n in (N, V))
    targets = torch.randint(V, (N,), generator=generator)
    goes_on = torch.rand(N, V, generator=generator) < torch.rand(N, 1, generator=generator)
    goes_on[0], goes_on[1] = False, True
    goes_on[torch.arange(N), targets] = False
    ids, rows = goes_on.T.nonzero(as_tuple=True)  # by id
    own_bias = torch.randn(V, generator=generator) if bias else None
    return hidden, weight, own_bias, targets, rows, ids, goes_on


def reference(hidden, weight, bias, targets, goes_on, temperature, softcap, scale):
    logits = linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = (logits / temperature).log_softmax(-1)
    closed = log_probs.masked_fill(goes_on, -torch.inf).logsumexp(-1)
    return log_probs.gather(1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1), closed


@pytest.mark.parametrize(("softcap", "scale", "temperature"), [(None, 1.0, 1.0), (5.0, 1.0, 1.0), (4.0, 0.5, 0.7)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("columns", "token_rows"), [(1024, 4096), (32, 4096), (32, 7)])
@pytest.mark.parametrize("closing_alone", [False, True])
def test_values_and_gradients_are_those_of_whole_logits(
    closing_alone, columns, token_rows, bias, softcap, scale, temperature, monkeypatch
):
    monkeypatch.setattr("trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE", token_rows)
    hidden, weight, own_bias, targets, rows, ids, goes_on = case(columns + token_rows, bias)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, N, generator=generator)
    weights[1, 1] = 0  # of which so little is closed that float32 has few digits for it
    if closing_alone:  # and in few rows, as beside text that takes no part
        weights[1, torch.randperm(N, generator=generator)[: N - 9]] = 0

    leaves = [x.clone().requires_grad_() for x in (hidden, weight, own_bias) if x is not None]
    found = ClosingLogProbFunction.apply(
        *leaves, *[None] * (not bias), targets, rows, ids, temperature, columns, softcap, scale
    )
    value = (weights[1] * found[2]).sum() + (0 if closing_alone else (weights[0] * found[0]).sum())
    gradients = torch.autograd.grad(value, leaves)

    exact = [x.double().requires_grad_() for x in (hidden, weight, own_bias) if x is not None]
    expected = reference(*exact, *[None] * (not bias), targets, goes_on, temperature, softcap, scale)
    value = (weights[1] * expected[2]).sum() + (0 if closing_alone else (weights[0] * expected[0]).sum())
    wanted = torch.autograd.grad(value, exact)
    for value, true in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(value.double(), true, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2].double().exp(), expected[2].exp(), rtol=1e-4, atol=1e-6)
    for gradient, true in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), true, rtol=1e-3, atol=1e-3 * true.abs().max().item())
    assert found[2][0] == 0 and found[2].min() < -1


def test_where_next_to_all_go_on_closing_is_as_likely_as_the_token_that_closes():
    """p_close is then what float32 cannot tell of 1 - its complement."""
    hidden, weight = torch.eye(2, 8), torch.zeros(V, 8)
    weight[1, 0] = 60.0  # nearly all of the first row's probability
    ids, rows = torch.tensor([1, 2]), torch.tensor([0, 0])
    targets = torch.tensor([5, 5])
    log_probs, _, close = ClosingLogProbFunction.apply(hidden, weight, None, targets, rows, ids, 1.0, 1024, None, 1.0)
    assert torch.isfinite(close).all()
    torch.testing.assert_close(close[0], log_probs[0])
    assert log_probs[0] < -59


def test_in_half_precision_the_closing_is_right_to_its_digits():
    hidden, weight, _, targets, rows, ids, goes_on = case(3, False)
    found = ClosingLogProbFunction.apply(
        hidden.bfloat16(), weight.bfloat16(), None, targets, rows, ids, 1.0, 1024, None, 1.0
    )
    expected = reference(hidden.bfloat16().double(), weight.bfloat16().double(), None, targets, goes_on, 1.0, None, 1.0)
    sure = expected[2] > -3
    torch.testing.assert_close(found[2][sure].double(), expected[2][sure], rtol=0.05, atol=0.05)
