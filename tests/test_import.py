"""Imports run one way, and the maths stands on its own."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


PACKAGE = Path(importlib.util.find_spec("trl_ctopd").origin).parent
# From the bottom up: a room imports from its own files and from rooms before it, nothing else.
ORDER = (
    "redact",
    "text",
    "losses",
    "models",
    "gkd",
    "config",
    "rollouts",
    "teachers",
    "training",
    "looking",
    "trainer",
    "preference",
    "cli",
    "align",
)
APART = {("losses", "models")}  # neighbours that know nothing of each other
# Frameworks that the maths does without. transformers is loaded for tokenizers alone, so its trainer is named.
FRAMEWORKS = {"trl", "peft", "accelerate", "datasets", "deepspeed", "rich"}
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


def module_of(file: Path) -> str:
    """`losses.dpca` of its file; a package's `__init__` has the package's name, that of all is empty."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports_of(module: str) -> set[str]:
    """The package's modules that a file names in an import, those within functions too; not what only type checkers
    read."""
    file = FILES[module]
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    package = [part for part in package if part]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                named = ".".join([*base, alias.name])
                found.add(named if named in FILES else ".".join(base))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.partition(".")[0] == "trl_ctopd" for name in names), f"{module}: imports are relative"
    return found - {module}


def room_of(module: str) -> str:
    return module.partition(".")[0]


GRAPH = {module: imports_of(module) for module in FILES}


def test_every_room_has_a_place_in_the_order():
    assert {room_of(module) for module in FILES} - {""} == set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_from_rooms_below_it_alone(room):
    below = {*ORDER[: ORDER.index(room) + 1], ""} - {low for low, high in APART if high == room}
    up = {
        f"{module} -> {target}"
        for module, targets in GRAPH.items()
        for target in targets
        if room_of(module) == room and room_of(target) not in below
    }
    assert not up


def test_no_two_files_import_each_other_in_a_circle():
    """What a function imports when it is called counts too; the root, which only names what to load, imports nothing that
    imports it."""
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for target in GRAPH[module] - {""}:
            visit(target)
        path.pop()
        done.add(module)

    for module in GRAPH:
        visit(module)


def in_a_fresh_process(code):
    """What it prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("room", ["text", "losses"])
def test_the_maths_loads_no_framework_and_nothing_that_shows_it(room):
    modules = [f"trl_ctopd.{module}" for module in FILES if room_of(module) == room]
    loaded, is_function = in_a_fresh_process(
        # a dependency that takes one of them where it finds it, as httpx takes rich, does not find it
        f"import sys\nsys.modules.update(dict.fromkeys({sorted(FRAMEWORKS)}))\n"
        f"import {', '.join(modules)}\nimport json, trl_ctopd\n"
        "print(json.dumps([[name for name, module in sys.modules.items() if module], callable(trl_ctopd.token_bytes)]))"
    )
    assert set(modules) <= set(loaded)
    assert not FRAMEWORKS & {name.partition(".")[0] for name in loaded}
    assert "transformers.trainer" not in loaded
    assert not [name for name in loaded if name.startswith("trl_ctopd.looking")]
    assert is_function


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [
        (["text.token_bytes"], {"numpy"}),
        (["text.aligner", "text.chunks", "text.altered_text"], {"numpy"}),
        ([module for module in FILES if room_of(module) == "losses"], {"torch"}),
    ],
)
def test_the_maths_asks_for_numbers_alone(modules, allowed):
    nodes = [node for module in modules for node in ast.walk(ast.parse(FILES[module].read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == allowed


def test_aligning_loads_neither_torch_nor_transformers():
    """They come with the caller's tokenizer, not with the maths."""
    modules = ", ".join(f"trl_ctopd.text.{name}" for name in ("token_bytes", "aligner", "chunks", "altered_text"))
    loaded = in_a_fresh_process(f"import {modules}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))")
    assert not {"torch", "transformers", "trl"} & set(loaded)


def test_an_alignment_from_the_public_name_shows_itself():
    shows = in_a_fresh_process(
        "import json\nfrom trl_ctopd import TextAlignment\n"
        "print(json.dumps([hasattr(TextAlignment, name) for name in ('_repr_html_', 'to_html', 'print')]))"
    )
    assert shows == [True, True, True]


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


def test_no_two_test_files_share_a_name():
    """pytest imports a test file by its bare name, so that neighbours can borrow from it: the second one would not be collected."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
