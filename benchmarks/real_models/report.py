"""The tables and the picture of docs/real_models.md, from the lines of `run.py`, and the tasks solved from what `solved.py` has saved.

    python -m benchmarks.real_models.report       # from the repository root

A gap is Σ nats / Σ bytes over the held-out prompts. Its standard error, and that of a difference, is over prompts by linearization:
methods answer the same prompts, so what a prompt adds to both cancels in their difference. Seeds are averaged for each prompt first.
Nats an answer are Σ nats over a prompt's answer, its end included: the reverse KL of whole texts, as far as answers are written.
CPU seconds are those of one processor, with one library for its products: the one that made the most runs of a table. Those of runs on
another count as unknown.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib


matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from demo_real.measuring import ratio

from benchmarks.quality.report import fill
from benchmarks.quality.run import read

from . import solved
from .data import DATASETS
from .run import METHODS, PAIRS, RESULTS, UPDATES


PAGE = Path(__file__).parents[2] / "docs" / "real_models.md"
DEFAULT, HOME = "reverse_kl", "smollm2<-qwen"
EARLY_RATE = 1e-3  # of the short runs that are compared
NAMES = {
    "start": "untrained",
    "reverse_kl": "`reverse_kl` (the default)",
    "dpca": "`dpca`, closed chunks",
    "dpca_open": '`dpca`, `event="open"`',
    "sft": "`sft` on references",
    "seq_kd": "`seq_kd`",
    "trl_gold_off": "TRL's GOLD on references",
    "trl_gold_on": "TRL's GOLD on-policy, hybrid",
}


TITLES = {
    "mbpp": "## Programming tasks (MBPP)",
    "text": "## Plain text\n\nThe first 40 words of paragraphs of Wikipedia, continued without a chat template.",
    "gsm8k": "## Word problems (GSM8K's questions)",
}
PAIR_TITLES = {
    "qwen<-smollm2": "The pair in the other direction, on programming tasks: Qwen2.5-Coder-0.5B-Instruct learns from SmolLM2.",
    "smollm2-4bit<-smollm2": "One tokenizer: SmolLM2, rounded to four bits, learns from itself as it was, on programming tasks.",
}


@dataclass
class Point:
    """The gap after some updates, each prompt's part of its error, each prompt's nats, and the means over seeds of what else was measured.
    `cpu_seconds` are NaN where another processor than the table's took them."""

    gap: float
    parts: np.ndarray
    cpu_seconds: float
    entropy: float
    mean_length: float
    truncated_fraction: float
    answers: np.ndarray
    seeds: int
    rate: float

    @property
    def error(self) -> float:
        return error(self.parts)

    @property
    def nats(self) -> str:
        return _with_error(self.answers)


Curve = dict[int, Point]  # by the number of updates
BySeed = dict[int, Curve]


def error(parts: np.ndarray) -> float:
    return parts.std(ddof=1) / math.sqrt(len(parts))


def parts(rows: Sequence[tuple[float, int]]) -> np.ndarray:
    """(x − r y) / mean y of each row, with r = Σx / Σy: their mean is 0, and their standard error that of r."""
    nats, sizes = np.array(rows, float).T
    return (nats - nats.sum() / sizes.sum() * sizes) / sizes.mean()


def curves(lines: Sequence[dict], dataset: str, pair: str = HOME) -> dict[str, BySeed]:
    """Each method's curves, in the order of the methods, at the rate with the smallest mean gap after 12 updates on the seeds that its
    rates share. Among rates that are no worse than that by more than the error of the difference, the one with the most seeds."""
    found = {}
    for method, by_rate in curves_by_rate(lines, dataset, pair).items():
        tried = {rate: averaged(by_seed)[UPDATES] for rate, by_seed in on_common_seeds(by_rate).items()}
        order = sorted(tried, key=lambda rate: tried[rate].gap) or [*by_rate]
        level = [rate for rate in order if rate not in tried or _is_level(tried[rate], tried[order[0]])]
        found[method] = by_rate[max(level, key=lambda rate: len(by_rate[rate]))]
    return found


