"""`ctopd prefer` in this process: a file of pairs, a YAML file, a saved student."""

import json

import pytest
import yaml
from peft import AutoPeftModelForCausalLM
from toys import student_model, student_tokenizer, teacher_model, teacher_tokenizer

from trl_ctopd.cli import main


def settings_in(folder):
    """The models and pairs are in `folder`; so is a config that trains on them."""
    for name, model, tokenizer in (
        ("student", student_model(), student_tokenizer()),
        ("teacher", teacher_model(), teacher_tokenizer()),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {n} plus 1?"}],
            "chosen": [{"role": "assistant", "content": f"{n + 1} is the sum"}],
            "rejected": [{"role": "assistant", "content": f"{n} is what"}],
        }
        for n in range(8)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(folder / "student"),
        "teacher_model_name_or_path": str(folder / "teacher"),
        "positive_teacher": str(folder / "teacher"),
        "negative_teacher": str(folder / "teacher"),
        "dataset_name": str(folder / "pairs.jsonl"),
        "use_peft": True,
        "lora_target_modules": "all-linear",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": str(folder / "output"),
    }


def test_a_file_of_pairs_trains_an_adapter_that_is_saved_with_its_card(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings_in(tmp_path)))
    main(["prefer", "--config", str(config), "--max_steps", "1"])
    output = tmp_path / "output"
    assert AutoPeftModelForCausalLM.from_pretrained(output).active_adapter == "default"
    [state] = output.glob("checkpoint-*/trainer_state.json")
    [log, *_] = json.loads(state.read_text())["log_history"]
    assert log["step"] == 1 and "rewards/margins" in log
    card = (output / "README.md").read_text()
    assert "fine-tuned version of `student`" in card and "trained under the teacher `teacher` with CTPD" in card
    assert "None" not in card and 'model="output"' in card
    assert str(tmp_path) not in card + (output / "checkpoint-1" / "README.md").read_text()


def test_a_run_goes_on_where_its_command_says_true(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**settings_in(tmp_path), "save_steps": 1}))
    main(["prefer", "--config", str(config), "--max_steps", "1"])
    main(["prefer", "--config", str(config), "--max_steps", "2", "--resume_from_checkpoint", "True"])
    state = json.loads((tmp_path / "output" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2]


def test_a_missing_teacher_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(
            ["prefer", "--model_name_or_path", "student", "--use_cpu", "--bf16", "false", "--output_dir", str(tmp_path)]
        )
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("ctopd prefer: error: No teacher: pass `--teacher_model_name_or_path`")
