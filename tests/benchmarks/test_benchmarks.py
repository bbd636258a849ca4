"""The speed benchmarks still run, in little, the GPU's way through them too; what they find is in benchmarks/results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


def run(assets: Path, output: Path, module: str, *options: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.speed.{module}", "--quick", *options, "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "CTOPD_ASSETS": str(assets), "HF_HOME": str(output.parent / "cache")},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert output.with_suffix(".png").stat().st_size > 10_000
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    "options",
    [pytest.param(options, marks=pytest.mark.slow) for options in ((), ("--gpu",))],
    ids=["on the CPU", "as on a GPU"],
)
def test_a_step_beside_golds_and_the_floor(assets, tmp_path, options):
    report = run(assets, tmp_path / "step.json", "step", *options)
    for result in report["results"].values():
        assert result["ratios"]["gold over ours"]["median"] > 0
        assert result["ratios"]["ours over floor"]["median"] > 0
        assert ("ours, not compiled over ours" in result["ratios"]) == ("--gpu" in options)
        assert {"generation", "alignment", "teacher", "student", "loss"} <= set(result["sides"]["ours"]["phases"])


@pytest.mark.slow
def test_the_growth_of_a_step(assets, tmp_path):
    report = run(assets, tmp_path / "scaling.json", "scaling")
    for result in report["results"].values():
        assert {"total", "generation", "student"} <= set(result["ours"]["exponents"])


@pytest.mark.slow
@pytest.mark.parametrize(("script", "sides"), [("ahead", "ahead over due"), ("overlap", "beside over in turn")])
def test_a_run_with_a_second_thread_beside_one_without(assets, tmp_path, script, sides):
    output = tmp_path / "threads.json"
    little = ("--rounds", "1", "--steps", "2", "--tokens", "4")
    command = [sys.executable, "-m", f"benchmarks.speed.{script}", *little, "--output", str(output)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CTOPD_ASSETS": str(assets)}, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for result in json.loads(output.read_text())["results"].values():
        assert result[f"{sides}, wall"]["median"] > 0
        assert result[f"{sides}, main thread"]["median"] > 0
