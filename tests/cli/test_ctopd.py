"""`ctopd`: what its commands load before they work, and how they are called."""

import configparser
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from trl_ctopd.cli import COMMANDS, main


ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "rich"}
IMPORTED = (
    "import sys, json; from trl_ctopd.cli import main\ntry: main({})\nexcept SystemExit as end: assert not end.code\n"
)
IMPORTED += "print(); print(json.dumps(sorted(sys.modules)))"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_loads_no_framework(arguments):
    command = [sys.executable, "-c", IMPORTED.format(arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    *shown, loaded = done.stdout.splitlines()
    assert not HEAVY & {name.partition(".")[0] for name in json.loads(loaded)}
    assert "".join(shown).strip()


def test_the_help_of_all_names_every_command_and_each_one_itself(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"ctopd {name} " in shown for name in COMMANDS)
    for name in ("align", "plan"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: ctopd {name} ")


@pytest.mark.parametrize("arguments", [[], ["distil"]])
def test_an_unknown_or_missing_command_is_refused_with_the_known_ones(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_an_error_of_align_names_the_command_that_was_typed(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["align", "--student", "a", "--teacher", "b"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "ctopd align: error: give a text, or --file for a file of texts\n"


def test_the_console_script_is_this_function():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "ctopd" and getattr(importlib.import_module(module), function) is main


def test_as_a_module_it_is_the_same_command():
    command = [sys.executable, "-m", "trl_ctopd.cli", "--version"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == importlib.import_module("trl_ctopd").__version__
