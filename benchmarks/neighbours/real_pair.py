"""Where rollouts end early, on two pretrained models: whole completions, KAT, random cuts of its lengths, and growing lengths.

    python -m benchmarks.neighbours.real_pair [--models FOLDER] [--data mbpp.jsonl]     # 20 minutes of one core

Models, prompts and the loss are those of `examples/demo_real`. Every run has the same prompts, number of updates and seed, so all
are alike until the first cut.

Decisions:
- `SETTINGS` are KAT's, made small for a run of five updates: with the paper's warm-up nothing would be cut.
- `learned_from` counts the student tokens in the loss, over all updates. `tokens_written` counts what the student wrote.
- What the output file has already is not run again, so that a case can be run alone.
- The gap is measured on whole completions of prompts that no update has seen, with the same draws before and after. Its standard
  error is over prompts.

Left out: more than one seed, and how many tasks are solved, which five updates do not move beyond the noise.
"""

import argparse
import gc
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from demo_real import problems
from demo_real.measuring import measure
from demo_real.run import LEARNING_RATE, LOSS, STUDENT, TEACHER, build, named, prompts_of

from benchmarks import report
from benchmarks.clock import stopwatch
from benchmarks.real_models import MEASURED_RUN
from benchmarks.speed.models import quiet


RESULTS = Path(__file__).parents[1] / "results" / "neighbours"
HELD_OUT, PROMPTS, TOKENS, UPDATES, PIECE = 8, 4, 96, 5, 32
SETTINGS = {"window": 12, "patience": 4, "warmup_steps": 1, "warmup_rollouts": 4}
START = "start"  # measured, and not trained
CASES = {
    START: {},
    "whole": {},
    "kat": {"early_stop": "kat", "early_stop_kwargs": SETTINGS},
    "random": {"early_stop": "random", "early_stop_kwargs": SETTINGS},
    "growing": {"early_stop": "growing", "early_stop_kwargs": {"start": 32, "steps": UPDATES}},
    "kat in pieces": {"early_stop": "kat", "early_stop_kwargs": SETTINGS, "early_stop_tokens": PIECE},
}


def run(trainer) -> dict:
    """Trains, and measures the held-out gap after it."""
    with stopwatch() as spent:
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    names = ("cut_fraction", "masked_fraction", "threshold", "max_new_tokens")
    return {
        "gap": asdict(measure(trainer)),
        "tokens_written": round(PROMPTS * sum(log["completions/mean_length"] for log in logs)),
        "learned_from": round(sum(map(scored, logs))),
        "cpu_seconds": round(spent.cpu_seconds, 1),
        "updates": [{name: log[f"early_stop/{name}"] for name in names if f"early_stop/{name}" in log} for log in logs],
    }


def scored(log: dict) -> float:
    """The student tokens in the loss of one update: those written, without what alignment masks, nor what follows the cuts."""
    written = PROMPTS * log["completions/mean_length"]
    return written * (1 - log["alignment/masked_fraction"]) * (1 - log.get("early_stop/masked_fraction", 0))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder with both models; else they come from the hub")
    parser.add_argument("--data", default=problems.HUB_NAME, help="hub name, or a .jsonl file with MBPP's columns")
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=CASES)
    parser.add_argument("--output", type=Path, default=RESULTS / "early_stop_real.json")
    options = parser.parse_args(arguments)
    quiet()
    settings = {"student": STUDENT, "teacher": TEACHER, "loss": LOSS, "learning_rate": LEARNING_RATE}
    settings |= {
        "updates": options.updates,
        "prompts": PROMPTS,
        "max_new_tokens": TOKENS,
        "held_out": HELD_OUT,
        "seed": 0,
    }
    found, runs = report.header() | settings, {}
    if options.output.exists():
        before = json.loads(options.output.read_text())
        if other := [
            f"{name} {before.get(name)}, now {own}" for name, own in settings.items() if before.get(name) != own
        ]:
            parser.error(f"{options.output} is of other settings ({'; '.join(other)}): choose another --output.")
        runs = before["runs"]
    found["runs"], rows = runs, prompts_of(problems.load_problems(options.data))
    for case in (case for case in options.cases if case not in runs):
        with tempfile.TemporaryDirectory() as folder:
            trainer = build(
                named(STUDENT, options.models), named(TEACHER, options.models), rows[HELD_OUT:], Path(folder),
                rows[:HELD_OUT], distillation_loss=LOSS, learning_rate=LEARNING_RATE,
                per_device_train_batch_size=PROMPTS, per_device_eval_batch_size=HELD_OUT, max_steps=options.updates,
                max_new_tokens=TOKENS, seed=0, **MEASURED_RUN, **CASES[case],
            )  # fmt: skip
            runs[case] = {"gap": asdict(measure(trainer))} if case == START else run(trainer)
        print(case, runs[case], flush=True)
        report.save(options.output, found)
        del trainer
        gc.collect()


if __name__ == "__main__":
    main()
