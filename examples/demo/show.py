"""The demo's output: three tables and a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from trl_ctopd import TextAlignment

from . import task


COLOURS = ["#0b7a75", "#d1495b"]
QUIET = "#6b7280"


def figures(values: dict[str, float]) -> None:
    table = Table(title="Held-out amounts written right (greedy)", title_justify="left")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("share of the gap recovered", justify="right")
    table.add_row("teacher", f"{values['teacher_accuracy']:.1%}", "")
    table.add_row("student before", f"{values['student_accuracy_before']:.1%}", "")
    after, recovered = values["student_accuracy_after"], values["gap_recovered"]
    table.add_row("student after", f"{after:.1%}", f"{recovered:.1%}", style="bold")
    if "control_accuracy_after" in values:
        after, recovered = values["control_accuracy_after"], values["control_gap_recovered"]
        table.add_row("control, gaps shuffled", f"{after:.1%}", f"{recovered:.1%}")
    Console().print(table)


def samples(amounts: Sequence[int], before: Sequence[str], after: Sequence[str]) -> None:
    """Answers to the first few questions, unselected. `before` and `after` may have more."""
    table = Table(title="What the student writes", title_justify="left", show_lines=True)
    for heading in ("asked", "before", "after"):
        table.add_column(heading)
    for amount, *answers in zip(amounts, before, after, strict=False):
        marks = ["[green]✓[/]" if task.is_right(amount, answer) else "[red]✗[/]" for answer in answers]
        cells = [f"{mark} {answer}" for mark, answer in zip(marks, answers, strict=True)]
        table.add_row(task.question(amount), *cells)
    Console().print(table)


def judgement(
    alignment: TextAlignment,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_log_probs: Sequence[float],
    teacher_log_probs: Sequence[float],
) -> None:
    """A row for each chunk: both sides' tokens, and the gap (teacher minus student) in nats."""
    table = Table(title=f"What the teacher makes of “{alignment.text}”", title_justify="left")
    table.add_column("student's tokens")
    table.add_column("teacher's tokens")
    table.add_column("gap, nats", justify="right")
    for chunk in range(len(alignment.chunk_bytes)):
        sides, budgets = [], []
        for tokenizer, ids, chunks, log_probs in (
            (student_tokenizer, alignment.student_ids, alignment.student_chunks, student_log_probs),
            (teacher_tokenizer, alignment.teacher_ids, alignment.teacher_chunks, teacher_log_probs),
        ):
            inside = [position for position, own in enumerate(chunks) if own == chunk]
            sides.append("  ".join(tokenizer.convert_ids_to_tokens([ids[position] for position in inside])))
            budgets.append(sum(log_probs[position] for position in inside))
        gap = budgets[1] - budgets[0]
        table.add_row(*sides, f"{round(gap, 1) + 0.0:.1f}", style="bold red" if gap < -1 else None)
    Console().print(table, markup=False)


def learning_curve(curves: Sequence, before: float, teacher: float, path: Path) -> None:
    """Accuracy and gap over the steps, one colour for each `Curve`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for curve, colour in zip(curves, COLOURS[: len(curves)], strict=True):
        left.plot(curve.accuracy.keys(), curve.accuracy.values(), color=colour, linewidth=2.2, label=curve.label)
        steps, gap = list(curve.nats_per_byte), list(curve.nats_per_byte.values())
        right.plot(steps, gap, color=colour, linewidth=0.8, alpha=0.35)
        right.plot(steps, _smoothed(gap), color=colour, linewidth=2.2)
    beside = {"textcoords": "offset points", "xytext": (-4, 4), "ha": "right", "color": QUIET, "fontsize": 9}
    left.axhline(teacher, color=QUIET, linewidth=1, linestyle="--")
    left.annotate("teacher", (1, teacher), xycoords=("axes fraction", "data"), **beside)
    left.set(title="Held-out amounts written right", ylabel="greedy accuracy", ylim=(0, 1.08))
    left.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    left.legend(frameon=False, loc="center right")
    right.axhline(0, color=QUIET, linewidth=1, linestyle="--")
    right.set(title="Gap to the teacher on the student's own text", ylabel="nats per byte")
    right.set_ylim(bottom=min(-0.01, right.get_ylim()[0]))
    for axes in (left, right):
        axes.set_xlabel("distillation step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def _smoothed(values: Sequence[float], reach: int = 4) -> list[float]:
    """The mean of each value and its neighbours, with fewer of them at the ends."""
    near = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in near]
