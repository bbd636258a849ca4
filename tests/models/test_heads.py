"""The LM head by itself, on what the backbone hands to it, against the model's own logits: tiny models of many families
that do more with them than a matrix product, or do it in their own way."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from toys import student_model, teacher_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_ctopd.models import heads
from trl_ctopd.models.forwards import base_model
from trl_ctopd.models.heads import TokenScores, add_token_scores, check_head, hidden_states, lm_head


VOCAB = 37
TEMPERATURE = 0.7
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_d_state": 4, "mamba_n_groups": 1}

# (config, its own settings); scales far from 1 and caps that bite
FAMILIES = {
    "Llama, untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "Llama, tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "Qwen2, untied": ("Qwen2Config", {"tie_word_embeddings": False}),
    "Qwen2, tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "Phi, a bias": ("PhiConfig", {"tie_word_embeddings": False}),
    "GPT-2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "Gemma 2, a soft cap": ("Gemma2Config", {"final_logit_softcapping": 1.5}),
    "Gemma 2, no cap": ("Gemma2Config", {"final_logit_softcapping": None}),
    "Gemma 3, a soft cap": ("Gemma3TextConfig", {"final_logit_softcapping": 1.5}),
    "nanochat, a soft cap": ("NanoChatConfig", {"final_logit_softcapping": 1.5}),
    "Cohere, tied and scaled": ("CohereConfig", {"logit_scale": 0.25}),
    "Cohere 2, scaled": ("Cohere2Config", {"logit_scale": 3.0, "tie_word_embeddings": False}),
    "Granite, divided": ("GraniteConfig", {"logits_scaling": 4.0}),
    "HyperCLOVA X, multiplied": ("HyperCLOVAXConfig", {"logits_scaling": 4.0}),
    "MiniCPM 3, states divided": ("MiniCPM3Config", {"dim_model_base": 4, **LATENT}),
    "Falcon-H1, multiplied": ("FalconH1Config", {"lm_head_multiplier": 3.0, **MAMBA}),
}
# Its own forward pass goes round its `base_model`; TRL's fused one, in which training runs, does not.
OPT = {"OPT, embeddings of another size": ("OPTConfig", {"ffn_dim": 24, "word_embed_proj_dim": 8})}
every_family = pytest.mark.parametrize("family", FAMILIES)


def model_of(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Its weights, the head's bias among them, so large that the logits are far from 0."""
    torch.manual_seed(0)
    name, settings = (FAMILIES | OPT)[family]
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**SHAPE, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.to(dtype).eval()