def _is_level(point: Point, best: Point) -> bool:
    return point.gap - best.gap <= error(point.parts - best.parts)


def on_common_seeds(by_rate: dict[float, BySeed]) -> dict[float, BySeed]:
    """What was measured after 12 updates, of the seeds that all rates have; of all seeds where the rates share none."""
    measured = {
        rate: {seed: curve for seed, curve in by_seed.items() if UPDATES in curve} for rate, by_seed in by_rate.items()
    }
    measured = {rate: by_seed for rate, by_seed in measured.items() if by_seed}
    seeds = set.intersection(*map(set, measured.values())) if measured else set()
    return {
        rate: {seed: curve for seed, curve in by_seed.items() if seed in seeds or not seeds}
        for rate, by_seed in measured.items()
    }


def curves_by_rate(lines: Sequence[dict], dataset: str, pair: str = HOME) -> dict[str, dict[float, BySeed]]:
    """By method and learning rate. Of a seed that was run twice, the longer run."""
    found: dict[str, dict[float, BySeed]] = {}
    timed = processor(lines, dataset, pair)
    for method in ("start", *METHODS):
        wanted = {"method": method, "dataset": dataset, "pair": pair}
        own = [line for line in lines if "error" not in line and all(line["run"][k] == v for k, v in wanted.items())]
        for line in sorted(own, key=lambda line: (-line["run"]["learning_rate"], line["run"]["updates"])):
            rate, seed = line["run"]["learning_rate"], line["run"]["seed"]
            comparable = _machine(line) == timed
            curve = {int(step): _point(point, rate, comparable) for step, point in line["curve"].items()}
            found.setdefault(method, {}).setdefault(rate, {})[seed] = curve
    return found


def processor(lines: Sequence[dict], dataset: str, pair: str = HOME) -> str | None:
    """The `_machine` that made the most runs of a data set and a pair with the default, or else with any method. Its CPU seconds are
    compared."""
    of_pair = [
        line
        for line in lines
        if line["run"]["dataset"] == dataset and line["run"]["pair"] == pair and line["run"]["updates"]
    ]
    made = Counter(map(_machine, of_pair))
    own = Counter(_machine(line) for line in of_pair if line["run"]["method"] == DEFAULT)
    return max(made, key=lambda machine: (own[machine], made[machine]), default=None)


def _machine(line: dict) -> str:
    """Its processor, and the library for its products where that is not torch's own choice."""
    machine = line["machine"]
    library = machine.get("products", "torch's own")
    return machine["cpu"] if library == "torch's own" else f"{machine['cpu']} with {library}"


def _point(measured: dict, rate: float, comparable: bool) -> Point:
    rest = (measured[name] for name in ("entropy", "mean_length", "truncated_fraction"))
    seconds = measured["cpu_seconds"] if comparable or not measured["cpu_seconds"] else math.nan
    return Point(
        ratio(measured["rows"])[0],
        parts(measured["rows"]),
        seconds,
        *rest,
        np.array(measured["rows"], float)[:, 0],
        1,
        rate,
    )


def mean(points: Sequence[Point]) -> Point:
    """Of several seeds. What a prompt adds is averaged before the error is taken."""
    columns = zip(*map(_values, points), strict=True)
    found = Point(*(sum(column) / len(points) for column in columns), len(points), points[0].rate)
    timed = [point.cpu_seconds for point in points if not math.isnan(point.cpu_seconds)]
    return replace(found, cpu_seconds=sum(timed) / len(timed) if timed else math.nan)


def averaged(by_seed: BySeed) -> Curve:
    """Each step's mean over the seeds that were measured there."""
    steps = sorted({step for curve in by_seed.values() for step in curve})
    return {step: mean([curve[step] for curve in by_seed.values() if step in curve]) for step in steps}


