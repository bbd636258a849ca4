"""What a newcomer runs first: the demo, and the loop without a trainer. Minutes, not seconds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(*command, timeout: int) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "steps, recovered",
    [(["--quick"], 0.5), pytest.param([], 0.85, marks=pytest.mark.slow)],  # two minutes more
    ids=["quick", "full"],
)
def test_the_demo_recovers_the_gap_without_being_shown_an_answer(steps, recovered, tmp_path):
    run(EXAMPLES / "demo" / "run.py", "--seed", 0, "--no-control", *steps, "--output", tmp_path, timeout=3600)
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["teacher_accuracy"] >= 0.9
    assert figures["student_accuracy_before"] < 0.6
    assert figures["gap_recovered"] >= recovered
    assert figures["peak_memory_gigabytes"] < 3
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "student" / "model.safetensors").exists()


@pytest.mark.slow  # over a minute
def test_the_loop_without_a_trainer_closes_the_gap():
    printed = run(EXAMPLES / "minimal_loop.py", timeout=3600)
    gaps = [float(gap) for gap in re.findall(r"gap (\S+) nats/byte", printed)]
    right = [float(share) for share in re.findall(r"([\d.]+)% right; gap", printed)]
    assert gaps[-1] < 0.75 * gaps[0]
    assert right[-1] > right[0]
