"""The census of chat templates, on two of TRL's."""

import pytest
from template_sides import census, side


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gptoss", dict.fromkeys(census["TURNS"], "right")),
        ("llama3_2", {"answer": "right", "thought and answer": "masked: it leaves out the thought", "call": "right"}),
    ],
)
def test_each_kind_of_turn_is_judged(name, found):
    assert {kind: census["judged"](side(name), side("qwen3"), kind) for kind in found} == found
