"""Checks of the trainer's arguments, before any training time is spent."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, PeftType
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from trl import LogCompletionsCallback, WeaveCallback

from ..config import CrossTokenizerGKDConfig
from ..losses import AUTO, LOSSES, Metrics, build_loss, loss_name
from ..losses.compass import Compass
from ..models.activated import active_tokens, invocation_of
from ..models.heads import AUTOCAST, base_model, check_head, context_of, has_imbalance
from ..models.loading import (
    adapter_base,
    check_saves,
    check_vocabulary,
    computes_fast,
    forget_gguf,
    load_model,
    slow_weights,
    warn_of_experts,
    warn_of_two_checkpoints,
)
from ..models.packing import turning_length
from ..models.quantized import dequantizes, prepare_quantized, saved_quantization
from ..models.reference import trained_beside
from ..models.sharding import shards_student
from ..models.trials import check_causal, draws_noise
from ..redact import redact
from ..rollouts.ahead import check_ahead
from ..rollouts.compiled import check_compiled
from ..rollouts.early_stop import check_early_stop, check_pieces
from ..rollouts.generation import check_continuous, check_padding, check_prompt_learning
from ..teachers.panel import Panel
from ..teachers.servers import is_url, is_url_without_scheme
from ..text.vocabulary import VocabularyPair
from .identity import dataset_digest


logger = get_logger(__name__)
_RATIOS = ("clip_ratio_low", "clip_ratio_high")
_KNOBS = ("event", "credit", "baseline", "baseline_top_k", "advantage_clip", *_RATIOS)  # of single losses


def check_arguments(model, teacher_model, args, train_dataset, peft_config=None):
    """Raises `TypeError` or `ValueError` for arguments of the trainer that cannot work together."""
    if not isinstance(args, CrossTokenizerGKDConfig):
        raise TypeError(f"`args` must be a CrossTokenizerGKDConfig, got {type(args).__name__}.")
    if teacher_model is None or teacher_model in ({}, []):
        raise ValueError("No teacher: pass `teacher_model`, or set `teacher_model_name_or_path` in the config.")
    teachers = list(teacher_model.values()) if isinstance(teacher_model, Mapping) else [teacher_model]
    if any(teacher is model for teacher in teachers) and not isinstance(model, str):
        raise ValueError("Teacher and student are the same module; load the teacher apart, since it is frozen.")
    own = {id(parameter) for parameter in model.parameters()} if isinstance(model, nn.Module) else set()
    for teacher in teachers:
        shared = own & {id(p) for p in teacher.parameters()} if isinstance(teacher, nn.Module) else ()
        if shared:
            raise ValueError(
                f"Teacher and student share {len(shared)} weights: the {type(teacher).__name__} is within the student, or the "
                "student within it, and what an adapter adds is added in both. Load the teacher apart, since it is frozen."
            )
    by_name = [teacher for teacher in teachers if isinstance(teacher, str) and not is_url(teacher)]
    for name in by_name:
        if is_url_without_scheme(name) and not Path(name).exists():
            raise ValueError(
                f"The teacher {redact(name)!r} is not the name of a model. If it is a server, write http://{name.strip()}."
            )
    if args.teacher_model_init_kwargs and not by_name:
        kind = "at a server" if isinstance(teachers[0], str | Sequence) else f"a {type(teachers[0]).__name__}"
        raise ValueError(
            f"`teacher_model_init_kwargs` {sorted(args.teacher_model_init_kwargs)} are for a teacher given by name, but "
            f"`teacher_model` is {kind} that is loaded already."
        )
    reference = [] if args.reference_teacher is None else [args.reference_teacher]
    if any(is_url(teacher) or isinstance(teacher, list | tuple) for teacher in [*teachers, *reference]):
        if args.temperature != 1.0:
            raise ValueError(
                f"temperature={args.temperature}: a server's log-probs of a text are those at temperature 1. Set it to 1.0, or "
                "take a teacher in this process."
            )
        if args.seq_kd:
            raise ValueError("seq_kd: a teacher behind a server reads and does not write: take one in this process.")
    if args.teacher_weights and not isinstance(teacher_model, Mapping):
        raise ValueError(
            f"teacher_weights={args.teacher_weights} are of several teachers by name, and there is one: pass a dict of teachers, or set "
            "teacher_models."
        )
    if isinstance(teacher_model, Mapping) and args.seq_kd:
        raise ValueError("seq_kd: with several teachers, the student or the dataset writes: set seq_kd=False.")
    if train_dataset is None or (isinstance(train_dataset, Dataset) and not len(train_dataset)):
        raise ValueError(f"`train_dataset` is {'missing' if train_dataset is None else 'empty'}: it gives the prompts.")
    columns = getattr(train_dataset, "column_names", ())
    if isinstance(train_dataset, IterableDataset) and (columns := next(iter(train_dataset), None)) is None:
        raise ValueError("`train_dataset` is empty: it gives the prompts.")
    if pictures := [name for name in ("image", "images") if name in columns]:
        raise ValueError(
            f"`train_dataset` has a column {pictures[0]!r}, by which TRL knows a dataset of pictures, and this trainer is for text: remove or "
            f"rename it (`dataset.remove_columns({pictures})`)."
        )
    if isinstance(model, nn.Module):
        forget_gguf(model)
    if isinstance(model, str):
        given = (args.model_init_kwargs or {}).get("quantization_config")
        quantized = given is not None and not dequantizes(given)
    else:
        quantized = getattr(model, "is_quantized", False) and not isinstance(model, PeftModel)
    if quantized and peft_config is None:
        raise ValueError(
            "The student is quantized, and its whole weights cannot be trained: train an adapter on it (`--use_peft`, "
            '`peft_config=LoraConfig(target_modules="all-linear")`), or load it without `quantization_config`.'
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        _check_decompressed(quantizer.quantization_config.quant_method)
    if quantizer is not None and not quantizer.is_trainable:
        raise ValueError(
            f"The student is quantized with {type(quantizer).__name__}, which no adapter can be trained on: load its plain weights, or "
            "a quantization that bitsandbytes makes."
        )
    adapter = model.active_peft_config if isinstance(model, PeftModel) else peft_config
    if adapter is not None:
        check_adapter(adapter, args)
    for name in ("packing", "padding_free", "assistant_only_loss", "label_smoothing_factor"):
        if getattr(args, name):
            raise ValueError(
                f"`{name}` does not apply: the student writes its own sequences, and the teacher scores them."
            )
    if args.neftune_noise_alpha:
        raise ValueError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} does not apply: text is written without noise, and would be scored with it, as that "
            "of another student."
        )
    for half, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if getattr(args, f"{half}_full_eval"):
            raise ValueError(
                f"{half}_full_eval=True does not apply: for an evaluation outside of `train()`, transformers casts all of the student to {dtype}, and "
                f"leaves it so for what is trained and saved afterwards; within `train()` it does not. To compute in {dtype}, set {half}=True, which "
                f"keeps the weights, or load the student so (`model_init_kwargs={{'dtype': '{dtype}'}}`)."
            )
    if "inputs" in args.include_for_metrics:
        raise ValueError(
            "include_for_metrics=['inputs'] does not apply: the inputs of an evaluation are what the student writes in it. See "
            "`log_completions`."
        )
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` does not apply: lengths are known once the student has "
            "written."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process (DataParallel) are not supported: start one process a GPU with `accelerate "
            "launch`, or show this one a single GPU (CUDA_VISIBLE_DEVICES=0)."
        )
    check_parallelism(args.parallelism_config)
    check_offloading(args)
    check_early_stop(args)
    check_ahead(args)
    if args.rollout_reuse > 1:
        window = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows = None if isinstance(train_dataset, IterableDataset) else len(train_dataset)
        if rows is None or rows < window:
            raise ValueError(
                f"rollout_reuse={args.rollout_reuse} repeats the prompts of an optimizer step, {window} of them, and the "
                f"train dataset has {'no length' if rows is None else rows}: set it to 1, or give it a dataset with as many."
            )
        if rest := rows % window:
            always = "the last ones" if args.train_sampling_strategy == "sequential" else "others in each epoch"
            logger.warning(
                f"rollout_reuse={args.rollout_reuse} repeats the prompts of an optimizer step, {window} of them. The train dataset has {rows} "
                f"rows, so that {rest} are left out of each epoch: {always}."
            )


def check_parallelism(config):
    """Raises `ValueError` for a `ParallelismConfig` that gives several processes one row."""
    sizes = {name: getattr(config, name, 1) for name in ("tp_size", "cp_size", "sp_size")}
    if shared := [f"{name}={size}" for name, size in sizes.items() if size > 1]:
        raise ValueError(
            f"Tensor, context and sequence parallelism are not supported ({', '.join(shared)} in the parallelism_config, or of the student as "
            "it was loaded): each process writes rows of its own, and reads all of their tokens. For a student that is too large for one device, "
            "split its weights with FSDP2 or ZeRO-3 (docs/scaling_out.md)."
        )


def check_offloading(args: TrainingArguments):
    """Raises `ValueError` for activations that are to be offloaded from the CPU."""
    if args.activation_offloading and args.device.type == "cpu":
        raise ValueError(
            "activation_offloading=True moves activations from a GPU to the machine's memory, and this run is on a CPU, where they are in "
            "it: set activation_offloading=False."
        )


def check_adapter(config: PeftConfig, args: CrossTokenizerGKDConfig):
    """Raises `ValueError` for an adapter that cannot be trained, or not with `args`, and warns of one that is trained as another."""
    if config.peft_type == PeftType.ADALORA:
        logger.warning(
            f"ADALORA: PEFT leaves it to the training loop to call `model.base_model.update_and_allocate`, and neither transformers nor TRL nor this trainer "
            f"does. Unless a callback calls it (`on_optimizer_step`), all {config.init_r} ranks of a layer are trained to the end. The term that keeps its "
            "factors orthogonal, which PEFT adds to a model's own loss, is left out (orth_reg_weight). Train a LoRA adapter."
        )
    if config.peft_type == PeftType.ADAPTION_PROMPT:
        raise ValueError(
            "ADAPTION_PROMPT: PEFT wraps the student otherwise for it than for other adapters. Train a LoRA adapter."
        )
    if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE") and args.gradient_checkpointing:
        raise ValueError(
            f"{config.peft_type.value} does not work with gradient checkpointing, which computes each layer again without the prefix: set "
            "gradient_checkpointing=False (it is True unless it is set), or train a LoRA adapter."
        )
    check_prompt_learning(config)


def check_run(
    args: CrossTokenizerGKDConfig,
    accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset | IterableDataset,
    eval_dataset: Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset] | None,
    tools: bool = False,
):
    """Raises `ValueError` for what is known to fail once the run's processes, its student and its data are there. `tools`: whether the
    student's calls are executed."""
    check_strategy(args, accelerator)
    check_same_data(accelerator, train_dataset, eval_dataset)
    check_drop_last(args, accelerator, train_dataset, eval_dataset)
    check_best_metric(args, eval_dataset)
    check_trainable(model)
    check_activated(args, model, train_dataset, tools)
    prepare_quantized(base_model(model), accelerator.autocast)
    check_compiled(model, args, accelerator)
    if args.generation_backend == "transformers_continuous":
        check_continuous(model)
    check_vocabulary("student", base_model(model), tokenizer)
    check_causal("student", model)
    check_padding(model, args)
    warn_of_experts(model)
    warn_of_slow_half(accelerator, model)
    warn_of_turning_positions(args, model, train_dataset)
    check_saves(model, tokenizer, args.output_dir if args.should_save else None)


