"""Writing: the same text whoever leaves the batch, in whatever order and by whichever backend."""

import math
import random
import warnings
from collections import Counter
from functools import partial
from types import SimpleNamespace

import needs
import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from toys import student_model, student_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from trl_ctopd.rollouts import generation
from trl_ctopd.rollouts.cache import CACHE
from trl_ctopd.rollouts.generation import (
    _by_length,
    _generate,
    _generate_continuously,
    _SampledLogProbs,
    check_padding,
    check_prompt_learning,
    check_virtual_tokens,
    check_window,
    off_by_its_cache,
)
from trl_ctopd.rollouts.pairing import Prompt


VOCAB = 40
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "Llama": ("LlamaConfig", {}),
    "Qwen2": ("Qwen2Config", {}),
    "a sliding window": ("MistralConfig", {"sliding_window": 5}),
    "windows in every other layer": ("Gemma2Config", {"sliding_window": 5}),
    "learned positions": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}),
    "a state instead of a cache": ("MambaConfig", {"state_size": 4}),
    "convolutions in the cache": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "linear attention": ("MiniMaxConfig", {"num_local_experts": 2, "block_size": 8}),
}
STOPS = list(range(1, 10))
DRAW = random.Random(0)
PROMPTS = [[DRAW.randrange(10, VOCAB) for _ in range(DRAW.randrange(2, 9))] for _ in range(24)]
PAGED = {"num_blocks": 32, "page_size": 32, "max_batch_tokens": 128}


def model_of(family: str, scale: float = 0.15):
    torch.manual_seed(0)
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**{**SHAPE, **settings})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, scale)
    return model.double().eval()  # two computations of one model round alike enough to choose the same token


def settings(**options) -> GenerationConfig:
    return GenerationConfig(
        **{"do_sample": False, "max_new_tokens": 24, "eos_token_id": STOPS, "pad_token_id": 0, **options}
    )


def cut(completions: list[list[int]]) -> list[list[int]]:
    """Up to the first stop token."""
    ends = [next((n for n, token in enumerate(ids, start=1) if token in STOPS), len(ids)) for ids in completions]
    return [ids[:end] for ids, end in zip(completions, ends, strict=True)]


def watched(model) -> list[int]:
    """How many rows each forward pass of the model has."""
    rows = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, inputs: rows.append(inputs["input_ids"].shape[0]), with_kwargs=True
    )
    return rows


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_leave_change_no_text(family):
    model = model_of(family)
    together = cut(_generate(model, PROMPTS, settings(), rows_leave=False))
    assert len({len(ids) for ids in together}) >= 2, "of uneven length"
    assert cut(_generate(model, PROMPTS, settings(), rows_leave=True)) == together


def writing(**settings) -> SimpleNamespace:
    return SimpleNamespace(
        **{"generation_backend": "transformers", "generation_batch_size": None, "use_vllm": False, **settings}
    )


DECODER = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "is_decoder": True,
    "is_encoder_decoder": False,
}
READ_PADDING = {
    "RWKV": ("RwkvConfig", {}),
    "RecurrentGemma": ("RecurrentGemmaConfig", {"num_hidden_layers": 3, "lru_width": 32}),
    "Bart's decoder": ("BartConfig", DECODER),
    "mBART's decoder": ("MBartConfig", DECODER),
    "TrOCR": ("TrOCRConfig", DECODER),
}
WRITE_ALIKE = {
    **FAMILIES,
    "GPT-NeoX": ("GPTNeoXConfig", {}),
    "Gemma 3": ("Gemma3TextConfig", {"sliding_window": 5}),
    "OPT": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Phi-3": ("Phi3Config", {"pad_token_id": 0}),
    "BLOOM": ("BloomConfig", {"n_layer": 2, "n_head": 2}),
    "MPT": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 128}),
    "Falcon": ("FalconConfig", {"head_dim": None}),
    "Falcon with ALiBi": ("FalconConfig", {"head_dim": None, "alibi": True}),
    "experts": ("Qwen3MoeConfig", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
}
BOTH_PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def wild(family: str, dtype: torch.dtype):
    """Its weights so large that logits are far from each other, those of norms as they are."""
    torch.manual_seed(0)
    name, settings = (READ_PADDING | WRITE_ALIKE)[family]
    settings = {key: value for key, value in {**SHAPE, **settings}.items() if value is not None}
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    return model.to(dtype).train()


