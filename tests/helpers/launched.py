"""What a launch of several processes must have come to."""

import subprocess
from collections.abc import Sequence
from pathlib import Path


def check_finished(done: subprocess.CompletedProcess, results: Sequence[Path]) -> None:
    """
    `done` ended well, or its processes had written the `results`, which is the last thing that they do, and one of them was aborted while
    Python itself ended. A thread of gloo that still holds a tensor then needs Python's lock (torch 2.13; pytorch/pytorch pull request
    179291), and `destroy_process_group` does not end those threads.
    """
    aborted = "Signal 6 (SIGABRT)" in done.stderr and all(path.exists() for path in results)
    assert done.returncode == 0 or aborted, done.stderr
