"""
Makes the tables and plots of `benchmarks/quality/README.md`, and the short table of `docs/losses.md`, from the runs' JSON lines.

    python -m benchmarks.quality.report                # from the repository root
    python -m benchmarks.quality.report --scale gpu

Only the text between the markers `<!-- quality: NAME -->` and `<!-- /quality -->` is replaced. A figure is the median over
seeds, with the smallest and the largest value; `n` is the number of seeds. Runs of the tuning stage are in no table.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib

from .methods import METHODS
from .run import (
    COMMON,
    DIGITS,
    HOME,
    LEADING,
    MORE_PAIRS,
    OFF_POLICY,
    OTHERS,
    RESULTS,
    SCALES,
    STAGES,
    STEPS,
    Lines,
    Plan,
    key,
    read,
    results_file,
)


matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter


ROOT = Path(__file__).parents[2]
SHORT, PAGE = ROOT / "docs" / "losses.md", Path(__file__).parent / "README.md"
CREDITS = ("dpca", "dpca_uniform", "dpca_byte_length", "dpca_last", "dpca_macro", "strict_sampled")
GRADIENT = ("semantic", "uniform", "byte_length", "last", "macro", "strict mask")
DRAWN = ("dpca", "dpca_macro", "strict_sampled", "bpm", "sft", "seq_kd", "trl_gold_template_on")
FACTOR = 1e9


def share(line: dict) -> float:
    """The share of the gap between the student's start and its teacher that is closed, in held-out greedy accuracy."""
    return (line["accuracy"] - line["start"]) / (line["teacher_accuracy"] - line["start"])


def select(lines: Iterable[dict], purpose: str, **wanted) -> Lines:
    return [
        line
        for line in lines
        if line["run"]["purpose"] == purpose
        and "error" not in line
        and all(line["run"][name] == value for name, value in wanted.items())
    ]


def spread(lines: Lines, figure: Callable[[dict], float] = share, digits: int = 2) -> str:
    if not lines:
        return "–"
    values = [figure(line) for line in lines]
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def median(lines: Lines, figure: Callable[[dict], float]) -> float | None:
    return statistics.median(figure(line) for line in lines) if lines else None


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def seeds(groups: Iterable[Lines]) -> str:
    counts = sorted({len(group) for group in groups if group})
    return "0" if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def flops(line: dict) -> float:
    return line["teacher_flops"] + line["student_flops"]


def by_merit(lines: Lines, methods: Iterable[str]) -> list[str]:
    """The methods that have runs, ordered by the mean over tasks of the median share, the best first."""
    merit = {}
    for method in methods:
        medians = [median(select(lines, "headline", method=method, task=task), share) for task in HOME]
        if any(value is not None for value in medians):
            merit[method] = statistics.mean(value for value in medians if value is not None)
    return sorted(merit, key=merit.get, reverse=True)


def sequence_curve(lines: Lines, task: str) -> tuple[list[float], list[float]]:
    """FLOPs and median accuracy of `seq_kd` after some updates of its long runs, the start included."""
    runs = select(lines, "curve", task=task)
    if not runs:
        return [], []
    found = defaultdict(list)
    for line in runs:
        updates = line["run"]["updates"]
        found[0.0].append(line["start"])
        for update, accuracy in [*line["accuracy_curve"].items(), (updates, line["accuracy"])]:
            found[flops(line) * int(update) / updates].append(accuracy)
    merged = defaultdict(list)
    for spent, accuracies in found.items():  # seeds differ by a few tokens after the same update
        merged[round(spent / (flops(runs[0]) / runs[0]["run"]["updates"]))] += [(spent, a) for a in accuracies]
    points = [
        tuple(statistics.median(part) for part in zip(*pairs, strict=True)) for _, pairs in sorted(merged.items())
    ]
    return [spent for spent, _ in points], [accuracy for _, accuracy in points]


