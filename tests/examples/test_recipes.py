"""The recipes, with small models in the place of the large ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SMALL = {
    "model_name_or_path": "small/student",
    "teacher_model_name_or_path": "small/teacher",
    "dataset_name": "small",
    "dataset_config": "default",
    "use_cpu": "true",
    "bf16": "false",
    "max_length": "200",
    "max_new_tokens": "8",
    "max_steps": "1",
    "eval_strategy": "no",
    "report_to": "none",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpu_24gb", "gpu_80gb", "laptop"])
def test_a_recipe_trains_saves_and_says_what_it_did(name, tmp_path):
    made = [sys.executable, str(ROOT / "examples" / "small_models.py"), str(tmp_path / "small")]
    subprocess.run(made, check=True, capture_output=True, timeout=900)
    rows = [json.dumps({"question": f"What is {n} plus {n}?"}) for n in range(64)]
    for left in (tmp_path / "small").glob("*.jsonl"):
        left.unlink()
    (tmp_path / "small" / "train.jsonl").write_text("\n".join(rows))
    command = [sys.executable, str(ROOT / "examples" / "distill.py")]
    command += ["--config", str(ROOT / "examples" / "configs" / f"{name}.yaml")]
    command += [part for option, value in SMALL.items() for part in (f"--{option}", value)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    assert (tmp_path / "distill_output" / "adapter_model.safetensors").exists()
    assert "reverse_kl" in (tmp_path / "distill_output" / "README.md").read_text()
