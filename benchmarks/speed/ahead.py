"""
What writing one step ahead (`async_rollouts=1`) saves: a run with it and one without, in turns.

    CTOPD_ASSETS=<folder> python -m benchmarks.speed.ahead              # from the repository root; two cores of a CPU
    CTOPD_ASSETS=<folder> python -m benchmarks.speed.ahead --gpu        # on two GPUs

Writes `ahead.json` (`ahead_gpu.json`) to `benchmarks/results/speed/`. The folder holds `datasets/gsm8k/train.jsonl`, and for `--gpu`
`tokenizers/llama-3.2` and `tokenizers/qwen2.5`.

Decisions:
- Models have random weights and write text of full length, as in `models.py`. On the CPU torch has one thread, so that learning takes
  one core and writing another.
- The text of a run's first step is included, which nothing hides. The rest is in `threads.py`.
- `narrow` models spend their time in the Python interpreter, which the two threads share; `wide` ones in matrix products, which they
  do not.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch

from benchmarks.report import assets_folder, header, save
from benchmarks.speed.models import (
    LLAMA_1B,
    NARROW,
    QWEN_7B,
    ROWS_1B_7B,
    WIDE,
    Setting,
    published,
    quiet,
    small,
)
from benchmarks.speed.threads import measured, tell


RESULTS = Path(__file__).parents[1] / "results" / "speed"


def settings(gpu: bool, assets: Path, folder: Path, tokens: int) -> dict[str, Setting]:
    if gpu:
        sizes = {"shapes": (LLAMA_1B, QWEN_7B), "lora": True, "device": "cuda", "dtype": torch.bfloat16}
        return {"1B and 7B": Setting(published(assets), ROWS_1B_7B, tokens, 2, 2, **sizes)}
    tokenizers = small(assets, folder)
    return {
        name: Setting(tokenizers, (1_024, 2_048), tokens, 4, 2, (shape, shape))
        for name, shape in {"narrow": NARROW, "wide": WIDE}.items()
    }


def measure(setting: Setting, assets: Path, folder: Path, rounds: int, count: int, device: str) -> dict:
    sides = {"due": {}, "ahead": {"async_rollouts": 1, "generation_device": device}}
    return measured(setting, assets, folder, rounds, count, sides, {"seconds_hidden": "sampling/seconds_hidden"})


def main(gpu: bool, assets: Path, output: Path, rounds: int, count: int, tokens: int) -> None:
    report = header() | {"rounds": rounds, "steps": count, "new_tokens": tokens, "completions": 4 if gpu else 8}
    report["results"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, setting in settings(gpu, assets, Path(folder), tokens).items():
            found = measure(setting, assets, Path(folder) / name, rounds, count, "cuda:1" if gpu else "cpu")
            report["results"][name] = found
            tell(name, found, "due", "ahead")
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
