"""Two real processes on the CPU (gloo)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_run import REUSED, run


pytestmark = pytest.mark.multiprocess


def two_processes(folder: Path, mode: str, loss: str) -> list[dict]:
    script = Path(__file__).parent / "distributed_run.py"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            script,
            folder,
            mode,
            loss,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [torch.load(folder / f"{mode}-{rank}.pt", weights_only=False) for rank in (0, 1)]
    for result in results:
        assert (result["num_processes"], result["distributed_type"]) == (2, "DistributedType.MULTI_CPU")
        assert result["wrapper"] == "DistributedDataParallel"
    return results


@pytest.mark.parametrize("loss", ["dpca", "bpm"])
def test_two_processes_take_the_step_of_one(tmp_path, monkeypatch, loss):
    monkeypatch.setattr("trl_ctopd.trainer.CACHE_DIR", tmp_path / "cache")
    first, second = two_processes(tmp_path, "fixed", loss)
    alone = run(str(tmp_path), batch=8, distillation_loss=loss)
    assert alone["step"].abs().max() > 1e-3
    assert 0 < alone["log"]["alignment/teacher_context_exceeded_fraction"] < 1
    torch.testing.assert_close(first["step"], second["step"], rtol=0, atol=0)
    torch.testing.assert_close(first["step"], alone["step"], rtol=1e-5, atol=1e-6)
    for name, value in alone["log"].items():
        if not name.startswith(("seconds/", "compute_overhead")):
            assert first["log"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_two_processes_use_their_completions_again_as_one_does(tmp_path):
    first, second = two_processes(tmp_path, "reused", "dpca")
    alone = run(str(tmp_path), batch=4, gradient_accumulation_steps=2, **REUSED)
    assert alone["step"].abs().max() > 1e-3
    torch.testing.assert_close(first["step"], second["step"], rtol=0, atol=0)
    torch.testing.assert_close(first["step"], alone["step"], rtol=1e-4, atol=1e-5)


def test_two_processes_write_score_mix_and_evaluate(tmp_path):
    first, second = two_processes(tmp_path, "written", "dpca")
    torch.testing.assert_close(first["step"], second["step"], rtol=0, atol=0)
    assert first["log"] == second["log"], "every figure is one figure over both"
    assert first["eval"]["eval_gap/nats_per_byte"] == second["eval"]["eval_gap/nats_per_byte"]
