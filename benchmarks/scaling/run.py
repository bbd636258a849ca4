"""
The time of an optimizer step by the number of processes: weak scaling (each brings its own prompts) and strong (they share).

    CTOPD_ASSETS=<folder> python -m benchmarks.scaling.run                              # two processes on the CPU
    CTOPD_ASSETS=<folder> python -m benchmarks.scaling.run --gpu --processes 1 2 4 8    # Llama-3.2-1B <- Qwen2.5-7B by shape

Writes `scaling.json` (`scaling_gpu.json`) to `benchmarks/results/scaling/`. Every run is one `accelerate launch` with a file of
`examples/accelerate_configs`. Completions have full length. The first step of a run does not count. The figure is the median of
the others on the first process, which waits for all. Efficiency is 1 where twice the processes do twice the work in the same time
(weak), or the same work in half the time (strong). Processes that share cores cannot reach it; the file records the cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from benchmarks.report import assets_folder, header, save
from benchmarks.speed.models import LLAMA_1B, QWEN_7B, ROWS_1B_7B, Ours, Setting, conversations, published, quiet, small


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "scaling"
CONFIGS = ROOT / "examples" / "accelerate_configs"
ROUNDS = 6


def setting(assets: Path, folder: Path, gpu: bool, prompts: int) -> Setting:
    """One process's part of a step."""
    if gpu:
        tokenizers, rows, shapes = published(assets), ROWS_1B_7B, (LLAMA_1B, QWEN_7B)
        return Setting(tokenizers, rows, 512, prompts, shapes=shapes, lora=True, device="cuda", dtype=torch.bfloat16)
    tokenizers = small(assets, folder)
    rows = tuple(len(AutoTokenizer.from_pretrained(path)) for path in tokenizers)
    return Setting(tokenizers, rows, 64, prompts)


def work(assets: Path, gpu: bool, prompts: int, processes: int, output: Path) -> None:
    """Runs in every process. The first one writes the seconds of its steps to `output`."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        own = setting(assets, Path(folder), gpu, prompts)
        rows = conversations(assets, processes * own.prompts)
        side = Ours(own, rows, Path(folder), num_train_epochs=ROUNDS + 1)  # DeepSpeed's engine serves only one `train`
        side.trainer.train()
        if side.trainer.is_world_process_zero():
            output.write_text(json.dumps(side.seconds[1:]))


def seconds_a_step(strategy: str, gpu: bool, processes: int, prompts: int) -> float:
    config = (CONFIGS if gpu else CONFIGS / "cpu") / f"{strategy}.yaml"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "seconds.json"
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        launch += ["--num_processes", str(processes), *([] if gpu else [str(CONFIGS / "cpu" / "on_cpu.py")]), __file__]
        launch += ["--processes", str(processes), "--prompts", str(prompts), "--worker", str(output), *["--gpu"] * gpu]
        done = subprocess.run(
            launch, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{strategy}, {processes} processes: {done.stderr}")
        return statistics.median(json.loads(output.read_text()))


def main(strategies: list[str], gpu: bool, processes: list[int], prompts: int, output: Path) -> None:
    report, fewest = header() | {"prompts": prompts, "results": {}}, min(processes)
    for strategy in tqdm(strategies):
        found = {"weak": {}, "strong": {}}
        for count in processes:
            for kind, own in (("weak", prompts), ("strong", prompts * fewest // count)):
                if kind == "strong" and count == fewest:
                    found[kind][count] = found["weak"][count]  # the same run
                else:
                    found[kind][count] = seconds_a_step(strategy, gpu, count, own)
        report["results"][strategy] = {
            kind: {
                str(count): {
                    "seconds": taken,
                    "efficiency": own[fewest] / taken * (fewest / count if kind == "strong" else 1),
                }
                for count, taken in own.items()
            }
            for kind, own in found.items()
        }
    save(output, report)
    table = Table("strategy", "scaling", "processes", "seconds a step", "efficiency")
    for strategy, kinds in report["results"].items():
        for kind, counts in kinds.items():
            for count, figures in counts.items():
                table.add_row(strategy, kind, count, *(f"{figures[name]:.2f}" for name in ("seconds", "efficiency")))
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--strategies", nargs="+", default=["ddp", "zero2", "zero3", "fsdp2"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=int, default=16, help="of one process in weak scaling")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    assets = assets_folder(parser)
    if arguments.worker:
        work(assets, arguments.gpu, arguments.prompts, *arguments.processes, arguments.worker)
    else:
        output = arguments.output or RESULTS / ("scaling_gpu.json" if arguments.gpu else "scaling.json")
        main(arguments.strategies, arguments.gpu, arguments.processes, arguments.prompts, output)