def warn_of_slow_half(accelerator, model: nn.Module):
    """Warns of a student that is to compute in a half precision for which the CPU has no instructions."""
    said, mixed = slow_weights("student", model), AUTOCAST.get(accelerator.mixed_precision)
    if said:
        logger.warning(f"{said}. Load it with dtype='float32' (model_init_kwargs).")
    elif mixed is not None and accelerator.device.type == "cpu" and not computes_fast(mixed):
        name = accelerator.mixed_precision
        logger.warning(
            f"{name}=True on a CPU without instructions for it: the student computes several times slower than in float32. Set {name}=False."
        )


def learns_as_it_writes(args: CrossTokenizerGKDConfig, model: nn.Module) -> bool:
    """Whether the student, ready to be scored, computes while it learns what it computes while it writes; warns where `disable_dropout` does
    not make it."""
    noisy = args.disable_dropout and draws_noise(model)
    if noisy:
        logger.warning(
            f"The student draws noise while it learns, though disable_dropout={args.disable_dropout}: two passes over one text differ, as with PVeRA, "
            "which samples in its layers. Text is written without noise and scored with it, which its loss averages over. Its rows are not packed."
        )
    return args.disable_dropout and not noisy


def warn_of_turning_positions(args: CrossTokenizerGKDConfig, model: nn.Module, dataset: Dataset | IterableDataset):
    """Warns of a student with longrope of which a rendered `dataset` and `max_new_tokens` allow texts that are encoded in two ways."""
    turns = turning_length(base_model(model).config.get_text_config())
    if turns == math.inf or not isinstance(dataset, Dataset):
        return
    longest = max(map(len, dataset["prompt_ids"]))
    if longest + args.max_new_tokens > turns:
        logger.warning(
            f"The student has longrope, whose positions are encoded otherwise in texts beyond {turns} tokens, and the longest prompt has {longest}, "
            f"its completion up to {args.max_new_tokens}. A text that grows beyond is drawn as a short one and scored as a long one, and so are "
            "those in its micro-batch. Keep both together within it, with shorter prompts or max_new_tokens."
        )


