"""The planner's figures, against what can be counted by hand and against real tensors."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig

from trl_ctopd.cli import main
from trl_ctopd.looking.plan import memory as plan
from trl_ctopd.looking.plan.work import STRATEGIES, Work
from trl_ctopd.models import heads


CONFIG = LlamaConfig(
    vocab_size=1_000,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
WORK = Work(prompt_tokens=8, new_tokens=24, batch=2, dtype="float32", autocast=False, cuda=False, loss="dpca")


def real_peak(checkpointing: bool) -> int:
    """What the same pass holds, on real tensors."""
    model = AutoModelForCausalLM.from_config(CONFIG)
    heads.add_token_scores(model)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.enable_input_require_grads()
    model.train()
    alive = plan.Alive()
    alive.leave_out([*model.parameters(), *model.buffers()])
    scored = torch.stack([torch.arange(2).repeat_interleave(24), torch.arange(-25, -1).repeat(2)])
    with alive:
        inputs = {"input_ids": torch.zeros(2, 32, dtype=torch.long), "scored": scored}
        model(**inputs, targets=torch.zeros(48, dtype=torch.long)).log_probs.sum().backward()
    return alive.most


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_without_numbers_holds_what_a_real_one_holds(checkpointing):
    found = plan.run_pass(CONFIG, replace(WORK, activation_checkpointing=checkpointing), 2, learns=True)
    assert found.peak == pytest.approx(real_peak(checkpointing), rel=0.05)


def test_tied_weights_are_counted_once_and_an_adapter_alone_is_trained():
    weights = 4 * sum(p.numel() for p in AutoModelForCausalLM.from_config(CONFIG).parameters())
    full = plan.run_pass(CONFIG, WORK, 2, learns=True)
    assert full.weights == full.trained == weights
    lora = plan.run_pass(CONFIG, WORK, 2, learns=True, lora_rank=4)
    assert lora.weights - lora.trained == weights
    per_layer = 4 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 2 * (64 + 128) + (128 + 64))
    assert lora.trained == 3 * per_layer


def test_reading_holds_less_than_learning_and_checkpointing_less_than_keeping_all():
    kept, read = plan.passes(CONFIG, CONFIG, replace(WORK, batch=8))
    checkpointed, _ = plan.passes(CONFIG, CONFIG, replace(WORK, batch=8, activation_checkpointing=True))
    assert read.peak < checkpointed.peak < kept.peak


def test_a_loss_on_distributions_adds_its_tiles_and_the_teachers_hidden_states_to_the_activations():
    config = copy.deepcopy(CONFIG)
    config.vocab_size = 20_000
    [on_log_probs, kept, in_tiles] = (
        plan.passes(config, config, replace(WORK, lora_rank=4, **own))[0]
        for own in ({}, {"loss": "auto"}, {"loss": "reverse_kl", "logit_tile_tokens": 64})
    )
    tokens, columns = WORK.batch * WORK.new_tokens, 2 * config.vocab_size
    hidden = 4 * tokens * config.hidden_size
    assert 0 < on_log_probs.held < on_log_probs.peak < in_tiles.peak < kept.peak
    all_rows = 2 * config.vocab_size * tokens + 8 * tokens * columns // 8
    assert kept.peak == on_log_probs.held + 4 * all_rows + hidden
    assert in_tiles.peak == on_log_probs.held + 4 * 64 * columns // 2 + hidden
    with pytest.raises(ValueError, match="there is no loss 'dpcaa': choose one of auto, dpca"):
        plan.passes(CONFIG, CONFIG, replace(WORK, loss="dpcaa"))


def test_an_adapter_is_merged_into_copies_of_the_weights_while_the_student_writes(monkeypatch):
    monkeypatch.setattr(plan, "packing_is_faster", lambda rows: False)
    adapted, read = plan.passes(CONFIG, CONFIG, replace(WORK, lora_rank=4))
    whole, _ = plan.passes(CONFIG, CONFIG, WORK)
    writing = [
        plan.plan(own, read, 0, replace(WORK, lora_rank=rank), "ddp", 1).writing
        for own, rank in ((adapted, 4), (whole, None))
    ]
    assert writing == [4 * adapted.linear, 0]
    rows = WORK.batch * WORK.accumulation
    monkeypatch.setattr(plan, "packing_is_faster", lambda own: own == rows)  # packs what it multiplies by
    assert plan.plan(whole, read, 0, WORK, "ddp", 1).writing == 4 * (
        whole.linear + CONFIG.vocab_size * CONFIG.hidden_size
    )


def test_sharding_divides_what_it_says_it_divides():
    own, read = plan.passes(CONFIG, CONFIG, WORK)
    cache = plan.cache_bytes(CONFIG, WORK)
    of = {strategy: plan.plan(own, read, cache, WORK, strategy, 4) for strategy in STRATEGIES}
    assert of["ddp"].student == of["zero2"].student == 4 * of["zero3"].student == 4 * of["fsdp2"].student
    assert of["ddp"].teacher == 4 * of["fsdp2"].teacher
    assert of["ddp"].optimizer == 4 * of["zero2"].optimizer
    assert of["zero3_offload"].always == 0
    assert of["ddp"].learning == own.peak + own.trained  # the buckets


def test_what_is_trained_in_half_precision_is_in_float32_too_where_the_strategy_keeps_it_so():
    half = replace(WORK, dtype="bfloat16", autocast=True)
    own, read = plan.passes(CONFIG, CONFIG, half)
    of = {strategy: plan.plan(own, read, 0, half, strategy, 4) for strategy in STRATEGIES}
    assert own.trained_in_float32 == 2 * own.trained == 2 * own.weights
    assert of["ddp"].student == 4 * of["zero3"].student == 2 * of["fsdp2"].student == own.weights
    assert of["ddp"].optimizer == 2 * own.trained
    assert 4 * of["zero3"].optimizer == 4 * of["zero2"].optimizer == 3 * own.trained_in_float32
    assert 4 * of["fsdp2"].optimizer == 2 * own.trained_in_float32
    adapter, _ = plan.passes(CONFIG, CONFIG, replace(half, lora_rank=4))
    assert adapter.trained == adapter.trained_in_float32, "PEFT's own choice"
    assert 4 * plan.plan(adapter, read, 0, half, "zero2", 4).optimizer == 3 * adapter.trained


def test_fsdp2_holds_whole_gradients_until_the_last_micro_batch():
    own, read = plan.passes(CONFIG, CONFIG, WORK)
    once, thrice = (plan.plan(own, read, 0, replace(WORK, accumulation=n), "fsdp2", 4).learning for n in (1, 3))
    assert thrice - once == own.trained


@pytest.mark.parametrize("config", [CONFIG, GPT2Config(n_embd=64, n_head=4, n_layer=3, vocab_size=1_000)])
def test_one_device_holds_the_cache_of_all_its_prompts(config):
    rows, width = 2 * 3, 2 * (2 if config is CONFIG else 4) * 16 * 4  # keys and values of heads of 16, in float32
    expected = rows * 32 * width * (3 + 1) + 4 * rows * 1_000 * 4
    assert plan.cache_bytes(config, replace(WORK, accumulation=3)) == expected


def test_the_command_reads_configs_alone(tmp_path, capsys):
    CONFIG.save_pretrained(tmp_path)
    sides = ["plan", "--student", str(tmp_path), "--teacher", str(tmp_path)]
    main([*sides, "--prompt-tokens", "8", "--new-tokens", "8", "--devices", "2", "--json"])
    plans = json.loads(capsys.readouterr().out)
    assert [*plans] == [*STRATEGIES]
    assert all(found["peak"] > 0 for found in plans.values())
    main([*sides, "--prompt-tokens", "8", "--new-tokens", "8", "--memory-gib", "0.0001"])
    shown = capsys.readouterr().out
    assert "too large" in shown and "fits" not in shown


BITS = {
    "gptq": ({"bits": 4, "group_size": 32}, 4 + 20 / 32),
    "awq": ({"w_bit": 4, "q_group_size": 128}, 4 + 20 / 128),
    "fp8": ({}, 8),
    "bitsandbytes": ({"load_in_4bit": True}, 4.5),
    "compressed-tensors": ({}, 32),
}


@pytest.mark.parametrize("method", BITS)
def test_a_teacher_that_was_saved_quantized_holds_the_bits_of_its_linear_layers_whole_on_each_device(method):
    given, bits = BITS[method]
    teacher = copy.deepcopy(CONFIG)
    teacher.quantization_config = {"quant_method": method, **given}
    own, read = plan.passes(CONFIG, teacher, WORK)
    linear = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert read.weights == own.weights - linear * (32 - bits) / 8
    as_plain = method == "compressed-tensors"
    assert read.peak - plan.run_pass(CONFIG, WORK, 2, learns=False).peak == (0 if as_plain else 4 * 64 * 128)
    found = plan.plan(own, read, 0, WORK, "fsdp2", 4)
    assert found.teacher == (read.weights // 4 if as_plain else read.weights)


def test_a_model_that_is_quantized_as_it_is_loaded_is_planned_with_its_bits():
    whole = plan.passes(CONFIG, CONFIG, replace(WORK, lora_rank=4))
    found = plan.passes(CONFIG, CONFIG, replace(WORK, lora_rank=4, student_bits=4, teacher_bits=8))
    linear = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert [a.weights - b.weights for a, b in zip(whole, found, strict=True)] == [linear * 27.5 / 8, linear * 3]
    assert found[0].trained == whole[0].trained


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_planned_bits_are_those_that_bitsandbytes_holds(tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantized]'")
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(tmp_path)
    as_loaded = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=as_loaded, dtype=torch.float32)
    held = sum(part.numel() * part.element_size() for part in model.parameters())
    for part in model.parameters():
        if getattr(part, "quant_state", None) is not None:
            held += part.quant_state.absmax.numel() * 4
    _, read = plan.passes(CONFIG, CONFIG, replace(WORK, teacher_bits=bits))
    assert read.weights == held


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--student-bits", "4"], "a quantized student is trained with an adapter: give --lora-rank"),
        (["--student", "nowhere/at/all"], "--student nowhere/at/all: no config.json can be read: "),
        (["--batch", "0"], "argument --batch: 0 is not positive"),
        (["--memory-gib", "-3"], "argument --memory-gib: -3 is not a positive size"),
        (["--memory-gib", "0"], "argument --memory-gib: 0 is not a positive size"),
        (["--memory-gib", "nan"], "argument --memory-gib: nan is not a positive size"),
        (["--dtype", "int8"], "choose from"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_its_option(tmp_path, capsys, arguments, said):
    CONFIG.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["plan", "--student", str(tmp_path), "--teacher", str(tmp_path), *arguments])
    assert exit.value.code == 2
    assert said in capsys.readouterr().err