@BOTH_PRECISIONS
@pytest.mark.parametrize("family", READ_PADDING)
def test_a_student_that_reads_or_counts_padding_is_refused_where_prompts_are_padded(family, dtype):
    model = wild(family, dtype)
    with pytest.raises(ValueError, match=f"{type(model).__name__} reads the padding.*generation_batch_size=1"):
        check_padding(model, writing())
    check_padding(model, writing(generation_batch_size=1))
    check_padding(model, writing(use_vllm=True))
    check_padding(model, writing(generation_backend="transformers_continuous"))


@BOTH_PRECISIONS
@pytest.mark.parametrize("family", WRITE_ALIKE)
def test_a_student_that_writes_alike_after_padding_passes_and_is_left_as_it_was(family, dtype):
    model = wild(family, dtype)
    own, drawn = model.generation_config, torch.get_rng_state()
    check_padding(model, writing())
    assert model.training and model.generation_config is own and torch.equal(torch.get_rng_state(), drawn)


ADAPTERS = {
    "LoRA": ("Lora", {"init_lora_weights": False}),
    "DoRA": ("Lora", {"use_dora": True, "init_lora_weights": False}),
    "activated LoRA": ("Lora", {"alora_invocation_tokens": [5, 6], "init_lora_weights": False}),
    "a trained head": ("Lora", {"modules_to_save": ["lm_head"]}),
    "IA3": ("IA3", {"feedforward_modules": []}),
    "trained tokens": ("TrainableTokens", {"token_indices": [1, 2], "target_modules": ["embed_tokens"]}),
    "noise": ("Pvera", {"r": 8}),
    "a second network": ("Shadow", {"target_modules": None}),
    "virtual tokens": ("PromptTuning", {"num_virtual_tokens": 3, "target_modules": None}),
    "virtual keys": ("PrefixTuning", {"num_virtual_tokens": 3, "target_modules": None}),
}


@BOTH_PRECISIONS
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_student_with_an_adapter_that_writes_alike_after_padding_passes(name, dtype):
    kind, options = ADAPTERS[name]
    options = {"target_modules": ["q_proj", "v_proj"], **options}
    config = needs.adapter(kind, **{option: value for option, value in options.items() if value is not None})
    check_padding(get_peft_model(wild("Llama", dtype), config), writing())


@pytest.mark.parametrize("key", ["sliding_window", "attention_chunk_size"])
def test_a_window_that_the_model_does_not_know_of_is_refused(key):
    model = student_model()
    check_window("student", model)
    setattr(model.config, key, 16)
    with pytest.raises(ValueError, match=f"{key}=16, which LlamaForCausalLM does not know of"):
        check_window("student", get_peft_model(model, needs.adapter("Lora", target_modules=["q_proj"])))


@pytest.mark.parametrize("key", ["sliding_window", "attention_chunk_size"])
def test_a_window_as_long_as_the_context_passes(key):
    model = student_model()
    setattr(model.config, key, model.config.max_position_embeddings)
    check_window("student", model)


def test_a_teacher_that_writes_is_asked_for_its_window_too(build):
    teacher = {"teacher": student_model(), "teacher_processing_class": student_tokenizer()}
    teacher["teacher"].config.sliding_window = 16
    build(**teacher)
    with pytest.raises(ValueError, match="The config of the teacher has sliding_window=16"):
        build(**teacher, seq_kd=True, lmbda=0.0)