def sequence_flops(lines: Lines, method: str, task: str) -> str:
    """How many times the method's FLOPs `seq_kd` needs to reach the method's median accuracy."""
    runs = select(lines, "headline", method=method, task=task)
    spent, accuracies = sequence_curve(lines, task)
    if not runs or not spent:
        return "–"
    wanted, own = median(runs, lambda line: line["accuracy"]), median(runs, flops)
    if wanted <= accuracies[0]:
        return "0"
    for i in range(1, len(spent)):
        if accuracies[i] >= wanted:
            part = (wanted - accuracies[i - 1]) / (accuracies[i] - accuracies[i - 1])
            return f"{(spent[i - 1] + part * (spent[i] - spent[i - 1])) / own:.2f}"
    return f"> {spent[-1] / own:.1f}"


def headline(lines: Lines) -> str:
    rows = []
    for method in by_merit(lines, METHODS):
        groups = {task: select(lines, "headline", method=method, task=task) for task in HOME}
        every = [line for group in groups.values() for line in group]
        rows.append(
            [
                f"`{method}`",
                *map(spread, groups.values()),
                seeds(groups.values()),
                spread(every, kept),
                f"{median(every, lambda line: line['cpu_seconds']):.1f}",
                f"{median(every, lambda line: line['teacher_flops']) / FACTOR:.0f}",
                f"{median(every, lambda line: line['student_flops']) / FACTOR:.0f}",
                " / ".join(sequence_flops(lines, method, task) for task in HOME),
            ]
        )
    head = ["method", *HOME, "n", "second skill kept", "CPU s", "teacher GFLOP", "student GFLOP", "× by `seq_kd`"]
    return table(head, rows)


def kept(line: dict) -> float:
    return line["second_skill"]


def short(lines: Lines) -> str:
    rows = []
    for method in by_merit(lines, METHODS):
        groups = {task: select(lines, "headline", method=method, task=task) for task in HOME}
        every = [line for group in groups.values() for line in group]
        rows.append([f"`{method}`", *map(spread, groups.values()), seeds(groups.values()), spread(every, kept)])
    return table(["method", *HOME, "n", "second skill kept"], rows)


def rates(plan: Plan, found: dict[str, dict]) -> str:
    """The result at each learning rate, the chosen one in bold."""
    rows = []
    for method in METHODS:
        cells = []
        for task in HOME:
            best = plan.chosen(method, task, found)
            marks = {
                line["run"]["learning_rate"]: f"{line['accuracy']:.2f}"
                for line in plan.tried(method, task, found)
                if "error" not in line and method in LEADING + OTHERS
            }
            texts = [f"**{mark}**" if rate == best else mark for rate, mark in sorted(marks.items())]
            cells.append(
                ", ".join(f"{text} at {rate:g}" for text, rate in zip(texts, sorted(marks), strict=True)) or "–"
            )
        if any(cell != "–" for cell in cells):
            rows.append([f"`{method}`", *cells])
    return table(["method", *HOME], rows)


def credit(lines: Lines, gradient: dict) -> str:
    rows = []
    for method, name in zip(CREDITS, GRADIENT, strict=True):
        groups = [select(lines, "headline", method=method, task=task) for task in HOME]
        gaps = [median(group, lambda line: line["gap_nats_per_byte"]) for group in groups]
        figures = [
            f"{gradient[where][name]['cosine'][0]:.2f} ({gradient[where][name]['noise'][0]:.0f})" for where in gradient
        ]
        gap = " / ".join("–" if value is None else f"{value:.3f}" for value in gaps)
        rows.append([name, *map(spread, groups), seeds(groups), gap, *figures])
    return table(
        ["credit", *HOME, "n", "gap left, nats/byte", *(f"cosine (noise), {where}" for where in gradient)], rows
    )


def masked(line: dict) -> float:
    return statistics.mean(entry["alignment/masked_fraction"] for entry in line["log"])