def check_strategy(args: CrossTokenizerGKDConfig, accelerator):
    """Raises `ValueError` for settings that do not work with the run's distributed strategy."""
    check_parallelism(getattr(accelerator, "parallelism_config", None))
    fsdp = accelerator.distributed_type == DistributedType.FSDP
    if fsdp and accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP version {accelerator.state.fsdp_plugin.fsdp_version} flattens weights together, and the LM head's is read apart from "
            "its model: set `fsdp_version: 2` in the Accelerate config, as examples/accelerate_configs/fsdp2.yaml does."
        )
    if accelerator.num_processes > 1 and not args.accelerator_config.even_batches:
        raise ValueError(
            "even_batches=False would give the last batch of an epoch to some processes alone, and the others would wait for "
            "ever: leave it True. The student does not learn from padding rows."
        )
    if accelerator.num_processes > 1 and args.eval_use_gather_object:
        raise ValueError(
            "eval_use_gather_object=True is for predictions that are no tensors, and an evaluation here has losses alone, which transformers could "
            "not join again: leave it out."
        )
    if accelerator.num_processes > 1 and args.ddp_static_graph and args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"ddp_static_graph=True with gradient_accumulation_steps={args.gradient_accumulation_steps}: torch ends such a run with an internal error, "
            "since its first backward passes do not average gradients. Leave ddp_static_graph out."
        )
    sharded = shards_student(accelerator)
    check_pieces(args, sharded)
    if args.gather_for_generation or not sharded:
        return
    if args.generation_backend == "transformers_continuous":
        raise ValueError(
            "generation_backend='transformers_continuous' with gather_for_generation=False would make unlike numbers of "
            "forward passes in its processes, and hang: choose 'transformers', or gather_for_generation=True."
        )
    if args.use_vllm and args.vllm_mode == "colocate":
        raise ValueError(
            "vllm_mode='colocate' with gather_for_generation=False: the engine holds the whole student beside the training, which "
            "is to hold a share alone. Choose vllm_mode='server', on GPUs of its own, or gather_for_generation=True."
        )