def test_a_window_that_the_model_has_passes():
    check_window("student", AutoModelForCausalLM.from_config(transformers.MistralConfig(**SHAPE, sliding_window=16)))


NEMOTRON_H = {
    "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 1,
    "ssm_state_size": 16,
    "initializer_range": 0.5,
    "time_step_min": 0.1,  # which reading takes for the least time step, and writing does not
    "num_hidden_layers": 4,
}


def writes_with_other_time_steps():
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(**{**SHAPE, **NEMOTRON_H, "vocab_size": len(student_tokenizer())})
    return AutoModelForCausalLM.from_config(config)


def test_a_state_that_is_written_with_otherwise_than_it_is_read_is_found():
    model = writes_with_other_time_steps()
    assert off_by_its_cache(model) > 0.02
    for layer in model.modules():
        if hasattr(layer, "time_step_limit"):
            layer.time_step_limit = (0.0, math.inf)  # as the step with the cache has it
    assert off_by_its_cache(model) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_other_caches_pass(family):
    assert off_by_its_cache(model_of(family)) < 1e-4


@pytest.mark.parametrize("top_k", [0, 8])
def test_a_student_whose_cache_is_off_is_told_of_and_its_draws_are_recorded_where_they_can_be(build, caplog, top_k):
    trainer = build(model=writes_with_other_time_steps(), generation_batch_size=1, top_k=top_k, max_steps=1)
    assert "writes with its cache otherwise than it reads a whole text" in caplog.text
    trainer.train()
    assert ("sampling/log_prob_difference" in trainer.state.log_history[0]) == (top_k == 0)


def test_logits_that_are_not_finite_are_not_told_of_as_padding():
    model = wild("Llama", torch.float32)
    model.lm_head.register_forward_hook(lambda module, args, output: output + torch.inf)
    check_padding(model, writing())


def test_a_student_that_is_offloaded_is_not_tried():
    model = wild("Bart's decoder", torch.float32)
    model.lm_head.to("meta")
    check_padding(model, writing())


