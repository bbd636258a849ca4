"""The committed figures of benchmarks/scaling say what docs/scaling_out.md says of them."""

import json
from pathlib import Path


ROOT = Path(__file__).parents[2]


def test_the_committed_peaks_are_within_15_percent():
    for path in (ROOT / "benchmarks" / "results" / "scaling").glob("peaks*.json"):
        for name, case in json.loads(path.read_text())["cases"].items():
            assert 0.85 < case["predicted"] / case["measured"] < 1.15, (path.name, name)