def _changed(args: CrossTokenizerGKDConfig, names: Iterable[str]) -> dict:
    """Those of the settings that are not at their defaults."""
    given = {name: getattr(args, name) for name in names}
    return {name: value for name, value in given.items() if value != type(args).__dataclass_fields__[name].default}


def with_loss(args: CrossTokenizerGKDConfig, teacher_model) -> CrossTokenizerGKDConfig:
    """`args` with a loss in the place of "auto": `reverse_kl` where the teacher tells whole distributions, else `dpca`, which has the same
    expected gradient, and more noise."""
    if getattr(args, "distillation_loss", None) != AUTO:
        return args
    others = {field.name for field in fields(LOSSES["reverse_kl"])}
    own = _changed(args, [knob for knob in _KNOBS if knob not in others] + ["reference_teacher", "rollout_reuse"])
    if args.distillation_loss_kwargs and not {*args.distillation_loss_kwargs} <= others:
        own["distillation_loss_kwargs"] = args.distillation_loss_kwargs
    if isinstance(teacher_model, Mapping):
        name, why = "dpca", "teachers are given by name"
    elif is_url(teacher_model) or isinstance(teacher_model, list | tuple):
        name, why = "dpca", "a server tells log-probs of the text alone"
    elif own:
        name, why = "dpca", f"{' and '.join(f'{name}={value!r}' for name, value in own.items())} is set"
    else:
        name, why = "reverse_kl", "the teacher is in this process"
    logger.info(f"distillation_loss={AUTO!r} is {name}: {why}.")
    chosen = copy.copy(args)
    chosen.distillation_loss = name
    return chosen