@torch.no_grad()
def test_positions_that_a_model_keeps_beside_its_cache_go_with_their_rows():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {**SHAPE, "rope_parameters": rope, "rope_scaling": rope}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32}
    )
    model = transformers.Qwen2VLForConditionalGeneration(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
    together = cut(_generate(model, PROMPTS, settings(), rows_leave=False))
    assert len({len(ids) for ids in together}) >= 2
    assert cut(_generate(model, PROMPTS, settings(), rows_leave=True)) == together


@torch.no_grad()
def test_rows_that_have_ended_cost_nothing_more_once_half_of_them_have():
    model, prompts = model_of("Llama"), [(prompt * 4)[:8] for prompt in PROMPTS]  # read in one pass
    lengths = sorted(map(len, cut(_generate(model, prompts, settings(), rows_leave=False))))
    rows = watched(model)
    _generate(model, prompts, settings(), rows_leave=True)
    assert sum(rows) < 0.7 * len(prompts) * max(lengths)
    assert rows == sorted(rows, reverse=True)
    for step, alive in enumerate(rows):
        going_on = sum(length > step for length in lengths)
        assert going_on <= alive <= max(2 * going_on, 1)


@torch.no_grad()
@pytest.mark.parametrize("size", [None, 5])
def test_texts_that_are_known_before_others_are_told_of_once_each(size):
    model, told = model_of("Llama"), []
    args = SimpleNamespace(generation_batch_size=size)

    def ended(row, ids):
        told.append((row, ids))

    generate = partial(_generate, rows_leave=True)
    completions = [ids for ids, _ in _by_length(generate, model, PROMPTS, settings(), args, False, ended)]
    assert completions == cut(_generate(model, PROMPTS, settings(), rows_leave=False))
    rows = [row for row, _ in told]
    assert all(completions[row] == ids for row, ids in told) and len(set(rows)) == len(rows)
    late = [row for row in range(len(PROMPTS)) if row not in rows]
    assert 0 < len(late) <= (5 if size else len(PROMPTS) // 2), "those of the last call are not told of"


@torch.no_grad()
def test_the_longest_text_may_be_as_long_as_is_asked_and_no_longer():
    model = model_of("Llama")
    lengths = [len(ids) for ids in _generate(model, PROMPTS, settings(max_new_tokens=3), rows_leave=True)]
    assert lengths == [3] * len(PROMPTS)


@torch.no_grad()
@pytest.mark.parametrize("rows_leave", [True, False])
def test_what_is_sampled_follows_the_models_distribution(rows_leave):
    """Of many texts from one prompt, the second token beside its exact probability, though the first ends many."""
    model, size = model_of("Llama", scale=0.12), 6000
    first = model(torch.tensor([PROMPTS[3]])).logits[0, -1].softmax(-1)
    assert 0.05 < first[STOPS].sum() < 0.95
    exact = torch.zeros(VOCAB)
    for token in range(VOCAB):
        if token not in STOPS:
            exact += first[token] * model(torch.tensor([[*PROMPTS[3], token]])).logits[0, -1].softmax(-1)
    torch.manual_seed(1)
    config = settings(do_sample=True, top_k=0, max_new_tokens=4)
    found = Counter(ids[1] for ids in cut(_generate(model, [PROMPTS[3]] * size, config, rows_leave)) if len(ids) > 1)
    for token in range(VOCAB):
        p = exact[token].item()
        assert abs(found[token] / size - p) < 4.5 * (p * (1 - p) / size) ** 0.5 + 1e-3


def with_virtual_tokens():
    torch.manual_seed(0)
    adapter = get_peft_model(model_of("Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    torch.nn.init.normal_(adapter.prompt_encoder["default"].embedding.weight)
    return adapter


@torch.no_grad()
def test_virtual_tokens_are_refused_by_the_versions_that_write_without_them_and_by_no_others():
    """Whichever versions are installed: greedy texts of PEFT's `generate` against plain forward passes."""
    adapter, config = with_virtual_tokens(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    right = 0
    for prompt in PROMPTS:
        ids, own = torch.tensor([prompt]), torch.tensor([prompt])
        for _ in range(8):
            read = {"input_ids": own, "attention_mask": torch.ones_like(own)}
            own = torch.cat([own, adapter(**read).logits[:, -1:].argmax(-1)], 1)
        read = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = adapter.generate(**read, generation_config=settings(max_new_tokens=8))
        right += cut([found[0, len(prompt) :].tolist()]) == cut([own[0, len(prompt) :].tolist()])
    if right == len(PROMPTS):
        check_prompt_learning(config)
    else:
        with pytest.raises(ValueError, match="PROMPT_TUNING: with transformers .* not its own.*transformers<5.24"):
            check_prompt_learning(config)
    check_prompt_learning(LoraConfig())


@pytest.mark.skipif(CACHE == "cache", reason="with this transformers, virtual tokens are refused")
@torch.no_grad()
def test_virtual_tokens_are_read_to_the_end():
    adapter = with_virtual_tokens()
    together = _generate(adapter, PROMPTS, settings(), rows_leave=False)
    assert _generate(adapter, PROMPTS, settings(), rows_leave=True) == together
    with pytest.raises(ValueError, match="virtual tokens.*'transformers'"):
        _generate_continuously(adapter, PROMPTS, settings(), PAGED)


VIRTUAL = {
    "prompt tuning": ("PromptTuning", {"num_virtual_tokens": 3}),
    "P-tuning": ("PromptEncoder", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "a prompt of examples": (
        "CPT",
        {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1] * 3, "cpt_tokens_type_mask": [1, 2, 3]},
    ),
    "prefix tuning": ("PrefixTuning", {"num_virtual_tokens": 3}),
    "a cartridge": ("Cartridge", {"num_virtual_tokens": 3}),
}


@pytest.mark.skipif(CACHE == "cache", reason="with this transformers, virtual tokens are refused")
@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("kind", VIRTUAL)
@torch.no_grad()
def test_a_student_with_virtual_tokens_writes_beside_longer_prompts_what_it_writes_alone(kind, size):
    """Padding on the left would part some virtual tokens from the text."""
    name, options = VIRTUAL[kind]
    adapter = get_peft_model(model_of("Llama", scale=0.25), needs.adapter(name, **options)).double().eval()
    torch.manual_seed(0)
    for own in adapter.parameters():
        if own.requires_grad:
            own.normal_()
    told, how = [], SimpleNamespace(generation_batch_size=size)
    write, config = partial(_generate, rows_leave=True), settings(temperature=1.0)
    together = _by_length(write, adapter, PROMPTS, config, how, True, lambda row, ids: told.append(row))
    for prompt, (found, log_probs) in zip(PROMPTS, together, strict=True):
        [(ids, expected)] = _by_length(write, adapter, [prompt], config, how, True)
        assert found == ids
        torch.testing.assert_close(torch.tensor(log_probs), torch.tensor(expected), rtol=0, atol=1e-4)
    assert len(told) == len(set(told)) and (told or size is None)


def test_virtual_tokens_before_padding_are_refused_where_the_processes_of_a_sharded_student_write_apart():
    adapter, apart = with_virtual_tokens(), SimpleNamespace(gather_for_generation=False)
    with pytest.raises(ValueError, match="PROMPT_TUNING with gather_for_generation=False.*gather_for_generation=True"):
        check_virtual_tokens(adapter, apart, sharded=True)
    check_virtual_tokens(adapter, apart, sharded=False)
    check_virtual_tokens(adapter, SimpleNamespace(gather_for_generation=True), sharded=True)
    prefix = get_peft_model(model_of("Llama"), needs.adapter("PrefixTuning", num_virtual_tokens=3))
    check_virtual_tokens(prefix, apart, sharded=True)


def test_small_batches_hold_prompts_of_like_length_and_come_back_in_order(build, monkeypatch):
    seen, generate = [], generation._generate
    monkeypatch.setattr(
        generation,
        "_generate",
        lambda model, prompts, *a, **k: seen.append(prompts) or generate(model, prompts, *a, **k),
    )

    def written(**options):
        trainer = build(per_device_train_batch_size=8, **options)
        trainer.generation_config.do_sample = False
        prompts = trainer.data_collator(list(trainer.train_dataset))["prompts"]
        return trainer.rollouts.write(trainer.model, prompts, 0)

    assert written() == written(generation_batch_size=6)
    whole, *parts = [list(map(len, prompts)) for prompts in seen]
    assert list(map(len, parts)) == [6] * (len(whole) // 6) + [len(whole) % 6] * (len(whole) % 6 > 0)
    assert sum(parts, []) == sorted(whole, reverse=True)


@torch.no_grad()
def test_continuous_batching_writes_the_same_text():
    model = model_of("Llama")
    together = cut(_generate(model, PROMPTS, settings(), rows_leave=False))
    assert cut(_generate_continuously(model, PROMPTS, settings(), PAGED)) == together


@torch.no_grad()
def test_continuous_batching_samples_by_the_runs_own_seed():
    model, config = model_of("Llama", scale=0.12), settings(do_sample=True, top_k=0)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(_generate_continuously(model, PROMPTS, config, PAGED))
    assert texts[0] == texts[1] != texts[2]


def test_a_failure_of_continuous_batching_is_told_and_not_trained_on():
    with pytest.raises(RuntimeError, match="wrote 0 of 1 completions.*'transformers' needs no paged cache"):
        _generate_continuously(model_of("Llama"), [[7] * 100], settings(max_new_tokens=60), {**PAGED, "num_blocks": 1})


def test_a_run_trains_by_continuous_batching(build):
    trainer = build(
        model=student_model(),
        generation_backend="transformers_continuous",
        transformers_continuous_batching_config=PAGED,
        max_steps=2,
    )
    trainer.train()
    assert trainer.state.log_history[1]["completions/mean_length"] > 1
    assert trainer.model.training


def test_a_step_warns_of_no_names_that_trl_has_to_change(build):
    trainer = build(gradient_checkpointing=True, max_steps=1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
    assert not [str(warning.message) for warning in seen if "checkpointing" in str(warning.message)]


@pytest.mark.parametrize(
    "options", [{}, {"peft_config": LoraConfig(target_modules="all-linear")}], ids=["whole", "LoRA"]
)
def test_generation_leaves_no_further_hooks_on_the_embeddings(build, options):
    trainer, found = build(gradient_checkpointing=True, max_steps=3, **options), []
    embeddings = trainer.model.get_input_embeddings()
    training_step = trainer.training_step

    def watched(*args, **kwargs):
        found.append(len(embeddings._forward_hooks))
        return training_step(*args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    assert found[0] > 0 and len(set(found)) == 1


@torch.no_grad()
@pytest.mark.parametrize("rows_leave", [True, False])
def test_the_recorded_log_probs_are_those_of_the_models_own_plain_forward_pass(rows_leave):
    model, config = model_of("Llama"), settings(do_sample=True, top_k=0, temperature=0.7)
    recorder = _SampledLogProbs(len(PROMPTS), config)
    written = cut(_generate(model, PROMPTS, config, rows_leave=rows_leave, recorder=recorder))
    assert len({len(ids) for ids in written}) > 3
    for prompt, ids, own in zip(PROMPTS, written, recorder.of_tokens, strict=True):
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(own[: len(ids)].double(), expected, rtol=0, atol=1e-4)


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.mark.parametrize("backend", ["transformers", "transformers_continuous"])
def test_an_adapter_is_merged_while_the_student_writes_and_the_text_is_its_own(build, backend):
    """Greedy in all but name: the adapter's own forward passes choose every token that was written."""
    options = {"generation_backend": backend, "temperature": 1e-4, "peft_config": LORA}
    if backend == "transformers_continuous":
        options["transformers_continuous_batching_config"] = PAGED
    trainer = build(per_device_train_batch_size=4, **options)
    merges, write = [], trainer.rollouts.write
    layers = [module for module in trainer.model.modules() if hasattr(module, "lora_A")]
    trainer.model.base_model.model.model.register_forward_pre_hook(
        lambda *_: merges.append({own.merged for own in layers})
    )
    found = write(trainer.model, [Prompt(ids, [1]) for ids in PROMPTS[:4]], 0)
    assert merges and all(merged == {True} for merged in merges)
    assert not any(layer.merged for layer in layers)
    for prompt, (ids, told) in zip(PROMPTS[:4], found, strict=True):
        assert told is None  # in float32 it is the distribution that is scored
        logits = trainer.model.eval()(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        top = logits.topk(2)
        clear = top.values[:, 0] - top.values[:, 1] > 0.02
        assert clear.any() and (top.indices[:, 0] == torch.tensor(ids))[clear].all()


def test_in_half_precision_what_merging_rounds_otherwise_is_logged_and_weighed(build):
    options = {"bf16": True, "peft_config": LORA, "max_steps": 2, "logging_steps": 1}
    merged, apart = (build(merge_adapter_for_generation=merge, **options) for merge in (None, False))
    for trainer in (merged, apart):
        trainer.train()
    logged = [entry for entry in merged.state.log_history if "sampling/log_prob_difference" in entry]
    assert len(logged) == 2 and all(0 < entry["sampling/log_prob_difference"] < 0.1 for entry in logged)
    assert not any("sampling/log_prob_difference" in entry for entry in apart.state.log_history)
    truncated = build(top_p=0.9, **options)  # of which no log-probs are recorded
    assert truncated.rollouts.write(truncated.model, [Prompt(PROMPTS[0], [1])], 0)[0][1] is None
