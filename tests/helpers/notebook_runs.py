"""Runs a notebook of the project from top to bottom in a folder of its own, and checks its saved outputs."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell


NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def run(name: str, report: str, folder: Path) -> tuple[nbformat.NotebookNode, dict]:
    """The executed notebook, and the value of `report`, an expression evaluated at its end. Errors in cells are raised."""
    notebook = saved(name)
    notebook.cells.append(new_code_cell(f"import json\nprint(json.dumps({report}))"))
    NotebookClient(
        notebook,
        timeout=None,
        startup_timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    found = printed(notebook)[-1]  # on a busy machine, one print may arrive in several outputs
    notebook.cells.pop()
    return notebook, json.loads(found)


def saved(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def outputs(notebook: nbformat.NotebookNode) -> list[list[nbformat.NotebookNode]]:
    """The outputs of each code cell."""
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell printed."""
    return ["".join(o.text for o in own if o.get("name") == "stdout") for own in outputs(notebook)]


FIGURE = re.compile(r"[-+]?\d+(?:\.\d+)?%?")


def check_printed(one: list[str], other: list[str]):
    """Each cell has the same words and whole numbers. Other figures may differ by one in the last digit or by 0.1 %, since sums
    in another order differ by that much on another processor."""
    for own, its in zip(one, other, strict=True):
        assert FIGURE.sub("#", own).split() == FIGURE.sub("#", its).split()
        for a, b in zip(FIGURE.findall(own), FIGURE.findall(its), strict=True):
            if set(a + b) & set(".%"):
                decimals = max(len(figure.rstrip("%").partition(".")[2]) for figure in (a, b))
                values = [float(figure.rstrip("%")) for figure in (a, b)]
                assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1.01 * 10**-decimals)
            else:
                assert a == b


def shown(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """All outputs of one MIME type."""
    return [output.data[kind] for own in outputs(notebook) for output in own if kind in output.get("data", {})]


def check_saved(name: str):
    """Saved from one complete run, without an error or a warning, and without a path of the machine."""
    notebook = saved(name)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert all(o.output_type != "error" and o.get("name") != "stderr" for own in outputs(notebook) for o in own)
    text = nbformat.writes(notebook)
    assert not any(trace in text for trace in ("/tmp/", "/home/", "/root/", "Warning", "WARNING"))
