"""Preference pairs and rewards on two processes beside one process with the same batch."""

import json
import math
import subprocess
import sys
from pathlib import Path

import neighbours_run
import pytest
from launched import check_finished


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs" / "cpu"


def launched(folder: Path, strategy: str, cases: list[str]) -> dict:
    """What two processes have found."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
            *("--config_file", CONFIGS / f"{strategy}.yaml", CONFIGS / "on_cpu.py"),
            *(Path(neighbours_run.__file__), folder, *cases),
        ],
        capture_output=True,
        text=True,
        timeout=900,
    )
    check_finished(done, [folder / "found-2.json"])
    return json.loads((folder / "found-2.json").read_text())


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "kind", "cases"),
    [("ddp", "MULTI_CPU", ["preference", "rewards"]), ("zero3", "DEEPSPEED", ["preference"])],
)
def test_two_processes_learn_from_pairs_and_rewards_what_one_learns(tmp_path, strategy, kind, cases):
    """From saved models: under ZeRO-3, one that is made from a config draws other weights than in one process."""
    neighbours_run.save_models(tmp_path)
    found = launched(tmp_path, strategy, cases)
    expected = neighbours_run.run(tmp_path, 1, cases)
    assert found["type"] == f"DistributedType.{kind}"
    for case in cases:
        assert len(found[case]) == len(expected[case]) == 2
        for ours, alone in zip(found[case], expected[case], strict=True):
            assert set(alone) <= set(ours)
            for name, value in alone.items():
                assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (case, name)
        assert expected[case][0]["loss"] != expected[case][1]["loss"], "something was learned"


@pytest.mark.multiprocess
@pytest.mark.slow
def test_pairs_of_a_sharded_student_in_half_precision_are_scored_in_float32(tmp_path):
    """Accelerate has FSDP2 round log-probs to bfloat16: a sum of 150 nats to whole nats, and this loss to 0.62."""
    neighbours_run.save_models(tmp_path)
    found = launched(tmp_path, "fsdp2", ["preference-of-itself"])
    assert found["type"] == "DistributedType.FSDP"
    assert found["preference-of-itself"][0]["loss"] == pytest.approx(math.log(2), abs=0.03)
