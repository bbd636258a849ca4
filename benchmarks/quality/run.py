"""
Which method, and why: trains teachers and weak students from nothing, distils with every method, and writes one JSON line a
run to `benchmarks/results/quality/runs.jsonl`, from which `report.py` makes the tables.

    python -m benchmarks.quality.run --scale cpu      # from the repository root
    python -m benchmarks.quality.run --scale gpu      # larger models, longer answers, more seeds; runs_gpu.jsonl

Stop it at any time and start it again: what is finished is skipped. Start it twice: the two share the work.

Decisions:
- The runs are a list in the order of their importance, seed by seed over all methods and tasks, so that one that is cut off
  is still balanced. `--minutes` ends it after so long; `--stages` does parts of it.
- Tuning comes first: each method meets the same grid of learning rates in each world, with a seed of its own, judged by
  greedy accuracy on prompts that are not the held-out ones, then by the gap. What is reported has other seeds.
- A run that cannot be done (TRL's trainer refuses some tokenizers) is a line with its error, and is not tried again.
"""

import argparse
import hashlib
import json
import logging
import os
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.report import header
from benchmarks.speed.models import quiet

from .methods import METHODS, Run, do
from .worlds import CACHE, Size, locked, world


RESULTS = Path(__file__).parents[1] / "results" / "quality"
HOME = {"sums": "digits", "plurals": "families", "stories": "sizes"}  # the pair of each task in the headline
MORE_PAIRS = (("plurals", "lengths"), ("sums", "coarse"))
HEADLINE = [name for name in METHODS if not name.endswith(("_off", "decode_and_compare"))] + ["trl_gold_template_off"]
OFF_POLICY = ["alm_off", "gold_off", "uld_off", "cdm_off"]


