"""
What an optimizer step costs with open chunks, with closed chunks and with `reverse_kl`, side by side.

    CTOPD_ASSETS=<folder> python -m benchmarks.speed.events     # from the repository root; on the CPU

Writes `events.json` to `benchmarks/results/speed/`. The folder holds `tokenizers/<name>` as published on the hub and
`datasets/gsm8k/train.jsonl`.

Decisions:
- Models have random weights and write text of full length, as in `models.py`. Student and
  teacher are of one shape, as small as fits six of them at once, so that the vocabulary is much of the work: the body has 21M
  weights, the student's head 19M or 58M, the teacher's 49M.
- All three trainers are built first, take one step each that does not count, and then take turns, in an order that turns
  with the round. A ratio is the median of the rounds' ratios of processor time, in which other work on the machine does not
  count.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks.clock import Step
from benchmarks.report import assets_folder, header, save
from benchmarks.speed.models import Ours, Setting, conversations, quiet


RESULTS = Path(__file__).parents[1] / "results" / "speed"
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 6} | {
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SIDES = {
    "dpca, open": {"event": "open", "credit": "semantic"},
    "dpca, closed": {"event": "closed"},
    "reverse_kl": {"distillation_loss": "reverse_kl"},
}
PAIRS = {"49,152 rows": ("smollm2-instruct", "llama-3.2"), "151,936 rows": ("qwen2.5", "llama-3.2")}
ROWS = {"smollm2-instruct": 49_152, "qwen2.5": 151_936, "llama-3.2": 128_256}


def summary(steps: list[Step], to: list[Step]) -> dict:
    """Medians of seconds, and of the ratio of processor time to that of the same round's `to`."""
    ratios = [own.cpu_seconds / other.cpu_seconds for own, other in zip(steps, to, strict=True)]
    return {
        "seconds": statistics.median(step.seconds for step in steps),
        "cpu_seconds": statistics.median(step.cpu_seconds for step in steps),
        "phases": {name: statistics.median(step.phases.get(name, 0.0) for step in steps) for name in steps[0].phases},
        "times_dpca_open": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
    }


def measure(names: tuple[str, str], assets: Path, folder: Path, rounds: int, tokens: int, prompts: int) -> dict:
    paths = tuple(assets / "tokenizers" / name for name in names)
    rows = tuple(ROWS[name] for name in names)
    setting = Setting(paths, rows, tokens, prompts, 1, (SHAPE, SHAPE), lora=True)
    texts = conversations(assets, prompts)
    sides = {name: Ours(setting, texts, folder / name, **options) for name, options in SIDES.items()}
    steps: dict[str, list[Step]] = {name: [] for name in sides}
    for own in sides.values():
        own.run()
    for number in range(rounds):
        order = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
        for name in order:
            steps[name].append(sides[name].run())
    return {name: summary(own, steps["dpca, open"]) for name, own in steps.items()}


def main(assets: Path, output: Path, rounds: int, tokens: int, prompts: int) -> None:
    report = header() | {
        "rounds": rounds,
        "new_tokens": tokens,
        "completions": prompts,
        "shape": SHAPE,
        "lora": True,
    }
    report["results"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, pair in PAIRS.items():
            report["results"][name] = found = measure(pair, assets, Path(folder), rounds, tokens, prompts)
            for side, figures in found.items():
                ratio = figures["times_dpca_open"]
                print(
                    f"{name:14} {side:14} {figures['seconds']:6.2f} s  {figures['cpu_seconds']:6.2f} s of the processor  ",
                    end="",
                )
                print(
                    f"{ratio['median']:.3f} ({ratio['least']:.3f} to {ratio['most']:.3f}) times dpca, open", flush=True
                )
    save(output, report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each completion")
    parser.add_argument("--prompts", type=int, default=2, help="completions of a step")
    parser.add_argument("--output", type=Path, default=RESULTS / "events.json")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet()
    torch.set_num_threads(1)
    main(assets_folder(parser), given.output, given.rounds, given.tokens, given.prompts)
