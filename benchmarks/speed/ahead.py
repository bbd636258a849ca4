"""
What writing one step ahead (`async_rollouts=1`) saves: a run with it and one without, in turns.

    CTOPD_ASSETS=<folder> python -m benchmarks.speed.ahead              # from the repository root; two cores of a CPU
    CTOPD_ASSETS=<folder> python -m benchmarks.speed.ahead --gpu        # on two GPUs

Writes `ahead.json` (`ahead_gpu.json`) to `benchmarks/results/speed/`. The folder holds `datasets/gsm8k/train.jsonl`, and for `--gpu`
`tokenizers/llama-3.2` and `tokenizers/qwen2.5`.

Decisions:
- Models have random weights and write text of full length, as in `models.py`. On the CPU torch has one thread, so that learning takes
  one core and writing another.
- A round is a whole run of a few steps on each side, the text of the first step included, which nothing hides. Both sides are built
  first and take one run each that does not count. A ratio is the median of the rounds' ratios.
- Wall time says something on a quiet machine alone; the load before is recorded. The processor time of the main thread does not
  depend on other work. With free devices a step takes at least that, which is what a step without writing would take.
- `narrow` models spend their time in the Python interpreter, which the two threads share; `wide` ones in matrix products, which they
  do not.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.clock import Step
from benchmarks.report import assets_folder, header, save
from benchmarks.speed.models import (
    LLAMA_1B,
    NARROW,
    QWEN_7B,
    ROWS_1B_7B,
    Ours,
    Setting,
    conversations,
    published,
    quiet,
    small,
)


RESULTS = Path(__file__).parents[1] / "results" / "speed"
WIDE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6} | {
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def settings(gpu: bool, assets: Path, folder: Path, tokens: int) -> dict[str, Setting]:
    if gpu:
        sizes = {"shapes": (LLAMA_1B, QWEN_7B), "lora": True, "device": "cuda", "dtype": torch.bfloat16}
        return {"1B and 7B": Setting(published(assets), ROWS_1B_7B, tokens, 2, 2, **sizes)}
    tokenizers = small(assets, folder)
    return {
        name: Setting(tokenizers, (1_024, 2_048), tokens, 4, 2, (shape, shape))
        for name, shape in {"narrow": NARROW, "wide": WIDE}.items()
    }


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


def measure(setting: Setting, assets: Path, folder: Path, rounds: int, count: int, device: str) -> dict:
    texts = conversations(assets, setting.prompts * count)
    options = {"event": "open", "logging_steps": count}
    sides = {
        "due": Ours(setting, texts, folder / "due", **options),
        "ahead": Ours(setting, texts, folder / "ahead", async_rollouts=1, generation_device=device, **options),
    }
    steps: dict[str, list[Step]] = {name: [] for name in sides}
    main_thread: dict[str, list[float]] = {name: [] for name in sides}
    hidden = []
    for number in range(rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            begin = time.thread_time()
            step = sides[name].run()
            if number:
                main_thread[name].append(time.thread_time() - begin)
                steps[name].append(step)
                hidden += [sides[name].log["sampling/seconds_hidden"]] if name == "ahead" else []
    seconds = {name: [step.seconds for step in own] for name, own in steps.items()}
    return {
        **{name: summary(own, main_thread[name], count) for name, own in steps.items()},
        "seconds_hidden": statistics.median(hidden),
        "ahead over due, wall": ratio(seconds["ahead"], seconds["due"]),
        "ahead over due, main thread": ratio(main_thread["ahead"], main_thread["due"]),
    }


def main(gpu: bool, assets: Path, output: Path, rounds: int, count: int, tokens: int) -> None:
    report = header() | {"rounds": rounds, "steps": count, "new_tokens": tokens, "completions": 4 if gpu else 8}
    report["results"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, setting in settings(gpu, assets, Path(folder), tokens).items():
            found = measure(setting, assets, Path(folder) / name, rounds, count, "cuda:1" if gpu else "cpu")
            report["results"][name] = found
            for measured, key in (("wall", "seconds_a_step"), ("main thread", "main_thread_cpu_seconds_a_step")):
                own = found[f"ahead over due, {measured}"]
                print(
                    f"{name}, {measured}: {found['due'][key]:.2f} s a step, ahead {found['ahead'][key]:.2f}: "
                    f"{own['median']:.2f} ({own['least']:.2f} to {own['most']:.2f})",
                    flush=True,
                )
    save(output, report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each completion")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet()
    if not given.gpu:
        torch.set_num_threads(1)
    path = given.output or RESULTS / ("ahead_gpu.json" if given.gpu else "ahead.json")
    main(given.gpu, assets_folder(parser), path, given.rounds, given.steps, given.tokens)
