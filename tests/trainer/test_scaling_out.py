"""docs/scaling_out.md: what it says to run without a GPU, run one after the other as it stands there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scaling_out.md").read_text()
COMMANDS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)


def test_the_files_that_it_names_are_there():
    for name in re.findall(r"(?:examples|notebooks)/[\w/.]+\.(?:py|yaml|ipynb)", PAGE):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
@pytest.mark.multiprocess
def test_its_commands_without_a_gpu_run_as_they_stand(tmp_path):
    for name in ("examples", "trl_ctopd"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env["PYTHONPATH"] = str(ROOT)
    run = [command for command in COMMANDS if "small" in command]
    assert len(run) == 6
    for command in run:
        done = subprocess.run(
            ["bash", "-euc", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, command + done.stderr[-5000:]
        runs = command.count("examples/distill.py")  # each node says so
        assert done.stdout.count("Saved to small_output.") == runs, command + done.stderr[-5000:]
    states = [json.loads(path.read_text()) for path in tmp_path.glob("small_output/checkpoint-*/trainer_state.json")]
    assert sorted(state["global_step"] for state in states) == [1, 2, 3, 4, 5, 6]
