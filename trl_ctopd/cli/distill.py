"""
Distil a student from a teacher with another tokenizer.

One GPU, LoRA:

    ctopd distill \\
        --model_name_or_path meta-llama/Llama-3.2-1B-Instruct \\
        --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct \\
        --dataset_name openai/gsm8k --dataset_config main --prompt_column question \\
        --dtype bfloat16 --use_peft --lora_r 32 --lora_target_modules all-linear --learning_rate 2e-4 \\
        --per_device_train_batch_size 8 --gradient_accumulation_steps 8 --max_new_tokens 512 \\
        --max_steps 200 --logging_steps 5 --output_dir distill_output

From a file of settings, which options on the command line override; on four GPUs:

    ctopd distill --config settings.yaml --max_steps 100
    accelerate launch --num_processes 4 -m trl_ctopd.cli distill --config settings.yaml

A teacher behind a vLLM server instead of one in this process:

    ctopd distill ... --teacher_server_url http://host:port --teacher_model_name_or_path Qwen/Qwen2.5-72B-Instruct
"""

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.resources import files


# Of some 250 options of TRL and Transformers, those that most runs set.
INHERITED = {
    "model_name_or_path": "student: a folder or a name on the hub",
    "dtype": "of the student's weights: bfloat16, float16, float32. The teacher keeps the one it was saved in, unless "
    '--teacher_model_init_kwargs \'{"dtype": "float16"}\' says otherwise',
    "dataset_name": "a name on the hub, a folder, or a .jsonl, .json or .parquet file (which has no test split)",
    "dataset_config": "configuration of a dataset on the hub",
    "dataset_train_split": "split to train on",
    "dataset_test_split": "split to evaluate on, with --eval_strategy",
    "output_dir": "where the model, its card and the checkpoints go",
    "use_peft": "train a LoRA adapter",
    "lora_r": "its rank",
    "lora_target_modules": "modules that get an adapter; all-linear: every linear layer",
    "load_in_4bit": "load the student in 4 bits, with --use_peft",
    "per_device_train_batch_size": "prompts in a micro-batch of one process",
    "gradient_accumulation_steps": "micro-batches in an optimizer step",
    "num_train_epochs": "passes over the dataset",
    "max_steps": "optimizer steps, instead of epochs",
    "bf16": "compute in bfloat16; on by default",
    "gradient_checkpointing": "save memory by computing activations twice; on by default",
    "use_cpu": "train without a GPU",
    "eval_strategy": "no, steps or epoch",
    "logging_steps": "optimizer steps between two logs",
    "save_steps": "optimizer steps between two checkpoints",
    "report_to": "tensorboard, wandb, trackio, none",
    "push_to_hub": "upload the model and its card at the end",
    "resume_from_checkpoint": "True: resume from the newest complete checkpoint in output_dir",
    "seed": "random seed",
}


def main(arguments: Sequence[str] | None = None) -> None:
    own = ("cli/distillation.py", "DistillArguments"), ("config.py", "CrossTokenizerGKDConfig")
    run("ctopd distill", __doc__, own, "distillation", arguments)


def run(
    prog: str, about: str, own: Sequence[tuple[str, str]], module: str, arguments: Sequence[str] | None = None
) -> None:
    """A command of which `module`, beside this one, has `parser`, `prepare` and `finish`. For `--help` it is not imported."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if {"-h", "--help"} & {*arguments}:
        short_help(prog, about, own).print_help()
        return
    command = import_module(f".{module}", __package__)
    parser = command.parser(prog=prog)
    if "--help-all" in arguments:
        parser.print_help()
        return
    try:  # mistakes of values and data are one line; what fails in training keeps its traceback
        script_args, *rest = parser.parse_args_and_config(arguments)
        trainer = command.prepare(script_args, *rest)
    except (ValueError, TypeError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    command.finish(trainer, script_args)


def short_help(prog: str, about: str, own: Sequence[tuple[str, str]]) -> argparse.ArgumentParser:
    """A parser that only prints help, with the options of the dataclasses `own` (file and name). The real one gets its options from
    TRL, whose import takes ten seconds."""
    shown = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--OPTION VALUE ...]",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shown.add_argument("--config", metavar="FILE.yaml", help="options from a file; those on the command line win")
    shown.add_argument("--help-all", action="store_true", help="show every option, those of TRL and Transformers too")
    group = shown.add_argument_group("most used options of TRL and Transformers")
    for name, text in INHERITED.items():
        group.add_argument(f"--{name}", metavar="", help=text)
    group = shown.add_argument_group("options of trl_ctopd")
    for file, of in own:
        for name, default, text in declared(file, of):
            group.add_argument(f"--{name}", metavar="", help=f"{text} (default: {default})")
    return shown


def declared(file: str, class_name: str) -> Iterator[tuple[str, str, str]]:
    """Name, default and help of each field that a dataclass in one of this package's files declares. Read from its source,
    since importing the class would load torch and TRL."""
    [found] = [node for node in _source(file) if isinstance(node, ast.ClassDef) and node.name == class_name]
    for node in found.body:
        if isinstance(node, ast.AnnAssign):
            given = {keyword.arg: keyword.value for keyword in node.value.keywords}
            default = given["default"] if "default" in given else given["default_factory"]
            [text] = given["metadata"].values  # under the key "help"
            yield node.target.id, ast.unparse(default).replace("%", "%%"), _text(text)


def _source(file: str) -> list[ast.stmt]:
    return ast.parse(files("trl_ctopd").joinpath(file).read_text(encoding="utf-8")).body


def _text(node: ast.expr) -> str:
    """The help text. Of all that it may compute, only the list of losses is supported."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    assert isinstance(node, ast.FormattedValue) and ast.unparse(node.value) == "', '.join(LOSSES)", ast.unparse(node)
    [losses] = [n.value for n in _source("losses/__init__.py") if ast.unparse(n).startswith("LOSSES: ")]
    return ", ".join(key.value for key in losses.keys)
