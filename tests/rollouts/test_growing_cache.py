"""The cache that grows in blocks holds what transformers' own would, and prompts are read into it once and with little padding."""

import pytest
import torch
from test_generation import FAMILIES, PROMPTS, cut, model_of, settings
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trl_ctopd.rollouts.cache import GrowingLayer, growing_cache
from trl_ctopd.rollouts.generation import _generate


def states(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, length, 4), torch.randn(rows, 2, length, 6)


@torch.no_grad()
def test_keys_and_values_are_those_of_transformers_layer_whatever_is_done_to_them():
    torch.manual_seed(0)
    ours, theirs, rows = GrowingLayer(), DynamicLayer(), 3
    for turn in range(200):
        if turn % 7 == 3:
            rows = int(torch.randint(1, 5, ()))
            indices = torch.randint(0, ours.keys.shape[0], (rows,))
            ours.batch_select_indices(indices), theirs.batch_select_indices(indices)
        if turn % 11 == 5:
            ours.crop(-2), theirs.crop(-2)
        if turn % 90 == 89:
            ours.batch_repeat_interleave(2), theirs.batch_repeat_interleave(2)
            rows *= 2
        if turn == 150:
            ours.reset(), theirs.reset()
        new = states(rows, 1 + 5 * (turn % 13 == 0))
        for own, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(own, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()


@torch.no_grad()
def test_a_token_is_added_without_a_copy_of_those_before_it():
    layer, places = GrowingLayer(), set()
    layer.update(*states(2, 100))
    for _ in range(400):
        places.add(layer.update(*states(2, 1))[0].data_ptr())
    assert len(places) < 10


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_prompts_are_read_once_and_the_text_is_the_same(family):
    model, prompts = model_of(family), [*PROMPTS[:6], *PROMPTS[2:6], *PROMPTS[4:6], PROMPTS[6]]
    apart = cut(_generate(model, prompts, settings(), rows_leave=False))
    read = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: read.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    assert cut(_generate(model, prompts, settings(), rows_leave=True)) == apart
    if growing_cache(model) is None:
        assert read[0] == (len(prompts), max(map(len, prompts)))
    else:
        assert sum(rows for rows, _ in read[: read.index((len(prompts), 1))]) == 7


@torch.no_grad()
def test_prompts_of_unlike_length_are_read_without_most_of_their_padding():
    model, read = model_of("Llama"), []
    prompts = [[12, 13] * length for length in (40, 5, 39, 4, 5, 20)]
    apart = cut(_generate(model, prompts, settings(), rows_leave=False))
    model.register_forward_pre_hook(
        lambda module, args, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    assert cut(_generate(model, prompts, settings(), rows_leave=True)) == apart
    assert read[:4] == [2 * 79, 39, 2 * 9, 6]  # rows (one of them twice), by the tokens of the longest but one


@torch.no_grad()
def test_prompts_of_one_token_are_read_beside_the_others():
    model, prompts = model_of("Llama"), [[12], [12], PROMPTS[3], PROMPTS[3]]
    apart = cut(_generate(model, prompts, settings(), rows_leave=False))
    assert cut(_generate(model, prompts, settings(), rows_leave=True)) == apart


@torch.no_grad()
def test_windows_stay_transformers_own():
    cache = growing_cache(model_of("windows in every other layer"))
    assert type(cache) is DynamicCache
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "GrowingLayer"]
