"""`notebooks/quickstart.ipynb` runs from top to bottom, and its student gets better."""

import pytest
from notebook_runs import check_saved, run, saved, shown


REPORT = """{
    "before": accuracy(before),
    "after": accuracy(after),
    "merged": accuracy(answers(merged, student_tokenizer)),
    "gaps": [entry["gap/nats_per_byte"] for entry in trainer.state.log_history if "gap/nats_per_byte" in entry],
}"""


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict:
    return run("quickstart", REPORT, tmp_path_factory.mktemp("notebook"))[1]


def test_the_student_of_the_notebook_learns_the_capitals(figures):
    assert figures["before"] <= 0.4
    assert figures["after"] >= 0.75  # the saved run has 1.0, another draw 0.83
    assert figures["merged"] >= 0.75
    assert figures["gaps"][-1] < 0.6 * figures["gaps"][0]


def test_its_saved_outputs_are_whole(figures):
    check_saved("quickstart")
    assert shown(saved("quickstart"), "image/png")
    alignment, progress, compared, report = shown(saved("quickstart"), "text/html")
    assert 'class="ctopd"' in alignment
    assert "Gap, nats/byte" in progress
    assert all(title in compared for title in ("Student before", "Student now", "Teacher"))
    assert report.startswith("<iframe srcdoc=") and "Latest sample, step 40" in report
