"""The README's picture of `make demo-real`, from its committed figures.

python -m benchmarks.real_models.figure     # from the repository root
"""

import json
from pathlib import Path

from demo_real.run import SOLVED
from demo_real.show import learning_curve


RESULTS = Path(__file__).parents[1] / "results"

if __name__ == "__main__":
    found = json.loads((RESULTS / "demo_real.json").read_text(encoding="utf-8"))
    learning_curve(found["curve"], found, SOLVED, RESULTS / "demo_real.png")