def found_by_halves(
    model: nn.Module, dtype: torch.dtype = torch.float64, **inputs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits by the head on the backbone's states, and the model's own of the same forward pass, over the temperature."""
    inner = base_model(model)
    with hidden_states(inner) as states:
        own = model(IDS, **inputs).logits
    assert len(states) == 1
    return lm_head(inner, dtype, TEMPERATURE)(states[0].flatten(0, 1)).view_as(own), own / TEMPERATURE


def check_gradients(model: nn.Module, found: torch.Tensor, own: torch.Tensor):
    """Of a scalar that weighs every logit otherwise, for all parameters."""
    weights = torch.randn(own.shape, generator=torch.Generator().manual_seed(1), dtype=own.dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mine, theirs = (
        torch.autograd.grad((weights * logits.tanh()).sum(), parameters, retain_graph=True, allow_unused=True)
        for logits in (found, own)
    )
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


@every_family
def test_the_head_on_the_backbones_states_gives_the_models_logits(family):
    found, own = found_by_halves(model_of(family))
    assert own.std() > 0.1
    torch.testing.assert_close(found, own, rtol=1e-6, atol=1e-9)


@every_family
def test_gradients_through_the_two_halves_are_the_models(family):
    model = model_of(family)
    found, own = found_by_halves(model)
    head = model.get_output_embeddings().weight
    assert torch.autograd.grad(found.sum(), head, retain_graph=True)[0].any()
    check_gradients(model, found, own)


# --- the log-probs of given tokens

# the tokens after these are asked for, out of order and one of them twice; columns count from the end
ROWS, COLUMNS, TARGETS = torch.tensor([[1, 0, 0, 1, 1], [-8, -2, -5, -3, -3], [3, 1, 36, 0, 0]])


def scores(model: nn.Module, **inputs) -> TokenScores:
    return model(input_ids=IDS, scored=torch.stack([ROWS, COLUMNS]), targets=TARGETS, **inputs)


@pytest.mark.parametrize("columns", [5, 1024], ids=["many tiles", "one tile"])
@pytest.mark.parametrize("family", [*FAMILIES, *OPT])
def test_scores_and_their_gradients_are_those_of_the_whole_logits(monkeypatch, family, columns):
    monkeypatch.setattr(heads, "_SMALL_TILE_COLUMNS", columns)
    model = model_of(family, torch.float32)
    with hidden_states(model) as states:
        add_token_scores(model, TEMPERATURE, entropy=True)
        found = scores(model)
    own = lm_head(model, torch.float32, TEMPERATURE)(states[0])[ROWS, COLUMNS].log_softmax(-1)
    log_probs, entropy = own.gather(-1, TARGETS[:, None])[:, 0], -(own.exp() * own).sum(-1)
    torch.testing.assert_close(found.log_probs, log_probs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-4, atol=1e-4)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mine, theirs = (
        torch.autograd.grad((values * torch.arange(1.0, 6.0)).sum(), parameters, retain_graph=True, allow_unused=True)
        for values in (found.log_probs, log_probs)
    )
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 + 1e-4 * other.abs().max().item())


def test_no_position_but_those_asked_for_is_projected(monkeypatch):
    rows = []
    monkeypatch.setattr(
        heads, "ChunkedLogProbFunction", SimpleNamespace(apply=lambda hidden, *rest: rows.append(len(hidden)) or hidden)
    )
    model = model_of("Llama, untied")
    add_token_scores(model)
    scores(model)
    assert rows == [5], "of 16 positions"


def test_nothing_asked_for_gives_nothing_and_a_gradient_of_zero():
    model = model_of("Llama, tied", torch.float32)
    add_token_scores(model)
    found = model(input_ids=IDS, scored=torch.zeros(2, 0, dtype=torch.long), targets=IDS[0, :0])
    assert found.log_probs.shape == (0,)
    found.log_probs.sum().backward()
    assert not model.get_output_embeddings().weight.grad.any()


def test_any_other_call_is_what_it_was():
    model, plain = model_of("Llama, untied"), model_of("Llama, untied")
    add_token_scores(model)
    assert torch.equal(model(IDS, labels=IDS).loss, plain(IDS, labels=IDS).loss)
    sampled = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **sampled), plain.generate(IDS, **sampled))


def test_virtual_tokens_in_front_move_no_position():
    torch.manual_seed(3)
    model = model_of("Llama, untied", torch.float32)
    add_token_scores(model)
    adapter = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    own = adapter(input_ids=IDS).logits[:, 3:].log_softmax(-1)[ROWS, COLUMNS]
    torch.testing.assert_close(scores(adapter).log_probs, own.gather(-1, TARGETS[:, None])[:, 0], rtol=1e-4, atol=1e-4)


# --- the head by itself


@pytest.mark.parametrize("family", ["Llama, tied", "Phi, a bias", "Gemma 2, a soft cap", "Cohere, tied and scaled"])
def test_one_row_of_states_gives_one_row_of_logits(family):
    model = model_of(family)
    with hidden_states(model) as states:
        own = model(IDS).logits / TEMPERATURE
    head = lm_head(model, torch.float64, TEMPERATURE)
    torch.testing.assert_close(head(states[0][1, 3:4]), own[1, 3:4], rtol=1e-6, atol=1e-9)
    assert head(states[0][0, :0]).shape == (0, VOCAB)


def test_every_forward_pass_within_adds_its_states():
    model = model_of("Llama, untied")
    with hidden_states(model) as states:
        model(IDS[:1])
        model(IDS[:, :3])
    assert [tuple(state.shape) for state in states] == [(1, 8, 16), (2, 3, 16)]


def test_a_forward_pass_afterwards_adds_nothing():
    model = model_of("Llama, untied")
    with hidden_states(model) as states:
        pass
    model(IDS)
    assert states == []
    assert not model.base_model._forward_hooks


def test_the_hook_is_removed_when_the_forward_pass_raises():
    model = model_of("Llama, untied")
    with pytest.raises(IndexError), hidden_states(model):
        model(IDS + VOCAB)
    assert not model.base_model._forward_hooks


def test_states_are_whole_where_only_the_last_logits_are_kept():
    """A forward pass need not project what a loss will project in tiles."""
    model = model_of("Llama, untied")
    own = model(IDS).logits / TEMPERATURE
    with hidden_states(model) as states:
        model(IDS, logits_to_keep=1)
    torch.testing.assert_close(lm_head(model, torch.float64, TEMPERATURE)(states[0]), own)


# --- adapters


def with_lora(model: PreTrainedModel, **settings) -> nn.Module:
    """An adapter that is not zero at first."""
    torch.manual_seed(2)
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **settings)).double()


@pytest.mark.parametrize("family", ["Llama, untied", "Qwen2, tied", "Gemma 2, a soft cap"])
def test_the_states_inside_an_adapter_are_those_of_the_adapted_model(family):
    plain = model_of(family)
    bare = plain(IDS).logits / TEMPERATURE
    model = with_lora(plain, target_modules=["q_proj", "v_proj"])
    assert base_model(model) is plain
    found, own = found_by_halves(model)
    assert (own - bare).abs().max() > 0.1
    torch.testing.assert_close(found, own)
    check_gradients(model, found, own)
    with model.disable_adapter():
        torch.testing.assert_close(found_by_halves(model)[0], bare)


def test_a_model_without_an_adapter_is_its_own_base():
    model = model_of("Llama, untied")
    assert base_model(model) is model


@pytest.mark.parametrize("loss", ["dpca", "reverse_kl"])
def test_a_head_that_is_tied_to_a_trained_embedding_is_read_whole_and_saved(build, tmp_path, loss):
    """PEFT 0.21 gives the copy of a tied head the embedding's sizes, turned round."""
    student_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    base, ids = functools.partial(AutoModelForCausalLM.from_pretrained, tmp_path / "base"), torch.arange(5, 15)[None]
    adapter = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    trainer = build(
        model=base(), peft_config=LoraConfig(**adapter), distillation_loss=loss, learning_rate=0.01, max_steps=2
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    own = trainer.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path / "saved")(input_ids=ids).logits, own)
    head, embedding = (getattr(trainer.model, f"get_{side}_embeddings")().weight for side in ("output", "input"))
    assert head is embedding and (own - base()(input_ids=ids).logits).abs().max() > 1e-3