def distillation_loss(args: CrossTokenizerGKDConfig) -> Callable:
    """
    The loss that `args` name. Raises `ValueError` where it cannot learn from the text that `args.lmbda` gives it, or where
    a setting would have no effect on it.
    """
    name, kwargs = args.distillation_loss, dict(args.distillation_loss_kwargs or {})
    knobs = set() if callable(name) else {field.name for field in fields(LOSSES[name])}
    changed = _changed(args, _KNOBS)
    for knob in _KNOBS:
        value = getattr(args, knob)
        if knob in changed and knob not in knobs:
            able = [other for other, known in LOSSES.items() if knob in {field.name for field in fields(known)}]
            raise ValueError(
                f"{knob}={value!r} has no effect on distillation_loss={loss_name(name)!r}: it is a setting of "
                f"{' and '.join(able)}."
            )
        if knob in changed and kwargs.get(knob, value) != value:
            raise ValueError(
                f"{knob} is {value!r} in the config and {kwargs[knob]!r} in distillation_loss_kwargs: say one."
            )
        if knob in knobs:
            kwargs.setdefault(knob, value)
    loss = build_loss(name, **kwargs)
    for attribute, known in (("signal", ("none", "logprobs", "logits")), ("policy", ("on", "off", "both"))):
        if getattr(loss, attribute, known[0]) not in known:
            raise ValueError(
                f"{loss_name(name)} has {attribute}={getattr(loss, attribute)!r}: choose one of {', '.join(known)}."
            )
    policy = getattr(loss, "policy", "both")
    for knob, off, ability in (
        ("rollout_reuse", 1, "weighs_by_ratio"),
        ("async_rollouts", 0, "weighs_by_importance"),
    ):
        if getattr(args, knob) > off and policy == "on" and not getattr(loss, ability, False):
            able = [other for other, known in LOSSES.items() if getattr(known, ability) or known.policy != "on"]
            raise ValueError(
                f"{knob}={getattr(args, knob)} trains on completions of a student that has been updated since, which "
                f"distillation_loss={loss_name(name)!r} does not account for: set it to {off}, or choose one of {', '.join(able)}."
            )
    for knob in _RATIOS:
        default = type(args).__dataclass_fields__[knob].default
        if (args.rollout_reuse == 1 or args.lmbda == 0) and getattr(loss, knob, default) != default:
            raise ValueError(
                f"{knob}={getattr(loss, knob)} has no effect with rollout_reuse={args.rollout_reuse} and lmbda={args.lmbda}: "
                "it bounds how far a later step goes with completions of the student's own."
            )
    if policy != "on" and args.off_policy_loss_kwargs:
        raise ValueError(
            f"off_policy_loss_kwargs has no effect: distillation_loss={loss_name(name)!r} is right on any text, or on "
            "given text alone, and takes the place of off_policy_loss."
        )
    if policy == "off" and args.lmbda > 0:
        raise ValueError(
            f"{args.distillation_loss!r} learns from text the student did not write, but lmbda={args.lmbda} lets the "
            "student write: set lmbda=0.0."
        )
    return loss


def open_student(model, args: CrossTokenizerGKDConfig, peft_config):
    """The student. If `model` names an adapter, it is loaded with its base and can be trained; a GGUF file (`gguf_file` in
    `model_init_kwargs`) is loaded too. Raises `ValueError` for an adapter that would get a second one by `peft_config`."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if not isinstance(model, str):
        return model
    warn_of_two_checkpoints(model)
    base = None if "gguf_file" in kwargs else adapter_base(model, kwargs.get("revision"))
    given = kwargs.get("quantization_config")
    saved = saved_quantization(base or model, None if base else kwargs.get("revision"))
    if saved is not None and not dequantizes(given):
        _check_decompressed(saved.get("quant_method"))
    if "gguf_file" not in kwargs and base is None and (saved is None or given is None):
        return model
    if base is not None and peft_config is not None:
        raise ValueError(
            f"{model} is an adapter already, and `peft_config` asks for another: leave that out to train it on, or merge it first "
            "(`AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()`)."
        )
    if args.world_size > 1:
        kwargs.setdefault("device_map", None)
    return load_model(model, kwargs, trainable=True)


def _check_decompressed(method: str | None):
    """Raises `ValueError` for a student of compressed-tensors that is not dequantized as it is loaded."""
    if method == "compressed-tensors":
        raise ValueError(
            "The student is quantized with compressed-tensors, whose layers have no weight until the first forward pass, and pass no "
            "gradient where they round what they are given (FP8, W8A8): load it dequantized, "
            "`model_init_kwargs={'quantization_config': {'quant_method': 'compressed-tensors', 'dequantize': True}}`. That takes the "
            "memory that it would take after its first forward pass."
        )


def check_trainable(model: nn.Module):
    """Raises `ValueError` for a student with nothing to train."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        adapter = isinstance(model, PeftModel)
        way = (
            "load the adapter with `is_trainable=True`, as in `PeftModel.from_pretrained(base, folder, is_trainable=True)`"
            if adapter
            else "set `requires_grad_(True)` on what is to be trained, or pass a `peft_config`"
        )
        raise ValueError(
            f"The student has nothing to train: all {sum(1 for _ in model.parameters())} parameters of its {type(model).__name__} "
            f"are frozen. Before the trainer is built, {way}."
        )
    invoked = invocation_of(model)
    if invoked is not None and not isinstance(model, PeftModelForCausalLM):
        raise ValueError(
            f"The student has nothing to train: its adapter begins at {invoked} (alora_invocation_tokens), and PEFT looks for these only "
            f"in a PeftModelForCausalLM, which {type(model).__name__} is not. Set task_type='CAUSAL_LM' in the adapter's configuration."
        )
    if isinstance(model, PeftModel) and (beside := trained_beside(model)):
        logger.warning(
            f"{len(beside)} weights of the base model are trained beside the adapter ({', '.join(beside[:3])}), and no file of the adapter "
            "holds them: `save_model()` leaves them out. Name their modules in the adapter's `modules_to_save`, or freeze them."
        )