@dataclass(frozen=True)
class Scale:
    size: Size
    updates: int
    prompts: int
    learning_rates: tuple[float, ...]  # the likeliest first
    seeds: int
    other_seeds: int  # of all but the headline
    curve: tuple[int, ...]  # updates at which seq_kd's accuracy is measured, for table 1's last column

    @property
    def measured_at(self) -> tuple[int, ...]:
        return tuple(sorted({max(1, self.updates * part // 8) for part in (1, 2, 4)}))


SCALES = {
    "cpu": Scale(
        Size(
            teacher_width=128,
            student_width=96,
            layers=2,
            teacher_steps={"sums": 700, "plurals": 500, "stories": 250},
            student_steps={"sums": 600, "plurals": 500, "stories": 300},
            batch_size=32,
            learning_rate=3e-3,
            task={},
            held_out=200,
            prompts=40 * 48,
        ),
        updates=40,
        prompts=48,
        learning_rates=(3e-4, 1e-3, 1e-4),
        seeds=5,
        other_seeds=3,
        curve=(5, 10, 20, 40, 80, 160),
    ),
    "gpu": Scale(
        Size(
            teacher_width=768,
            student_width=512,
            layers=8,
            teacher_steps=dict.fromkeys(HOME, 4_000),
            student_steps=dict.fromkeys(HOME, 4_000),
            batch_size=128,
            learning_rate=5e-4,
            task={"sums": {"addends": 16}, "plurals": {"nouns": 16}, "stories": {"asked": 6}},
            held_out=1_000,
            prompts=200 * 128,
            device="cuda",
        ),
        updates=200,
        prompts=128,
        learning_rates=(3e-5, 1e-4, 1e-5, 3e-4),
        seeds=8,
        other_seeds=5,
        curve=(10, 25, 50, 100, 200, 400, 800),
    ),
}
STAGES = ("tuning", "headline", "alignment", "same", "curve", "pairs", "again", "off_policy")


def key(scale: str, run: Run) -> str:
    return hashlib.sha256(json.dumps([scale, asdict(run)], sort_keys=True).encode()).hexdigest()[:16]


class Plan:
    """What is to be run, in order, given what has been found so far."""

    def __init__(self, scale: Scale):
        self.scale = scale

    def runs(self, stage: str, found: dict[str, dict]) -> Iterator[Run | None]:
        """The runs of a stage; `None` for one whose learning rate is not chosen yet."""
        if stage == "tuning":
            for rate in self.scale.learning_rates:
                for method in HEADLINE:
                    for task, pair in HOME.items():
                        yield self._run(method, task, pair, "cross", 0, rate, "tuning")
            return
        seeds = self.scale.seeds if stage == "headline" else self.scale.other_seeds
        for seed in range(1, seeds + 1):
            yield from self._of_seed(stage, seed, found)

    def _of_seed(self, stage: str, seed: int, found: dict[str, dict]) -> Iterator[Run | None]:
        if stage == "headline":
            cases = [(method, task, pair, "cross") for method in HEADLINE for task, pair in HOME.items()]
        elif stage == "alignment":
            cases = [("dpca_decode_and_compare", task, pair, "cross") for task, pair in HOME.items()]
        elif stage == "same":
            cases = [(m, task, pair, "same") for m in ("dpca", "seq_kd") for task, pair in HOME.items()]
        elif stage == "curve":
            cases = [("seq_kd", task, pair, "cross") for task, pair in HOME.items()]
        elif stage == "again":
            cases = [("dpca", task, pair, "cross") for task, pair in HOME.items()]
        elif stage == "pairs":
            names = ("dpca", "dpca_macro", "strict_sampled", "bpm", "simct", "dpca_decode_and_compare")
            cases = [(method, task, pair, "cross") for method in names for task, pair in MORE_PAIRS]
        else:
            cases = [(method, task, pair, "cross") for method in OFF_POLICY for task, pair in HOME.items()]
        for method, task, pair, teacher in cases:
            like = method.removesuffix("_off") if method in OFF_POLICY else method
            like = "dpca" if method == "dpca_decode_and_compare" else like
            rate = self.chosen(like, task, found)
            yield None if rate is None else self._run(method, task, pair, teacher, seed, rate, stage)

    def _run(self, method: str, task: str, pair: str, teacher: str, seed: int, rate: float, purpose: str) -> Run:
        scale = self.scale
        updates, measured_at = scale.updates, scale.measured_at
        if purpose == "tuning":
            measured_at = ()
        elif purpose == "curve":
            updates, measured_at = scale.curve[-1], scale.curve[:-1]
        elif purpose == "again":
            seed += 100
        return Run(method, task, pair, teacher, seed, rate, updates, scale.prompts, purpose, measured_at)

    def chosen(self, method: str, task: str, found: dict[str, dict]) -> float | None:
        """The learning rate with the best accuracy, then the smallest gap; `None` until all were tried."""
        tried = [
            line
            for line in found.values()
            if line["run"]["purpose"] == "tuning" and (line["run"]["method"], line["run"]["task"]) == (method, task)
        ]
        if len(tried) < len(self.scale.learning_rates):
            return None
        good = [line for line in tried if "error" not in line]
        if not good:
            return self.scale.learning_rates[0]

        def merit(line: dict) -> tuple[float, float]:
            gap = line["gap_nats_per_byte"]
            return round(line["accuracy"], 2), float("-inf") if gap is None else -gap

        return max(good, key=merit)["run"]["learning_rate"]


def results_file(scale: str) -> Path:
    return RESULTS / ("runs.jsonl" if scale == "cpu" else f"runs_{scale}.jsonl")


def read(path: Path) -> dict[str, dict]:
    """The finished runs by key; a last line that was cut off in writing is as if it were not there."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["key"]] = entry
    return found


def append(path: Path, entry: dict) -> None:
    """One line, in one write, on the disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def next_run(plan: Plan, scale: str, stages: list[str], found: dict[str, dict], busy: set[str]) -> Run | None:
    for stage in stages:
        for run in plan.runs(stage, found):
            if run is not None and key(scale, run) not in found and key(scale, run) not in busy:
                return run
    return None


def left(plan: Plan, scale: str, stages: list[str], found: dict[str, dict]) -> int:
    runs = [run for stage in stages for run in plan.runs(stage, found)]
    return sum(run is None or key(scale, run) not in found for run in runs)


def main(scale_name: str, stages: list[str], minutes: float | None, path: Path) -> None:
    quiet()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    scale, about = SCALES[scale_name], header()
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    plan, rendered, worlds, busy, begun = Plan(scale), {}, {}, set(), time.monotonic()
    seconds: list[float] = []
    with tqdm(total=left(plan, scale_name, stages, read(path)), unit="run") as bar:
        while minutes is None or time.monotonic() - begun < 60 * minutes:
            found = read(path)
            bar.n = bar.total - left(plan, scale_name, stages, found)
            bar.refresh()
            run = next_run(plan, scale_name, stages, found, busy)
            if run is None:
                if not busy:
                    break
                busy.clear()  # of the other process: it may have ended
                time.sleep(5)
                continue
            own = key(scale_name, run)
            with locked(CACHE / "locks" / f"run-{own}", wait=False) as ours:
                if not ours or own in read(path):
                    busy.add(own)
                    continue
                bar.set_description(f"{run.purpose}: {run.method}, {run.task}, seed {run.seed}")
                name = (run.task, run.pair, run.teacher)
                if name not in worlds:
                    worlds[name] = world(scale.size, *name)
                started = time.process_time()
                entry = {"key": own, "scale": scale_name, "run": asdict(run), "revision": revision, **about}
                try:
                    with tempfile.TemporaryDirectory() as folder:
                        entry |= do(run, worlds[name], Path(folder), rendered)
                except (ValueError, NotImplementedError, RuntimeError) as error:
                    entry["error"] = f"{type(error).__name__}: {error}"
                entry["all_cpu_seconds"] = round(time.process_time() - started, 2)
                append(path, entry)
                seconds.append(entry["all_cpu_seconds"])
                bar.set_postfix_str(f"{statistics.mean(seconds[-20:]):.0f} CPU s a run")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.results or results_file(arguments.scale)
    main(arguments.scale, arguments.stages, arguments.minutes, path)