def alignment(lines: Lines) -> str:
    rows = []
    cases = [(task, pair, "headline", "alignment") for task, pair in HOME.items()]
    cases += [(task, pair, "pairs", "pairs") for task, pair in MORE_PAIRS]
    for task, pair, *purposes in cases:
        methods = ("dpca", "dpca_decode_and_compare")
        groups = [
            select(lines, purpose, method=method, task=task, pair=pair)
            for purpose, method in zip(purposes, methods, strict=True)
        ]
        if all(groups):
            cells = [cell for group in groups for cell in (spread(group), f"{100 * median(group, masked):.1f} %")]
            rows.append([f"{task}, `{pair}`", *cells, seeds(groups)])
    return table(["task, pair", "byte-exact", "masked", "decode and compare", "masked", "n"], rows)


def coverage(lines: Lines) -> str:
    rows = []
    for name, sampled, dense in (("1:1 chunks only", "strict_sampled", "strict_topk"), ("all chunks", "dpca", "simct")):
        for task in HOME:
            cells = [select(lines, "headline", method=method, task=task) for method in (sampled, dense)]
            macro = select(lines, "headline", method="dpca_macro", task=task) if name == "all chunks" else []
            bpm = select(lines, "headline", method="bpm", task=task) if name == "all chunks" else []
            texts = [spread(cells[0]) + (f"; `macro` {spread(macro)}" if macro else "")]
            texts.append(spread(cells[1]) + (f"; `bpm` {spread(bpm)}" if bpm else ""))
            rows.append([name, task, *texts, seeds(cells)])
    return table(["coverage", "task", "sampled token", "distribution", "n"], rows)


def steps(lines: Lines) -> str:
    """Shares after 10, 20 and 40 updates, each method at its own learning rate."""
    rows = []
    for method in STEPS:
        groups = [select(lines, "headline", method=method, task=task) for task in HOME | DIGITS]
        if any(groups):
            rows.append([f"`{method}`", *map(_on_the_way, groups), seeds(groups)])
    return table(["method", *HOME, *DIGITS, "n"], rows)


def common_rate(lines: Lines, rate: float) -> str:
    """The same with one learning rate for all tasks."""
    rows = []
    for method in COMMON:
        groups = [
            select(lines, "headline", method=method, task=task, learning_rate=rate)
            or select(lines, "steps", method=method, task=task)
            for task in HOME
        ]
        if any(groups):
            rows.append([f"`{method}`", *map(_on_the_way, groups), seeds(groups)])
    return table(["method", *HOME, "n"], rows)


def _on_the_way(lines: Lines) -> str:
    if not lines:
        return "–"
    updates = [*lines[0]["accuracy_curve"]]
    curve = [
        median(lines, lambda line, at=at: share({**line, "accuracy": line["accuracy_curve"][at]})) for at in updates
    ]
    return " / ".join(f"{value:.2f}" for value in [*curve, median(lines, share)])


def noise(figures: dict) -> str:
    rows = []
    for loss in next(iter(figures["tasks"].values())):
        found = [task[loss] for task in figures["tasks"].values()]
        rows.append([f"`{loss}`", *("–" if own["noise"] is None else f"{own['noise']:.2f}" for own in found)])
    return table(["loss", *figures["tasks"]], rows)


def _kept(name: str, make: Callable[[dict], str]) -> str:
    path = RESULTS / name
    return make(json.loads(path.read_text())) if path.exists() else "Not measured yet."


def off_policy(lines: Lines) -> str:
    rows = []
    for method in OFF_POLICY:
        own = method.removesuffix("_off")
        groups = [
            select(lines, purpose, method=name, task=task)
            for task in HOME
            for purpose, name in (("headline", own), ("off_policy", method))
        ]
        if any(groups[1::2]):
            rows.append([f"`{own}`", *map(spread, groups), seeds(groups)])
    return table(["method", *(f"{task}, {policy}" for task in HOME for policy in ("on", "off")), "n"], rows)


def same(lines: Lines) -> str:
    rows = []
    for method in ("dpca", "dpca_macro", "seq_kd"):
        for task in HOME:
            cross = select(lines, "headline", method=method, task=task)
            alike = select(lines, "same", method=method, task=task)
            if cross and alike:
                rows.append(
                    [f"`{method}`", task, spread(cross), spread(alike), *teachers(cross, alike), seeds([alike])]
                )
    return table(["method", "task", "cross", "same", "accuracies", "their teachers", "n, same"], rows)


