"""
Compares methods: trains teachers and weak students from scratch, distils with every method, and writes one JSON line for each
run to `benchmarks/results/quality/runs.jsonl`, from which `report.py` makes the tables.

    python -m benchmarks.quality.run --scale cpu      # from the repository root
    python -m benchmarks.quality.run --scale gpu      # larger models, longer answers, more seeds; runs_gpu.jsonl

Stop it at any time and start it again: finished runs are skipped. Two processes at the same time share the work.

Decisions:
- The runs are ordered by importance, seed by seed over all stages, methods and tasks, so that an interrupted benchmark is
  still balanced. `--minutes` ends it after that time; `--stages` and `--methods` select parts. The leading methods have more
  seeds than the others.
- Tuning comes first. Each method gets the same grid of learning rates on each task, with a seed of its own. The rate is chosen by
  greedy accuracy on prompts other than the held-out ones, then by the gap. The reported runs have other seeds.
- A run that cannot be done (TRL's trainer rejects some tokenizers) becomes a line with its error, and no run of its kind is
  tried again.
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.clock import stopwatch
from benchmarks.report import header
from benchmarks.speed.models import quiet

from .methods import METHODS, Run, do
from .worlds import CACHE, Size, locked, world


RESULTS = Path(__file__).parents[1] / "results" / "quality"
HOME = {"sums": "digits", "plurals": "families", "stories": "sizes"}  # each task's pair of tokenizers in the headline
DIGITS = {"hundreds": "threes"}  # a task and pair of its own, for few methods
MORE_PAIRS = (("plurals", "lengths"), ("sums", "coarse"))
LEADING = [
    "dpca",
    "dpca_macro",
    "strict_sampled",
    "seq_kd",
    "bpm",
    "strict_topk",
    "simct",
    "sft",
    "reverse_kl",
    "dpca_closed",
    "constant",
]
OTHERS = [name for name in METHODS if name not in LEADING and not name.endswith(("_off", "decode_and_compare"))]
OTHERS += ["trl_gold_template_off"]
STEPS = ["reverse_kl", "dpca_closed", "dpca", "bpm", "seq_kd", "sft", "constant"]  # shares after 10, 20 and 40 updates
COMMON = ["reverse_kl", "dpca_closed", "dpca"]  # these at one learning rate for all tasks too
OFF_POLICY = ["alm_off", "gold_off", "uld_off", "cdm_off"]


@dataclass(frozen=True)
class Scale:
    size: Size
    updates: int
    prompts: int
    learning_rates: tuple[float, ...]  # the most likely one first
    seeds: int  # of the leading methods
    other_seeds: int
    curve: tuple[int, ...]  # updates at which seq_kd's accuracy is measured, for the last column of table 1

    @property
    def measured_at(self) -> tuple[int, ...]:
        return tuple(sorted({max(1, self.updates * part // 4) for part in (1, 2)}))


SCALES = {
    "cpu": Scale(
        Size(
            teacher_width=128,
            student_width=96,
            layers=2,
            teacher_steps={"sums": 700, "plurals": 500, "stories": 250, "hundreds": 900},
            student_steps={"sums": 600, "plurals": 500, "stories": 300, "hundreds": 700},
            same_teacher_steps={"sums": 700, "plurals": 1_500, "stories": 500},
            batch_size=32,
            learning_rate=3e-3,
            task={},
            held_out=200,
            prompts=40 * 24,
        ),
        updates=40,
        prompts=24,
        learning_rates=(3e-4, 1e-3, 1e-4, 3e-5),
        seeds=10,
        other_seeds=3,
        curve=(5, 10, 20, 40, 80, 160),
    ),
    "gpu": Scale(
        Size(
            teacher_width=768,
            student_width=512,
            layers=8,
            teacher_steps=dict.fromkeys(HOME | DIGITS, 4_000),
            student_steps=dict.fromkeys(HOME | DIGITS, 4_000),
            same_teacher_steps=dict.fromkeys(HOME, 4_000),
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
        seeds=10,
        other_seeds=5,
        curve=(10, 25, 50, 100, 200, 400, 800),
    ),
}
STAGES = (
    "tuning",
    "headline",
    "others",
    "alignment",
    "same",
    "curve",
    "again",
    "off_policy",
    "pairs",
    "digits",
    "steps",
)


Lines = list[dict]


def key(scale: str, run: Run) -> str:
    return hashlib.sha256(json.dumps([scale, asdict(run)], sort_keys=True).encode()).hexdigest()[:16]


class Plan:
    """The runs to do, in order, given the results so far."""

    def __init__(self, scale: Scale):
        self.scale = scale

    def runs(self, stages: Sequence[str], found: dict[str, dict]) -> Iterator[Run | None]:
        """The runs of the stages; `None` for a run whose learning rate is not chosen yet."""
        if "tuning" in stages:
            for task, rate, method in product(HOME, self.scale.learning_rates, LEADING + OTHERS):
                yield self._run(method, task, HOME[task], "cross", 0, rate, "tuning")
            for (task, pair), rate, method in product(DIGITS.items(), self.scale.learning_rates, STEPS):
                yield self._run(method, task, pair, "cross", 0, rate, "tuning")
        for seed in range(1, self.scale.seeds + 1):
            for stage in stages:
                purpose = "headline" if stage in ("others", "digits") else stage
                for method, task, pair, teacher in self._cases(stage, seed):
                    rate = self.chosen(method, task, found)
                    if stage == "steps" and rate is not None:
                        if rate == self.scale.learning_rates[0]:
                            continue  # the headline has it
                        rate = self.scale.learning_rates[0]
                    yield None if rate is None else self._run(method, task, pair, teacher, seed, rate, purpose)

    def _cases(self, stage: str, seed: int) -> Iterator[tuple[str, str, str, str]]:
        """Method, task, pair and teacher."""
        if stage == "tuning" or (
            stage not in ("headline", "again", "digits", "steps") and seed > self.scale.other_seeds
        ):
            return
        more = [(task, pair, "cross") for task, pair in MORE_PAIRS]
        home = [(task, pair, "cross") for task, pair in HOME.items()]
        methods, worlds = {
            "headline": (LEADING, home),
            "others": (OTHERS, home),
            "alignment": (["dpca_decode_and_compare"], home),
            "same": (["dpca", "seq_kd"], [(task, pair, "same") for task, pair, _ in home]),
            "curve": (["seq_kd"], home),
            "again": (["dpca"], home),
            "off_policy": (OFF_POLICY, home),
            "steps": (COMMON, home),
            "digits": (STEPS, [(task, pair, "cross") for task, pair in DIGITS.items()]),
            "pairs": (["dpca", "dpca_decode_and_compare", "dpca_macro", "strict_sampled", "bpm"], more),
        }[stage]
        for method, one in product(methods, worlds):
            yield method, *one

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

    def tried(self, method: str, task: str, found: dict[str, dict]) -> Lines:
        """The runs that decide on a learning rate."""
        wanted = {"method": method, "task": task, "purpose": "tuning"}
        lines = [line for line in found.values() if all(line["run"][name] == value for name, value in wanted.items())]
        return [line for line in lines if line["run"]["learning_rate"] in self.scale.learning_rates]

    def chosen(self, method: str, task: str, found: dict[str, dict]) -> float | None:
        """The learning rate with the best accuracy, then the smallest gap; `None` until all were tried. A variant of a method
        uses the rate of the method that was tuned."""
        if method not in LEADING + OTHERS:
            method = method.removesuffix("_off").removesuffix("_decode_and_compare")
        tried = self.tried(method, task, found)
        if len(tried) < len(self.scale.learning_rates) and not any("error" in line for line in tried):
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
    """The finished runs by key. A last line that is incomplete is ignored."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["key"]] = entry
    return found