def check_activated(
    args: CrossTokenizerGKDConfig, model: nn.Module, dataset: Dataset | IterableDataset, tools: bool = False
):
    """Raises `ValueError` where a student with an activated LoRA would write otherwise than it is scored, and as `check_invoked` does."""
    invocation = invocation_of(model)
    if invocation is None:
        return
    if tools or args.early_stop_tokens is not None:
        asked = "tools" if tools else f"early_stop_tokens={args.early_stop_tokens}"
        raise ValueError(
            f"{asked} with an activated LoRA (alora_invocation_tokens={invocation}): the student goes on with its own text in a further call, in "
            "which the adapter would begin elsewhere than where the whole is scored. Leave one of the two out, or train a plain LoRA."
        )
    if isinstance(dataset, Dataset):
        check_invoked(invocation, dataset)


def check_invoked(invocation: Sequence[int], dataset: Dataset):
    """Raises `ValueError` where no prompt of the rendered `dataset` activates an adapter that begins at `invocation`. Warns where some do not."""
    without = sum(not active_tokens(invocation, prompt) for prompt in dataset["prompt_ids"])
    if without == len(dataset):
        raise ValueError(
            f"The student's adapter would never be on: it begins at {invocation} (alora_invocation_tokens), which none of the {without} prompts "
            "has. Take ids that the chat template writes, such as those of what opens the assistant's turn, encoded with "
            "add_special_tokens=False."
        )
    if without:
        logger.warning(
            f"{without} of {len(dataset)} prompts do not have the ids at which the student's adapter begins ({invocation}, "
            "alora_invocation_tokens): nothing is learned from them."
        )


def check_callbacks(callbacks: Iterable[TrainerCallback]):
    """Raises `ValueError` for callbacks of TRL that write for the prompts of an unrendered dataset."""
    for callback in callbacks:
        if isinstance(callback, LogCompletionsCallback | WeaveCallback):
            raise ValueError(
                f"{type(callback).__name__} reads the text of prompts from the evaluation dataset, of which this trainer keeps their ids: remove it "
                "(`trainer.remove_callback`), and set log_completions=True, which logs what the student writes."
            )


def check_learns(loss: torch.Tensor):
    """Raises `ValueError` where no weight that is to be trained has part in `loss`."""
    if not loss.requires_grad:
        raise ValueError(
            "The loss depends on no weight that is to be trained: what requires a gradient is in no active part of the student. With "
            "several adapters, `model.set_adapter(name)` chooses the one that is trained."
        )


def _by_name(train_dataset, eval_dataset) -> list[tuple[str, str, Dataset | IterableDataset | None]]:
    """Each dataset of the run with its name, and whether it is "train" or "eval". An evaluation's may be named "train" too."""
    evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
    return [("train", "train", train_dataset), *((name, "eval", dataset) for name, dataset in evaluated.items())]


def check_same_data(accelerator, train_dataset, eval_dataset):
    """
    Every process must be given the same dataset, of which it reads its share. Raises `ValueError` where their lengths differ, since
    processes would then wait for each other for ever. Warns where their rows differ.
    """
    if accelerator.num_processes == 1:
        return
    for name, _, dataset in _by_name(train_dataset, eval_dataset):
        found = gather_object([(len(dataset) if isinstance(dataset, Dataset) else -1, dataset_digest(dataset))])
        lengths = [length for length, _ in found]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"The {name} dataset has {', '.join(map(str, lengths))} rows in processes 0 to {len(lengths) - 1}: give every process "
                "the whole dataset, of which each is dealt its own rows."
            )
        if len(set(found)) > 1:
            logger.warning(
                f"The {name} dataset has other rows in some processes than in others. Each process is dealt some of the rows of its "
                "own dataset, so that the others are never read: give every process the whole dataset."
            )


