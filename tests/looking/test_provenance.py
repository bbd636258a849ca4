"""What a card and a report say of a run's origin, and what they keep to themselves."""

import sys

import pytest
from datasets import Dataset

from trl_ctopd.looking.provenance import command, dataset_source, license_of


@pytest.fixture
def started_with(monkeypatch, tmp_path):
    """`started_with("run.py", ...)`: the command that is told of a process started so in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)

    def told(*arguments):
        monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", *arguments])
        return command()

    return told


def test_a_command_is_told_as_it_was_given(started_with):
    assert started_with("run.py", "--seed", "1", "--text", "two words") == "python3 run.py --seed 1 --text 'two words'"
    assert started_with("-m", "pkg.run", "--x=1") == "python3 -m pkg.run --x=1"
    assert started_with("/opt/venv/bin/ctopd", "distill", "--seed", "1") == "ctopd distill --seed 1"


def test_a_command_gives_away_no_token_and_no_folder(started_with, tmp_path):
    secret = "hf_" + "a" * 30
    told = started_with(
        str(tmp_path / "run.py"), "--hub_token", "abc", "--api_key=def", "--output_dir", "/home/me/out",
        "--model_init_kwargs", f'{{"token": "{secret}"}}', "--max_new_tokens", "64",
    )  # fmt: skip
    assert not any(part in told for part in ("abc", "def", "/home", secret, str(tmp_path)))
    assert told.startswith("python3 run.py --hub_token … ") and told.endswith("--max_new_tokens 64")
    assert "--output_dir out" in told


def test_a_notebook_and_code_in_a_line_have_no_command(started_with, monkeypatch):
    assert started_with("-c", "print()") is None
    assert started_with() is None
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert started_with("-m", "ipykernel_launcher", "-f", "x.json") is None


def test_a_dataset_of_the_hub_is_named_and_one_made_in_place_is_not():
    made = Dataset.from_list([{"prompt": "a"}])
    assert dataset_source(made) is None and dataset_source(None) is None
    made.info.download_checksums = {f"hf://datasets/lab/questions@0123abc/data/{n}.parquet": {} for n in range(2)}
    assert dataset_source(made.map(lambda row: {"ids": [1]}, remove_columns=["prompt"])) == "lab/questions"


def test_a_licence_is_read_from_the_card_in_a_models_folder(tmp_path):
    assert license_of("") == {} and license_of(str(tmp_path)) == {}
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n# A model\n")
    assert license_of(str(folder)) == {"license": "other", "license_name": "mine"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("[mit, apache-2.0]", {"license": ["mit", "apache-2.0"]}),
        ("[mit]", {"license": "mit"}),
        ("\n- mit\n- null", {"license": "mit"}),
        ("[]", {}),
        ("mit", {"license": "mit"}),
    ],
)
def test_several_licences_of_a_card_stay_several(tmp_path, written, read):
    (tmp_path / "README.md").write_text(f"---\nlicense: {written}\n---\n# A model\n")
    assert license_of(str(tmp_path)) == read