def append(path: Path, entry: dict) -> None:
    """Appends one line in one write, and syncs it to the disk. Begins a new line after an incomplete one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with path.open("a") as file:
        file.write(("" if whole else "\n") + json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def unfinished(plan: Plan, scale: str, stages: Sequence[str], found: dict[str, dict]) -> Iterator[Run | None]:
    refused = {_kind(line["run"]) for line in found.values() if "error" in line}
    for run in plan.runs(stages, found):
        if run is None or (key(scale, run) not in found and _kind(asdict(run)) not in refused):
            yield run


def _kind(run: dict) -> tuple[str, ...]:
    return tuple(run[name] for name in ("method", "task", "pair", "teacher"))


def main(
    scale_name: str, stages: list[str], minutes: float | None, path: Path, methods: Sequence[str] = tuple(METHODS)
) -> None:
    scale, about = SCALES[scale_name], header()
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    plan, rendered, worlds, busy, begun = Plan(scale), {}, {}, set(), time.monotonic()
    seconds: list[float] = []
    with tqdm(unit="run") as bar:
        while minutes is None or time.monotonic() - begun < 60 * minutes:
            found = read(path)
            runs = [run for run in unfinished(plan, scale_name, stages, found) if run is None or run.method in methods]
            bar.n, bar.total = len(found), len(found) + len(runs)
            bar.refresh()
            run = next((run for run in runs if run is not None and key(scale_name, run) not in busy), None)
            if run is None:
                if not busy:
                    break
                busy.clear()  # the other process's runs: it may have ended
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
                entry = {"key": own, "scale": scale_name, "run": asdict(run), "revision": revision, **about}
                with stopwatch() as spent:
                    try:
                        with tempfile.TemporaryDirectory() as folder:
                            entry |= do(run, worlds[name], Path(folder), rendered)
                    except (ValueError, NotImplementedError, RuntimeError) as error:
                        entry["error"] = f"{type(error).__name__}: {error}"
                entry["all_cpu_seconds"] = round(spent.cpu_seconds, 2)
                append(path, entry)
                seconds.append(entry["all_cpu_seconds"])
                bar.set_postfix_str(f"{statistics.mean(seconds[-20:]):.0f} CPU s a run")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    quiet()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    path = arguments.results or results_file(arguments.scale)
    main(arguments.scale, arguments.stages, arguments.minutes, path, arguments.methods)
