"""One process of two is killed, interrupted or fails, or hangs: the run ends with an error that says which, and does not wait for ever.
(test_resume.py has the killed rank that every test run looks at.)"""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.faults import ranks


pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]
CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs" / "cpu"
HELPERS = Path(__file__).parents[1] / "helpers"
SECONDS = 30  # that the others wait for one that hangs


def launch(config: str, folder: Path, by: str, *options: str, patience: int = 600) -> subprocess.Popen:
    return subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--config_file",
                CONFIGS / f"{config}.yaml",
                *options,
            ),
            *(HELPERS / "resume_run.py", folder, by, str(patience)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def root_cause(said: str) -> str:
    """What the launcher's summary gives as the first failure."""
    return said[said.index("Root Cause (first observed failure)") :]


def test_a_killed_rank_ends_the_run_and_is_named(tmp_path):
    run = launch("ddp", tmp_path, "SIGKILL", "--main_process_port", "0")
    said, _ = run.communicate(timeout=900)
    assert run.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in root_cause(said)
    assert "Signal 9 (SIGKILL)" in root_cause(said)


def test_a_rank_that_hangs_ends_the_run_when_the_others_have_waited_long_enough(tmp_path):
    run = launch("ddp", tmp_path, "SIGSTOP", "--main_process_port", "0", patience=SECONDS)
    said, _ = run.communicate(timeout=900)
    assert run.returncode != 0
    assert "[rank0]: RuntimeError: " in said and f"Timed out waiting {SECONDS}000ms" in said
    assert "Unable to shutdown process" in said, "the launcher ends what cannot end itself"


def test_a_rank_killed_on_one_node_ends_the_other_node_too(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [
        launch("ddp_two_nodes", tmp_path, "SIGKILL", "--machine_rank", str(rank), "--main_process_port", port)
        for rank in (0, 1)
    ]
    first, second = (node.communicate(timeout=900)[0] for node in nodes)
    assert all(node.returncode not in (0, None) for node in nodes)
    assert "rank      : 1 (local_rank: 0)" in root_cause(second) and "Signal 9 (SIGKILL)" in root_cause(second)
    assert "rank      : 0 (local_rank: 0)" in root_cause(first) and "Connection" in first


@pytest.mark.parametrize("name", [name for name, case in ranks.CASES.items() if case.hangs_for])
def test_ctrl_c_or_an_error_ends_every_rank_while_a_server_hangs(tmp_path, name):
    found = ranks.run(name, tmp_path, limit=900)  # the servers would be silent for an hour
    assert found["ended"] and found["code"] != 0, (tmp_path / "output.txt").read_text()
    assert found["says"], (tmp_path / "output.txt").read_text()


@pytest.mark.parametrize("name", [name for name, case in ranks.CASES.items() if case.rows])
def test_ranks_whose_data_differ_where_they_may_not_end_with_the_cause(tmp_path, name):
    found = ranks.run(name, tmp_path, limit=900)
    assert found["ended"] and found["code"] != 0, (tmp_path / "output.txt").read_text()
    assert found["says"], (tmp_path / "output.txt").read_text()
