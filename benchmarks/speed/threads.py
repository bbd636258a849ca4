"""Two runs of our trainer, of which one does in a second thread what the other does in the first.

A round is a whole run of a few steps on each side, in turns. Both sides are built first and take one run each that does not count. A
ratio is the median of the rounds' ratios. Wall time says something on a quiet machine alone; the load before is recorded. The processor
time of the main thread does not depend on other work: with free devices a step takes at least that.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.clock import Step
from benchmarks.report import assets_folder, header, save
from benchmarks.speed.models import LLAMA_1B, QWEN_7B, ROWS_1B_7B, Ours, Setting, conversations, published, quiet, small


RESULTS = Path(__file__).parents[1] / "results" / "speed"
Options = dict[str, dict]  # the settings of each side, by its name


def ratio(own: list[float], other: list[float]) -> dict[str, float]:
    ratios = [one / two for one, two in zip(own, other, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def summary(steps: list[Step], main_thread: list[float], count: int) -> dict:
    return {
        "main_thread_cpu_seconds_a_step": statistics.median(main_thread) / count,
        "seconds_a_step": statistics.median(step.seconds / count for step in steps),
        "cpu_seconds_a_step": statistics.median(step.cpu_seconds / count for step in steps),
        "phases": {name: statistics.median(step.phases.get(name, 0.0) for step in steps) for name in steps[0].phases},
    }


def settings(
    gpu: bool, assets: Path, folder: Path, tokens: int, batches: tuple[int, int], shapes: dict[str, tuple[dict, dict]]
) -> dict[str, Setting]:
    """`batches`: prompts in a micro-batch, and micro-batches. `shapes`: of the student and the teacher on a CPU, by name."""
    if gpu:
        sizes = {"shapes": (LLAMA_1B, QWEN_7B), "lora": True, "device": "cuda", "dtype": torch.bfloat16}
        return {"1B and 7B": Setting(published(assets), ROWS_1B_7B, tokens, *batches, **sizes)}
    tokenizers = small(assets, folder)
    return {name: Setting(tokenizers, (1_024, 2_048), tokens, *batches, pair) for name, pair in shapes.items()}


def measured(
    setting: Setting,
    assets: Path,
    folder: Path,
    rounds: int,
    count: int,
    options: dict[str, dict],
    logged: dict[str, str] | None = None,
) -> dict:
    """
    Args:
        count: steps of a run.
        options: the two sides by name, each with its settings.
        logged: figures of the second side's log that are reported, each by the name under which it is logged.
    """
    texts = conversations(assets, setting.prompts * count)
    one, two = options
    common = {"event": "open", "logging_steps": count}
    sides = {name: Ours(setting, texts, folder / name, **common, **own) for name, own in options.items()}
    steps: dict[str, list[Step]] = {name: [] for name in sides}
    main_thread: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, list[float]] = {name: [] for name in logged or {}}
    for number in range(rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            begin = time.thread_time()
            step = sides[name].run()
            if number:
                main_thread[name].append(time.thread_time() - begin)
                steps[name].append(step)
                for figure in found if name == two else ():
                    found[figure].append(sides[name].log[logged[figure]])
    seconds = {name: [step.seconds for step in own] for name, own in steps.items()}
    return {
        **{name: summary(own, main_thread[name], count) for name, own in steps.items()},
        **{name: statistics.median(own) for name, own in found.items()},
        f"{two} over {one}, wall": ratio(seconds[two], seconds[one]),
        f"{two} over {one}, main thread": ratio(main_thread[two], main_thread[one]),
    }


def tell(name: str, found: dict, one: str, two: str) -> None:
    for clock, key in (("wall", "seconds_a_step"), ("main thread", "main_thread_cpu_seconds_a_step")):
        own = found[f"{two} over {one}, {clock}"]
        print(
            f"{name}, {clock}: {found[one][key]:.2f} s a step, {two} {found[two][key]:.2f}: "
            f"{own['median']:.2f} ({own['least']:.2f} to {own['most']:.2f})",
            flush=True,
        )


def program(
    doc: str,
    name: str,
    steps: int,
    batches: Callable[[bool], tuple[int, int]],
    shapes: dict[str, tuple[dict, dict]],
    options: Callable[[bool], Options],
    logged: dict[str, str] | None = None,
) -> None:
    """
    The command of a benchmark, which writes `name`.json, or with `--gpu` `name`_gpu.json.

    Args:
        steps: of a run, by default.
        batches, shapes: as for `settings`; the first of whether there is a GPU.
        options, logged: as for `measured`; the first of whether there is a GPU.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each completion")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet()
    if not given.gpu:
        torch.set_num_threads(1)
    assets, sizes, sides = assets_folder(parser), batches(given.gpu), options(given.gpu)
    report = header() | {"rounds": given.rounds, "steps": given.steps, "new_tokens": given.tokens}
    report |= {"completions": sizes[0] * sizes[1], "results": {}}
    with tempfile.TemporaryDirectory() as folder:
        for case, setting in settings(given.gpu, assets, Path(folder), given.tokens, sizes, shapes).items():
            found = measured(setting, assets, Path(folder) / case, given.rounds, given.steps, sides, logged)
            report["results"][case] = found
            tell(case, found, *sides)
    save(given.output or RESULTS / f"{name}{'_gpu' * given.gpu}.json", report)
