"""`ctopd distill` as people run it: a process of its own, a YAML file, options that override it."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import yaml
from peft import AutoPeftModelForCausalLM
from toys import prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer
from transformers import AutoTokenizer

from trl_ctopd import CrossTokenizerGKDConfig
from trl_ctopd.cli import distillation
from trl_ctopd.cli.distill import INHERITED, declared
from trl_ctopd.cli.distillation import DistillArguments, load_splits, parser, splits_of


EXAMPLES = Path(__file__).parents[2] / "examples"


def distill(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, EXAMPLES / "distill.py", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        capture_output=True,
        check=False,
        text=True,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a LoRA run: `config.yaml`, the models, and what the script left in `output`."""
    folder = tmp_path_factory.mktemp("distill")
    for name, model, tokenizer in (
        ("student", student_model(), student_tokenizer()),
        ("teacher", teacher_model(), teacher_tokenizer()),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    data = folder / "data"
    data.mkdir()
    for split, rows in (("train", prompts(8)), ("test", prompts(2))):
        lines = [{"question": row["prompt"][0]["content"], "answer": row["completion"][0]["content"]} for row in rows]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {
        "model_name_or_path": str(folder / "student"),
        "teacher_model_name_or_path": str(folder / "teacher"),
        "dataset_name": str(data),
        "prompt_column": "question",
        "use_peft": True,
        "lora_r": 4,
        "lora_target_modules": "all-linear",
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_new_tokens": 8,
        "max_steps": 50,
        "learning_rate": 1.0e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "disable_tqdm": True,
        "output_dir": str(folder / "output"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    done = distill("--config", folder / "config.yaml", "--max_steps", 2)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_from_yaml_leaves_an_adapter_that_loads_and_learned(run):
    model = AutoPeftModelForCausalLM.from_pretrained(run / "output")
    assert model.peft_config["default"].r == 4
    assert any(value.abs().sum() > 0 for name, value in model.named_parameters() if "lora_B" in name)
    assert AutoTokenizer.from_pretrained(run / "output").chat_template == student_tokenizer().chat_template


def test_the_command_line_wins_over_the_yaml_file(run):
    [state] = (run / "output").glob("checkpoint-*/trainer_state.json")
    history = json.loads(state.read_text())["log_history"]
    assert state.parent.name == "checkpoint-2"  # max_steps is 50 in the file
    assert {"gap/nats_per_byte", "eval_gap/nats_per_byte"} <= {name for entry in history for name in entry}


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.json", "."])
def test_a_local_file_or_folder_is_a_dataset(name, tmp_path):
    file = tmp_path / (name if name != "." else "train.jsonl")
    (prompts(3).to_parquet if name == "rows.parquet" else prompts(3).to_json)(file)
    splits = load_splits(DistillArguments(dataset_name=str(tmp_path / name)))
    assert splits["train"]["prompt"][:] == prompts(3)["prompt"][:]


def test_a_prompt_column_leaves_no_answer_in_the_dataset(run):
    splits = load_splits(DistillArguments(dataset_name=str(run / "data"), prompt_column="question"))
    assert splits.column_names == {"train": ["prompt"], "test": ["prompt"]}
    assert splits["train"]["prompt"][:] == prompts(8)["prompt"][:]


def test_a_prompt_column_of_messages_is_taken_as_it_is(tmp_path):
    prompts(3).rename_column("prompt", "asked").to_json(tmp_path / "rows.jsonl")
    splits = load_splits(DistillArguments(dataset_name=str(tmp_path / "rows.jsonl"), prompt_column="asked"))
    assert splits["train"]["prompt"][:] == prompts(3)["prompt"][:]


def test_a_compressed_file_is_read_and_one_of_another_kind_is_refused(tmp_path):
    rows = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts(3)["prompt"])
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    splits = load_splits(DistillArguments(dataset_name=str(tmp_path / "rows.jsonl.gz")))
    assert splits["train"]["prompt"][:] == prompts(3)["prompt"][:]
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(ValueError, match="must end in .jsonl, .json, .parquet, .csv, .arrow"):
        load_splits(DistillArguments(dataset_name=str(tmp_path / "rows.xlsx")))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nope.jsonl", None, "cannot be read: there is no such file or folder here"),
        ("no/such/folder", None, "cannot be read: there is no such file or folder here"),
        ("rows.jsonl", "", "cannot be read: it has no rows"),
        ("rows.jsonl", '{"prompt":', "cannot be read: JSON parse error"),
        ("rows.csv", "", "cannot be read: No columns to parse"),
    ],
)
def test_a_dataset_that_is_not_there_or_cannot_be_read_is_named_with_the_reason(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"--dataset_name .*{name} {message}"):
        splits_of(DistillArguments(dataset_name=str(tmp_path / name)))


