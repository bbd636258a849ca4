"""The demo on pretrained models, run here on toy ones: what it measures, and that it goes on where it was stopped."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from toys import student_model, student_tokenizer


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from demo_real import problems, run, sandbox
from demo_real.measuring import ratio


ROWS = [
    {
        "task_id": n,
        "text": f"Write a function that adds {n}.",
        "code": f"def add(x):\r\n    return x + {n}",
        "test_list": [f"assert add(1) == {n + 1}", f"assert add(0) == {n}"],
    }
    for n in range(12)
]


@pytest.fixture
def data(tmp_path) -> str:
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ROWS))
    return str(file)


def test_an_answer_is_right_if_its_code_passes_all_tests(data):
    task = problems.load_problems(data)[0]
    right = task.reference[0]["content"]
    assert problems.solves(task, right)
    assert problems.solves(task, f"Sure:\n{task.code}")
    assert not problems.solves(task, right.replace("x +", "x -"))
    assert not problems.solves(task, "I would rather not.")
    assert problems.is_python(right) and not problems.is_python("```python\ndef add(x:\n```")


@pytest.mark.parametrize(
    "source",
    [
        "import socket\nsocket.socket()",
        "open('left_behind', 'w')",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.mkdir('left_behind')",
        "x = bytearray(2 << 30)",
        "import sys\nsys.exit(0)",
        "raise ValueError",
    ],
)
def test_code_that_reaches_out_takes_too_much_or_ends_early_does_not_pass(source):
    assert not sandbox.passes(source)


def test_code_that_never_ends_is_ended(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    assert not sandbox.passes("while True: pass")


def test_code_that_imports_and_reads_what_such_code_needs_passes():
    assert sandbox.passes("import re, math, collections, itertools\nassert math.gcd(4, 6) == 2\nprint('done')")


def test_a_ratios_standard_error_is_that_of_many_draws():
    generator = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        bytes_ = generator.integers(20, 60, 32)
        nats = 0.2 * bytes_ + generator.normal(size=32) * 4
        found.append(ratio(list(zip(nats, bytes_, strict=True))))
    values, errors = np.array(found).T
    assert values.mean() == pytest.approx(0.2, abs=0.01)
    assert errors.mean() == pytest.approx(values.std(), rel=0.15)


def test_it_measures_trains_and_goes_on_where_it_was_stopped(tmp_path, data, monkeypatch, capsys):
    for name, model, tokenizer in (
        ("student", student_model(), student_tokenizer()),
        ("teacher", student_model(seed=1), student_tokenizer()),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    for name, value in {
        "HELD_OUT": 4,
        "SOLVED": 4,
        "GAP_PROMPTS": 4,
        "ANSWER_TOKENS": 4,
        "TOKENS": 4,
        "PROMPTS_PER_STEP": 2,
    }.items():
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "STEPS_BETWEEN_CHECKPOINTS", 1)
    settings = (str(tmp_path / "student"), str(tmp_path / "teacher"), data, tmp_path / "out", run.LOSS, 2, 0)

    step, steps = run.CrossTokenizerGKDTrainer.training_step, []

    def stopped_at_the_second(*args, **kwargs):
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run.CrossTokenizerGKDTrainer, "training_step", stopped_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run.main(*settings)
    first = json.loads((tmp_path / "out" / "measured.json").read_text())
    run.main(*settings)
    second = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert first["gap_before"] == second["gap_before"] and first["before"] == second["before"]
    assert [entry["step"] for entry in second["curve"]] == [1, 2]
    assert second["gap_after"]["standard_error"] > 0
    assert (tmp_path / "out" / "learning_curve.png").stat().st_size > 0
    assert (tmp_path / "out" / "student" / "adapter_model.safetensors").exists()
    assert "student after" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="of another run"):
        run.main(*settings[:-1], 1)
