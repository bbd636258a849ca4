"""Checks of the trainer's arguments, processes and data, before any training time is spent."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset, IterableDataset
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from trl import LogCompletionsCallback, WeaveCallback

from ..config import CrossTokenizerGKDConfig
from ..models.forwards import base_model
from ..models.loading import check_saves, check_vocabulary, warn_of_experts
from ..models.quantized import prepare_quantized
from ..models.sharding import shards_student
from ..models.trials import check_causal
from ..redact import redact
from ..rollouts.ahead import check_ahead
from ..rollouts.compiled import check_compiled
from ..rollouts.early_stop import check_early_stop, check_pieces
from ..rollouts.generation import check_continuous, check_padding, check_virtual_tokens, check_window
from ..rollouts.prompts import check_datasets
from ..teachers.servers import is_url, is_url_without_scheme
from .identity import dataset_digest
from .student import check_activated, check_student, check_trainable, warn_of_slow_half, warn_of_turning_positions


logger = get_logger(__name__)


def check_arguments(model, teacher_model, args, train_dataset, peft_config=None, eval_dataset=None):
    """Raises `TypeError` or `ValueError` for arguments of the trainer that cannot work, or not together."""
    if not isinstance(args, CrossTokenizerGKDConfig):
        raise TypeError(f"`args` must be a CrossTokenizerGKDConfig, got {type(args).__name__}.")
    check_teachers(args, model, teacher_model)
    check_prompts(train_dataset)
    check_datasets(train_dataset, eval_dataset)
    check_student(model, args, peft_config)
    check_settings(args)
    check_parallelism(args.parallelism_config)
    check_offloading(args)
    check_early_stop(args)
    check_ahead(args)
    check_reuse(args, train_dataset)


def check_apart(model, *teachers):
    """Raises `ValueError` where the student is one of its teachers, or shares weights with one."""
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


def check_teachers(args: CrossTokenizerGKDConfig, model, teacher_model):
    """Raises `ValueError` without a teacher, for one that is the student or within it, and for settings that `teacher_model` cannot follow."""
    if teacher_model is None or teacher_model in ({}, []):
        raise ValueError("No teacher: pass `teacher_model`, or set `teacher_model_name_or_path` in the config.")
    teachers = list(teacher_model.values()) if isinstance(teacher_model, Mapping) else [teacher_model]
    check_apart(model, *teachers)
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


def check_prompts(train_dataset: Dataset | IterableDataset | None):
    """Raises `ValueError` for a dataset without rows, or one that TRL would take for pictures."""
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


def check_settings(args: CrossTokenizerGKDConfig):
    """Raises `ValueError` for settings of TRL's and transformers' trainers that do not apply to text which the student writes."""
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


def check_reuse(args: CrossTokenizerGKDConfig, train_dataset: Dataset | IterableDataset):
    """Raises `ValueError` where the dataset has too few rows for `rollout_reuse`. Warns of rows that it leaves out."""
    if args.rollout_reuse == 1:
        return
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
    check_tied(model, accelerator)
    check_activated(args, model, train_dataset, tools)
    prepare_quantized(base_model(model), accelerator.autocast)
    check_compiled(model, args, accelerator)
    if args.generation_backend == "transformers_continuous":
        check_continuous(model)
    check_vocabulary("student", base_model(model), tokenizer)
    check_causal("student", model)
    check_window("student", model)
    check_padding(model, args)
    check_virtual_tokens(model, args, shards_student(accelerator))
    warn_of_experts(model)
    warn_of_slow_half(accelerator, model)
    warn_of_turning_positions(args, model, train_dataset)
    check_saves(model, tokenizer, args.output_dir if args.should_save else None)


def check_tied(model: nn.Module, accelerator):
    """Raises `ValueError` for tied embeddings of which an adapter trains one side, where Accelerate ties both sides again as it shards them: the
    model that is trained would not be the one that is saved (findings/fsdp_ties_what_peft_untied.sh)."""
    if (
        accelerator.distributed_type != DistributedType.FSDP
        or not accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
    ):
        return
    ends = [base_model(model).get_input_embeddings(), base_model(model).get_output_embeddings()]
    if model.config.tie_word_embeddings and any(isinstance(end, AuxiliaryTrainingWrapper) for end in ends):
        raise ValueError(
            "The student's embeddings are tied, and the adapter trains them or the LM head apart (`modules_to_save`, `trainable_token_indices`): FSDP2 "
            "with `fsdp_cpu_ram_efficient_loading: true` would tie them again. Use DDP or ZeRO, or set that to false and "
            "`ensure_weight_tying=True` in the adapter's config."
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


def check_callbacks(callbacks: Iterable[TrainerCallback]):
    """Raises `ValueError` for callbacks of TRL that write for the prompts of an unrendered dataset."""
    for callback in callbacks:
        if isinstance(callback, LogCompletionsCallback | WeaveCallback):
            raise ValueError(
                f"{type(callback).__name__} reads the text of prompts from the evaluation dataset, of which this trainer keeps their ids: remove it "
                "(`trainer.remove_callback`), and set log_completions=True, which logs what the student writes."
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
