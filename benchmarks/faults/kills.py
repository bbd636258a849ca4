"""
Kills trainings with SIGKILL at random moments and resumes them until they end. Their weights are compared bit for bit with those
of the same training without kills.

```bash
python -m benchmarks.faults.kills --kills 100 --minutes 14      # repeat until the count is reached: it continues
```

A run is drawn from `KINDS`. There are two sorts of kills: after a random time, whatever the process is doing; or at a given moment
of a step, or during the writing of a checkpoint file, of which half then exists (`Death` of tests/helpers/resume_run.py). With two
processes, one of them is killed, and the other ends by itself. Every resume is `resume_from_checkpoint=True`. If the run was
killed before its first checkpoint, it starts again. Writes `kills.json` to `benchmarks/results/faults/`. All its runs are of one
version of the package: a file with runs of another is not continued.
"""

import argparse
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.report import header, save


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "helpers"))
OUTPUT = Path(__file__).parents[1] / "results" / "faults" / "kills.json"
STEPS = 8
REUSED = {"rollout_reuse": 2, "gradient_accumulation_steps": 2}
KINDS = {
    "whole student": (1, {}),
    "whole student, completions used twice": (1, REUSED),
    "adapter": (1, {"lora": True}),
    "adapter, one checkpoint kept": (1, {"lora": True, "save_total_limit": 1, "save_steps": 2}),
    "two processes": (2, {}),
    "two processes, completions used twice": (2, REUSED),
}
FILES = ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")
ADAPTERS_FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")


def start(context, folder: Path, processes: int, settings: dict, death=None) -> list:
    """Starts the processes of a run, which resumes from a checkpoint if there is a complete one."""
    from resume_run import train

    port = None
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    resume = any(path.stat().st_size for path in folder.glob("run/checkpoint-*/trainer_state.json"))
    settings = {"max_steps": STEPS, "save_strategy": "steps", **settings}
    ranks = [
        context.Process(target=train, args=(folder, rank, port, resume, death, settings)) for rank in range(processes)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def ended(ranks: list) -> list[int]:
    for rank in ranks:
        rank.join(timeout=600)
    return [rank.exitcode for rank in ranks]


def weights(folder: Path, processes: int) -> list[dict]:
    return [torch.load(folder / f"weights_{rank}.pt") for rank in range(processes)]


def largest_difference(found: list[dict], wanted: list[dict]) -> float:
    return max(
        (own[name].double() - other[name].double()).abs().max().item()
        for own, other in zip(found, wanted, strict=True)
        for name in other
    )


def random_death(draw: random.Random, processes: int, lora: bool, step: int):
    from resume_run import MOMENTS, Death

    where = draw.choice([*MOMENTS, *(ADAPTERS_FILES if lora else FILES)])
    if where == "rng_state.pth" and processes > 1:
        where = "rng_state_1.pth"
    rank = 1 if where == "rng_state_1.pth" else 0 if where in (*FILES, *ADAPTERS_FILES) else draw.randrange(processes)
    return Death(step, where, rank)


def live(context, folder: Path, kind: str, draw: random.Random, deadline: float) -> list[str] | None:
    """One run, killed again and again until it ends; the moments of its kills, or None when the time is up."""
    processes, settings = KINDS[kind]
    kills: list[str] = []
    while True:
        if time.monotonic() > deadline:
            return None
        saved = [int(path.parent.name.split("-")[1]) for path in folder.glob("run/checkpoint-*/trainer_state.json")]
        done = max(saved, default=0)
        dies = len(kills) < 6 and done < STEPS
        death = None
        if dies and draw.random() < 0.5:
            death = random_death(draw, processes, "lora" in settings, draw.randint(done + 1, STEPS))
        ranks = start(context, folder, processes, settings, death)
        if dies and death is None:
            victim = draw.choice(ranks)
            victim.join(timeout=draw.uniform(0.5, 5))
            if victim.is_alive():
                victim.kill()
        codes = ended(ranks)
        if codes == [0] * processes:
            return kills
        if -9 not in codes:
            said = "\n".join((folder / f"said_{rank}.txt").read_text()[-2000:] for rank in range(processes))
            raise RuntimeError(f"{kind}: a run that nobody killed ended with {codes} in {folder}.\n{said}")
        kills.append("at a random time" if death is None else f"at {death.where}")


def package_version() -> str:
    """Git's id of the package's folder, which changes with any of its files."""
    root = Path(__file__).resolve().parents[2]
    if subprocess.check_output(["git", "status", "--porcelain", "trl_ctopd"], cwd=root):
        sys.exit("trl_ctopd/ has changes that are not committed, so that nobody could tell which version was killed")
    return subprocess.check_output(["git", "rev-parse", "HEAD:trl_ctopd"], cwd=root, text=True).strip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=14, help="stop after a run that ends later than this")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()

    package = package_version()
    report = {**header(), "package": package, "runs": []}
    if options.output.exists():
        report = json.loads(options.output.read_text())
        if report.get("package") != package:
            parser.error(
                f"{options.output} has runs of the package {report.get('package')}, this is {package}: remove it"
            )
    os.environ["PYTHONPATH"] = os.pathsep.join([sys.path[0], os.getcwd(), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resume_run"])
    deadline = time.monotonic() + 60 * options.minutes
    wanted: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        number = len(report["runs"])
        while sum(len(run["kills"]) for run in report["runs"]) < options.kills and time.monotonic() < deadline:
            kind, draw = list(KINDS)[number % len(KINDS)], random.Random(number)
            processes, settings = KINDS[kind]
            if kind not in wanted:
                whole = Path(scratch) / f"whole-{len(wanted)}"
                whole.mkdir()
                assert ended(start(context, whole, processes, settings)) == [0] * processes
                wanted[kind] = weights(whole, processes)
            folder = Path(scratch) / str(number)
            folder.mkdir()
            kills = live(context, folder, kind, draw, deadline)
            if kills is None:
                break
            difference = largest_difference(weights(folder, processes), wanted[kind])
            report["runs"].append({"kind": kind, "kills": kills, "difference": difference})
            save(options.output, report)
            print(f"{number}: {kind}, {len(kills)} kills, difference {difference}", flush=True)
            number += 1
    show(report)


def show(report: dict):
    table = Table("run", "runs", "kills", "largest difference", title="Killed and resumed")
    for kind in KINDS:
        runs = [run for run in report["runs"] if run["kind"] == kind]
        kills = sum(len(run["kills"]) for run in runs)
        table.add_row(kind, str(len(runs)), str(kills), f"{max((run['difference'] for run in runs), default=0):g}")
    where = Counter(place for run in report["runs"] for place in run["kills"])
    Console().print(table)
    Console().print(", ".join(f"{count} {place}" for place, count in where.most_common()))
    total = sum(where.values())
    Console().print(f"{total} kills, {sum(run['difference'] > 0 for run in report['runs'])} differences")


if __name__ == "__main__":
    main()
