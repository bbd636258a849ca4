"""The pictures of two runs of `make demo-real` (the README's, and one of 480 steps), from their committed figures.

python -m benchmarks.real_models.figure     # from the repository root
"""

import json
from pathlib import Path

from demo_real.run import SOLVED
from demo_real.show import learning_curve


RESULTS = Path(__file__).parents[1] / "results"

if __name__ == "__main__":
    for name in ("demo_real", "demo_real_480"):
        found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        learning_curve(found["curve"], found, SOLVED, RESULTS / f"{name}.png")
