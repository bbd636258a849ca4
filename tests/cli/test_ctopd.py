"""`ctopd`: what its commands load before they work, and how they are called."""

import ast
import configparser
import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers_for_tests import byte_level, metaspace_bpe

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


def test_align_in_a_process_of_its_own_prints_both_sides(tmp_path):
    for side, tokenizer in (("student", byte_level()), ("teacher", metaspace_bpe())):
        tokenizer.save_pretrained(tmp_path / side)
    command = [sys.executable, "-m", "trl_ctopd.cli", "align", "--student", tmp_path / "student"]
    command += ["--teacher", tmp_path / "teacher", "twenty-three"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "student" in done.stdout and "teacher" in done.stdout


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


def test_every_package_that_is_imported_is_declared():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    declared = {re.split(r"[<>=]", line)[0] for line in lines}
    optional = {"matplotlib", "IPython", "sentencepiece"}  # asked for where they are used, which works without them
    imported = set()
    for file in (ROOT / "trl_ctopd").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    assert imported - sys.stdlib_module_names - optional <= declared
    assert all(re.search(r">=\d", line) for line in lines), "each with a lower bound"


def test_an_index_page_gets_no_picture_or_link_that_leads_into_the_repository(monkeypatch):
    setuptools = pytest.importorskip("setuptools", reason="needs setuptools, which builds the package")
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    text = given["long_description"]
    assert re.findall(r"\]\((?!https?:)", text) == []
    assert "How it works" in text and "](https://arxiv.org/" in text
    assert text.startswith("# trl_ctopd")
