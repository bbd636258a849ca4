"""The held-out gap with its standard error: student minus teacher log-prob of the student's own samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trl_ctopd import CrossTokenizerGKDTrainer
from trl_ctopd.losses import build_loss
from trl_ctopd.losses.credit import gaps


@dataclass(frozen=True)
class Gap:
    """Nats a byte, its standard error over prompts, and statistics of the samples."""

    nats_per_byte: float
    standard_error: float
    entropy: float
    mean_length: float
    truncated_fraction: float


class _Recorded:
    """Wraps a loss. For batches without a gradient it also records each row's gap and bytes."""

    def __init__(self, loss):
        self._loss = loss
        self.rows: list[tuple[float, int]] = []

    def __getattr__(self, name):
        return getattr(self._loss, name)

    def __call__(self, batch, num_items):
        if not torch.is_grad_enabled():
            scores = batch.student_log_probs, batch.teacher_log_probs
            gap, neutral = gaps(*scores, batch.student_chunks, batch.teacher_chunks, batch.num_chunks)
            num_bytes = batch.student_sum(batch.student_widths).masked_fill(neutral, 0)
            self.rows += zip((-gap.sum(1)).tolist(), num_bytes.sum(1).tolist(), strict=True)
        return self._loss(batch, num_items)


def ratio(rows: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Σx / Σy of pairs (x, y), and its standard error by linearization: √(Σ(x − ry)² n/(n − 1)) / Σy."""
    total = sum(y for _, y in rows)
    if not total:
        raise ValueError("No gap can be measured: no byte of the answers was scored by both models.")
    value = sum(x for x, _ in rows) / total
    spread = sum((x - value * y) ** 2 for x, y in rows) * len(rows) / max(1, len(rows) - 1)
    return value, math.sqrt(spread) / total


def measure(trainer: CrossTokenizerGKDTrainer, dataset=None) -> Gap:
    """Samples an answer to each prompt of `dataset`, or of the trainer's own evaluation set, with the same seed every time."""
    return measured_rows(trainer, dataset)[0]


def measured_rows(trainer: CrossTokenizerGKDTrainer, dataset=None) -> tuple[Gap, list[tuple[float, int]]]:
    """As `measure`, and for each prompt the gap in nats and the bytes of its answer. All chunks count, whatever the loss reads:
    published DPCA takes the loss's place."""
    loss = trainer.distillation_loss
    trainer.distillation_loss = recorded = _Recorded(build_loss("dpca", event="open"))
    try:
        found = trainer.evaluate(dataset)
    finally:
        trainer.distillation_loss = loss
    value, error = ratio([row for row in recorded.rows if any(row)])  # without rows that only fill up a batch
    gap = Gap(
        round(value, 5),
        round(error, 5),
        round(found["eval_entropy"], 4),
        round(found["eval_completions/mean_length"], 2),
        round(found["eval_completions/truncated_fraction"], 4),
    )
    return gap, recorded.rows
