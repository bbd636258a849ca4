"""Packed rows: every token reads in them what it reads in padded rows, on models of many families; and where packing is left alone."""

import random

import needs
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.clock import peak_bytes
from trl_ctopd.models import packing, trials
from trl_ctopd.models.heads import add_token_scores, attention_mask_of, hidden_states
from trl_ctopd.models.packing import Packer, packed_inputs, packer_for
from trl_ctopd.rollouts.pairing import pad_rows


VOCAB, HIDDEN = 37, 16
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
PACKED = {
    "Llama": ("LlamaConfig", {}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {}),
    "Phi": ("PhiConfig", {}),
    "GPT-2": ("GPT2Config", {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 96}),
    "Granite": ("GraniteConfig", {"logits_scaling": 4.0}),
    "OLMo 2": ("Olmo2Config", {}),
    "experts": ("Qwen3MoeConfig", EXPERTS),
    "Gemma 3, windows of 24": ("Gemma3TextConfig", {"sliding_window": 24}),
    "Mistral, windows of 24": ("MistralConfig", {"sliding_window": 24}),
}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4, "mamba_n_groups": 1}
LIMITED = "not all its layers see the whole text"
PADDED = {
    "Gemma 3, small windows": ("Gemma3TextConfig", {"sliding_window": 4}, LIMITED),
    "Phi 3, a small window": ("Phi3Config", {"sliding_window": 4}, LIMITED),
    "Llama 4, chunks": ("Llama4TextConfig", EXPERTS, LIMITED),
    "Falcon-H1, a state": ("FalconH1Config", MAMBA, LIMITED),
    "BLOOM, no positions": ("BloomConfig", {"n_layer": 2, "n_head": 2}, "eager, not sdpa"),
    "Llama, flex": ("LlamaConfig", {"attn_implementation": "flex_attention"}, "flex_attention, not sdpa"),
    "Llama, eager": ("LlamaConfig", {"attn_implementation": "eager"}, "eager, not sdpa"),
}


def model_of(name: str, dtype: torch.dtype = torch.float64, **settings) -> PreTrainedModel:
    torch.manual_seed(0)
    kind, own = ({**PACKED, **PADDED})[name][:2]
    settings = {**SHAPE, **own, **settings}
    loaded = {"attn_implementation": settings.pop("attn_implementation", None)}
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings), **loaded)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.to(dtype).eval()


def texts(seed: int, prompts: int = 3, generations: int = 4, longest: int = 9) -> tuple[list, list]:
    """Prompts, the first of one token, each of the others like one before it for a while, or all of it and more; and completions of unlike
    length, some of them empty; not in the order of the prompts."""
    draw = random.Random(seed)
    ids = [[draw.randrange(VOCAB)]]
    for _ in range(prompts - 1):
        before = draw.choice(ids)
        ids.append(before[: draw.randint(0, len(before))] + [draw.randrange(VOCAB) for _ in range(draw.randint(1, 8))])
    rows = [
        (own, [draw.randrange(VOCAB) for _ in range(draw.randint(0, longest))])
        for own in ids
        for _ in range(generations)
    ]
    draw.shuffle(rows)
    return [prompt for prompt, _ in rows], [completion for _, completion in rows]


@pytest.fixture
def always(monkeypatch):
    """Packs whether it is less work or not."""
    monkeypatch.setattr(packing, "_LEAST_SAVED", -100.0)


def padded_and_packed(prompts: list, completions: list) -> tuple[dict, dict]:
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    places = [(r, len(prompts[r]) - 1 + n - width) for r in range(len(rows)) for n in range(len(completions[r]))]
    scored, targets = torch.tensor(places).T, torch.tensor([token for own in completions for token in own])
    packed = Packer(10**6)(prompts, completions, width)
    assert packed is not None
    padded = {"input_ids": pad_rows(rows, width, 0), "scored": scored, "targets": targets}
    return padded, {**packed_inputs(packed, scored), "targets": targets}


# --- what a packed row holds


@pytest.mark.parametrize("seed", range(20))
def test_what_a_token_sees_is_its_own_text_up_to_itself(always, seed):
    """By the mask, the positions and the places alone."""
    draw = random.Random(seed)
    prompts, completions = texts(seed, draw.randint(1, 4), draw.randint(2, 5), draw.randint(1, 30))
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    length = max(map(len, rows)) + draw.randint(0, 3)
    packed = Packer(10**6)(prompts, completions, length + 30, multiple=3)
    assert packed is not None
    assert packed["input_ids"].shape[1] % 24 == 0
    seen = attention_mask_of(packed["ends"], torch.float64)[:, 0] == 0
    assert seen.any(-1).all(), "a softmax over nothing is NaN"
    width = packed["input_ids"].shape[1]
    assert packed["places"].shape == (len(rows), length + 30)
    for row, text in enumerate(rows):
        for n in range(len(text)):
            number, cell = divmod(packed["places"][row, n].item(), width)
            found = seen[number, cell]
            assert packed["position_ids"][number][found].tolist() == list(range(n + 1))
            assert packed["input_ids"][number][found].tolist() == text[: n + 1]


