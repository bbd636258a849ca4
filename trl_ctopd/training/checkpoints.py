"""Checkpoints of a run that may be killed at any moment: which are whole, and from which one it goes on.

Decisions: Trainer writes `trainer_state.json` after all else of a checkpoint, and deletes older checkpoints after that. So a
checkpoint is whole where this file is and can be read, if two things are seen to, which the trainer does when it saves: every
process has written its part by then, and nothing is left in the folder from a run before. Nodes may have disks of their own
(`save_on_each_node`), so a checkpoint counts as whole where it is so for every process.
"""

import json
import shutil
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config import CrossTokenizerGKDConfig
from ..teachers.panel import settled


logger = get_logger(__name__)


def folder_of(run: str | Path, step: int) -> Path:
    return Path(run) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def clear(folder: Path):
    """Removes what an earlier run has left of a checkpoint; amid that, it is no whole one either."""
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return True


def to_resume_from(asked: str | bool | None, output_dir: str) -> str | None:
    """
    The checkpoint that a run goes on from, the same on every process; each must call it.

    Args:
        asked: `resume_from_checkpoint`: a folder; `True`, or the same as a command line says it, for the last whole
            checkpoint in `output_dir`; `None` or `False` for none.
        output_dir: the run's.

    Raises `ValueError` where there is no whole one, or the folder asked for is none; with the last whole one's name.
    """
    if isinstance(asked, str) and asked.lower() in ("true", "false"):
        asked = asked.lower() == "true"
    if not asked:
        return None
    folder = Path(output_dir if asked is True else asked)
    beside = folder if asked is True else folder.parent
    steps, half = _steps_in(beside)
    last = folder_of(beside, max(steps)) if steps else None
    if asked is not True:
        if not all(gather_object([is_whole(folder)])):
            raise ValueError(
                f"resume_from_checkpoint: {folder} is no whole checkpoint. Its {TRAINER_STATE_NAME}, which is written last, is "
                "missing or cut short, as in a run that was killed while it saved. "
                + (f"The last whole one beside it is {last}." if last else "There is no whole one beside it.")
            )
        return str(folder)
    if last is None:
        found = f", only half-written ones (steps {', '.join(map(str, sorted(half)))})" if half else ""
        raise ValueError(
            f"resume_from_checkpoint=True: {folder} has no whole checkpoint that every process can read{found}. To start from "
            "the beginning, leave resume_from_checkpoint out."
        )
    if newer := [step for step in half if step > max(steps)]:
        logger.warning(
            f"{folder_of(beside, max(newer))} is only half written, since its run ended while it saved: going on from {last}."
        )
    return str(last)


def _steps_in(run: Path) -> tuple[set[int], set[int]]:
    """The steps of the checkpoints in `run` that are whole for every process, and of those that are not."""
    names = {
        path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    }
    steps = {path: int(step) for path, step in names.items() if step.isdecimal()}
    whole = set.intersection(*gather_object([{step for path, step in steps.items() if is_whole(path)}]))
    return whole, set(steps.values()) - whole


class PendingRollouts:
    """
    The micro-batches of an optimizer step, kept for the steps after it that use them again (`rollout_reuse`).

    Attributes:
        batches: the micro-batches, as `RolloutSource` makes them.
        old_log_probs: by a micro-batch's `index`, the (B, S) log-probs of the student as it was when it wrote them; there
            once the first step has used them.
    """

    def __init__(self, args: CrossTokenizerGKDConfig):
        self._args = args
        self.batches: list[dict] = []
        self.old_log_probs: dict[int, torch.Tensor] = {}

    def clear(self):
        self.batches, self.old_log_probs = [], {}

    def save(self, checkpoint: str):
        """Writes this process's own; waits for scores that a server still works on."""
        batches = [settled(batch) for batch in self.batches]
        torch.save((self._layout(), batches, self.old_log_probs), self._file(checkpoint))

    def load(self, checkpoint: str):
        """What this process has saved there, if there is any and its settings are those of this run."""
        file = self._file(checkpoint)
        if not file.exists():
            return
        layout, batches, old_log_probs = torch.load(file, "cpu")
        if layout == self._layout():
            self.batches, self.old_log_probs = batches, old_log_probs
        else:
            logger.warning(
                f"{checkpoint} keeps completions of other settings than these (then {layout}, now "
                f"{self._layout()}): they are left, and the student writes anew."
            )

    def _layout(self) -> dict[str, int]:
        names = (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_generations",
            "rollout_reuse",
            "world_size",
        )
        return {name: getattr(self._args, name) for name in names}

    def _file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"rollouts_{self._args.process_index}.pt"
