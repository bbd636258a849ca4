"""Shared by the benchmarks: the header of every result file, and the real data."""

import argparse
import json
import os
import platform
from datetime import date
from pathlib import Path

import torch

from trl_ctopd.looking.provenance import versions


def machine() -> dict:
    """The processor, its cores, the GPU if there is one, and the machine's load before the benchmark."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def header() -> dict:
    """The first fields of a result file. Call it before anything is measured."""
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions()},
    }


def save(path: Path, report: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Figures: {path}")


def assets_folder(parser: argparse.ArgumentParser) -> Path:
    """The folder of real tokenizers and data that `CTOPD_ASSETS` names. Exits where it names none."""
    if not os.environ.get("CTOPD_ASSETS"):
        parser.error("CTOPD_ASSETS names no folder with the real tokenizers and data")
    return Path(os.environ["CTOPD_ASSETS"])


def gsm8k(assets: Path, rows: int) -> list[dict[str, str]]:
    """The first rows of GSM8K, each a `question` and an `answer`."""
    lines = (assets / "datasets" / "gsm8k" / "train.jsonl").read_text().splitlines()[:rows]
    return [json.loads(line) for line in lines]