def teachers(*groups: Lines) -> list[str]:
    accuracy = " / ".join(f"{median(group, lambda line: line['accuracy']):.3f}" for group in groups)
    return [accuracy, " / ".join(f"{group[0]['teacher_accuracy']:.3f}" for group in groups)]


def more_pairs(lines: Lines) -> str:
    methods = sorted({line["run"]["method"] for line in select(lines, "pairs")}, key=[*METHODS].index)
    rows = []
    for task, pair in MORE_PAIRS:
        groups = [select(lines, "pairs", method=method, task=task, pair=pair) for method in methods]
        rows.append([f"{task}, `{pair}`", *map(spread, groups), seeds(groups)])
    return table(["task, pair", *(f"`{method}`" for method in methods), "n"], rows)


def again(lines: Lines) -> str:
    rows = []
    for task in HOME:
        first, second = select(lines, "headline", method="dpca", task=task), select(lines, "again", task=task)
        if first and second:
            low, high = (f(map(share, first)) for f in (min, max))
            inside = low <= median(second, share) <= high
            rows.append([task, spread(first), spread(second), seeds([second]), "yes" if inside else "no"])
    return table(["task", "first", "again, other seeds", "n", "its median lies within the first's spread"], rows)


def worlds(lines: Lines) -> str:
    rows = {}
    for line in lines:
        if "error" not in line:
            run, tokens = line["run"], line["parameters"]
            name = (run["task"], run["pair"], run["teacher"])
            rows[name] = [
                f"{line['teacher_accuracy']:.3f}",
                f"{line['start']:.3f}",
                *(f"{tokens[s] / 1e6:.2f} M" for s in ("teacher", "student")),
            ]
    head = ["task", "pair", "teacher's tokenizer", "teacher", "student's start", "its parameters", "the student's"]
    return table(head, [[*name, *cells] for name, cells in sorted(rows.items())])


