"""
One side of `real_pair.py`, in a process of its own: a trainer on a pretrained pair, which takes a step for each line of its
input and prints what it cost. `PYTHONPATH` says which version of this repository it is.

All its times but `wall` are processor time, those that the trainer logs included: `time.perf_counter` is replaced before
anything reads it.
"""

import json
import sys
import tempfile
import time
from pathlib import Path


wall = time.perf_counter
time.perf_counter = time.process_time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.speed.models import Gold, Ours, Setting, quiet


class Pair(Setting):
    """Pretrained models in place of random ones."""

    def tokenizer(self, side: int) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.tokenizers[side])

    def model(self, side: int) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.tokenizers[side], dtype=self.dtype)


def main(side: str, student: str, teacher: str, questions: str, new_tokens: int, generations: int) -> None:
    quiet()
    torch.set_num_threads(1)
    rows = [(row["question"], row["answer"]) for row in json.loads(questions)]
    completions = len(rows) * generations
    sizes = {"new_tokens": new_tokens, "lora": True, "hybrid": False, "accumulation": 2}
    with tempfile.TemporaryDirectory() as folder:
        folder, paths = Path(folder), (Path(student), Path(teacher))
        if side == "gold":
            setting = Pair(paths, (0, 0), batch=completions // 2, **sizes)
            trainer = Gold(setting, [row for row in rows for _ in range(generations)], folder)
        else:
            setting = Pair(paths, (0, 0), batch=len(rows) // 2, **sizes)
            options = {"teacher_overlap": True} if side == "beside" else {}  # an earlier version does not have it
            trainer = Ours(setting, rows, folder, num_generations=generations, **options)
        print("ready", flush=True)
        for _ in sys.stdin:
            start = wall()
            step = trainer.run()
            found = {"wall": wall() - start, "cpu": step.cpu_seconds, "phases": step.phases, "tokens": step.tokens}
            print(json.dumps({**found, "peak_mib": step.peak_mib}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5], *map(int, sys.argv[5:7]))