def check_drop_last(args: TrainingArguments, accelerator, train_dataset, eval_dataset):
    """Raises `ValueError` where `dataloader_drop_last` leaves nothing of a dataset. Warns of rows that no evaluation would read."""
    if not args.dataloader_drop_last:
        return
    sharers = 1 if args.accelerator_config.split_batches else accelerator.num_processes
    for name, kind, dataset in _by_name(train_dataset, eval_dataset):
        if not isinstance(dataset, Dataset):
            continue
        rows, batch = len(dataset), getattr(args, f"{kind}_batch_size") * sharers
        if rows < batch:
            raise ValueError(
                f"dataloader_drop_last=True leaves nothing of the {name} dataset: it has {rows} rows, and a batch of all processes {batch}. Set "
                f"dataloader_drop_last=False, or lower per_device_{kind}_batch_size."
            )
        if kind == "eval" and rows % batch:
            logger.warning(
                f"dataloader_drop_last=True: the last {rows % batch} of {rows} rows of the {name} dataset are in no evaluation. Set "
                "dataloader_drop_last=False to read them."
            )


def check_best_metric(args: CrossTokenizerGKDConfig, eval_dataset):
    """Raises `ValueError` for a `metric_for_best_model` that is of none of several evaluation datasets, whose figures begin with their names."""
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == "no" or not isinstance(eval_dataset, Mapping):
        return
    own = metric.removeprefix("eval_")
    if not any(own.startswith(f"{name}_") for name in eval_dataset):
        named = ", ".join(f"{name}_{own}" for name in eval_dataset)
        raise ValueError(
            f"metric_for_best_model={metric!r} is of none of the evaluation datasets ({', '.join(eval_dataset)}): say of which. "
            f"Choose one of: {named}."
        )


def compass(args: CrossTokenizerGKDConfig) -> Compass:
    """
    The loss on the difference of two teachers, which takes the place of dpca. Raises `ValueError` for another loss, and for settings
    of dpca's that have no effect on it.
    """
    if args.distillation_loss != "dpca" or args.distillation_loss_kwargs:
        raise ValueError(
            f"reference_teacher={args.reference_teacher!r} has no effect on distillation_loss={loss_name(args.distillation_loss)!r} with "
            f"distillation_loss_kwargs={args.distillation_loss_kwargs}: it takes the place of dpca's advantages, so leave both at their "
            "defaults."
        )
    for name in ("event", "credit", "baseline", "baseline_top_k"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"{name}={getattr(args, name)!r} has no effect with reference_teacher: the difference of two teachers has one chunk "
                "event, and its shares are reference_teacher_share. Leave it out."
            )
    ratio = {name: getattr(args, name) for name in ("advantage_clip", "clip_ratio_low", "clip_ratio_high")}
    return Compass(alpha=args.reference_teacher_alpha, share=args.reference_teacher_share, **ratio)


def check_compares_completions(loss: Callable, args: CrossTokenizerGKDConfig, given: bool):
    """Raises `ValueError` where `loss` compares the completions of a prompt, and there are none to compare. `given`: on text that the
    student did not write."""
    if not getattr(loss, "compares_completions", False):
        return
    name = loss_name(loss)
    if args.num_generations < 2:
        raise ValueError(
            f"{name} compares the completions of a prompt, and num_generations={args.num_generations} makes one: set it to 2 or more "
            "(4 in the paper)."
        )
    if given and not args.seq_kd:
        raise ValueError(
            f"{name} compares the completions of a prompt, and with lmbda={args.lmbda} the dataset gives one: set seq_kd=True, so that "
            "the teacher writes them."
        )
    if args.length_grouped and args.gradient_accumulation_steps > 1:
        raise ValueError(
            f"{name} compares the completions of a prompt within a micro-batch, and length_grouped=True with "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} deals them out by length: set length_grouped=False."
        )


def losses_by_text(args: CrossTokenizerGKDConfig) -> tuple[Callable, Callable]:
    """`chosen_losses`, checked for what they need of the completions of a prompt."""
    own, given = chosen_losses(args)
    if args.lmbda > 0:
        check_compares_completions(own, args, given=False)
    if args.lmbda < 1:
        check_compares_completions(given, args, given=True)
    return own, given


