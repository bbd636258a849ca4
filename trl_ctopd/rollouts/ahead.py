"""Rollouts one step ahead (`async_rollouts=1`): the completions of step k + 1 are written while step k is learned.

    step k         take the text of step k → hand the weights W_k over → begin the text of step k + 1 → learn step k

Decisions
- The text of step k + 1 is that of W_k, the weights before step k's update, and carries the log-probs that it was sampled with. Each
  token's advantage is weighted by the truncated ratio of the student to them, as vLLM's is (`vllm.importance`). Only the first step's
  text is written by the weights that learn from it.
- Prompts are read one step before they are due, past the end of an epoch too, and none for a step that is not to come.
- All that concerns other processes (weights, prompts, results at a server) is done by the main thread, which alone may call
  collectives. What the other thread does, it does alone.
- What is drawn depends on seed, step and process, and not on which thread draws when.
- A checkpoint waits for the text under way, and keeps it.
- An error of the other thread is raised where its text is asked for. A checkpoint that is saved before keeps no text.

Left out: more than one step of staleness, and text that is begun by one policy and ended by another (partial rollouts).
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import nn
from transformers.trainer_utils import has_length

from ..config import CrossTokenizerGKDConfig
from .generation import Written
from .pairing import Prompt
from .waiting import wait_for


logger = get_logger(__name__)

Figures = dict[str, tuple[float, float]]
_PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": None, "generation_kwargs": None}


def check_ahead(args: CrossTokenizerGKDConfig):
    """Raises `ValueError` for settings that cannot work together with `async_rollouts`."""
    if not args.async_rollouts:
        if args.generation_device is not None:
            raise ValueError(
                f"generation_device={args.generation_device} has no effect with async_rollouts=0: it is where a copy of the student "
                "writes while the student is trained. Set async_rollouts=1, or leave it out."
            )
        return
    said = f"async_rollouts={args.async_rollouts}"
    if args.lmbda == 0:
        raise ValueError(f"{said} has no effect with lmbda=0.0: it is for text that the student writes.")
    for name, neutral in (("rollout_reuse", 1), ("early_stop", None)):
        if (value := getattr(args, name)) != neutral:
            raise ValueError(
                f"{said} does not go with {name}={value!r}, which makes the text of a step depend on what is learned before it. Set one "
                "of the two to its default."
            )
    if args.use_vllm:
        if args.vllm_mode != "server":
            raise ValueError(
                f"{said} with vllm_mode={args.vllm_mode!r}: the engine has the GPU that trains, so that nothing would be written "
                "meanwhile. Set vllm_mode='server', on a GPU of its own, or async_rollouts=0."
            )
        if args.generation_device is not None:
            raise ValueError(
                f"generation_device={args.generation_device} has no effect with use_vllm=True: leave it out."
            )
        return
    if not args.generation_device:
        raise ValueError(
            f"{said} needs a device that is free while the student is trained: name a second GPU for a copy of the student "
            "(generation_device='cuda:1'), or let a server write (use_vllm=True, vllm_mode='server')."
        )
    if args.generation_backend not in ("auto", "transformers"):
        raise ValueError(
            f"{said} with generation_backend={args.generation_backend!r}: a copy of the student writes by 'transformers' alone. Choose "
            "that, or a server (use_vllm=True, vllm_mode='server')."
        )
    if args.torch_compile:
        raise ValueError(
            f"{said} with torch_compile=True: while a model is compiled, transformers keeps what its layers return in a variable of the "
            "whole process, and a copy of the student would write there too. Set torch_compile=False, or let a server write "
            "(use_vllm=True, vllm_mode='server')."
        )
    if bent := [f"{n}={getattr(args, n)}" for n, default in _PLAIN.items() if getattr(args, n) != default]:
        raise ValueError(
            f"{said} weighs tokens by the log-probs that they were sampled with, which a copy of the student tells where a temperature "
            f"alone shapes them, and {', '.join(bent)} shapes them too: leave that out, or let a server write (use_vllm=True, "
            "vllm_mode='server')."
        )


class Cancelled(Exception):
    """Ends the writing of text that nobody waits for."""


class Background(Protocol):
    """Writes as the student was when it was asked, in a thread of its own."""

    ends_soon: bool  # whether what is cancelled ends within a moment

    def begin(
        self, model: nn.Module, prompts: list[Prompt], step: int, taken: int
    ) -> tuple[Callable[[threading.Event], Any], Callable[[Any], list[Written] | None]]:
        """
        Called by the main thread of all processes. Hands the weights over.

        Args:
            model: the student, wrapped for training.
            prompts: of this process, for which it is to write.
            step: the optimizer step that the text is for.
            taken: optimizer steps taken, which tells versions of the weights apart.

        Returns:
            What the other thread is to do, with an event that asks it to end; and what the main thread of all processes then makes of
            its result (`None` where it failed): the completions of `prompts`, or `None` where another process has failed.
        """


class _Job:
    """The text of a step, while it is written and until it is taken."""

    def __init__(self, step: int, staleness: int, prompts: Sequence[Prompt]):
        self.step, self.staleness = step, staleness
        self.prompts = [prompt.student_ids for prompt in prompts]
        self.written: list[Written] | None = None
        self.error: BaseException | None = None
        self.restored = False  # from a checkpoint
        self.seconds = self.waited = 0.0
        self._result, self._end = None, None
        self._cancelled, self._done = threading.Event(), threading.Event()

    def start(self, run: Callable[[threading.Event], Any], end: Callable[[Any], list[Written] | None]):
        self._end = end
        # a daemon, since a server may never answer, and the process is to end all the same
        threading.Thread(target=self._work, args=(run,), name="rollouts ahead", daemon=True).start()

    def _work(self, run: Callable[[threading.Event], Any]):
        begin = time.perf_counter()
        try:
            self._result = run(self._cancelled)
        except BaseException as error:  # it is raised in the main thread
            self.error = error
        self.seconds = time.perf_counter() - begin
        self._done.set()

    def settle(self):
        """Waits for the other thread, and for the other processes."""
        if self._end is None:
            return
        begin = time.perf_counter()
        wait_for(self._done)
        self.waited += time.perf_counter() - begin
        end, self._end = self._end, None
        self.written = end(self._result)
        if self.written is None and self.error is None:
            self.error = RuntimeError(
                f"Another process failed while it wrote the completions of step {self.step} ahead (async_rollouts=1)."
            )

    def cancel(self, wait: bool):
        self._cancelled.set()
        if wait and self._end is not None:
            wait_for(self._done)


class Ahead:
    """
    The text of the next step. All processes call each method at the same time.

    Args:
        writer: what writes it.
        args: the run's settings.
    """

    def __init__(self, writer: Background, args: CrossTokenizerGKDConfig):
        self._writer, self._args = writer, args
        self._job: _Job | None = None

    def begin(self, model: nn.Module, prompts: list[Prompt], step: int, taken: int):
        """Begins the text of `step` with the weights that `model` has now, after `taken` steps."""
        self._drop()
        job = _Job(step, step - taken, prompts)
        job.start(*self._writer.begin(model, prompts, step, taken))
        self._job = job

    def take(self, model: nn.Module, prompts: list[Prompt], step: int, tell: Callable[[Figures], Any]) -> list[Written]:
        """The completions of `prompts` for `step`, which `model` writes now where they were not begun before. `tell` is called with
        figures of them."""
        if not self._has(prompts, step):
            self.begin(model, prompts, step, step)
        job = self._job
        job.settle()
        self._job = None
        if job.error is not None:
            raise job.error
        tell({"sampling/staleness": (job.staleness * len(prompts), len(prompts))})
        if not job.restored:
            tell({"sampling/seconds_hidden": (max(job.seconds - job.waited, 0.0), 1)})
        return job.written

    def _has(self, prompts: list[Prompt], step: int) -> bool:
        job = self._job
        if job is None:
            return False
        same = job.step == step and job.prompts == [prompt.student_ids for prompt in prompts]
        if not job.restored or all(gather_object([same])):
            return same
        logger.warning(
            f"The checkpoint keeps completions for step {job.step} that are of other prompts than step {step} now has: they are dropped, "
            "and the student writes new ones. It will not be the run that was begun."
        )
        return False

    def settle(self):
        """Waits until nothing is being written, so that the writer can do something else."""
        if self._job is not None:
            self._job.settle()

    def stop(self):
        """Ends what is being written, for nobody."""
        if self._job is not None:
            self._job.cancel(wait=self._writer.ends_soon)

    def _drop(self):
        if self._job is not None:
            self._job.cancel(wait=True)
            self._job = None

    # Checkpoints

    def save(self, checkpoint: str):
        """Writes this process's part of the text for the next step, once it is there."""
        job = self._job
        if job is None:
            return
        job.settle()
        if job.error is not None:
            logger.warning(
                f"{checkpoint} keeps no completions for step {job.step}, since writing them failed ({type(job.error).__name__}): a run "
                "that resumes from it lets the student write them anew, by its newer weights."
            )
            return
        kept = {"step": job.step, "staleness": job.staleness, "prompts": job.prompts, "written": job.written}
        torch.save(kept, self._file(checkpoint))

    def load(self, checkpoint: str | None):
        """Takes up what this process saved there; without a checkpoint, forgets an earlier run."""
        self._drop()
        file = None if checkpoint is None else self._file(checkpoint)
        if not all(gather_object([file is not None and file.exists()])):
            return
        kept = torch.load(file, "cpu")
        job = _Job(kept["step"], kept["staleness"], [])
        job.prompts, job.written, job.restored = kept["prompts"], kept["written"], True
        self._job = job

    def _file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"ahead_{self._args.process_index}.pt"