def at_cpu_seconds(curve: Curve, start: Point, seconds: float) -> tuple[Point, bool]:
    """The point at `seconds` of training on the line between the measured ones; else the last, and whether it comes before."""
    points = [start, *curve.values()]
    for before, after in zip(points[:-1], points[1:], strict=True):
        if seconds <= after.cpu_seconds:
            share = (seconds - before.cpu_seconds) / (after.cpu_seconds - before.cpu_seconds)
            mixed = [(1 - share) * a + share * b for a, b in zip(_values(before), _values(after), strict=True)]
            return Point(*mixed, after.seeds, after.rate), False
    return points[-1], True


def _values(point: Point) -> tuple:
    return (
        point.gap,
        point.parts,
        point.cpu_seconds,
        point.entropy,
        point.mean_length,
        point.truncated_fraction,
        point.answers,
    )


def _steps(found: dict[str, BySeed]) -> list[int]:
    return sorted({step for by_seed in found.values() for curve in by_seed.values() for step in curve} - {0})


def table(found: dict[str, BySeed], timed: str | None) -> str:
    """`timed`: the processor whose CPU seconds these are."""
    steps, last = _steps(found), f"after {UPDATES}"
    timed = _short_name(timed)
    gaps = " | ".join(["gap before", *(f"gap after {step}" for step in steps)])
    rows = [
        f"| | rate | seeds | {gaps} | nats an answer, {last} | CPU seconds ({timed}), {last} | entropy, {last} | tokens | cut off |",
        "|---" * (9 + len(steps)) + "|",
    ]
    for method, by_seed in found.items():
        curve = averaged(by_seed)
        gaps = [f"{curve[step].gap:.3f} ± {curve[step].error:.3f}" if step in curve else "" for step in (0, *steps)]
        point = curve.get(0 if method == "start" else UPDATES)
        if point is None:
            continue
        rows.append(
            f"| {NAMES.get(method, f'`{method}`')} | {_written(point.rate)} | {point.seeds} | {' | '.join(gaps)} | {point.nats} | {_seconds(point)} "
            f"| {point.entropy:.2f} | {point.mean_length:.0f} | {100 * point.truncated_fraction:.0f} % |"
        )
    return "\n".join(rows)


def _with_error(answers: np.ndarray, sign: str = "") -> str:
    return f"{answers.mean():{sign}.1f} ± {error(answers):.1f}"


def _short_name(cpu: str | None) -> str | None:
    return cpu and cpu.replace("(R)", "").replace(" Processor", "")


def _seconds(point: Point) -> str:
    return "" if math.isnan(point.cpu_seconds) else f"{point.cpu_seconds:.0f}"


