"""The census of chat templates, on two of TRL's."""

import runpy
from pathlib import Path

import pytest
import trl

from trl_ctopd.text.chat import Speaker


census = runpy.run_module("benchmarks.templates.census")
FOLDER = Path(trl.__file__).parent / "chat_templates"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gptoss", dict.fromkeys(census["TURNS"], "right")),
        ("llama3_2", {"answer": "right", "thought and answer": "masked: it leaves out the thought", "call": "right"}),
    ],
)
def test_each_kind_of_turn_is_judged(name, found):
    side, other = (
        Speaker(census["tokenizer_for"]((FOLDER / f"{template}.jinja").read_text())) for template in (name, "qwen3")
    )
    assert {kind: census["judged"](side, other, kind) for kind in found} == found