def plot(lines: Lines, path: Path) -> None:
    """Every seed of the headline as a dot, the medians as bars."""
    methods = by_merit(lines, METHODS)[::-1]
    size = (12, 0.28 * len(methods) + 1.5)
    figure, [panels] = plt.subplots(1, len(HOME), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, task in zip(panels, HOME, strict=True):
        for place, method in enumerate(methods):
            values = [share(line) for line in select(lines, "headline", method=method, task=task)]
            color = (
                "tab:orange" if method.startswith("dpca") else "tab:gray" if method.startswith("trl") else "tab:blue"
            )
            panel.plot(values, [place] * len(values), "o", color=color, alpha=0.5, markersize=5)
            if values:
                panel.plot([statistics.median(values)] * 2, [place - 0.35, place + 0.35], color=color, linewidth=2.5)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.axvline(1, color="black", linewidth=0.8, linestyle=":")
        panel.set(title=f"{task} ({HOME[task]})", xlabel="share of the gap recovered", xlim=(-1.05, 1.15))
        panel.grid(axis="y", alpha=0.25)
    panels[0].set_yticks(range(len(methods)), methods)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves(lines: Lines, path: Path) -> None:
    """Accuracy over updates and over FLOPs, with `seq_kd`'s long runs."""
    figure, panels = plt.subplots(2, len(HOME), figsize=(12, 7), squeeze=False, layout="constrained")
    for (upper, lower), task in zip(panels.T, HOME, strict=True):
        for color, method in enumerate(DRAWN):
            runs = select(lines, "headline", method=method, task=task)
            if not runs:
                continue
            points = {0: [line["start"] for line in runs]}
            for update in runs[0]["accuracy_curve"]:
                points[int(update)] = [line["accuracy_curve"][update] for line in runs]
            points[runs[0]["run"]["updates"]] = [line["accuracy"] for line in runs]
            middle = [statistics.median(values) for values in points.values()]
            upper.plot([*points], middle, color=f"C{color}", marker=".", label=method)
            extremes = ([f(values) for values in points.values()] for f in (min, max))
            upper.fill_between([*points], *extremes, color=f"C{color}", alpha=0.12, linewidth=0)
            lower.plot(median(runs, flops), middle[-1], "o", color=f"C{color}", label=method)
        spent, accuracies = sequence_curve(lines, task)
        lower.plot(spent[1:], accuracies[1:], color="black", marker=".", linewidth=1, label="seq_kd, 160 updates")
        for line in select(lines, "headline", task=task)[:1]:
            upper.axhline(line["teacher_accuracy"], color="black", linewidth=0.8, linestyle=":")
        upper.set(title=f"{task} ({HOME[task]})", xlabel="updates", ylim=(-0.02, 1.03))
        lower.set(xlabel="FLOPs of teacher and student", xscale="log", ylim=(-0.02, 1.03))
        lower.xaxis.set_minor_formatter(NullFormatter())
        for panel in (upper, lower):
            panel.grid(alpha=0.25)
    panels[0, 0].set_ylabel("greedy accuracy, held-out")
    panels[1, 0].set_ylabel("greedy accuracy, held-out")
    panels[0, -1].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def fill(path: Path, blocks: dict[str, str], marker: str = "quality") -> None:
    """Replaces the text between the markers of each block that the file has."""
    text = path.read_text()
    for name, block in blocks.items():
        pattern = rf"(<!-- {marker}: {re.escape(name)} -->\n).*?(<!-- /{marker} -->)"
        text = re.sub(pattern, lambda found, block=block: f"{found[1]}\n{block}\n\n{found[2]}", text, flags=re.DOTALL)
    path.write_text(text)


def blocks(lines: Lines, gradient: dict, plan: Plan, found: dict[str, dict]) -> dict[str, str]:
    return {
        "short": short(lines),
        "worlds": worlds(lines),
        "table 1": headline(lines),
        "table 2": credit(lines, gradient),
        "table 3": alignment(lines),
        "table 4": coverage(lines),
        "table 5": off_policy(lines),
        "table 7": same(lines),
        "pairs": more_pairs(lines),
        "again": again(lines),
        "rates": rates(plan, found),
        "refused": refused(lines),
        "steps": steps(lines),
        "common rate": common_rate(lines, plan.scale.learning_rates[0]),
        "noise": _kept("noise.json", noise),
    }


def refused(lines: Lines) -> str:
    errors = {}
    for line in lines:
        if "error" in line:
            errors.setdefault((line["run"]["method"], line["run"]["task"]), line["error"])
    return "\n".join(f"- `{method}` on {task}: {error}" for (method, task), error in sorted(errors.items())) or "None."


def main(scale: str) -> None:
    suffix = "" if scale == "cpu" else f"_{scale}"
    found = read(results_file(scale))
    plan = Plan(SCALES[scale])
    wanted = {key(scale, run) for run in plan.runs(STAGES, found) if run is not None}
    lines = [line for own, line in found.items() if own in wanted]  # the others had a learning rate that was not chosen
    drawn = {line["run"]["task"] for line in select(lines, "curve")}
    # long runs are expensive: one at such a rate is used until there is a better one
    lines += [line for line in select(found.values(), "curve") if line["run"]["task"] not in drawn]
    gradient = json.loads((RESULTS / "gradient.json").read_text())["gradients"]
    made = blocks(lines, gradient, plan, found)
    if scale == "cpu":
        fill(PAGE, made)
        fill(SHORT, {"short": made["short"]})
    else:
        (RESULTS / f"report{suffix}.md").write_text("\n\n".join(f"## {name}\n\n{text}" for name, text in made.items()))
    plot(lines, RESULTS / f"headline{suffix}.png")
    curves(lines, RESULTS / f"curves{suffix}.png")
    minutes = sum(line["all_cpu_seconds"] for line in found.values()) / 60
    print(f"{len(found)} runs, {len(lines)} of them in the tables, {minutes:.0f} CPU minutes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    main(parser.parse_args().scale)
