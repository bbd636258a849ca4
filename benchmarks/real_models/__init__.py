"""Benchmarks on pretrained models. They share the parts of `make demo-real`, which lie in examples/."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

MEASURED_RUN = {"lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
