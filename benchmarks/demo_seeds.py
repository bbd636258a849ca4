"""
Runs the demo over several seeds (`make demo`'s own command) and collects its figures in `benchmarks/results/demo.json`.

    python -m benchmarks.demo_seeds --seeds 0 1 2

A seed that already has `demo_output/seed<n>/metrics.json` is not run again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.report import header, save


ROOT = Path(__file__).resolve().parents[1]
SHOWN = (
    "teacher_accuracy",
    "student_accuracy_before",
    "student_accuracy_after",
    "gap_recovered",
    "control_accuracy_after",
    "control_gap_recovered",
)


def main(seeds: list[int], output: Path) -> None:
    about, runs = header(), []
    for seed in seeds:
        folder = output / f"seed{seed}"
        if not (folder / "metrics.json").exists():
            command = [sys.executable, ROOT / "examples" / "demo" / "run.py", "--seed", str(seed), "--output", folder]
            subprocess.run(command, check=True)
        runs.append(json.loads((folder / "metrics.json").read_text()))
    result = {**about, "runs": runs}
    save(ROOT / "benchmarks" / "results" / "demo.json", result)
    for run in runs:
        print(f"seed {run['seed']}: " + ", ".join(f"{name} {run[name]:.3f}" for name in SHOWN))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    main(**vars(parser.parse_args()))
