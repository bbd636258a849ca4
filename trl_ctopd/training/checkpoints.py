"""Checkpoints of a run that may be killed at any moment: which are complete, which run they belong to, and which one a run resumes
from.

Decisions
- `Trainer` writes `trainer_state.json` last, and only then deletes older checkpoints. So a checkpoint with a readable
  `trainer_state.json` is complete, as long as every process has written its part by then and the folder held no files of an earlier
  run. The trainer sees to both when it saves.
- Nodes may have disks of their own (`save_on_each_node`), so a checkpoint counts as complete only if it is complete for every process.
- `checkpoint.json` is written just before. It lists the files with their sizes, the run, and the settings. All of it is on the disk
  before older checkpoints are deleted.
- A run writes `_run.json` into its output folder when it begins, so that it does not resume from another run's checkpoint.
"""

import json
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..config import CrossTokenizerGKDConfig
from ..losses import loss_name
from ..teachers.readings import settled


logger = get_logger(__name__)

MANIFEST = "checkpoint.json"
RUN = "_run.json"  # the leading underscore keeps it from being pushed to the hub
# settings that are saved with the optimizer's state, and come back with it
_OF_OPTIMIZER = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
_ORNAMENTS = (".md", ".png", ".html")  # files that a resume does not read
_RENAMED = {"filler": "padding_rows"}  # keys of the micro-batches in older checkpoints


def folder_of(run: str | Path, step: int) -> Path:
    return Path(run) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def clear(folder: Path):
    """Removes a checkpoint that an earlier run left. Interrupted, it leaves an incomplete one."""
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    return not missing(folder)


def missing(folder: Path) -> list[str]:
    """The files that a complete checkpoint would have and `folder` has not, or has with another size than when it was saved."""
    if _read(folder / TRAINER_STATE_NAME) is None:
        return [TRAINER_STATE_NAME]
    files = (_read(folder / MANIFEST) or {}).get("files", {})  # an older version wrote no list
    return [
        name for name, size in files.items() if not (folder / name).is_file() or (folder / name).stat().st_size != size
    ]


def _read(path: Path) -> dict | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return found if isinstance(found, dict) else None


class Lineage:
    """
    Which `train()` calls a run consists of: its own, and before it those that it was resumed from, each with the last step that it
    contributed. Each call has a name of its own. The same on every process.
    """

    def __init__(self, parts: list[tuple[str, int | None]]):
        self.parts = parts

    @classmethod
    def begun(cls, checkpoint: str | None) -> "Lineage":
        """Of a run that begins now, from scratch or from `checkpoint`. Every process must call it."""
        before = []
        if checkpoint is not None:
            folder = Path(checkpoint)
            step = _read(folder / TRAINER_STATE_NAME)["global_step"]
            known = (_read(folder / MANIFEST) or {}).get("lineage") or [["", None]]
            before = [(name, step if until is None else until) for name, until in known]
        [name] = broadcast_object_list([uuid.uuid4().hex])
        return cls([*before, (name, None)])

    @classmethod
    def of_folder(cls, run: Path) -> "Lineage | None":
        """Of the last run that began in this folder; None if there is no record of one."""
        found = _read(run / RUN)
        return None if found is None else cls([(name, until) for name, until in found["lineage"]])

    def write(self, run: Path):
        run.mkdir(parents=True, exist_ok=True)
        unfinished = run / f".{RUN}"
        unfinished.write_text(json.dumps({"lineage": self.parts}), encoding="utf-8")
        _sync(unfinished)
        os.replace(unfinished, run / RUN)
        _sync(run)

    def has(self, checkpoint: Path, step: int) -> bool:
        """Whether a checkpoint belongs to this run."""
        known = (_read(checkpoint / MANIFEST) or {}).get("lineage") or [["", None]]
        untils = [until for name, until in self.parts if name == known[-1][0]]
        return any(until is None or step <= until for until in untils)


