"""
What `ctopd distill` runs: options in, a trained student out.

Decisions:
- `--dataset_name` is a name on the hub, a local folder, or a local .jsonl, .json, .csv, .parquet or .arrow file, compressed or not (without a test split).
- `--prompt_column` is for rows without `prompt` and `messages`: the text of one column becomes a user message, and messages in it are taken
  as they are. The other columns, which may hold answers, are left out, or kept for rewards and a gate alone.
- `--dtype`, `--load_in_4bit` and `--load_in_8bit` are for the student. The teacher keeps the dtype it was saved in,
  unless `--teacher_model_init_kwargs '{"dtype": "float16"}'` says otherwise.
"""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import Trainer, TrainingArguments
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from ..config import CrossTokenizerGKDConfig
from ..trainer import CrossTokenizerGKDTrainer


_READ_AS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


@dataclass
class DistillArguments(ScriptArguments):
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Text column that becomes the prompt, as one user message, in a dataset with neither `prompt` nor "
            "`messages` (GSM8K: question). The other columns are left out; with rewards or a gate they are kept for these."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards beside the teacher, see docs/rewards.md: `module.function`, or names of reward models. Modules in the "
            "working directory are found too."
        },
    )
    teacher_gate: str | None = field(
        default=None, metadata={"help": "`module.function` that calls completions wrong, see docs/rewards.md."}
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate on only the first so many rows of the test split: at every evaluation the student answers all of them."
        },
    )


def parser(**options) -> TrlParser:
    """The command's options: those of dataset, training and student."""
    return TrlParser((DistillArguments, CrossTokenizerGKDConfig, ModelConfig), **options)


def splits_of(args: ScriptArguments):
    """The dataset that `args` name, with its splits as they are. Raises `ValueError` where it cannot be read, or has no split to
    train on."""
    name, wanted = args.dataset_name, args.dataset_train_split
    if name is None:
        raise ValueError("No dataset: pass `--dataset_name`.")
    path, given, files = Path(name), name, None
    if path.is_file():
        ending = next((own for own in reversed(path.suffixes) if own not in _COMPRESSED), "")
        if ending not in _READ_AS:
            raise ValueError(
                f"--dataset_name {name}: a file must end in {', '.join(_READ_AS)}, or be a name on the hub."
            )
        given, files = _READ_AS[ending], {wanted: str(path)}
    config = None if files else args.dataset_config
    try:
        splits = load_dataset(given, config, data_files=files, streaming=args.dataset_streaming)
    except Exception as error:  # of many classes; of an empty file a StopIteration without text
        cause = error.__cause__ if type(error) is DatasetGenerationError else None
        reason = str(cause or error).rstrip(".") or "it has no rows"
        found = path.exists() or not isinstance(error, OSError)
        why = "" if found else ": there is no such file or folder here, and the hub does not give it"
        raise ValueError(f"--dataset_name {name} cannot be read{why}: {reason}.") from error
    if wanted not in splits:
        raise ValueError(
            f"The dataset has no split {wanted!r} to train on, only {', '.join(splits)}: name one with --dataset_train_split."
        )
    return splits


def load_splits(args: DistillArguments):
    splits = splits_of(args)
    if args.prompt_column is None:
        return splits
    columns = splits[args.dataset_train_split].column_names
    if args.prompt_column not in columns:
        raise ValueError(
            f"--prompt_column {args.prompt_column!r} is not a column of the dataset: {', '.join(columns)}."
        )
    judged = args.reward_funcs or args.teacher_gate

    def with_prompt(row):
        given = row[args.prompt_column]
        return {"prompt": given if isinstance(given, list) else [{"role": "user", "content": given}]}

    return splits.map(
        with_prompt,
        remove_columns=[name for name in columns if name in ("completion", args.prompt_column)] if judged else columns,
    )


def named_function(name: str) -> Callable:
    """The function `module.function`. Raises `ValueError` where there is none."""
    module, _, function = name.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{name!r} is not the name of a function ({error}): write `module.function`, of an installed module or of a file in the "
            "working directory."
        ) from error


def named_reward(name: str) -> Callable | str:
    """A function's `module.function`, or a reward model's name, which has a slash or is a folder."""
    return name if "/" in name or Path(name).is_dir() else named_function(name)


def prepare(
    script_args: DistillArguments, training_args: CrossTokenizerGKDConfig, model_args: ModelConfig
) -> CrossTokenizerGKDTrainer:
    """All that comes before training."""
    set_init_kwargs(training_args, model_args)
    splits = load_splits(script_args)
    return CrossTokenizerGKDTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=splits[script_args.dataset_train_split],
        eval_dataset=evaluated_split(script_args, training_args, splits, script_args.max_eval_samples),
        peft_config=get_peft_config(model_args),
        reward_funcs=[named_reward(name) for name in script_args.reward_funcs or []] or None,
        teacher_gate=named_function(script_args.teacher_gate) if script_args.teacher_gate else None,
    )


def finish(trainer: CrossTokenizerGKDTrainer, script_args: DistillArguments):
    train_and_save(trainer, script_args)
    trainer.end()
    trainer.accelerator.end_training()


def set_init_kwargs(training_args: TrainingArguments, model_args: ModelConfig):
    """Adds to `model_init_kwargs` what the command's options say of how the student is loaded."""
    init_kwargs = {
        "revision": model_args.model_revision,
        "dtype": model_args.dtype,
        "attn_implementation": model_args.attn_implementation,
    }
    quantization = get_quantization_config(model_args)
    if quantization is not None:  # with None, a model that was saved quantized can be read as a plain one
        init_kwargs["quantization_config"] = quantization
    training_args.model_init_kwargs = {**init_kwargs, **(training_args.model_init_kwargs or {})}


def evaluated_split(script_args: ScriptArguments, training_args: TrainingArguments, splits, most: int | None = None):
    """The split to evaluate on, at most `most` rows of it; None where none is asked for. Raises `ValueError` where it is not there."""
    if training_args.eval_strategy == "no":
        return None
    if script_args.dataset_test_split not in splits:
        raise ValueError(
            f"The dataset has no split {script_args.dataset_test_split!r} to evaluate on, only {', '.join(splits)}: pass "
            "--eval_strategy no, or name one with --dataset_test_split."
        )
    evaluated = splits[script_args.dataset_test_split]
    if most is None:
        return evaluated
    if most < 1:
        raise ValueError(
            f"max_eval_samples must be at least 1, got {most}: pass --eval_strategy no to evaluate nothing."
        )
    return evaluated.take(most)


def train_and_save(trainer: Trainer, script_args: ScriptArguments):
    args = trainer.args
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
