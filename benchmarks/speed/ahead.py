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

from benchmarks.speed.models import NARROW, WIDE
from benchmarks.speed.threads import Options, program


SHAPES = {"narrow": (NARROW, NARROW), "wide": (WIDE, WIDE)}


def batches(gpu: bool) -> tuple[int, int]:
    return (2, 2) if gpu else (4, 2)


def options(gpu: bool) -> Options:
    return {"due": {}, "ahead": {"async_rollouts": 1, "generation_device": "cuda:1" if gpu else "cpu"}}


if __name__ == "__main__":
    program(__doc__, "ahead", 6, batches, SHAPES, options, {"seconds_hidden": "sampling/seconds_hidden"})
