"""`notebooks/look_inside.ipynb` runs from top to bottom (its own assertions hold), and what it says is what it shows."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell


NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "look_inside.ipynb"
REPORT = """
import json
print(json.dumps({
    "chunks": [chunk.decode() for chunk in chunks],
    "gaps": scored.gap.tolist(),
    "student": [piece.decode() for piece in student_pieces],
    "credits": scored.advantages.tolist(),
}))
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory) -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(new_code_cell(REPORT))
    folder = str(tmp_path_factory.mktemp("notebook"))
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return notebook


def test_the_misspelled_word_is_orange_and_the_rest_is_pale(notebook):
    found = json.loads(notebook.cells[-1].outputs[-1].text)
    word = found["chunks"].index(" f"), found["chunks"].index("-")
    assert "".join(found["chunks"][slice(*word)]) == " fivety"
    assert max(found["gaps"][slice(*word)]) < -5
    assert all(abs(gap) < 0.5 for gap in found["gaps"][: word[0]] + found["gaps"][word[1] + 1 :])
    v = found["student"].index("v")
    assert found["student"][v + 1] == "e"
    assert found["credits"][v] < found["credits"][v + 1] < 0


def test_its_saved_outputs_are_those_of_the_run(notebook):
    saved = nbformat.read(NOTEBOOK, as_version=4)
    ran = [cell for cell in notebook.cells[:-1] if cell.cell_type == "code"]
    kept = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in kept] == [*range(1, len(kept) + 1)]
    printed = [[output.get("text") for output in cell.outputs if output.get("name") == "stdout"] for cell in kept]
    assert printed == [[o.get("text") for o in cell.outputs if o.get("name") == "stdout"] for cell in ran]
    pictures = [output.data["text/html"] for cell in kept for output in cell.outputs if "data" in output]
    assert len(pictures) == 4
    assert all('class="ctopd' in picture for picture in pictures)
    assert all(
        output.output_type != "error" and output.get("name") != "stderr" for cell in kept for output in cell.outputs
    )
    assert not any(trace in nbformat.writes(saved) for trace in ("/tmp/", "/home/", "/root/", "Warning", "WARNING"))
