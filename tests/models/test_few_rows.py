"""Products of few rows: torch's to rounding, for every shape, and torch's own where they are not ours to compute."""

import logging
import random
import shutil

import pytest
import torch
from accelerate import PartialState
from torch import nn

from trl_ctopd.models import few_rows
from trl_ctopd.models.few_rows import ROWS, few_rows_fast


@pytest.fixture
def kernel():
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        pytest.skip("There is no C compiler on this machine.")
    few_rows._kernel.cache_clear()
    found = few_rows._kernel()
    assert found is not None
    return found


@pytest.mark.parametrize("threads", [1, 2])
def test_the_product_is_that_of_float64_for_any_number_of_rows_and_columns(kernel, threads):
    draw, before = random.Random(0), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in (1, *ROWS):
            n, k = draw.randrange(1, 70), draw.randrange(1, 150)
            x, weight = torch.randn(rows, k), torch.randn(n, k)
            exact = x.double() @ weight.double().T
            torch.testing.assert_close(kernel(x, weight).double(), exact, rtol=0, atol=1e-5 * k**0.5)
    finally:
        torch.set_num_threads(before)


def test_an_input_may_have_gaps_and_any_number_of_dimensions_and_the_bias_is_added(kernel):
    layer, x = nn.Linear(24, 10), torch.randn(2, 24, 3).transpose(1, 2)
    with torch.no_grad():
        expected = layer(x)
        with few_rows_fast(layer):
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def counted(kernel, monkeypatch) -> list[int]:
    calls = []
    monkeypatch.setattr(few_rows, "_kernel", lambda: lambda x, weight: calls.append(len(x)) or kernel(x, weight))
    return calls


def test_many_rows_gradients_and_other_precisions_are_torchs_own(kernel, monkeypatch):
    calls, layer, half = counted(kernel, monkeypatch), nn.Linear(24, 10), nn.Linear(24, 10).bfloat16()
    with few_rows_fast(nn.ModuleList([layer, half])):
        layer(torch.randn(8, 24)).sum().backward()
        with torch.no_grad():
            layer(torch.randn(ROWS.stop, 24)), layer(torch.randn(1, 24)), half(torch.randn(8, 24).bfloat16())
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(torch.randn(8, 24)).dtype == torch.bfloat16
            assert calls == []
            layer(torch.randn(8, 24))
    assert calls == [8] and layer.weight.grad is not None


def test_layers_are_as_they_were_afterwards_and_others_hooks_stay(kernel):
    layer, hooked = nn.Linear(24, 10), nn.Linear(24, 10)
    hooked.forward = hook = lambda x: x
    with pytest.raises(KeyError), few_rows_fast(nn.ModuleList([layer, hooked])):
        assert "forward" in vars(layer) and hooked.forward is hook
        raise KeyError
    assert "forward" not in vars(layer) and hooked.forward is hook


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_layers_are_torchs_and_the_reason_is_said_once(compiler, monkeypatch, caplog):
    PartialState()  # which the log asks for
    monkeypatch.setenv("CC", compiler)
    few_rows._kernel.cache_clear()
    layer, x = nn.Linear(24, 10), torch.randn(8, 24)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            with few_rows_fast(layer):
                assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert [record.getMessage().count(compiler) for record in caplog.records] == [1]
    few_rows._kernel.cache_clear()


def test_a_product_that_is_not_torchs_is_not_used(kernel):
    with pytest.raises(RuntimeError, match="differs from torch's product by"):
        few_rows._check(lambda x, weight: kernel(x, weight) * 1.001)