# --- the scores of packed rows


def scores_and_gradients(model: nn.Module, inputs: dict, weights: torch.Tensor) -> tuple[list, list]:
    found = model(**inputs)
    values = [found.log_probs, found.entropy, found.close_log_probs]
    loss = (found.log_probs * weights[0]).sum() + (
        found.close_log_probs * weights[1][: len(found.close_log_probs)]
    ).sum()
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return values, torch.autograd.grad(loss, own, allow_unused=True)


def compare(model: nn.Module, seed: int, tolerance: float = 1e-5):
    padded, packed = padded_and_packed(*texts(seed))
    assert packed["input_ids"].numel() < padded["input_ids"].numel()
    count = len(padded["targets"])
    generator = torch.Generator().manual_seed(seed)
    going_on = torch.stack([torch.arange(count).repeat(3), torch.randint(0, VOCAB, (3 * count,), generator=generator)])
    going_on = torch.unique(going_on, dim=1)
    weights = torch.randn(2, count, generator=generator)
    one, other = (scores_and_gradients(model, {**own, "going_on": going_on}, weights) for own in (padded, packed))
    for mine, theirs in zip(other[0], one[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert any(gradient is not None and gradient.any() for gradient in one[1])
    scale = max(gradient.abs().max().item() for gradient in one[1] if gradient is not None)
    for mine, theirs in zip(other[1], one[1], strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", PACKED)
def test_scores_and_gradients_of_packed_rows_are_those_of_padded_ones(always, name):
    model = model_of(name, torch.float32)
    add_token_scores(model, 0.7, entropy=True)
    assert packer_for("student", model, Accelerator(cpu=True)) is not None
    for seed in range(2):
        compare(model, seed)


@pytest.mark.parametrize("name", [name for name in PACKED if name != "experts"])  # whose products know no float64
def test_hidden_states_in_float64_agree_to_ten_digits(always, name):
    model = model_of(name)
    add_token_scores(model)
    padded, packed = padded_and_packed(*texts(3))
    with hidden_states(model) as states, torch.no_grad():
        model(**padded)
        model(**packed)
    one, other = (own[tuple(inputs["scored"])] for own, inputs in zip(states, (padded, packed), strict=True))
    torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10)


def loss_gradients(model: nn.Module, inputs: dict) -> list[torch.Tensor]:
    model.zero_grad()
    model(**inputs).log_probs.square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_adapter_under_gradient_checkpointing_learns_the_same_from_packed_rows(always, reentrant):
    model = model_of("Llama", torch.float32)
    add_token_scores(model, entropy=True)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    one, other = (loss_gradients(model, inputs) for inputs in padded_and_packed(*texts(4)))
    for padded, packed in zip(one, other, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5 * padded.abs().max().item())


def test_half_precision_by_autocast_takes_packed_rows(always):
    model = model_of("Llama", torch.float32)
    add_token_scores(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        padded, packed = (model(**inputs).log_probs for inputs in padded_and_packed(*texts(5)))
    torch.testing.assert_close(packed, padded, rtol=0.05, atol=0.05)


# --- which models read packed rows, and which rows are packed


def reason(model: nn.Module, caplog, accelerator=None) -> str:
    """Why it reads padded rows."""
    with caplog.at_level("INFO"):
        assert packer_for("teacher", model, accelerator or Accelerator(cpu=True)) is None
    [message] = caplog.messages
    assert "The teacher reads padded rows" in message
    return message


@pytest.mark.parametrize("name", PADDED)
def test_models_that_would_read_packed_rows_otherwise_are_left_padded(name, caplog):
    assert PADDED[name][2] in reason(model_of(name, torch.float32), caplog)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_neighbours_outside_of_attention_fails_the_trial(dtype, caplog):
    model = model_of("Llama", dtype)
    add_token_scores(model)
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + 0.2 * args[0].cumsum(1))
    assert "gives other hidden states for packed rows" in reason(model, caplog)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Shadow", "Lora"])
def test_an_adapter_that_has_learned_nothing_is_tried_for_what_it_reads_once_it_has(
    name, dtype, scale, caplog, monkeypatch
):
    """Also where it moves the hidden states by less than half precision rounds them."""
    monkeypatch.setattr(trials, "_STEP", 0.05 * scale)
    model = model_of("Llama", dtype)
    add_token_scores(model)
    model = get_peft_model(model, needs.adapter(name))
    if name == "Shadow":
        assert "gives other hidden states for packed rows" in reason(model, caplog)
    else:
        assert packer_for("student", model, Accelerator(cpu=True)) is not None


def test_code_that_refuses_the_mask_fails_the_trial(caplog):
    model = model_of("Llama", torch.float32)
    add_token_scores(model)

    def refuse(module, args, kwargs):
        if kwargs.get("attention_mask") is not None:
            raise KeyError("a mask of two dimensions")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert "does not take packed rows (KeyError: 'a mask of two dimensions')" in reason(model, caplog)


def test_sharded_models_virtual_tokens_and_activated_adapters_read_padded_rows(caplog):
    class Sharded:
        distributed_type = DistributedType.FSDP

    assert "it may be sharded" in reason(model_of("Llama", torch.float32), caplog, Sharded())
    caplog.clear()
    prompt = get_peft_model(model_of("Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert "virtual tokens" in reason(prompt, caplog)
    caplog.clear()
    activated = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    activated = get_peft_model(model_of("Llama"), activated)
    activated.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert "begins after the last invocation of a row" in reason(activated, caplog)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trial_leaves_the_model_in_its_mode(dtype):
    model = model_of("Qwen2", dtype).train()
    add_token_scores(model)
    assert packer_for("student", model, Accelerator(cpu=True)) is not None
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def packed_shape(prompts: list[list[int]], counts: list[int], hidden: int) -> tuple[int, int] | None:
    rows = [[*prompt, *range(count)] for prompt, count in zip(prompts, counts, strict=True)]
    packed = Packer(hidden)(prompts, [list(range(count)) for count in counts], max(map(len, rows)))
    return None if packed is None else tuple(packed["input_ids"].shape)


def test_a_prompt_that_rows_share_is_read_once():
    one, two = list(range(40)), list(range(1, 41))
    assert packed_shape([one, two] * 4, [10] * 8, 512) == (2, 80)


def test_what_prompts_begin_with_alike_is_read_once_a_row():
    system = list(range(200))
    assert packed_shape([[*system, n, n] for n in range(8)], [10] * 8, 512) == (1, 296)
    kinds = [[kind, *system, n] for kind in (1, 2) for n in range(8)]
    assert packed_shape(random.Random(0).sample(kinds, 16), [10] * 16, 512) == (2, 296)


@pytest.mark.parametrize(
    ("name", "reach"),
    [("Llama", 10**9), ("Gemma 3, windows of 24", 24), ("Mistral, windows of 24", 24)],
)
def test_rows_longer_than_a_models_window_are_padded(name, reach):
    """In it, each layer sees the whole row, as the packed rows' mask says."""
    model = model_of(name, torch.float32)
    add_token_scores(model)
    packer = packer_for("student", model, Accelerator(cpu=True))
    assert packer([[1] * 14] * 4, [[2] * 10, [3], [4], [5]], 24) is not None
    assert (packer([[1] * 14] * 4, [[2] * 11, [3], [4], [5]], 25) is not None) == (reach >= 25)


def test_rows_that_share_nothing_and_are_of_like_length_are_padded():
    assert packed_shape([[n] * 40 for n in range(8)], [10] * 8, 512) is None


def test_short_rows_fill_the_space_of_long_ones():
    assert packed_shape([[n] * 4 for n in range(8)], [100] * 2 + [44] * 6, 4096) == (5, 104)


def test_completions_too_long_to_be_read_together_are_not():
    """Attention over all sixteen would cost more than reading the prompt again."""
    assert packed_shape([[1] * 100] * 16, [100] * 16, 256) == (4, 504)
    assert packed_shape([[1] * 20] * 8, [2000] * 8, 64) is None


@pytest.mark.parametrize("seed", range(20))
def test_packing_saves_a_fifth_and_its_mask_fits_into_what_it_saves(seed):
    draw = random.Random(seed)
    hidden = draw.choice([16, 64, 576, 4096])
    prompts, completions = texts(seed, draw.randint(1, 5), draw.randint(1, 5), draw.choice([5, 60, 400]))
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    packed = Packer(hidden)(prompts, completions, length)
    if packed is not None:
        rows, width = packed["input_ids"].shape
        padded = len(prompts) * length * (12 * hidden + length)
        assert rows * width * (12 * hidden + 2 * width) <= 0.8 * padded
        assert rows * width <= 0.8 * len(prompts) * length
        assert rows * width**2 <= 8 * hidden * (len(prompts) * length - rows * width)


def test_a_learning_pass_over_packed_rows_takes_less_memory():
    model = model_of("Llama", torch.float32)
    add_token_scores(model)
    draw = random.Random(0)
    prompts = [own for own in ([1] * 50, [2] * 60) for _ in range(4)]
    completions = [[draw.randrange(VOCAB) for _ in range(draw.randint(10, 20))] for _ in prompts]
    padded, packed = (
        peak_bytes(lambda inputs=inputs: model(**inputs).log_probs.sum().backward())
        for inputs in padded_and_packed(prompts, completions)
    )
    assert packed < 0.8 * padded
