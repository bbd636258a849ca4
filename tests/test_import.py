"""The maths stands on its own: TRL is loaded when the trainer is asked for, and not before."""

import ast
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest


PACKAGE = pathlib.Path(importlib.util.find_spec("trl_ctopd").origin).parent
MATHS = [
    "trl_ctopd",
    *(f"trl_ctopd.{name}" for name in ("token_bytes", "align", "alignment", "altered_text", "credit", "losses")),
]
PUBLIC = """
import json, sys, trl_ctopd
before = "trl" in sys.modules
from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
print(json.dumps({
    "before": before,
    "subclasses": [issubclass(CrossTokenizerGKDTrainer, GKDTrainer), issubclass(CrossTokenizerGKDConfig, GKDConfig)],
    "names": trl_ctopd.__all__,
    "missing": [name for name in trl_ctopd.__all__ if getattr(trl_ctopd, name, None) is None],
    "listed": dir(trl_ctopd),
}))
"""


def in_a_fresh_process(code):
    """What it prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_maths_imports_without_trl():
    """And without what only trainers need; `token_bytes` the function survives `token_bytes` the module."""
    loaded, is_function = in_a_fresh_process(
        f"import {', '.join(MATHS)}\nimport json, sys\n"
        "modules = {name.partition('.')[0] for name in sys.modules}\n"
        "print(json.dumps([sorted(modules), callable(trl_ctopd.token_bytes)]))"
    )
    assert {"trl_ctopd", "torch"} <= set(loaded)
    assert not {"trl", "peft", "accelerate", "datasets"} & set(loaded)
    assert is_function


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("token_bytes", {"numpy"}),
        ("align", {"numpy"}),
        ("alignment", {"numpy"}),
        ("altered_text", {"numpy"}),
        ("credit", {"torch"}),
        ("losses", {"torch"}),
    ],
)
def test_a_module_of_the_maths_asks_for_no_framework(module, allowed):
    path = PACKAGE / module
    nodes = [
        node
        for file in (path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")])
        for node in ast.walk(ast.parse(file.read_text()))
    ]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == allowed


def test_trainer_and_config_load_on_first_use_and_every_public_name_is_there():
    found = in_a_fresh_process(PUBLIC)
    assert found["before"] is False
    assert found["subclasses"] == [True, True]
    assert found["missing"] == []
    wanted = {"CrossTokenizerGKDConfig", "CrossTokenizerGKDTrainer", "token_bytes", "align_text"}
    assert wanted <= set(found["names"]) <= set(found["listed"])


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    import trl_ctopd

    with pytest.raises(AttributeError, match="'trl_ctopd'.*'Trainer'"):
        trl_ctopd.Trainer  # noqa: B018
