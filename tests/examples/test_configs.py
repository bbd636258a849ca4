"""The example configurations are read as the command reads them."""

from pathlib import Path

import pytest

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
