"""The maths stands on its own: TRL is loaded when the trainer is asked for, and not before."""

import json
import subprocess
import sys

import pytest

MATHS = ["trl_ctopd", *(f"trl_ctopd.{name}" for name in ("token_bytes", "align", "alignment", "credit", "losses"))]


def in_a_fresh_process(code):
    """What it prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loaded_by(statement):
    """The top-level modules there are after it."""
    return in_a_fresh_process(
        f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )


def test_the_maths_imports_without_trl():
    loaded = loaded_by(f"import {', '.join(MATHS)}")
    assert "trl_ctopd" in loaded and "torch" in loaded
    assert not {"trl", "peft", "accelerate", "datasets"} & set(loaded)


@pytest.mark.parametrize(
    ("module", "allowed"),
    [("token_bytes", []), ("align", ["numpy"]), ("alignment", ["numpy"]), ("credit", ["torch"]), ("losses", ["torch"])],
)
def test_a_module_of_the_maths_loads_no_framework_itself(module, allowed):
    """Once the package is there, since Python loads `trl_ctopd` before any of its modules."""
    loaded = in_a_fresh_process(
        "import ast, importlib.util, json, pathlib\n"
        f"path = pathlib.Path(importlib.util.find_spec('trl_ctopd.{module}').origin)\n"
        "paths = path.parent.glob('*.py') if path.name == '__init__.py' else [path]\n"
        "nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]\n"
        "names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]\n"
        "names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in names})))"
    )
    assert set(loaded) - set(sys.stdlib_module_names) == set(allowed)


def test_trainer_and_config_load_on_first_use_from_the_package():
    assert in_a_fresh_process(
        "import json, sys, trl_ctopd\n"
        "before = 'trl' in sys.modules\n"
        "from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer\n"
        "from trl.experimental.gkd import GKDConfig, GKDTrainer\n"
        "found = issubclass(CrossTokenizerGKDTrainer, GKDTrainer), issubclass(CrossTokenizerGKDConfig, GKDConfig)\n"
        "print(json.dumps([before, *found]))"
    ) == [False, True, True]


def test_every_public_name_is_there_and_listed():
    names, missing, listed = in_a_fresh_process(
        "import json, trl_ctopd\n"
        "names = trl_ctopd.__all__\n"
        "missing = [name for name in names if getattr(trl_ctopd, name, None) is None]\n"
        "print(json.dumps([names, missing, dir(trl_ctopd)]))"
    )
    assert {"CrossTokenizerGKDConfig", "CrossTokenizerGKDTrainer", "token_bytes", "align_text"} <= set(names) <= set(listed)
    assert missing == []


def test_token_bytes_is_the_function_and_not_its_module():
    assert in_a_fresh_process(
        "import json, trl_ctopd.token_bytes\n"
        "from trl_ctopd import token_bytes\n"
        "print(json.dumps([callable(token_bytes), callable(trl_ctopd.token_bytes)]))"
    ) == [True, True]


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    message = in_a_fresh_process(
        "import json, trl_ctopd\n"
        "try:\n    trl_ctopd.Trainer\nexcept AttributeError as error:\n    print(json.dumps(str(error)))"
    )
    assert "'Trainer'" in message and "trl_ctopd" in message
