"""Completions by a real vLLM beside the training, through TRL's `VLLMGeneration`, on the CPU and in vLLM's own environment,
which CTOPD_VLLM names (the `vllm` program in it); skipped without."""

import json
import os
import subprocess
from pathlib import Path

import needs
import pytest
import trl


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_engine_writes_with_the_weights_of_the_step(tmp_path, kind):
    program, processor = needs.vllm(), Path("/proc/cpuinfo")
    if processor.exists() and "amx_tile" in processor.read_text():
        pytest.skip("on a processor with AMX vLLM's CPU build packs its weights, and cannot take those of the step")
    tests = Path(__file__).parents[1]
    settings = {
        "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests / "helpers"))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    site_packages = Path(trl.__file__).parents[1]
    done = subprocess.run(
        [Path(program).with_name("python"), tests / "helpers" / "vllm_colocate_run.py", site_packages, tmp_path, kind],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["log"]) == 3 and all(found["lengths"])
    for entry in found["log"]:
        assert entry["sampling/log_prob_difference"] < 0.05, "bf16 there, float32 here"
        assert abs(entry["sampling/importance_ratio"] - 1) < 0.05
    assert found["from_the_student_now"] < 0.05
    assert found["from_the_student_at_the_start"] > 0.25, "there was something to hand over"