def test_a_split_that_is_not_there_is_told_with_those_that_are(run):
    with pytest.raises(ValueError, match="no split 'tran' to train on, only train, test: .*--dataset_train_split"):
        splits_of(DistillArguments(dataset_name=str(run / "data"), dataset_train_split="tran"))


@pytest.mark.parametrize(
    ("strategy", "split", "most", "evaluated"),
    [
        ("steps", "test", 1, 1),
        ("steps", "train", 3, 3),
        ("steps", "test", 500, 2),
        ("no", "train", 3, None),
    ],
)
def test_a_cap_on_the_evaluation_leaves_all_rows_to_train_on(run, monkeypatch, strategy, split, most, evaluated):
    trainer = MagicMock()
    monkeypatch.setattr(distillation, "CrossTokenizerGKDTrainer", trainer)
    options = ["--eval_strategy", strategy, "--dataset_test_split", split, "--max_eval_samples", str(most)]
    script_args, *rest = parser().parse_args_and_config(["--config", str(run / "config.yaml"), *options])
    distillation.finish(distillation.prepare(script_args, *rest), script_args)
    given = trainer.call_args.kwargs
    assert len(given["train_dataset"]) == 8
    assert (given["eval_dataset"] and len(given["eval_dataset"])) == evaluated


def test_mistakes_of_values_and_data_are_one_line(tmp_path):
    for arguments, message in [
        (["--dataset_name", tmp_path / "none.jsonl", "--use_cpu"], "none.jsonl cannot be read"),
        (["--temperature", "0", "--use_cpu"], "temperature must be finite and positive, got 0.0"),
    ]:
        found = distill("--output_dir", tmp_path / "out", *arguments)
        assert found.returncode == 2 and "Traceback" not in found.stderr
        assert found.stderr.splitlines()[-1].startswith("ctopd distill: error: ") and message in found.stderr
    assert not (tmp_path / "out").exists()


def test_a_cap_that_leaves_nothing_to_evaluate_on_is_refused(run):
    options = ["--config", str(run / "config.yaml"), "--max_eval_samples", "0"]
    with pytest.raises(ValueError, match="max_eval_samples must be at least 1, got 0"):
        distillation.prepare(*parser().parse_args_and_config(options))


@pytest.fixture(scope="module")
def help_text() -> str:
    done = distill("--help")
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


def test_help_explains_every_field_of_the_config(help_text):
    fields = CrossTokenizerGKDConfig.__dataclass_fields__
    for name in CrossTokenizerGKDConfig.__annotations__:
        if name != "_VALID_DICT_FIELDS":
            assert f"--{name}" in help_text
            explained = " ".join(fields[name].metadata["help"].split()).replace("%%", "%")
            assert explained.replace("- ", "-") in help_text.replace(
                "- ", "-"
            )  # argparse breaks lines after hyphens too
    assert "--prompt_column" in help_text


def test_help_names_only_options_that_there_are_and_their_own_defaults():
    actions = {action.dest: action for action in parser()._actions}
    assert {*INHERITED} <= {*actions}
    own = {name: default for name, default, _ in declared("config.py", "CrossTokenizerGKDConfig")}
    assert not {*own} & {*INHERITED}
    for name in ("learning_rate", "lmbda", "credit", "distillation_loss", "report"):
        assert own[name] == repr(actions[name].default)


def test_help_all_lists_every_option():
    done = distill("--help-all")
    assert done.returncode == 0, done.stderr
    assert all(option in done.stdout for action in parser()._actions for option in action.option_strings)


def test_the_example_yaml_is_read_whole(tmp_path):
    path = EXAMPLES / "configs" / "distill_lora.yaml"
    parsed = parser().parse_args_and_config(
        ["--config", str(path), "--output_dir", str(tmp_path)]
    )  # unknown keys raise
    for name, value in yaml.safe_load(path.read_text()).items():
        if name != "output_dir":
            [found] = [getattr(part, name) for part in parsed if hasattr(part, name)]
            assert found == value, name