def test_a_head_that_is_trained_whole_beside_an_adapter_is_the_trained_one():
    model = with_lora(model_of("Llama, untied"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    trained = base_model(model).lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        trained.add_(1)
    found, own = found_by_halves(model)
    torch.testing.assert_close(found, own)
    check_gradients(model, found, own)
    assert torch.autograd.grad(found.sum(), trained)[0].any()


# --- number formats


LOW, HIGH = torch.bfloat16, torch.float32


@pytest.mark.parametrize("family", ["Llama, untied", "Phi, a bias", "Gemma 2, a soft cap", "Granite, divided"])
@pytest.mark.parametrize(("weights", "dtype"), [(LOW, HIGH), (HIGH, LOW), (LOW, LOW), (HIGH, HIGH)])
def test_the_product_is_taken_in_the_format_asked_for_and_all_else_in_float32(family, weights, dtype):
    """Whatever the weights and the states are in, and under autocast too."""
    model = model_of(family, weights)
    with hidden_states(model) as states, torch.no_grad():
        model(IDS)
    assert states[0].dtype == weights
    with torch.autocast("cpu", LOW):
        found = lm_head(model, dtype, TEMPERATURE)(states[0])
    head = model.get_output_embeddings()
    bias = None if head.bias is None else head.bias.to(dtype)
    expected = nn.functional.linear(states[0].to(dtype), head.weight.to(dtype), bias).float()
    if family.startswith("Gemma"):
        expected = 1.5 * (expected / 1.5).tanh()
    expected = expected / (4 if family.startswith("Granite") else 1) / TEMPERATURE
    assert found.dtype == HIGH
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("weights", "dtype"), [(LOW, HIGH), (HIGH, LOW)])
def test_gradients_arrive_in_the_formats_of_the_weights_and_the_states(weights, dtype):
    model = model_of("Llama, untied", weights)
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(3)).to(weights).requires_grad_()
    weight = model.lm_head.weight
    lm_head(model, dtype, TEMPERATURE)(hidden).logsumexp(-1).sum().backward()
    assert weight.grad.dtype == hidden.grad.dtype == weights
    exact_hidden, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    (exact_hidden @ exact_weight.T / TEMPERATURE).logsumexp(-1).sum().backward()
    for found, exact in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        torch.testing.assert_close(found.double(), exact, rtol=0.05, atol=0.05 * exact.abs().max().item())


# --- a weight in pieces


