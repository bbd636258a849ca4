"""The output of the demo on real models: two tables and a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .problems import Problem, code_of, solves


COLOUR, QUIET = "#0b7a75", "#6b7280"


def figures(values: dict, tasks: int) -> None:
    table = Table(title=f"{tasks} held-out tasks", title_justify="left")
    table.add_column("")
    for heading in ("tasks solved (greedy)", "answers that are Python", "gap, nats a byte", "tokens an answer"):
        table.add_column(heading, justify="right")
    for label, name, gap, style in (
        ("student before", "before", "gap_before", None),
        ("student after", "after", "gap_after", "bold"),
        ("teacher", "teacher", None, None),
    ):
        found, own = values[name], values.get(gap)
        table.add_row(
            label,
            f"{found['solved']}",
            f"{found['parsable']}",
            f"{own['nats_per_byte']:.3f} ± {own['standard_error']:.3f}" if own else "",
            f"{own['mean_length']:.0f}" if own else "",
            style=style,
        )
    Console().print(table)


def answers_side_by_side(tasks: Sequence[Problem], *answers: Sequence[str]) -> None:
    """The code of the first few tasks' answers, unselected. The columns of `answers` may have more."""
    table = Table(title="Greedy answers to the first held-out tasks", title_justify="left", show_lines=True)
    for heading in ("asked", "student before", "student after", "teacher"):
        table.add_column(heading, overflow="fold")
    for task, *own in zip(tasks, *answers, strict=False):
        cells = [Text(task.text)]
        for answer in own:
            right = solves(task, answer)
            mark = Text("✓ solved\n" if right else "✗\n", style="green" if right else "red")
            cells.append(mark + Text(code_of(answer).strip()))
        table.add_row(*cells)
    Console().print(table)


def learning_curve(history: Sequence[dict], values: dict, tasks: int, path: Path) -> None:
    """The gap over the steps, with the held-out gap at both ends; beside it the number of tasks solved."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(2, 1))
    steps = [entry["step"] for entry in history]
    left.plot(
        steps,
        [entry["gap/nats_per_byte"] for entry in history],
        color=COLOUR,
        linewidth=1,
        alpha=0.5,
        label="prompts of the step",
    )
    held_out = [values["gap_before"], values["gap_after"]]
    left.errorbar(
        [0, steps[-1] if steps else 0],
        [own["nats_per_byte"] for own in held_out],
        yerr=[own["standard_error"] for own in held_out],
        color=COLOUR, fmt="o", elinewidth=2, capsize=4, label="held-out prompts, ± standard error",
    )  # fmt: skip
    left.set(title="Gap to the teacher on the student's own text", xlabel="optimizer step", ylabel="nats per byte")
    left.set_ylim(bottom=0)
    left.legend(frameon=False)
    names = ("student before", "student after", "teacher")
    solved = [values[name]["solved"] for name in ("before", "after", "teacher")]
    bars = right.bar(names, solved, color=[QUIET, COLOUR, "#d1d5db"])
    right.bar_label(bars, [str(count) for count in solved])
    right.set(title=f"Of {tasks} held-out tasks solved", ylim=(0, 1.15 * max(1, *solved)))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=160)
    plt.close(figure)
