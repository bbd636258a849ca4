"""
How a step of `CrossTokenizerGKDTrainer` (`dpca`) grows with the length of the completions, the number of prompts and the
rows of both vocabularies, beside TRL's `GOLDTrainer`.

    CTOPD_ASSETS=<folder> python -m benchmarks.speed.scaling    # from the repository root

Writes `scaling.json` and `scaling.png` to `benchmarks/results/speed/`. The folder holds `datasets/gsm8k/train.jsonl`.
`--quick` does the same with small sizes, to test that it runs.

Decisions:
- Only one size grows at a time, from `BASE`. Models, trainers and what is timed are those of `step.py` (see `models.py`), on
  the CPU in float32. All prompts are one micro-batch.
- The tokenizers stay small (1,000 and 2,000 entries), so the text is the same at every number of rows. Further rows are
  computed and cannot be sampled.
- GOLD takes part up to `LONGEST_OF_GOLD` tokens: its step grows with the square of the length.
- A point is the fastest of `REPEATS` steps after one that does not count, since other work on the machine only adds time.
- An exponent is the slope of the logarithms: 1 is proportional growth. It holds for this range only. Costs that are the same
  at every size (prompt, layers, calls) lower it, attention raises it.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from benchmarks.clock import Step
from benchmarks.report import assets_folder, header, save
from benchmarks.speed.models import Gold, Ours, Setting, conversations, quiet, small


matplotlib.use("Agg")
from matplotlib import pyplot as plt


RESULTS = Path(__file__).parents[1] / "results" / "speed"
BASE = {"new_tokens": 128, "batch": 4, "rows": (32_768, 32_768), "accumulation": 1}
QUICK = {"new_tokens": 8, "batch": 1, "rows": (4_096, 4_096), "accumulation": 1}
AXES = {  # name: what it sets, values, values with --quick
    "completion length, tokens": (lambda n: {"new_tokens": n}, (64, 128, 256, 512), (8, 16)),
    "prompts": (lambda n: {"batch": n}, (2, 4, 8, 16), (1, 2)),
    "vocabulary rows": (lambda n: {"rows": (n, n)}, (8_192, 32_768, 131_072), (4_096, 8_192)),
}
SIDES: dict[str, Callable] = {"ours": Ours, "gold": Gold}
REPEATS = 3
LONGEST_OF_GOLD = 256


def fastest(build: Callable, setting: Setting, assets: Path, folder: Path, repeats: int) -> Step:
    side = build(setting, conversations(assets, setting.prompts), folder)
    side.run()
    steps = [side.run() for _ in range(repeats)]
    written = setting.prompts * setting.new_tokens
    if any(step.tokens["written"] != written for step in steps):
        raise RuntimeError(f"A step wrote {[step.tokens['written'] for step in steps]} tokens, expected {written}.")
    return min(steps, key=lambda step: step.seconds)


def sweep(build: Callable, settings: list[Setting], assets: Path, folder: Path, repeats: int) -> dict:
    """Seconds of a step and of its phases at each setting."""
    steps = []
    for setting in tqdm(settings, leave=False):
        steps.append(fastest(build, setting, assets, folder, repeats))
        gc.collect()
    names = dict.fromkeys(name for step in steps for name in step.phases)
    return {
        "seconds": [step.seconds for step in steps],
        "tokens": [step.tokens for step in steps],
        "phases": {name: [step.phases.get(name, 0.0) for step in steps] for name in names},
    }


def exponent(sizes: list[int], seconds: list[float]) -> float | None:
    """The slope of log seconds over log size."""
    if min(seconds) <= 0:
        return None
    return round(float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0]), 3)


def measure(base: Setting, change: Callable[[int], dict], sizes: list[int], assets: Path, folder: Path, repeats: int):
    settings = {size: replace(base, **change(size)) for size in sizes}
    result = {}
    for name, build in SIDES.items():
        own = {n: s for n, s in settings.items() if name == "ours" or s.new_tokens <= LONGEST_OF_GOLD}
        found = {"sizes": list(own), **sweep(build, list(own.values()), assets, folder, repeats)}
        parts = {"total": found["seconds"], **found["phases"]}
        result[name] = found | {"exponents": {part: exponent(found["sizes"], times) for part, times in parts.items()}}
    return result


def show(results: dict[str, dict]) -> None:
    parts = list(dict.fromkeys(p for result in results.values() for side in SIDES for p in result[side]["exponents"]))
    table = Table("grows", "side", "s a step", *parts, title="Seconds of a step, and exponents of its growth")
    for axis, result in results.items():
        for side in SIDES:
            found = result[side]["exponents"]
            cells = ["" if found.get(part) is None else f"{found[part]:.2f}" for part in parts]
            seconds = f"{result[side]['seconds'][0]:.2f} to {result[side]['seconds'][-1]:.2f}"
            table.add_row(axis, side, seconds, *cells)
    Console(width=140).print(table)


def plot(results: dict[str, dict], path: Path) -> None:
    figure, panels = plt.subplots(1, len(results), figsize=(4.4 * len(results), 5.2), layout="constrained")
    for axes, (axis, result) in zip(panels, results.items(), strict=True):
        ours, gold = result["ours"], result["gold"]
        sizes = ours["sizes"]
        for name, seconds in ours["phases"].items():
            if max(seconds) > 0.005 * max(ours["seconds"]):
                label = f"{name} ({ours['exponents'][name]})"
                axes.plot(sizes, seconds, marker=".", linewidth=1, label=label)
        total = {"color": "black", "linewidth": 2}
        axes.plot(sizes, ours["seconds"], marker="o", label=f"a step ({ours['exponents']['total']})", **total)
        label = f"GOLD's step ({gold['exponents']['total']})"
        axes.plot(gold["sizes"], gold["seconds"], marker="o", linestyle="--", label=label, **total)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.suptitle("Growth of a step and of its phases (exponent)")
    figure.savefig(path, dpi=120)


def main(assets: Path, output: Path, quick: bool) -> None:
    report = header()
    quiet()
    base, repeats = (QUICK, 2) if quick else (BASE, REPEATS)
    report |= {"base": base, "repeats": repeats, "results": {}}
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(small(assets, Path(folder)), **base)
        report["shape"] = setting.shapes[0]
        for axis, (change, sizes, few) in tqdm(AXES.items()):
            sizes = list(few if quick else sizes)
            report["results"][axis] = measure(setting, change, sizes, assets, Path(folder), repeats)
    save(output, report)
    plot(report["results"], output.with_suffix(".png"))
    show(report["results"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json")
    arguments = parser.parse_args()
    main(assets_folder(parser), arguments.output, arguments.quick)