@pytest.fixture
def mesh(tmp_path):
    """One process that is a whole group."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_weight_in_pieces_is_brought_together_and_its_gradient_goes_back_to_them(mesh):
    """As FSDP2 keeps it, tied to nothing."""
    whole, model = model_of("Phi, a bias"), model_of("Phi, a bias")
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    model.lm_head.bias = nn.Parameter(distribute_tensor(model.lm_head.bias.detach(), mesh, [Replicate()]))
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found, own = (lm_head(side, torch.float64, TEMPERATURE)(hidden) for side in (model, whole))
    assert not isinstance(found, DTensor)
    torch.testing.assert_close(found, own)
    for logits in (found, own):
        logits.logsumexp(-1).sum().backward()
    for name in ("weight", "bias"):
        gradient = getattr(model.lm_head, name).grad
        assert isinstance(gradient, DTensor)
        torch.testing.assert_close(gradient.full_tensor(), getattr(whole.lm_head, name).grad)


@every_family
def test_a_head_that_can_be_used_by_itself_passes(family):
    check_head("student", model_of(family, torch.float32))


def test_a_model_that_does_more_to_its_logits_is_refused():
    model = model_of("Llama, untied", torch.float32)
    model.lm_head.register_forward_hook(lambda module, args, output: output.tanh())
    with pytest.raises(ValueError, match="student's LlamaForCausalLM does more to its logits"):
        check_head("student", model)


def test_a_head_that_reads_a_further_layer_of_another_width_is_refused_by_name():
    config = transformers.ElectraConfig(
        **{name: SHAPE[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        num_attention_heads=2,
        embedding_size=8,
        is_decoder=True,
    )
    with pytest.raises(ValueError, match="student's ElectraForCausalLM does more to its logits"):
        check_head("student", AutoModelForCausalLM.from_config(config).eval())


def test_an_adapter_of_the_head_is_refused_by_name_and_passes_once_it_is_merged():
    adapted = get_peft_model(
        model_of("Llama, untied", torch.float32), LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    )
    with pytest.raises(ValueError, match="teacher's LM head has an adapter.*merge_and_unload"):
        check_head("teacher", base_model(adapted))
    check_head("teacher", adapted.merge_and_unload())


@pytest.mark.parametrize(
    ("name", "cap"),
    [
        ("Gemma2Config", "final_logit_softcapping"),
        ("RecurrentGemmaConfig", "logits_soft_cap"),
        ("xLSTMConfig", "output_logit_soft_cap"),
    ],
)
def test_a_soft_cap_is_known_by_each_familys_name_for_it(name, cap):
    config = getattr(transformers, name)(**{cap: 1.5})
    assert heads._softcap_and_scale(SimpleNamespace(config=config)) == (1.5, 1.0)


def test_what_changes_logits_by_a_percent_is_refused_in_float32():
    model = model_of("Llama, untied", torch.float32)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(ValueError, match="student's LlamaForCausalLM does more to its logits"):
        check_head("student", model)


def test_an_offloaded_head_is_refused_by_name():
    model = model_of("Llama, untied")
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="teacher's LM head is offloaded.*device_map"):
        check_head("teacher", model)


@every_family
def test_padding_at_the_end_changes_no_score_though_nothing_masks_it(family):
    model = model_of(family)
    add_token_scores(model)
    short, columns = IDS[:, :5], torch.tensor([-5, -4, -2])
    alone = [
        model(
            input_ids=row[None], scored=torch.stack([torch.zeros(3, dtype=torch.long), columns]), targets=row[[1, 2, 4]]
        )
        for row in short
    ]
    padded = torch.cat([short, torch.full((2, 3), 7)], 1)
    rows = torch.arange(2).repeat_interleave(3)
    targets = short[:, [1, 2, 4]].flatten()
    together = model(input_ids=padded, scored=torch.stack([rows, (columns - 3).repeat(2)]), targets=targets)
    torch.testing.assert_close(together.log_probs, torch.cat([own.log_probs for own in alone]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", [None, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")])
def test_a_copy_of_a_student_or_a_teacher_computes_with_its_own_weights(build, adapter):
    trainer = build(model=student_model(), teacher=teacher_model(), peft_config=adapter)
    trainer.train()
    for model in (trainer.model, trainer.teacher_model):
        other = copy.deepcopy(model).eval()
        with torch.no_grad():
            torch.testing.assert_close(other(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
            for weight in other.parameters():
                weight.zero_()
            assert not other(input_ids=IDS).logits.any()