def chosen_losses(args: CrossTokenizerGKDConfig) -> tuple[Callable, Callable]:
    """
    The loss on the student's own text, and the loss on given text. A cross-entropy beside a loss is for given text only: on the
    student's own it would teach the student whatever it wrote. Raises `ValueError` as `distillation_loss` does.
    """
    loss = distillation_loss(args)
    if args.reference_teacher is not None:
        loss = compass(args)
    if getattr(loss, "policy", "both") == "on":
        return loss, build_loss(args.off_policy_loss, **(args.off_policy_loss_kwargs or {}))
    weight = getattr(loss, "cross_entropy_weight", 0)
    if not weight or args.lmbda == 0 or not is_dataclass(loss):
        return loss, loss
    if args.lmbda == 1:
        raise ValueError(
            f"cross_entropy_weight={weight} has no effect with lmbda={args.lmbda}: it is for given text alone, since on text of "
            "the student's own it would teach whatever it wrote. Set lmbda below 1, or leave the weight out."
        )
    return replace(loss, cross_entropy_weight=0.0), loss


def checked(result) -> tuple[torch.Tensor, Metrics]:
    """`result` of a loss. Raises `TypeError` unless it is (value, metrics)."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise TypeError(
            "A loss returns (value, metrics), with metrics a dict of name: (sum, weight); this one returned a "
            f"{type(result).__name__}."
        )
    return result


def signal_of(loss: Callable) -> str:
    """What `loss` needs of the teacher: "none", "logprobs" (the default) or "logits"."""
    return getattr(loss, "signal", "logprobs")


def check_signal(loss: Callable, signals: Sequence[str]):
    """Raises `ValueError` where `loss` asks for more than a teacher that gives `signals` can."""
    wanted = signal_of(loss)
    if wanted == "logits" and getattr(loss, "likeliest", None) is not None and "likeliest" in signals:
        return
    if wanted != "none" and wanted not in signals:
        able = [name for name, known in LOSSES.items() if known.signal in ("none", *signals)]
        if "likeliest" in signals:
            able += ["reverse_kl with a `top_k`", "dpca with a `baseline_top_k`"]
        raise ValueError(
            f"{loss_name(loss)}{getattr(loss, 'reads_because', '')} needs the teacher's {wanted}, and a teacher behind a server, or one of several, gives "
            f"{', '.join(signal for signal in signals if signal != 'likeliest')} only. Choose one of {', '.join(able)}, or a single teacher in this process."
        )


def check_takes_rewards(loss: Callable):
    """Raises `ValueError` where `loss` would leave rewards out."""
    if not getattr(loss, "takes_rewards", False):
        able = [name for name, known in LOSSES.items() if known.takes_rewards]
        raise ValueError(
            f"reward_funcs are added to the advantages of sampled tokens, and {loss_name(loss)} has none: choose one of "
            f"{', '.join(able)}, or leave reward_funcs out."
        )


def check_losses(losses: Sequence[Callable], model: nn.Module, panel: Panel, vocabulary: Callable[[], VocabularyPair]):
    """
    Builds the tables of the two vocabularies that `losses` read, before any training time is spent. Raises `ValueError` where a
    teacher does not give what a loss needs, or an LM head cannot be read apart from its model.
    """
    for loss in losses:
        check_signal(loss, panel.signals)
        for structure in getattr(loss, "structures", ()):
            getattr(vocabulary(), structure)
    panel.ask_likeliest([loss.likeliest for loss in losses if getattr(loss, "likeliest", None) is not None])
    if any(getattr(loss, "event", "open") == "closed" for loss in losses):
        panel.ask_closings()
    check_head("student", base_model(model))
    panel.check_heads()


def context_length(model, args: CrossTokenizerGKDConfig) -> int | None:
    """
    Longest prompt plus completion in student tokens: `max_length` or the model's own context, whichever is shorter.

    Raises `ValueError` where `max_new_tokens` leaves no room for a prompt in it.
    """
    if isinstance(model, str):
        revision = (args.model_init_kwargs or {}).get("revision")
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
    else:
        config = model.config
    own = context_of(config)
    context = min((limit for limit in (args.max_length, own) if limit is not None), default=None)
    if context is not None and args.max_new_tokens >= context:
        raise ValueError(
            f"max_new_tokens={args.max_new_tokens} leaves no room for a prompt in a context of {context} tokens "
            f"(max_length={args.max_length}, the student's own {own})."
        )
    return context


def balances(model: nn.Module, coefficient: float) -> bool:
    """Whether transformers has a load-balancing loss for the student; warns where it has none."""
    student = base_model(model)
    if not has_imbalance(student):
        logger.warning(
            f"router_aux_loss_coef={coefficient} has no effect: transformers has no load-balancing loss for {type(student).__name__}."
        )
        return False
    return True