def begin(checkpoint: str | None, args: CrossTokenizerGKDConfig, identity: Mapping) -> Lineage:
    """Records in the output folder that a run begins, from scratch or from `checkpoint`, and warns of settings that have changed since."""
    if checkpoint is not None and (changed := changes(checkpoint, identity)):
        logger.warning(
            f"Going on from {checkpoint} with other settings than it was saved with: {'; '.join(changed.values())}. It will not be the "
            "run that was begun."
        )
    lineage = Lineage.begun(checkpoint)
    if args.should_save and args.save_strategy != SaveStrategy.NO:
        lineage.write(Path(args.output_dir))
    return lineage


@contextmanager
def whole(
    state: TrainerState,
    folder: Path,
    lineage: Lineage,
    settings: Mapping,
    place: tuple[int, int] | None = None,
    classes: Mapping[str, str] | None = None,
) -> Iterator[None]:
    """In the block, `state.save_to_json` marks `folder` as a complete checkpoint, after everything else in it is on the disk. `place`: as
    `place_of` returns it. `classes`: of the optimizer and the schedule."""
    save = state.save_to_json

    def save_and_mark(path: str):
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix not in _ORNAMENTS]
        made_of = {str(file.relative_to(folder)): file.stat().st_size for file in files}
        manifest = {"lineage": lineage.parts, "settings": settings, "files": made_of, "place": place}
        manifest["classes"] = classes or {}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path_of_part in (*files, folder / MANIFEST, *{file.parent for file in files}):
            _sync(path_of_part)
        save(path)
        _sync(Path(path))
        _sync(folder)
        _sync(folder.parent)

    state.save_to_json = save_and_mark
    try:
        yield
    finally:
        del state.save_to_json


def _sync(path: Path):
    """Waits until a file, or a folder's list of files, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def place_of(checkpoint: str | None) -> tuple[int, int] | None:
    """The epoch in which `checkpoint` was saved, counted from 0, and the optimizer steps taken in it; None where it does not tell."""
    place = ((_read(Path(checkpoint) / MANIFEST) or {}) if checkpoint else {}).get("place")
    return None if place is None else tuple(place)


def changes(checkpoint: str, settings: Mapping) -> dict[str, str]:
    """Which of a run's `settings` (JSON values) differ from those that `checkpoint` was saved with: by name, a text with both values."""
    before = (_read(Path(checkpoint) / MANIFEST) or {}).get("settings")
    if before is None:
        return {}
    now = json.loads(json.dumps(settings))
    return {
        name: f"{name} (then {before[name]!r}, now {now[name]!r})"
        for name in now
        if name in before and before[name] != now[name]
    }


def other_classes(checkpoint: str, classes: Mapping[str, str]) -> dict[str, str]:
    """Which of `classes` those of `checkpoint` are not: by name, a text with both."""
    before = (_read(Path(checkpoint) / MANIFEST) or {}).get("classes", {})
    return {
        name: f"{name} (then {before[name]}, now {own})"
        for name, own in classes.items()
        if before.get(name, own) != own
    }


def warn_of_what_stays(checkpoint: str, settings: Mapping, others: Mapping[str, str]):
    """Warns of the settings of the optimizer that have changed and come back with its state, and of what is left out since it is of `others`."""
    if others:
        rate = "the learning rate is that of this run's settings"
        anew = f"the optimizer begins anew, and {rate}" if "optimizer" in others else rate
        logger.warning(
            f"{checkpoint} has the state of another {' and '.join(others.values())}, which is left out: {anew}."
        )
    if "optimizer" in others or not (Path(checkpoint) / OPTIMIZER_NAME).exists():
        return
    if stay := sorted(
        (_OF_OPTIMIZER - {"learning_rate"} if others else _OF_OPTIMIZER) & set(changes(checkpoint, settings))
    ):
        logger.warning(
            f"{', '.join(stay)}: the checkpoint's stays in force, since Trainer takes the optimizer's settings from its {OPTIMIZER_NAME}. "
            f"To train on with another, begin a new run with model={checkpoint!r}."
        )


