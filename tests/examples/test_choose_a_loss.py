"""`notebooks/choose_a_loss.ipynb` runs from top to bottom, and what it says of each loss is what that loss does."""

import pytest
from notebook_runs import check_printed, check_saved, printed, run, saved, shown


REPORT = """{
    "pieces": {"wrong": misspelled.pieces, "right": spelled.pieces},
    "merged": [misspelled.alignment.student_chunks.count(c) > 1 for c in misspelled.alignment.student_chunks],
    "credit": {
        name: {"wrong": misspelled.judged_by(name).advantages.tolist(), "right": spelled.judged_by(name).advantages.tolist()}
        for name in ("dpca", "alm", "strict_sampled")
    },
    "asked": {
        name: {"wrong": asked_for(misspelled, name)[0].tolist(), "right": asked_for(spelled, name)[0].tolist()}
        for name in ("dpca", "alm", "bpm")
    },
    "perfect": {event: after_training(event) for event in ("closed", "open")},
    "ids": {piece: student_tokenizer.encode(piece)[0] for piece in (" f", "ifty", "i", "v", "-")},
}"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return run("choose_a_loss", REPORT, tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def found(ran):
    return ran[1]


def test_dpca_and_alm_blame_the_misspelled_word_and_reward_the_right_one(found):
    wrong, right = (found["pieces"][which] for which in ("wrong", "right"))
    word = slice(wrong.index(" f"), wrong.index("-"))
    assert "".join(wrong[word]) == " fivety"
    for name in ("dpca", "alm"):
        credit = found["credit"][name]
        assert max(credit["wrong"][word]) < -2
        assert min(credit["wrong"][word.stop + 1 :]) > -0.5
        assert min(credit["right"][right.index(" f") : right.index("-")]) > 0.3


def test_dpca_is_loudest_where_the_gap_is_largest_and_alm_where_the_student_was_sure(found):
    wrong, credit = found["pieces"]["wrong"], found["credit"]
    assert min(credit["dpca"]["wrong"]) == credit["dpca"]["wrong"][wrong.index(" f")]
    assert min(credit["alm"]["wrong"]) == credit["alm"]["wrong"][wrong.index("-")]
    v = wrong.index("v")
    assert credit["dpca"]["wrong"][v] < credit["dpca"]["wrong"][v + 1]
    assert credit["alm"]["wrong"][v] == credit["alm"]["wrong"][v + 1]


def test_alm_rewards_by_less_than_one_and_strict_sampled_is_silent_in_merged_chunks(found):
    credit = found["credit"]
    assert max(credit["alm"]["right"] + credit["alm"]["wrong"]) < 1
    for merged, strict, dpca in zip(
        found["merged"], credit["strict_sampled"]["wrong"], credit["dpca"]["wrong"], strict=True
    ):
        assert strict == (0 if merged else pytest.approx(dpca))
    assert any(found["merged"])


def test_what_the_student_is_sure_of_is_moved_by_alm_and_hardly_by_dpca(found):
    for piece in ("v", "-"):
        place = found["pieces"]["wrong"].index(piece)
        pushes = {name: found["asked"][name]["wrong"][place][found["ids"][piece]] for name in ("dpca", "alm")}
        assert pushes["alm"] < -2 < -0.3 < pushes["dpca"] < 0


def test_bpm_finds_nothing_wrong_with_what_the_teachers_word_begins_with(found):
    f, at = found["ids"][" f"], found["pieces"]["wrong"].index(" f")
    asked, ids = found["asked"], found["ids"]
    assert abs(asked["bpm"]["wrong"][at][f]) < 0.005
    assert asked["dpca"]["wrong"][at][f] < -5 and asked["alm"]["wrong"][at][f] < -3
    for name in ("dpca", "alm", "bpm"):
        after = asked[name]["right"][at + 1]
        assert after[ids["ifty"]] > 0.05 and after[ids["i"]] < -0.05
    lost = asked["bpm"]["wrong"][at + 1]
    assert abs(lost[ids["ifty"]]) < 0.05 and asked["dpca"]["wrong"][at + 1][ids["ifty"]] > 1


def test_closed_chunks_leave_a_perfect_student_and_open_ones_drive_it_away(found):
    (closed, one_digit), (opened, driven) = (found["perfect"][event] for event in ("closed", "open"))
    assert abs(closed) < 1e-3 and one_digit == pytest.approx(0.1, abs=1e-3)
    assert opened > 0.3 and driven > 0.3


def test_its_saved_outputs_are_those_of_the_run_to_a_last_digit(ran):
    check_saved("choose_a_loss")
    check_printed(printed(saved("choose_a_loss")), printed(ran[0]))
    pictures = shown(saved("choose_a_loss"), "text/html")
    assert [picture.count('class="ctopd scored"') for picture in pictures] == [2, 2]