def _written(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-") if rate else ""


def rates(found: dict[str, dict[float, BySeed]]) -> str:
    """The gap after 12 updates of the methods of which several rates were run, on the seeds that these share."""
    rows = ["| | rate | seeds | gap after 12 |", "|---|---|---|---|"]
    for method, by_rate in found.items():
        points = [averaged(by_seed)[UPDATES] for by_seed in on_common_seeds(by_rate).values()]
        if len(points) > 1:
            rows += [
                f"| {NAMES.get(method, f'`{method}`')} | {_written(point.rate)} | {point.seeds} | {point.gap:.3f} ± {point.error:.3f} |"
                for point in points
            ]
    return "\n".join(rows) if len(rows) > 2 else ""


def beside_the_default(found: dict[str, BySeed]) -> str:
    """Each method's gap minus the default's after 12 updates: after as many updates, after all of its own, and at equal CPU
    seconds, over the seeds that both have. Positive: the default is closer to the teacher."""
    own = {seed: curve[UPDATES] for seed, curve in found[DEFAULT].items()}
    seconds = mean([*own.values()]).cpu_seconds
    start = mean([curve[0] for curve in found["start"].values()])
    steps = _steps(found)
    after = " | ".join(f"after {step} updates" for step in steps)
    rows = [
        f"| gap minus that of the default after {UPDATES} | {after} | at {seconds:.0f} CPU seconds | nats an answer, after {UPDATES} |",
        "|---" * (3 + len(steps)) + "|",
    ]
    for method, by_seed in found.items():
        if method == DEFAULT:
            continue
        if method == "start":
            before = {seed: curve[0] for seed, curve in by_seed.items()}
            rows.append(
                f"| untrained | {_difference(before, own)} |" + " |" * len(steps) + f" {_nats_apart(before, own)} |"
            )
            continue
        cells = [_difference(_at(by_seed, step), own) for step in steps]
        timed = {seed: at_cpu_seconds(curve, start, seconds) for seed, curve in by_seed.items() if _is_timed(curve)}
        early = [point.cpu_seconds for point, is_last in timed.values() if is_last]
        said = f" (its last, at {sum(early) / len(early):.0f})" if early else ""
        cells.append(_difference({seed: point for seed, (point, _) in timed.items()}, own) + said)
        cells.append(_nats_apart(_at(by_seed, UPDATES), own))
        rows.append(f"| {NAMES.get(method, f'`{method}`')} | {' | '.join(cells)} |")
    return "\n".join(rows)


def step_by_step(
    title: str, by_rate: dict[str, dict[float, BySeed]], start: Point, timed: str | None, rate: float
) -> str:
    """The gap after each step at which `DEFAULT` was measured, of the runs at `rate`, and that gap minus `DEFAULT`'s: after as many updates,
    and at the CPU seconds of its last."""
    found = {method: own[rate] for method, own in by_rate.items() if rate in own}
    own = found[DEFAULT]
    steps = _steps({DEFAULT: own})
    seconds = averaged(own)[steps[-1]].cpu_seconds
    gaps = " | ".join(f"gap after {step}" for step in steps)
    beside = " | ".join(f"minus `{DEFAULT}`'s, after {step}" for step in steps)
    nats = f"nats an answer, after {steps[-1]} | minus `{DEFAULT}`'s"
    rows = [
        f"| {title}, rate {_written(rate)} | seeds | {gaps} | CPU seconds ({_short_name(timed)}) | {beside} | at {seconds:.0f} CPU seconds | {nats} |",
        "|---" * (6 + 2 * len(steps)) + "|",
    ]
    for method, by_seed in found.items():
        curve = averaged(by_seed)
        cells = [f"{curve[step].gap:.3f} ± {curve[step].error:.3f}" for step in steps] + [_seconds(curve[steps[-1]])]
        if method == DEFAULT:
            cells += [""] * (len(steps) + 1) + [curve[steps[-1]].nats, ""]
        else:
            cells += [_difference(_at(by_seed, step), _at(own, step)) for step in steps]
            timed = {
                seed: at_cpu_seconds(points, start, seconds)[0] for seed, points in by_seed.items() if _is_timed(points)
            }
            cells.append(_difference(timed, _at(own, steps[-1])))
            cells += [curve[steps[-1]].nats, _nats_apart(_at(by_seed, steps[-1]), _at(own, steps[-1]))]
        rows.append(f"| {NAMES.get(method, f'`{method}`')} | {curve[steps[-1]].seeds} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _at(by_seed: BySeed, step: int) -> dict[int, Point]:
    return {seed: curve[step] for seed, curve in by_seed.items() if step in curve}


def is_short(line: dict) -> bool:
    """Whether it is a run that ended before 12 updates: those have a table of their own."""
    return 0 < line["run"]["updates"] < UPDATES


def _is_timed(curve: Curve) -> bool:
    return not any(math.isnan(point.cpu_seconds) for point in curve.values())


def _difference(points: dict[int, Point], own: dict[int, Point]) -> str:
    """Of the gaps of the seeds that both have, with how many these are."""
    return _apart(points, own, lambda a, b: f"{a.gap - b.gap:+.3f} ± {error(a.parts - b.parts):.3f}")


def _nats_apart(points: dict[int, Point], own: dict[int, Point]) -> str:
    """The same of nats an answer."""
    return _apart(points, own, lambda a, b: _with_error(a.answers - b.answers, "+"))


def _apart(points: dict[int, Point], own: dict[int, Point], written: Callable[[Point, Point], str]) -> str:
    common = [seed for seed in points if seed in own]
    if not common:
        return ""
    found = written(*(mean([side[seed] for seed in common]) for side in (points, own)))
    return found + (f", {len(common)} seeds" if len(common) > 1 else "")


def refused(lines: Sequence[dict]) -> str:
    rows = [
        f"- {line['run']['method']}, {line['run']['dataset']}: {line['error']}" for line in lines if "error" in line
    ]
    return "\n".join(rows) or "None."


def blocks(lines: Sequence[dict], closer: Sequence[dict] = ()) -> dict[str, str]:
    """`closer`: runs on programming tasks that are measured on more prompts than `lines`."""
    made = {"refused": refused(lines)}
    short, lines = ([line for line in lines if is_short(line) == wanted] for wanted in (True, False))
    for pair in PAIRS:
        if pair != HOME and "start" in (found := curves(lines, "mbpp", pair)):
            made[f"mbpp {pair}"] = f"{PAIR_TITLES[pair]}\n\n{table(found, processor(lines, 'mbpp', pair))}"
            start, timed = averaged(found["start"])[0], processor(short, "mbpp", pair)
            by_rate = curves_by_rate(short, "mbpp", pair)
            for rate in by_rate.get(DEFAULT, {}):
                made[f"mbpp {pair} {_written(rate)}"] = step_by_step(pair, by_rate, start, timed, rate)
    for dataset in DATASETS:
        found = curves(lines, dataset)
        if "start" in found:
            made[dataset] = f"{TITLES[dataset]}\n\n{table(found, processor(lines, dataset))}"
            if DEFAULT in found:
                made[f"{dataset} beside the default"] = beside_the_default(found)
            if tried := rates(curves_by_rate(lines, dataset)):
                made[f"{dataset} rates"] = tried
            by_rate = curves_by_rate(short, dataset)
            if DEFAULT in by_rate:
                start = averaged(found["start"])[0]
                title = TITLES[dataset].splitlines()[0].removeprefix("## ")
                made[f"{dataset} early"] = step_by_step(title, by_rate, start, processor(short, dataset), EARLY_RATE)
    if closer:
        by_rate = curves_by_rate(closer, "mbpp")
        start, timed = averaged(by_rate.pop("start")[0.0])[0], processor(closer, "mbpp")
        title = f"{closer[0]['run']['held_out']} held-out prompts"
        for rate in by_rate[DEFAULT]:
            made[f"mbpp closer {_written(rate)}"] = step_by_step(title, by_rate, start, timed, rate)
    return made


def plot(lines: Sequence[dict], path: Path) -> None:
    """The gap over updates and over CPU seconds, a row of two for each data set."""
    lines = [line for line in lines if not is_short(line)]
    shown = {dataset: found for dataset in DATASETS if len(found := curves(lines, dataset)) > 1}
    figure, axes = plt.subplots(
        len(shown), 2, figsize=(11, 3.8 * len(shown)), layout="constrained", sharey="row", squeeze=False
    )
    for row, (dataset, found) in zip(axes, shown.items(), strict=True):
        start = averaged(found.pop("start"))[0]
        for colour, (method, by_seed) in enumerate(found.items()):
            curve = averaged(by_seed)
            points = [start, *curve.values()]
            for side, places in zip(row, ([0, *curve], [point.cpu_seconds for point in points]), strict=True):
                gaps, errors = [point.gap for point in points], [point.error for point in points]
                label = NAMES.get(method, method).replace("`", "")
                side.errorbar(places, gaps, yerr=errors, marker="o", capsize=3, color=f"C{colour}", label=label)
        row[0].set(title=f"{dataset}: held-out gap", xlabel="updates", ylabel="nats a byte", ylim=(0, None))
        row[1].set(title="the same", xlabel="CPU seconds of training")
        row[1].legend(frameon=False, fontsize=8)
        for side in row:
            side.spines[["top", "right"]].set_visible(False)
            side.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "runs.jsonl")
    options = parser.parse_args()
    lines = [*read(options.results).values()]
    closer = [*read(RESULTS / "closer.jsonl").values()]
    tasks = {"solved": solved.table(json.loads(solved.RESULTS.read_text()))}
    fill(PAGE, {**blocks(lines, closer), **tasks}, "real_models")
    plot(lines, RESULTS / "gap.png")
