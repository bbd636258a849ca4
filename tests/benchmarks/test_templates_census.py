"""The census of chat templates, on two of TRL's."""

import re

import pytest
from template_sides import FOLDER, census, side


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gptoss", dict.fromkeys(census["TURNS"], "right")),
        ("llama3_2", {"answer": "right", "thought and answer": "masked: it leaves out the thought", "call": "right"}),
    ],
)
def test_each_kind_of_turn_is_judged(name, found):
    assert {kind: census["judged"](side(name), side("qwen3"), kind) for kind in found} == found


def test_control_tokens_of_an_unknown_kind_can_be_named(tmp_path):
    template = (FOLDER / "qwen3.jinja").read_text().replace("<|im_start|>", "⟪on⟫").replace("<|im_end|>", "⟪off⟫")
    (tmp_path / "own.jinja").write_text(template, encoding="utf-8")
    control = re.compile(rf"{census['CONTROL'].pattern}|⟪\w+⟫")
    [found] = census["census"]([tmp_path / "own.jinja"], control).values()
    assert found == dict.fromkeys(census["TURNS"], "right")
