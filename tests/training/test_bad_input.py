"""Bad input is refused before any training time is spent, with both values and the way out in the message."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import needs
import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset, DatasetDict, IterableDataset
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from toys import prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaModel,
    Phi3Config,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl import LogCompletionsCallback

from trl_ctopd import (
    CrossTokenizerDPOConfig,
    CrossTokenizerDPOTrainer,
    CrossTokenizerGKDConfig,
    CrossTokenizerGKDTrainer,
)
from trl_ctopd.config import GKDConfig
from trl_ctopd.training.checks import check_strategy, check_tied


@pytest.fixture
def build(tmp_path):
    def build(settings=None, **arguments):
        defaults = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "max_new_tokens": 8}
        arguments = {
            "model": student_model(),
            "teacher_model": teacher_model(),
            "train_dataset": prompts(4),
            "processing_class": student_tokenizer(),
            "teacher_processing_class": teacher_tokenizer(),
            **arguments,
        }
        args = arguments.pop("args", None) or CrossTokenizerGKDConfig(**{**defaults, **(settings or {})})
        return CrossTokenizerGKDTrainer(args=args, **arguments)

    return build


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"credit": "fair"}, "'fair'.*semantic, uniform"),
        ({"eos_policy": "drop"}, "'drop'.*bridge, mask"),
        ({"distillation_loss": "kl"}, "'kl'.*dpca"),
        ({"distillation_loss_kwargs": {"clip": 1}}, "'clip'.*credit, advantage_clip"),
        ({"off_policy_loss": "dpca"}, "'dpca'.*did not write.*alm, .*uld, .*sft"),
        ({"distillation_loss": "sft"}, "'sft'.*lmbda=1.0"),
        ({"advantage_clip": -1.0}, "positive or None, got -1.0"),
        ({"temperature": 0.0}, "positive, got 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"num_generations": 0}, "num_generations must be at least 1, got 0"),
        ({"lmbda": 1.5}, "lmbda"),
        ({"max_new_tokens": 300}, "max_new_tokens=300.*256"),
        ({"max_new_tokens": 8, "max_length": 8}, "max_new_tokens=8.*8 tokens"),
        (
            {"max_new_tokens": 240},
            "Row 0.*prompt has .* tokens.*context of 256 .*room for 16 beside .*=240.*, or lower max_new_tokens",
        ),
        ({"packing": True}, "packing"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 does not apply: text is written without noise"),
        ({"include_for_metrics": ["inputs"]}, "include_for_metrics.*what the student writes"),
        ({"activation_offloading": True}, "this run is on a CPU.*set activation_offloading=False"),
        ({"bf16_full_eval": True}, "bf16_full_eval.*leaves it so.*set bf16=True.*'bfloat16'"),
        ({"fp16_full_eval": True}, "fp16_full_eval.*leaves it so.*set fp16=True.*'float16'"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, r"not supported \(cp_size=2 .*FSDP2 or ZeRO-3"),
        ({"assistant_only_loss": True}, "assistant_only_loss"),
        ({"train_sampling_strategy": "group_by_length"}, "group_by_length"),
        ({"train_sampling_strategy": "batch_rebalance"}, "batch_rebalance"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number, an int, got None"),
        ({"seq_kd": True}, "lmbda below 1"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "cannot set num_return_sequences"),
        ({"generation_kwargs": {"repetion_penalty": 1.2}}, "'repetion_penalty'.*does not know"),
        (
            {"chat_template_kwargs": "enable_thinking=False"},
            "chat_template_kwargs must be a dict.*enable_thinking=False",
        ),
        ({"pad_token": "<padd>"}, "no token '<padd>'"),
        ({"pad_token": "a"}, "pad_token is 'a'.*a token of text"),
        ({"max_steps": [4]}, r"max_steps must be a whole number, an int, got \[4\] .list."),
        ({"max_steps": 4.5}, "max_steps must be a whole number, an int, got 4.5"),
        ({"max_steps": "2"}, "max_steps must be a whole number, an int, got '2' .str."),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"save_steps": None}, "save_steps must be a number, got None"),
        ({"num_train_epochs": "3"}, "num_train_epochs must be a number, got '3' .str."),
        ({"mask_strings": 5}, "mask_strings must be a list of strings that are not empty, got 5"),
        ({"distillation_loss_kwargs": 3}, "distillation_loss_kwargs must be a dict, or the JSON text of one, got 3"),
        ({"teacher_model_init_kwargs": {"dtype": "float32"}}, "teacher_model_init_kwargs.*loaded already"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(build, setting, message):
    with pytest.raises(ValueError, match=message):
        build(setting)


@pytest.mark.parametrize("name", ["max_steps", "per_device_eval_batch_size", "warmup_steps"])
def test_a_number_of_a_run_on_pairs_that_is_none_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} must be .*number.*, got \[4\] .list."):
        CrossTokenizerDPOConfig(str(tmp_path), use_cpu=True, report_to=[], **{name: [4]})


def test_a_missing_teacher_is_named(build):
    with pytest.raises(ValueError, match="No teacher: pass `teacher_model`"):
        build(teacher_model=None)


@pytest.mark.parametrize("trainer", [CrossTokenizerGKDTrainer, CrossTokenizerDPOTrainer])
def test_a_missing_student_is_named(trainer):
    with pytest.raises(ValueError, match="No student: pass `model`, or `--model_name_or_path`"):
        trainer(None, teacher_model())


_SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_NO_WRITERS = {
    "an encoder .BertForMaskedLM.": BertForMaskedLM(BertConfig(**_SMALL)),
    "an encoder .BertModel.": BertModel(BertConfig(**_SMALL)),
    "an encoder-decoder .T5For": T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2)),
    "a LlamaModel without a head": LlamaModel(LlamaConfig(**_SMALL, vocab_size=400)),
}


@pytest.mark.parametrize("named", [False, True], ids=["a model", "its name"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", _NO_WRITERS)
def test_a_model_that_does_not_go_on_from_text_is_refused_before_anything_is_written(
    build, tmp_path, kind, side, named
):
    model, output = _NO_WRITERS[kind], tmp_path / "output"
    if named:
        model.save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    with pytest.raises(ValueError, match=f"The {side}.* is {kind}.*a causal language model is needed"):
        build({"output_dir": str(output)}, **{"model" if side == "student" else "teacher_model": model})
    teacher = {"teacher_model": teacher_model(), "teacher_processing_class": teacher_tokenizer()}
    for name in ("model",) if side == "student" else ("teacher_model", "positive_teacher"):
        models = {
            "model": student_model(),
            **teacher,
            "positive_teacher": teacher_model(),
            "negative_teacher": teacher_model(),
        }
        args = CrossTokenizerDPOConfig(str(output), use_cpu=True, report_to=[])
        with pytest.raises(ValueError, match=f"The {side}.* is {kind}"):
            CrossTokenizerDPOTrainer(
                args=args, train_dataset=prompts(4), processing_class=student_tokenizer(), **{**models, name: model}
            )
    assert not output.exists()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_folder_that_is_missing_or_without_a_tokenizer_is_named_with_its_side(build, tmp_path, side):
    model, tokenizer = {
        "student": ("model", "processing_class"),
        "teacher": ("teacher_model", "teacher_processing_class"),
    }[side]
    folder = tmp_path / "own"
    with pytest.raises(ValueError, match=f"The {side} '{folder}' is a folder that does not exist"):
        build(**{model: str(folder)})
    (student_model() if side == "student" else teacher_model()).save_pretrained(folder)
    with pytest.raises(
        ValueError, match=f"The {side}'s folder '{folder}' holds no tokenizer: .*pass it as `{tokenizer}`"
    ):
        build(**{model: str(folder), tokenizer: None})


def test_the_student_cannot_teach_itself_in_place(build):
    model = student_model()
    with pytest.raises(ValueError, match="same module"):
        build(model=model, teacher_model=model)


@pytest.mark.parametrize(("limit", "told"), [(30, True), (400, False)])
def test_a_student_whose_positions_turn_within_its_texts_is_warned_of(build, caplog, limit, told):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    limits = {"max_position_embeddings": 512, "original_max_position_embeddings": limit, "rope_parameters": rope}
    config = Phi3Config(**sizes, **limits, vocab_size=len(student_tokenizer()), pad_token_id=0, eos_token_id=2)
    build(model=AutoModelForCausalLM.from_config(config))
    assert (f"positions are encoded otherwise in texts beyond {limit} tokens" in caplog.text) == told


def test_another_trainers_config_is_refused(build, tmp_path):
    with pytest.raises(TypeError, match="CrossTokenizerGKDConfig, got GKDConfig"):
        build(args=GKDConfig(str(tmp_path), bf16=False, use_cpu=True))


@pytest.mark.parametrize(
    ("dataset", "state"),
    [(None, "missing"), (Dataset.from_list([]), "empty"), (IterableDataset.from_generator(lambda: iter(())), "empty")],
)
def test_no_prompts_is_an_error(build, dataset, state):
    with pytest.raises(ValueError, match=f"train_dataset` is {state}"):
        build(train_dataset=dataset)


def test_an_empty_evaluation_set_is_an_error(build):
    with pytest.raises(ValueError, match="eval dataset is empty"):
        build(eval_dataset=prompts(4).select([]))


@pytest.mark.parametrize("trainer", [CrossTokenizerGKDTrainer, CrossTokenizerDPOTrainer])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_dataset": [{"prompt": "two?"}]}, r"train .*got `list`: `Dataset.from_list\(rows\)`"),
        ({"train_dataset": {"prompt": ["two?"]}}, "train .*got `dict`: `Dataset.from_dict"),
        ({"train_dataset": "prompts.jsonl"}, "train .*got `str`: `datasets.load_dataset` reads one"),
        ({"train_dataset": Path("prompts.jsonl")}, "train .*got `.*Path`: `datasets.load_dataset` reads one"),
        ({"train_dataset": DatasetDict(train=prompts(2))}, "train .*got `DatasetDict`: choose one of its splits"),
        ({"eval_dataset": [{"prompt": "two?"}]}, "eval .*got `list`: `Dataset.from_list"),
        ({"eval_dataset": {"hard": "prompts.jsonl"}}, "hard .*got `str`: `datasets.load_dataset` reads one"),
    ],
)
def test_what_is_no_dataset_is_told_how_to_become_one(tmp_path, trainer, given, message):
    kind = CrossTokenizerGKDConfig if trainer is CrossTokenizerGKDTrainer else CrossTokenizerDPOConfig
    args = kind(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(TypeError, match=f"The {message}"):
        trainer(student_model(), teacher_model(), args, **{"train_dataset": prompts(4), **given})


def test_a_row_without_prompt_is_named_with_its_columns(build):
    with pytest.raises(ValueError, match="Row 0.*question"):
        build(train_dataset=Dataset.from_list([{"question": "two?"}]))


def test_a_row_without_reference_is_an_error_only_off_policy(build):
    rows = prompts(4).remove_columns("completion")
    build(train_dataset=rows)
    with pytest.raises(ValueError, match="Row 0.*lmbda=1.0.*seq_kd=True"):
        build({"lmbda": 0.5}, train_dataset=rows)


def test_a_reference_that_is_none_is_said_to_be_that(build):
    rows = prompts(4).remove_columns("completion").add_column("completion", [None] * 4)
    with pytest.raises(ValueError, match="Row 0 of the train dataset: its `completion` is None, which `lmbda` < 1"):
        build({"lmbda": 0.5}, train_dataset=rows)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_prompt_that_one_of_the_models_has_nothing_to_go_on_from_names_that_model(build, side):
    sides = {"processing_class": student_tokenizer(), "teacher_processing_class": teacher_tokenizer()}
    for tokenizer, begins in zip(sides.values(), (side != "student", side != "teacher"), strict=True):
        tokenizer.backend_tokenizer.post_processor = None
        if begins:
            bos = tokenizer.convert_ids_to_tokens(0)
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{bos} $A", special_tokens=[(bos, 0)])
    with pytest.raises(ValueError, match=f"Row 0 of the train dataset: as the {side} reads it, the prompt is empty"):
        build(train_dataset=Dataset.from_list([{"prompt": ""}]), **sides)


@pytest.mark.parametrize("name", ["image", "images"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_column_of_pictures_is_refused_with_the_way_out(build, name, streamed):
    rows = prompts(4).add_column(name, ["a.png"] * 4)
    with pytest.raises(ValueError, match=rf"column '{name}'.* is for text: remove or rename it .*remove_columns"):
        build(train_dataset=rows.to_iterable_dataset() if streamed else rows)


def test_no_pad_token_and_none_derivable_is_an_error(build):
    tokenizer = student_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no pad token.*pad_token"):
        build(processing_class=tokenizer)


def test_the_eos_token_pads_where_there_is_no_pad_token(build):
    tokenizer = student_tokenizer()
    tokenizer.pad_token = None
    assert build(processing_class=tokenizer).processing_class.pad_token == "<|eot|>"


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_tokenizer_larger_than_the_embedding_is_an_error(build, side):
    small = {
        "student": {"model": student_model(vocab_size=100)},
        "teacher": {"teacher_model": teacher_model(vocab_size=100)},
    }
    with pytest.raises(ValueError, match=f"The {side}'s tokenizer has ids up to .* embeds 100 tokens"):
        build(**small[side])


@pytest.mark.parametrize("side", ["processing_class", "teacher_processing_class"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (SimpleNamespace(tokenizer=None), "SimpleNamespace: pass its `.tokenizer`"),
        (object(), r"object: pass `AutoTokenizer.from_pretrained\(name\)`"),
        ("a/model", r"str: pass `AutoTokenizer.from_pretrained\('a/model'\)`"),
        (Path("model"), r"Path: pass `AutoTokenizer.from_pretrained\('model'\)`"),
    ],
)
def test_a_processing_class_that_is_no_tokenizer_is_refused_with_the_way_out(build, side, given, message):
    with pytest.raises(TypeError, match=f"A processing class must be a text tokenizer, got .*{message}"):
        build(**{side: given})


@pytest.mark.parametrize(
    ("given", "message"), [({"r": 4}, r"dict: pass `LoraConfig\(\*\*peft_config\)`"), ("lora", "str: pass `LoraConfig")]
)
def test_an_adapter_that_is_no_config_is_refused_with_the_way_out(build, given, message):
    with pytest.raises(TypeError, match=f"`peft_config` must be a PeftConfig, got {message}"):
        build(peft_config=given)


@pytest.mark.parametrize(
    "adapter", [{"target_modules": ["q_proj", "lm_head"]}, {"target_parameters": ["lm_head.weight"]}]
)
def test_an_adapter_on_the_head_whose_weight_is_read_by_itself_is_refused(build, adapter):
    message = "adapter to `lm_head` is not supported.*would never be trained. Remove `'lm_head'`"
    with pytest.raises(ValueError, match=message):
        build(peft_config=LoraConfig(**adapter))
    with pytest.raises(ValueError, match=message):
        build(model=get_peft_model(student_model(), LoraConfig(**adapter)))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("Cartridge", "CARTRIDGE does not work with gradient checkpointing.*gradient_checkpointing=False"),
        ("PrefixTuning", "PREFIX_TUNING does not work with gradient checkpointing.*gradient_checkpointing=False"),
        ("AdaptionPrompt", "ADAPTION_PROMPT.*LoRA"),
    ],
)
def test_an_adapter_that_the_student_cannot_be_trained_with_is_refused(build, adapter, message):
    sizes = {"adapter_len": 3, "adapter_layers": 1} if adapter == "AdaptionPrompt" else {"num_virtual_tokens": 3}
    config = needs.adapter(adapter, **sizes)
    with pytest.raises(ValueError, match=message):
        build(peft_config=config)
    with pytest.raises(ValueError, match=message):
        build(model=get_peft_model(student_model(), config))


@pytest.mark.parametrize("wrapped", [False, True], ids=["an adapter to be made", "a PeftModel"])
def test_an_adapter_that_keeps_all_its_ranks_is_warned_of(build, caplog, wrapped):
    config = AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, target_modules=["q_proj"], total_step=9)
    build(model=get_peft_model(student_model(), config)) if wrapped else build(peft_config=config)
    assert caplog.text.count("all 4 ranks of a layer are trained to the end") == 1
    caplog.clear()
    build(peft_config=LoraConfig(target_modules=["q_proj"]))
    assert "ranks" not in caplog.text


@pytest.mark.parametrize("wrapped", [False, True], ids=["an adapter to be made", "a PeftModel"])
def test_an_adapter_with_the_default_learning_rate_is_warned_of(build, caplog, wrapped):
    def built(**settings):
        caplog.clear()
        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        given = {"model": get_peft_model(student_model(), config)} if wrapped else {"peft_config": config}
        build(**given, **settings)
        return caplog.text

    assert built().count("learning_rate=1e-06, the default, is for whole weights") == 1
    assert "the default, is for" not in built(settings={"learning_rate": 2e-4})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    assert "the default, is for" not in built(optimizers=(optimizer, None))


def test_whole_weights_with_the_default_learning_rate_are_not_warned_of(build, caplog):
    build()
    assert "the default, is for" not in caplog.text


def test_an_adapter_that_is_loaded_as_another_under_another_seed_is_warned_of(build, caplog):
    build(peft_config=LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa_niter_4"))
    assert caplog.text.count("another model unless the same seed was set") == 1
    caplog.clear()
    build(peft_config=LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"))
    assert "seed was set" not in caplog.text


def test_a_quantized_student_without_an_adapter_is_refused_before_it_is_loaded(build):
    settings = {"model_init_kwargs": {"quantization_config": {"load_in_8bit": True}}}
    with pytest.raises(ValueError, match="quantized.*train an adapter on it .`--use_peft`, `peft_config=LoraConfig"):
        build(settings, model="no/such-model")


@pytest.mark.parametrize("wrapped", [False, True], ids=["an adapter to be made", "a PeftModel"])
def test_an_adapter_on_a_quantization_that_cannot_be_trained_is_refused_with_its_name(build, wrapped):
    class InferenceOnlyHfQuantizer(HfQuantizer):
        def _process_model_before_weight_loading(self, model, **kwargs):
            raise AssertionError("the model is loaded already")

        def is_serializable(self):
            return True

        @property
        def is_trainable(self):
            return False

    adapter, student = LoraConfig(target_modules="all-linear"), student_model()
    student.hf_quantizer = InferenceOnlyHfQuantizer(QuantizationConfigMixin(quant_method="inference-only"))
    given = {"model": get_peft_model(student, adapter)} if wrapped else {"model": student, "peft_config": adapter}
    with pytest.raises(
        ValueError, match="InferenceOnlyHfQuantizer, which no adapter can be trained on: load its plain weights"
    ):
        build(**given)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("FSDP", {"fsdp_version": 1}, "FSDP version 1.*set `fsdp_version: 2`"),
        (
            "MULTI_GPU",
            {"parallelism_config": ParallelismConfig(tp_size=2)},
            r"not supported \(tp_size=2 .*FSDP2 or ZeRO-3",
        ),
        ("MULTI_GPU", {"accelerator_config": {"even_batches": False}}, "even_batches=False.*leave it True"),
        ("MULTI_CPU", {"eval_use_gather_object": True}, "eval_use_gather_object=True .*leave it out"),
        (
            "MULTI_CPU",
            {"ddp_static_graph": True, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps=2: .*Leave ddp_static_graph out",
        ),
        (
            "FSDP",
            {"gather_for_generation": False, "generation_backend": "transformers_continuous"},
            "unlike numbers of forward passes.*choose 'transformers', or gather_for_generation=True",
        ),
        (
            "FSDP",
            {"gather_for_generation": False, "use_vllm": True, "vllm_mode": "colocate"},
            "holds the whole student.*vllm_mode='server'.*or gather_for_generation=True",
        ),
    ],
)
def test_what_cannot_work_in_several_processes_is_refused(tmp_path, kind, settings, message):
    """Said by a stand-in for the Accelerator of two processes; real ones are in test_accelerate_configs.py."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=settings.pop("fsdp_version", 2))
    accelerator = SimpleNamespace(
        num_processes=2,
        distributed_type=DistributedType[kind],
        state=SimpleNamespace(fsdp_plugin=plugin),
        parallelism_config=settings.pop("parallelism_config", None),  # of an Accelerate config
    )
    args = CrossTokenizerGKDConfig(str(tmp_path), use_cpu=True, **settings)
    with pytest.raises(ValueError, match=message):
        check_strategy(args, accelerator)


