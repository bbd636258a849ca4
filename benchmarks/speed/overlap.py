"""
What it saves that the teacher reads in a thread of its own (`teacher_overlap`): a run with it and one without, in turns.

    CTOPD_ASSETS=<folder> python -m benchmarks.speed.overlap              # from the repository root; two cores of a CPU
    CTOPD_ASSETS=<folder> python -m benchmarks.speed.overlap --gpu        # on one GPU, which both share, each on a stream of its own

Writes `overlap.json` (`overlap_gpu.json`) to `benchmarks/results/speed/`. The folder holds `datasets/gsm8k/train.jsonl`, and for `--gpu`
`tokenizers/llama-3.2` and `tokenizers/qwen2.5`.

Decisions:
- Models have random weights and write text of full length, as in `models.py`, in four micro-batches of two prompts. On the CPU torch has
  one thread, so that learning takes one core and the teacher another. How times are taken is in `threads.py`.
- On the CPU the student is `WIDE`, and its teacher the same or some six times as large.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch

from benchmarks.report import assets_folder, header, save
from benchmarks.speed.models import (
    LLAMA_1B,
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
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 9, "num_attention_heads": 12} | {
    "num_key_value_heads": 6,
    "tie_word_embeddings": True,
}
BATCH, ACCUMULATION = 2, 4
SIDES = {"in turn": {"teacher_overlap": False}, "beside": {"teacher_overlap": True}}


def settings(gpu: bool, assets: Path, folder: Path, tokens: int) -> dict[str, Setting]:
    sizes = tokens, BATCH, ACCUMULATION
    if gpu:
        own = {"shapes": (LLAMA_1B, QWEN_7B), "lora": True, "device": "cuda", "dtype": torch.bfloat16}
        return {"1B and 7B": Setting(published(assets), ROWS_1B_7B, *sizes, **own)}
    tokenizers = small(assets, folder)
    return {
        name: Setting(tokenizers, (1_024, 2_048), *sizes, (WIDE, shape))
        for name, shape in {"a teacher of the student's size": WIDE, "a larger teacher": LARGE}.items()
    }


def main(gpu: bool, assets: Path, output: Path, rounds: int, count: int, tokens: int) -> None:
    report = header() | {"rounds": rounds, "steps": count, "new_tokens": tokens, "completions": BATCH * ACCUMULATION}
    report["results"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, setting in settings(gpu, assets, Path(folder), tokens).items():
            found = measured(setting, assets, Path(folder) / name, rounds, count, SIDES)
            report["results"][name] = found
            tell(name, found, *SIDES)
    save(output, report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each completion")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet()
    if not given.gpu:
        torch.set_num_threads(1)
    path = given.output or RESULTS / ("overlap_gpu.json" if given.gpu else "overlap.json")
    main(given.gpu, assets_folder(parser), path, given.rounds, given.steps, given.tokens)
