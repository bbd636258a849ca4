"""A few of a step's completions, kept for the table of completions and, token by token, for the report.

Decisions: rows stay tensors on their device until something is logged, so that keeping them does not wait for the device.
So are the chunks that were scored: aligning the text again does not tell what a gate, an early stop or a cut-off end left out. No model
is run again.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback

from ..losses import ScoredChunks
from ..losses.credit import chunk_sum, gaps
from ..rollouts.pairing import Rollout
from .viewer.visible import legible


@dataclass(frozen=True)
class Sample:
    """
    A completion that both models have scored, in values that JSON can hold.

    Attributes:
        step: number of optimizer steps when it was logged.
        prompt: what the student read, markup included.
        ids: of the completion, its stop token included.
        student_log_probs: nats, one for each of `ids`; 0 for those that take no part.
        teacher_log_probs: nats, one for each teacher token, the turn end included if it is scored; empty if nothing is scored.
        gap: student minus teacher log-prob, in nats a byte of scored text; `None` if nothing is scored.
        teacher: index of its teacher, where there are several.
        frame: the frame of its prompt, a `Frame` as JSON.
        student_chunks: chunk of each of `ids`, -1 for those that are not compared; `None`: as the text is aligned.
        read_by: its teacher, or its teachers with their weights, where there are several in the run.
    """

    step: int
    prompt: str
    ids: list[int]
    student_log_probs: list[float]
    teacher_log_probs: list[float]
    gap: float | None
    teacher: int = 0
    frame: str = ""
    student_chunks: list[int] | None = None
    read_by: str = ""


class Samples:
    """The rows kept since the last `clear`."""

    def __init__(self):
        self._kept: list[tuple[torch.Tensor, ...]] = []
        self._frames: list[str] = []

    def clear(self):
        self._kept.clear()
        self._frames.clear()

    def keep(self, inputs: dict, batch: ScoredChunks, rows: int):
        """Keeps the first `rows` of a micro-batch."""
        tensors = (
            inputs["input_ids"],
            inputs["prompt_lengths"],
            inputs["lengths"],
            batch.student_log_probs.detach(),
            batch.teacher_log_probs,
            *batch.compared_chunks,
            batch.student_widths,
            batch.scorable,
            inputs["teacher_places"],
        )
        self._kept += zip(
            *(tensor[:rows].clone() for tensor in tensors), strict=True
        )  # a view would keep the whole batch
        self._frames += inputs["frames"][:rows]

    def __len__(self) -> int:
        return len(self._kept)

    def take(
        self,
        step: int,
        tokenizer: PreTrainedTokenizerBase,
        read: Callable[[list[list[int]], list[int], list[str]], list[Rollout]],
    ) -> list[Sample]:
        """The samples. `read` pairs completions with their teachers' tokens, as in training."""
        rows, frames = [[tensor.cpu() for tensor in row] for row in self._kept], list(self._frames)
        self.clear()
        samples = []
        completions = [ids[start:end].tolist() for ids, start, end, *_ in rows]
        teachers = [int(row[-1]) for row in rows]
        found = read(completions, teachers, frames)
        for row, own, place, frame, rollout in zip(rows, completions, teachers, frames, found, strict=True):
            ids, start, end, student, teacher, chunks, teacher_chunks, widths, scorable, _ = row
            gap = _per_byte(student, teacher, chunks, teacher_chunks, widths, len(scorable))
            scores = teacher[: len(rollout.teacher_ids)].tolist() if scorable.any() else []
            written = slice(start - 1, end - 1)
            samples.append(
                Sample(
                    step=step,
                    prompt=tokenizer.decode(ids[:start].tolist()),
                    ids=own,
                    student_log_probs=student[written].tolist(),
                    teacher_log_probs=scores,
                    gap=gap,
                    teacher=place,
                    frame=frame,
                    student_chunks=chunks[written].tolist(),
                    read_by=readers(rollout),
                )
            )
        return samples


def readers(rollout: Rollout) -> str:
    """The name of the teacher that has read it, or the names and weights of several; "" where the run has one."""
    if not rollout.parts:
        return rollout.prompt.teacher
    return ", ".join(f"{part.rollout.prompt.teacher} ({100 * part.weight:.4g} %)" for part in rollout.parts)


def _per_byte(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_chunks: torch.Tensor,
    teacher_chunks: torch.Tensor,
    widths: torch.Tensor,
    num_chunks: int,
) -> float | None:
    """The gap of one row in nats a byte, computed as in the log; `None` if the scored text has no bytes."""
    sides = student_chunks[None], teacher_chunks[None]
    gap, neutral = gaps(student[None], teacher[None], *sides, num_chunks)
    num_bytes = chunk_sum(widths[None], sides[0], num_chunks).masked_fill(neutral, 0).sum().item()
    return -gap.sum().item() / num_bytes if num_bytes else None


def show(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    callbacks: Sequence[TrainerCallback],
    num_samples: int,
    name: str = "completions",
) -> None:
    """Prints samples as a table, and sends the table under `name` to those of TensorBoard, wandb and trackio that `callbacks`
    report to."""
    step = samples[0].step
    columns = {
        "prompt": [sample.prompt for sample in samples],
        "completion": [tokenizer.decode(sample.ids) for sample in samples],
        "gap, nats/byte": [float("nan") if sample.gap is None else sample.gap for sample in samples],
    }
    if any(sample.read_by for sample in samples):
        columns["teacher"] = [sample.read_by for sample in samples]
    _print(columns, step, num_samples)
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text(name, _markdown(columns), step)
        elif isinstance(callback, WandbCallback | TrackioCallback):
            backend = importlib.import_module("wandb" if isinstance(callback, WandbCallback) else "trackio")
            table = pd.DataFrame({"step": step, **columns})
            backend.log({name: backend.Table(dataframe=table)})


def _print(columns: dict[str, list], step: int, num_samples: int):
    table = Table(title=f"Step {step}", title_justify="left", show_lines=True, expand=True)
    for name, values in columns.items():
        # the whole text is shown, without an ellipsis
        table.add_column(
            name.capitalize(), overflow="fold", justify="right" if isinstance(values[0], float) else "left"
        )
    for row in list(zip(*columns.values(), strict=True))[:num_samples]:
        table.add_row(*(f"{cell:.3f}" if isinstance(cell, float) else Text(legible(cell)) for cell in row))
    Console().print(table)


def _markdown(columns: dict[str, list]) -> str:
    """A Markdown table in which no text acts as markup."""
    rows = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in rows)


def _cell(value: str | float) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", escape(value, quote=False))
    return "<br>".join(text.splitlines())
