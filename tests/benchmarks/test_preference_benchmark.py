"""The table of preference pairs says what its result file says."""

import json
import statistics
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TABLES = [
    ("preference/preference.json", "method", "preference.md", ("accuracy", "pairs_right")),
]


@pytest.mark.parametrize(("file", "key", "page", "figures"), TABLES, ids=[file for file, *_ in TABLES])
def test_a_page_shows_the_medians_of_three_seeds(file, key, page, figures):
    report = json.loads((RESULTS / file).read_text())
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    for name, medians in report["medians"].items():
        runs = [run for run in report["runs"] if run[key] == name]
        assert sorted(run["seed"] for run in runs) == [0, 1, 2]
        [row] = [line for line in lines if line.startswith(f"| {name} |")]
        for figure in figures:
            assert medians[figure] == statistics.median(run[figure] for run in runs)
            assert f" {100 * medians[figure]:.0f} % " in row, (name, figure)
