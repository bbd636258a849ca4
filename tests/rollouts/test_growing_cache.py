"""The cache that grows in blocks holds what transformers' own would, and prompts are read into it once and with little padding."""

import random

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from test_generation import FAMILIES, PROMPTS, SHAPE, cut, model_of, settings
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from trl_ctopd.models.heads import add_token_scores
from trl_ctopd.rollouts import reading
from trl_ctopd.rollouts.cache import CACHE, GrowingLayer, can_join, growing_cache
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
    prompts = [[length % 37, 13] * length for length in (40, 5, 39, 4, 5, 20)]
    apart = cut(_generate(model, prompts, settings(), rows_leave=False))
    model.register_forward_pre_hook(
        lambda module, args, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    assert cut(_generate(model, prompts, settings(), rows_leave=True)) == apart
    assert sorted(read[:3]) == [2 * 9, 39, 2 * 79]  # rows (one of them twice), by the tokens of the longest but one


BEGIN = [10 + place * 7 % 30 for place in range(60)]
ALIKE = {
    "all, and one that says no more": [BEGIN + own for own in ([12], [13, 14], [13, 15, 16, 17], [18] * 9)]
    + [BEGIN[:40]],
    "two kinds of them": [[kind, *BEGIN, *own] for kind in (3, 4) for own in ([12, 13], [14], [15] * 7)],
    "some": [*(BEGIN + own for own in ([12, 13], [14])), *PROMPTS[:3]],
}


@torch.no_grad()
@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_prompts_begin_with_alike_is_read_once_and_the_text_is_the_same(family, name):
    model, prompts, read = model_of(family), [*ALIKE[name], ALIKE[name][0]], []
    apart = cut(_generate(model, prompts, settings(), rows_leave=False))
    model.register_forward_pre_hook(
        lambda module, args, inputs: read.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    assert cut(_generate(model, prompts, settings(), rows_leave=True)) == apart
    cache = growing_cache(model)
    if cache is not None and can_join(cache):
        tokens = sum(rows * length for rows, length in read[: read.index((len(prompts), 1))])
        assert tokens < 0.7 * sum(map(len, ALIKE[name]))


@torch.no_grad()
@pytest.mark.parametrize("seed", range(12))
def test_the_cache_to_begin_with_is_that_of_padded_prompts(seed, monkeypatch):
    """Their tokens, at the places that these have, whatever the prompts share."""
    draw, model = random.Random(seed), model_of("Qwen2")
    monkeypatch.setattr(reading, "CALL", draw.choice([0, 2, 8]))
    prompts = [[draw.randrange(10, 40) for _ in range(4)]]
    for _ in range(9):
        own = draw.choice(prompts)
        more = [draw.randrange(10, 40) for _ in range(draw.randint(2, 12))]
        prompts.append(own[: draw.randint(0, len(own))] + more)
    draw.shuffle(prompts)
    width = max(map(len, prompts)) - 1
    mask = torch.tensor([[0] * (width + 1 - len(own)) + [1] * (len(own) - 1) for own in prompts])
    ids = torch.tensor([[0] * (width + 1 - len(own)) + own[:-1] for own in prompts])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True)[CACHE].layers
    found = reading.begun(model, prompts, settings(), torch.device("cpu"))
    assert found.get_seq_length() == width
    for own, theirs in zip(found.layers, expected, strict=True):
        for part, its in ((own.keys, theirs.keys), (own.values, theirs.values)):
            part, its = (states.transpose(1, 2)[mask.bool()] for states in (part, its))
            torch.testing.assert_close(part, its, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_prompts_of_one_token_are_read_beside_the_others():
    model, prompts = model_of("Llama"), [[12], [12], PROMPTS[3], PROMPTS[3]]
    apart = cut(_generate(model, prompts, settings(), rows_leave=False))
    assert cut(_generate(model, prompts, settings(), rows_leave=True)) == apart


@torch.no_grad()
@pytest.mark.parametrize("ends", [[5, 6], [5, 6, 22], [21, 5, 6, 23, 5, 6]])
def test_an_activated_adapter_is_shown_prompts_whole(ends):
    """It begins at its last invocation, of which a prompt without its last token may have half."""
    torch.manual_seed(1)
    activated = {"alora_invocation_tokens": [5, 6], "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = get_peft_model(model_of("Llama"), LoraConfig(task_type="CAUSAL_LM", r=4, **activated)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.5)
    prompts = [[*BEGIN, 5, 6, *own, *ends] for own in ([12], [12], [13, 14])]
    apart = cut(_generate(model, prompts, settings(), rows_leave=False))
    assert cut(_generate(model, prompts, settings(), rows_leave=True)) == apart


@torch.no_grad()
def test_what_a_long_text_encodes_otherwise_is_read_with_it(monkeypatch):
    """With longrope a beginning by itself would be encoded as a short text."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope |= {"original_max_position_embeddings": 64, "factor": 2.0}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, rope_parameters=rope)).double().eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.15)
    prompts = [[*BEGIN, *PROMPTS[own], *PROMPTS[own + 1], 12] for own in (0, 2)]
    lengths = [len(own) - 1 for own in prompts]
    monkeypatch.setattr(reading, "of_like_length", lambda lengths: [[place] for place in range(len(lengths))])
    found = reading.begun(model, prompts, settings(), torch.device("cpu")).layers[1]
    for row, own in enumerate(prompts):
        expected = model(input_ids=torch.tensor([own[:-1]]), use_cache=True)[CACHE].layers[1]
        torch.testing.assert_close(found.keys[row, :, -lengths[row] :], expected.keys[0], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_windows_stay_transformers_own():
    cache = growing_cache(model_of("windows in every other layer"))
    assert type(cache) is DynamicCache
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "GrowingLayer"]


def test_a_model_whose_forward_pass_takes_no_cache_is_given_none_and_writes_what_it_writes_alone():
    torch.manual_seed(0)
    config = transformers.OpenAIGPTConfig(vocab_size=40, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    assert growing_cache(model) is None
    assert growing_cache(get_peft_model(model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))) is None
    prompts = [*PROMPTS[:5], PROMPTS[2]]
    alone = [cut(_generate(model, [prompt], settings(), rows_leave=False))[0] for prompt in prompts]
    assert cut(_generate(model, prompts, settings(), rows_leave=True)) == alone
    add_token_scores(model)
    assert growing_cache(model) is None
    add_token_scores(llama := model_of("Llama"))
    assert growing_cache(llama) is not None
