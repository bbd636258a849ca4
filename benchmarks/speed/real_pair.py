"""
An optimizer step on a pretrained pair: this version, an earlier one, and TRL's `GOLDTrainer`, in turns.

    git worktree add --detach <folder> 45762ad
    CTOPD_ASSETS=<folder> CTOPD_MODELS=<folder> python -m benchmarks.speed.real_pair --before <folder>

SmolLM2-135M-Instruct with LoRA (r 16, all linear layers) learns from Qwen2.5-Coder-0.5B-Instruct on questions of GSM8K: float32,
eight completions of at most 64 tokens, one thread, on the CPU. With `--generations 4` they are of two prompts. Writes
`real_pair_<generations>.json` to `benchmarks/results/speed/`.

Decisions:
- Each side is a process of its own, built before anything is timed, and sides take turns. There is no warm-up.
- Processor time is compared, in total and in its parts, since the machine may have other work. Ratios are those of the medians.
- GOLD has no parts of its own: its own time for writing is measured from outside. Its micro-batches hold as many completions as
  the others'; with several a prompt it gets each prompt as often, since it would read it as often.
- With `--overlap` a further side has its teacher read in a second thread, on a core of its own: its wall time says something, where
  the machine has nothing else to do.
- The limit is `bandwidth.writing_limit`, measured before the sides begin, on the same one thread.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from benchmarks.report import assets_folder, gsm8k, header, save
from benchmarks.speed.bandwidth import bandwidth, writing_limit


ROOT = Path(__file__).parents[2]
STUDENT, TEACHER = "smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"


class Side:
    """A process of `pair_side.py` with the repository in `tree`."""

    def __init__(self, kind: str, tree: Path, *arguments: str):
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, str(Path(__file__).with_name("pair_side.py")), kind, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=environment, cwd=tree, text=True, **pipes)
        self._answer(lambda line: line == "ready\n")

    def step(self) -> dict:
        print("step", file=self._process.stdin, flush=True)
        return json.loads(self._answer(lambda line: line.startswith('{"wall"')))

    def _answer(self, wanted) -> str:
        """The first line that is `wanted`; a trainer may print others."""
        found = next((line for line in self._process.stdout if wanted(line)), None)
        if found is None:
            raise RuntimeError(f"{self._process.args} ended with code {self._process.wait()}.")
        return found

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def summary(steps: list[dict]) -> dict:
    return {
        "cpu_seconds": statistics.median(step["cpu"] for step in steps),
        "writing_cpu_seconds": statistics.median(step["phases"]["generation"] for step in steps),
        "wall_seconds": statistics.median(step["wall"] for step in steps),
        "peak_mib": max(step["peak_mib"] or 0 for step in steps),
        "steps": steps,
    }


def main(
    assets: Path,
    models: Path,
    before: Path,
    generations: int,
    rounds: int,
    new_tokens: int,
    gold: bool,
    overlap: bool,
    output: Path,
):
    report, completions = header(), 8
    torch.set_num_threads(1)
    student = models / STUDENT
    questions = json.dumps(gsm8k(assets, completions // generations))
    arguments = (str(student), str(models / TEACHER), questions, str(new_tokens), str(generations))
    speed = bandwidth("cpu")
    sides = {"before": Side("ours", before, *arguments), "here": Side("ours", ROOT, *arguments)}
    if overlap:
        sides["beside"] = Side("beside", ROOT, *arguments)
    if gold:
        sides["gold"] = Side("gold", ROOT, *arguments)
    steps = {name: [] for name in sides}
    for turn in range(rounds):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            steps[name].append(sides[name].step())
            print(name, {key: round(value, 1) for key, value in steps[name][-1]["phases"].items()}, flush=True)
    for side in sides.values():
        side.close()
    found = {name: summary(own) for name, own in steps.items()}
    prompt = found["here"]["steps"][0]["tokens"]["prompts"] / completions
    limit = writing_limit(AutoModelForCausalLM.from_pretrained(student), completions, prompt, new_tokens, speed)
    ratios = {
        f"{part} over {other}": found["here"][part] / found[other][part]
        for other in found
        if other != "here"
        for part in ("cpu_seconds", "writing_cpu_seconds")
    }
    report |= {"completions": completions, "generations": generations, "new_tokens": new_tokens, "rounds": rounds}
    report |= {"gigabytes_a_second": speed / 1e9, "writing_limit_seconds": limit, "here": ratios, "sides": found}
    if overlap:
        report["beside over before, wall"] = found["beside"]["wall_seconds"] / found["before"]["wall_seconds"]
    report["limit_over_writing"] = limit / found["here"]["writing_cpu_seconds"]
    save(output, report)
    table = Table(
        "side", "cpu s a step", "of it writing", "wall s", "peak MiB", title=f"{generations} completions a prompt"
    )
    for name, own in found.items():
        columns = ("cpu_seconds", "writing_cpu_seconds", "wall_seconds", "peak_mib")
        table.add_row(name, *(f"{own[key]:.1f}" for key in columns))
    table.add_row("limit", "", f"{limit:.1f}", "", "")
    Console(width=100).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="folder with the earlier version")
    parser.add_argument("--generations", type=int, choices=(1, 2, 4), default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--no-gold", dest="gold", action="store_false", help="leave GOLD out")
    parser.add_argument("--overlap", action="store_true", help="also with teacher_overlap")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    if not os.environ.get("CTOPD_MODELS"):
        parser.error("CTOPD_MODELS names no folder with the two models")
    name = f"real_pair_{chosen.generations}{'_overlap' if chosen.overlap else ''}.json"
    path = chosen.output or ROOT / "benchmarks" / "results" / "speed" / name
    sizes = (chosen.generations, chosen.rounds, chosen.new_tokens, chosen.gold, chosen.overlap, path)
    main(assets_folder(parser), Path(os.environ["CTOPD_MODELS"]), chosen.before.resolve(), *sizes)
