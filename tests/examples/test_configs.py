"""The example configurations are read as the command reads them."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from toys import student_model, student_tokenizer, teacher_model, teacher_tokenizer

from trl_ctopd.cli import main
from trl_ctopd.cli.distillation import named_function, parser
from trl_ctopd.cli.pairs import parser as pairs_parser


ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_configuration_names_settings_that_exist(config, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["--config", str(config), "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    pairs = "ctopd prefer" in config.read_text().splitlines()[0]
    script, training, model = (pairs_parser if pairs else parser)().parse_args_and_config(arguments)
    assert script.dataset_name and model.model_name_or_path
    if pairs:
        assert script.teacher_model_name_or_path
        return
    assert training.teacher_model_name_or_path or len(training.teacher_models) > 1
    for name in (*(script.reward_funcs or []), *filter(None, [script.teacher_gate])):
        assert callable(named_function(name))


def test_the_configuration_with_rewards_trains_to_the_end_on_other_models_and_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = {"model_name_or_path": (student_model(), student_tokenizer())}
    given["teacher_model_name_or_path"] = (teacher_model(), teacher_tokenizer())
    options = []
    for option, parts in given.items():
        for part in parts:
            part.save_pretrained(tmp_path / option)
        options += [f"--{option}", str(tmp_path / option)]
    rows = [{"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(8)]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    options += ["--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "output")]
    options += [
        "--use_cpu",
        "true",
        "--bf16",
        "false",
        "--max_new_tokens",
        "8",
        "--max_steps",
        "1",
        "--logging_steps",
        "1",
    ]
    main(["distill", "--config", "examples/configs/rewards.yaml", *options, "--report_to", "none"])
    state = json.loads((tmp_path / "output" / "checkpoint-1" / "trainer_state.json").read_text())
    assert {"rewards/right_number/mean", "reward_std"} <= {*state["log_history"][0]}
    assert (tmp_path / "output" / "model.safetensors").exists()


def test_the_example_reward_knows_a_right_number(monkeypatch):
    monkeypatch.chdir(ROOT)
    reward = named_function("examples.rewards.right_number")
    said = ["So it is 1,200.", "2 apples", "none"]
    completions = [[{"role": "assistant", "content": text}] for text in said]
    assert reward(None, completions, ["a\n#### 1200", "#### 3", "#### 1"]) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["right_number", "examples.nothing.here", "os.nothing_like_it"])
def test_a_function_that_is_not_there_is_told_with_how_to_name_one(name):
    with pytest.raises(ValueError, match=f"'{name}' is not the name of a function.*write `module.function`"):
        named_function(name)
