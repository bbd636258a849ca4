"""`notebooks/look_inside.ipynb` runs from top to bottom (its own assertions hold), and what it says is what it shows."""

import pytest
from notebook_runs import check_printed, check_saved, printed, run, saved, shown


REPORT = """{
    "chunks": [chunk.decode() for chunk in chunks],
    "gaps": scored.gap.tolist(),
    "student": [piece.decode() for piece in student_pieces],
    "credits": scored.advantages.tolist(),
}"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run("look_inside", REPORT, tmp_path_factory.mktemp("notebook"))


def test_the_misspelled_word_is_orange_and_the_rest_is_pale(ran):
    _, found = ran
    word = found["chunks"].index(" f"), found["chunks"].index("-")
    assert "".join(found["chunks"][slice(*word)]) == " fivety"
    assert max(found["gaps"][slice(*word)]) < -5
    assert all(abs(gap) < 0.5 for gap in found["gaps"][: word[0]] + found["gaps"][word[1] + 1 :])
    v = found["student"].index("v")
    assert found["student"][v + 1] == "e"
    assert found["credits"][v] < found["credits"][v + 1] < 0


def test_its_saved_outputs_are_those_of_the_run_to_a_last_digit(ran):
    check_saved("look_inside")
    check_printed(printed(saved("look_inside")), printed(ran[0]))
    pictures = shown(saved("look_inside"), "text/html")
    assert len(pictures) == 4
    assert all('class="ctopd' in picture for picture in pictures)