@pytest.mark.parametrize(
    ("kind", "modules", "tied", "efficient", "refused"),
    [
        ("FSDP", ["embed_tokens"], True, True, True),
        ("FSDP", ["lm_head"], True, True, True),
        ("FSDP", None, True, True, False),
        ("FSDP", ["lm_head"], False, True, False),
        ("FSDP", ["embed_tokens"], True, False, False),
        ("MULTI_GPU", ["embed_tokens"], True, True, False),
    ],
)
def test_tied_embeddings_that_an_adapter_trains_apart_are_refused_under_fsdp(kind, modules, tied, efficient, refused):
    """Accelerate would tie them again, so that another model is trained than is saved."""
    plugin = SimpleNamespace(cpu_ram_efficient_loading=efficient)  # a real one sets a variable of the environment
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], state=SimpleNamespace(fsdp_plugin=plugin))
    model = get_peft_model(
        student_model(tie_word_embeddings=tied), LoraConfig(target_modules="all-linear", modules_to_save=modules)
    )
    with pytest.raises(ValueError, match="would tie them again. Use DDP or ZeRO") if refused else nullcontext():
        check_tied(model, accelerator)


@pytest.mark.parametrize(
    ("rows", "evaluated", "message"),
    [
        (3, 4, "leaves nothing of the train dataset: it has 3 rows, .* batch of all processes 4.*_train_batch_size"),
        (4, 3, "leaves nothing of the eval dataset: it has 3 rows, .* batch of all processes 4.*_eval_batch_size"),
    ],
)
def test_a_dataset_of_which_drop_last_leaves_nothing_is_refused(build, rows, evaluated, message):
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    data = {"train_dataset": prompts(rows), "eval_dataset": prompts(evaluated)}
    with pytest.raises(ValueError, match=message):
        build({"dataloader_drop_last": True, **sizes}, **data)


def test_rows_that_drop_last_leaves_out_of_evaluations_are_counted(build, caplog):
    sizes = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 4}
    build({"dataloader_drop_last": True, **sizes}, eval_dataset={"few": prompts(4), "more": prompts(6)})
    assert caplog.text.count("are in no evaluation") == 1
    assert "the last 2 of 6 rows of the more dataset are in no evaluation" in caplog.text


def test_a_callback_that_reads_the_text_of_prompts_is_refused_before_training(build):
    trainer = build(eval_dataset=prompts(2))
    callback = LogCompletionsCallback(trainer)
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match="LogCompletionsCallback reads .*remove_callback.*set log_completions=True"):
        trainer.train()
    trainer.remove_callback(callback)
    trainer.train()