def day_of(checkpoint: str | None) -> date | None:
    """The date in the prompts of the run that saved a checkpoint; None where its templates write none."""
    manifest = (_read(Path(checkpoint) / MANIFEST) if checkpoint else None) or {}
    day = manifest.get("settings", {}).get("prompt_date")
    return date.fromisoformat(day) if day else None


@contextmanager
def read_whole(checkpoint: str | None) -> Iterator[None]:
    """Raises `ValueError` with the checkpoint's name where a file of it is read in this block and is not what was saved, though it
    has its size."""
    try:
        yield
    except (pickle.UnpicklingError, EOFError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise ValueError(
            f"A file of {checkpoint} cannot be read ({type(error).__name__}), though it has the size that was saved: it has changed since. "
            "Go on from an earlier checkpoint: resume_from_checkpoint=PATH."
        ) from error


def asked_for(asked: str | bool | None) -> str | bool | None:
    """`resume_from_checkpoint` as a command line gives it, where "true" and "false" are text."""
    return asked.lower() == "true" if isinstance(asked, str) and asked.lower() in ("true", "false") else asked


def to_resume_from(asked: str | bool | None, output_dir: str) -> str | None:
    """
    The checkpoint that a run resumes from, the same on every process. Every process must call it.

    Args:
        asked: `resume_from_checkpoint`: a folder; `True` or "true" for the last complete checkpoint in `output_dir`; `None`, `False`
            or "false" for none.
        output_dir: the run's.

    Raises `ValueError` where there is no complete one, or `asked` is not one. It names the last complete one.
    """
    asked = asked_for(asked)
    if not asked:
        return None
    folder = Path(output_dir if asked is True else asked)
    if asked is not True:
        lacks = sorted(set().union(*gather_object([set(missing(folder))])))
        if lacks:
            beside, _, _ = _steps_in(folder.parent, None)
            why = f"Missing in it, or cut short: {', '.join(lacks)}."
            if lacks == [TRAINER_STATE_NAME]:
                why = (
                    f"Its {TRAINER_STATE_NAME}, which is written last, is missing or cut short, as in a run that was killed while "
                    "it saved."
                )
            raise ValueError(
                f"resume_from_checkpoint: {folder} is no whole checkpoint. {why} "
                + (
                    f"The last whole one beside it is {folder_of(folder.parent, max(beside))}."
                    if beside
                    else "There is no whole one beside it."
                )
            )
        return _warned_of(folder)
    steps, half, others = _steps_in(folder, Lineage.of_folder(folder))
    if not steps:
        found = f", only half-written ones (steps {', '.join(map(str, sorted(half)))})" if half else ""
        if others:
            raise ValueError(
                f"resume_from_checkpoint=True: the run that began last in {folder} has no whole checkpoint yet{found}, and "
                f"{folder_of(folder, max(others))} is of another one that was begun there before. To go on from that one, name it: "
                "resume_from_checkpoint=PATH. To start from the beginning, leave resume_from_checkpoint out."
            )
        raise ValueError(
            f"resume_from_checkpoint=True: {folder} has no whole checkpoint that every process can read{found}. To start from "
            "the beginning, leave resume_from_checkpoint out."
        )
    last = folder_of(folder, max(steps))
    if newer := [step for step in half if step > max(steps)]:
        lacks = missing(folder_of(folder, max(newer)))
        why = (
            "only half written, since its run ended while it saved"
            if lacks in ([], [TRAINER_STATE_NAME])
            else f"not whole (missing, or cut short: {', '.join(lacks)})"
        )
        logger.warning(f"{folder_of(folder, max(newer))} is {why}: going on from {last}.")
    if newer := [step for step in others if step > max(steps)]:
        logger.warning(
            f"{folder_of(folder, max(newer))} is of another run, which was begun in this folder before: going on from {last}."
        )
    return _warned_of(last)


def _warned_of(folder: Path) -> str:
    """`folder`, after a warning if it was saved without the optimizer's state or without a list of its files."""
    manifest = _read(folder / MANIFEST)
    names = [str(path.relative_to(folder)) for path in folder.rglob("*")] if manifest is None else manifest["files"]
    if not any(re.match(r"optimizer|.*optim_states|rank\d+-of-\d+-optimizer", name) for name in names):
        logger.warning(
            f"{folder} has no state of the optimizer (save_only_model?): the optimizer and its schedule start from scratch."
        )
    elif manifest is None:
        logger.warning(
            f"{folder} has no {MANIFEST}: it is of an older version or of another trainer. Whether it is complete, and which "
            "settings it was saved with, is not known."
        )
    return str(folder)


def _steps_in(run: Path, lineage: Lineage | None) -> tuple[set[int], set[int], set[int]]:
    """The steps of the checkpoints in `run`: complete for every process and of `lineage` (without one, of any run); incomplete;
    complete but of another run."""
    names = {
        path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    }
    steps = {path: int(step) for path, step in names.items() if step.isdecimal()}
    everywhere = set.intersection(*gather_object([{step for path, step in steps.items() if is_whole(path)}]))
    own = everywhere
    if lineage is not None:
        found = {step for path, step in steps.items() if step in everywhere and lineage.has(path, step)}
        own = set.intersection(*gather_object([found]))
    return own, set(steps.values()) - everywhere, everywhere - own


class PendingRollouts:
    """
    The micro-batches of an optimizer step, kept for the steps after it that use them again (`rollout_reuse`).

    Args:
        batch_size: prompts in a micro-batch, which `auto_find_batch_size` changes.

    Attributes:
        batches: the micro-batches, as `RolloutSource` makes them.
        old_scores: by a micro-batch's `index`, the `ScoredChunks.policy_scores` of the student as it was when it wrote
            them; there once the first step has used them.
    """

    def __init__(self, args: CrossTokenizerGKDConfig, batch_size: Callable[[], int]):
        self._args, self._batch_size = args, batch_size
        self.batches: list[dict] = []
        self.old_scores: dict[int, torch.Tensor] = {}

    def clear(self):
        self.batches, self.old_scores = [], {}

    def save(self, checkpoint: str):
        """Writes those of this process, after the server's scores have arrived."""
        batches = [settled(batch) for batch in self.batches]
        torch.save((self._layout(), batches, self.old_scores), self._file(checkpoint))

    def load(self, checkpoint: str):
        """Reads what this process saved there, if the settings that shape micro-batches are the same."""
        file = self._file(checkpoint)
        if not file.exists():
            return
        layout, batches, old_scores = torch.load(file, "cpu")
        # checkpoints from before this was kept say nothing of the loss
        now = {name: value for name, value in self._layout().items() if name in layout}
        if layout == now:
            self.batches = [{_RENAMED.get(name, name): value for name, value in own.items()} for own in batches]
            # (B, S) in checkpoints from before chunks closed
            self.old_scores = {index: own if own.dim() == 3 else own[None] for index, own in old_scores.items()}
        else:
            logger.warning(
                f"{checkpoint} keeps completions that were made with other settings (then {layout}, now "
                f"{now}): they are dropped, and the student writes new ones."
            )

    def _layout(self) -> dict[str, Any]:
        layout = {"per_device_train_batch_size": self._batch_size()}
        for name in ("gradient_accumulation_steps", "num_generations", "rollout_reuse", "world_size"):
            layout[name] = getattr(self._args, name)
        for name in ("distillation_loss", "distillation_loss_kwargs", "off_policy_loss", "event", "credit", "baseline"):
            value = getattr(self._args, name)  # what a loss reads is kept with the completions
            layout[name] = loss_name(value) if callable(value) else value
        return layout

    def _file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"rollouts_{self._args.process_index}.pt"
