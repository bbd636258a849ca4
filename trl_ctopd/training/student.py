"""The student before it is trained: opened from its name, and checked."""

import math
from collections.abc import Sequence

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, PeftType
from torch import nn
from transformers import AutoConfig, TrainingArguments
from trl.trainer.utils import get_config_model_id

from ..config import CrossTokenizerGKDConfig
from ..models.activated import active_tokens, invocation_of
from ..models.forwards import base_model, forget_preparation
from ..models.heads import AUTOCAST, context_of, has_imbalance
from ..models.loading import (
    adapter_base,
    check_goes_on,
    computes_fast,
    forget_gguf,
    load_model,
    slow_weights,
    warn_of_two_checkpoints,
)
from ..models.packing import turning_length
from ..models.quantized import dequantizes, saved_quantization
from ..models.reference import trained_beside
from ..models.trials import draws_noise
from ..rollouts.cache import CACHED_PROMPTS
from ..rollouts.generation import check_prompt_learning


logger = get_logger(__name__)


def name_of_student(model) -> str:
    """Hub name or folder of the student, a model or the name of one. Raises `ValueError` where there is none."""
    if model is None or model == "":
        raise ValueError(
            "No student: pass `model`, or `--model_name_or_path` on the command line or in its file of settings."
        )
    return model if isinstance(model, str) else get_config_model_id(model.config)


def check_new_adapter(model, peft_config: PeftConfig | None):
    """Raises `TypeError` for what is no adapter's config, and `ValueError` for a new adapter on a model into which transformers has loaded
    one: PEFT would begin that anew, and say that there are two (findings/a_new_adapter_begins_the_old_one_anew.sh)."""
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        way = "LoraConfig(**peft_config)" if isinstance(peft_config, dict) else "LoraConfig(...)"
        raise TypeError(
            f"`peft_config` must be a PeftConfig, got {type(peft_config).__name__}: pass `{way}`, or another class of PEFT's."
        )
    if peft_config is not None and getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"The student is a {type(model).__name__} into which transformers has loaded an adapter, and `peft_config` asks for another, which would "
            "take its place: what it has learned would be lost. Pass the adapter's folder or name as the student, without `peft_config`, to train it "
            "on; or merge it first (`AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()`)."
        )


def check_student(model, args: CrossTokenizerGKDConfig, peft_config: PeftConfig | None):
    """Raises `ValueError` for a student, a model or the name of one, whose quantized weights or whose adapter cannot be trained."""
    check_new_adapter(model, peft_config)
    check_goes_on("student", model, (args.model_init_kwargs or {}).get("revision"))
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


def open_student(model, args: CrossTokenizerGKDConfig, peft_config):
    """The student. If `model` names an adapter, it is loaded with its base and can be trained; a GGUF file (`gguf_file` in
    `model_init_kwargs`) is loaded too. Raises `ValueError` for an adapter that would get a second one by `peft_config`."""
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if not isinstance(model, str):
        forget_preparation(model)
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


def check_adapter(config: PeftConfig, args: CrossTokenizerGKDConfig):
    """Raises `ValueError` for an adapter that cannot be trained, or not with `args`, and warns of one that is trained as another."""
    if config.peft_type == PeftType.ADALORA:
        logger.warning(
            f"ADALORA: PEFT leaves it to the training loop to call `model.base_model.update_and_allocate`, and neither transformers nor TRL nor this trainer "
            f"does. Unless a callback calls it (`on_optimizer_step`), all {config.init_r} ranks of a layer are trained to the end. The term that keeps its "
            "factors orthogonal, which PEFT adds to a model's own loss, is left out (orth_reg_weight). Train a LoRA adapter."
        )
    if (drawn := str(getattr(config, "init_lora_weights", ""))).startswith("pissa_niter"):
        logger.warning(
            f"init_lora_weights={drawn!r}: where a saved adapter is loaded, PEFT draws again what it took out of the base weights, so that the "
            "student is another model unless the same seed was set (findings/a_saved_pissa_is_another_model.sh). 'pissa' draws nothing."
        )
    if config.peft_type == PeftType.ADAPTION_PROMPT:
        raise ValueError(
            "ADAPTION_PROMPT: PEFT wraps the student otherwise for it than for other adapters. Train a LoRA adapter."
        )
    if config.peft_type in CACHED_PROMPTS and args.gradient_checkpointing:
        raise ValueError(
            f"{config.peft_type.value} does not work with gradient checkpointing, which computes each layer again without the prefix: set "
            "gradient_checkpointing=False (it is True unless it is set), or train a LoRA adapter."
        )
    check_prompt_learning(config)


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


def warn_of_default_rate(args: TrainingArguments, model: nn.Module, optimizer, usual: str):
    """Warns of an adapter that is trained with the default learning rate, which is for whole weights. `optimizer`: the user's own, which has
    its own rate; `usual`: what an adapter takes."""
    default = type(args).__dataclass_fields__["learning_rate"].default
    adapted = isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)
    if adapted and optimizer is None and args.learning_rate == default:
        logger.warning(
            f"learning_rate={default:g}, the default, is for whole weights: an adapter learns next to nothing with it. Set learning_rate to {usual}."
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


def balances(args: CrossTokenizerGKDConfig, model: nn.Module, coefficient: float) -> bool:
    """Whether the student's load can be balanced; warns where transformers has no loss for it, or one without a gradient."""
    student = base_model(model)
    if not has_imbalance(student):
        logger.warning(
            f"router_aux_loss_coef={coefficient} has no effect: transformers has no load-balancing loss for {type(student).__name__}."
        )
        return False
    if args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        logger.warning(
            f"router_aux_loss_coef={coefficient} has no effect: with gradient_checkpointing_kwargs={{'use_reentrant': True}}, transformers notes the "
            "router's logits in a forward pass without gradients. Set use_reentrant to False. With an adapter under ZeRO-3, TRL sets it to True: set "
            "gradient_checkpointing=False there."
        )
        return False
    return True
