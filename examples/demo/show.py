"""What the demo shows: two tables and a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from . import task  # noqa: E402


COLOURS = ["#0b7a75", "#d1495b"]
QUIET = "#6b7280"


def table(figures: dict[str, float]) -> None:
    """The run's figures, as the issue of the day wants them: one row for each model."""
    rows = Table(title="Held-out amounts written right, greedy", title_justify="left")
    rows.add_column("model")
    rows.add_column("accuracy", justify="right")
    rows.add_column("gap recovered", justify="right")
    rows.add_row("teacher", f"{figures['teacher_accuracy']:.1%}", "")
    rows.add_row("student before", f"{figures['student_accuracy_before']:.1%}", "")
    rows.add_row(
        "student after", f"{figures['student_accuracy_after']:.1%}", f"{figures['gap_recovered']:.1%}", style="bold"
    )
    if "control_gap_recovered" in figures:
        rows.add_row(
            "control, gaps shuffled",
            f"{figures['control_accuracy_after']:.1%}",
            f"{figures['control_gap_recovered']:.1%}",
        )
    Console().print(rows)


def samples(amounts: Sequence[int], before: Sequence[str], after: Sequence[str]) -> None:
    """The first held-out amounts, unselected: what the student wrote before and after."""
    rows = Table(title="What the student writes", title_justify="left", show_lines=True)
    rows.add_column("asked", no_wrap=True)
    rows.add_column("before")
    rows.add_column("after")
    for amount, old, new in zip(amounts, before, after, strict=False):
        marked = [f"{'[green]✓' if task.is_right(amount, text) else '[red]✗'}[/] {text}" for text in (old, new)]
        rows.add_row(task.question(amount), *marked)
    Console().print(rows)


def learning_curve(curves: Sequence, before: float, teacher: float, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for curve, colour in zip(curves, COLOURS, strict=False):
        left.plot(curve.accuracy.keys(), curve.accuracy.values(), color=colour, linewidth=2.2, label=curve.label)
        steps, gap = list(curve.gap), list(curve.gap.values())
        right.plot(steps, gap, color=colour, linewidth=0.8, alpha=0.35)
        right.plot(steps, _smoothed(gap), color=colour, linewidth=2.2, label=curve.label)
    left.axhline(teacher, color=QUIET, linewidth=1, linestyle="--")
    left.axhline(before, color=QUIET, linewidth=1, linestyle=":")
    left.annotate("teacher", (1, teacher), xycoords=("axes fraction", "data"), xytext=(-4, 4), **_LABEL)
    left.annotate("student before", (1, before), xycoords=("axes fraction", "data"), xytext=(-4, 4), **_LABEL)
    left.set(title="Held-out amounts written right", ylim=(0, 1.06), ylabel="greedy accuracy")
    left.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
    right.axhline(0, color=QUIET, linewidth=1, linestyle="--")
    right.set(title="Gap to the teacher on the student's own text", ylabel="nats per byte")
    right.set_ylim(bottom=min(0, right.get_ylim()[0]))
    for axes in (left, right):
        axes.set_xlabel("distillation step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
    right.legend(frameon=False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


_LABEL = {"textcoords": "offset points", "ha": "right", "color": QUIET, "fontsize": 9}


def _smoothed(values: Sequence[float], window: int = 9) -> list[float]:
    """The mean of each value and its neighbours, fewer of them near the ends."""
    half = window // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(near) / len(near) for near in around]