class Windows:
    """
    The prompts of each optimizer step, of which those of the next one can be read before they are due.

    Trainer makes an iterator for each epoch. Where an epoch was begun here before that, its iterator is read on, and Trainer's is left
    as it is: a loader's iterator does nothing before it is asked for its first batch. The last window of a stream is filled up with rows
    that take no part.

    Args:
        marked: the rows of the batch that was read last, with those marked that only pad it.
    """

    def __init__(self, marked: Callable[[Sequence[Prompt]], list[Prompt]]):
        self._marked = marked
        self._loader, self._epoch = None, -1
        self._rows: Iterator | None = None  # of this epoch, where it was begun ahead
        # the next window, and the iterator of the epoch that it begins
        self._next: tuple[list[list[Prompt]], Iterator | None] | None = None

    def begin_epoch(self, loader, epoch: int):
        """Trainer is about to iterate over `loader`, or over what is left of it after a resume."""
        window, rows = self._next or (None, None)
        if rows is None or loader is not self._loader or epoch != self._epoch + 1:
            self._rows, self._next = None, None
        else:
            self._rows, self._next = rows, (window, None)
        self._loader, self._epoch = loader, epoch

    def take(self, given: Iterator, count: int) -> list[list[Prompt]]:
        """The next step's micro-batches, at most `count`; none where the epoch is over. `given`: Trainer's iterator of the epoch."""
        if self._next is None:
            return self._read(given, count)
        window, rows = self._next
        if rows is not None:  # it waits for the next epoch
            return []
        self._next = None
        return window

    def peek(self, given: Iterator, count: int) -> list[list[Prompt]]:
        """What the `take` after this one will return; where the epoch is over, the first one of the next epoch."""
        window, rows = self._read(given, count), None
        if not window:
            _set_epoch(self._loader, self._epoch + 1)
            rows = iter(self._loader)
            window = self._read_from(rows, count)
        self._next = (window, rows) if window else None
        return window

    def _read(self, given: Iterator, count: int) -> list[list[Prompt]]:
        return self._read_from(given if self._rows is None else self._rows, count)

    def _read_from(self, rows: Iterator, count: int) -> list[list[Prompt]]:
        window = []
        while len(window) < count and (batch := next(rows, None)) is not None:
            window.append(self._marked(batch["prompts"]))
        if window and self._loader is not None and not has_length(self._loader):
            # where Trainer does not know how long an epoch is, it makes a step of no fewer micro-batches
            window += [[replace(prompt, is_padding=True) for prompt in window[-1]] for _ in range(count - len(window))]
        return window


def _set_epoch(loader, epoch: int):
    """As Trainer does: Accelerate does not tell a sampler that it has wrapped."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    for part in (loader, sampler):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
