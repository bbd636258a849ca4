"""What a run is looked at by never stops it: each of these parts is broken in turn, and the run ends with its weights saved."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig
from safetensors.torch import load_file
from toys import student_model, student_tokenizer, teacher_model, teacher_tokenizer
from transformers import TrainerCallback
from transformers.utils.notebook import NotebookProgressCallback

from trl_ctopd.looking import card, notebook, provenance
from trl_ctopd.looking.report import page
from trl_ctopd.looking.samples import Samples


LOOKED_AT = {"report": True, "log_completions": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
BROKEN_CARDS = {
    "broken YAML": b"---\nlicense: [mit\n---\n# A model\n",
    "a tab": b"---\nlicense:\tmit\n\ttags: x\n---\n",
    "Latin-1": "---\nlicense: mit\n---\nModèle\n".encode("latin-1"),
    "a bad model-index": b"---\nmodel-index:\n- name: x\n  results: nothing\n---\n",
    "a model-index of no list": b"---\nmodel-index: 7\n---\n",
    "metadata that are a list": b"---\n- license\n- mit\n---\n",
    "metadata that are a word": b"---\nmit\n---\n",
    "a list for a licence": b"---\nlicense:\n- mit\n- apache-2.0\n---\n",
    "two documents": b"---\nlicense: mit\n...\n---\nother: 1\n---\n",
    "an unknown tag": b"---\nlicense: !!python/object:os.system {}\n---\n",
    "control characters": b"---\nlicense: \x07mit\n---\n",
    "UTF-16": "---\nlicense: mit\n---\n".encode("utf-16"),
    "nothing": b"",
    "no metadata": b"# A model\n",
    "bad evaluation results": b"---\neval_results:\n- a: 1\n---\n",
}


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def trains_to_the_end(trainer, folder: Path, steps: int = 2):
    trainer.train()
    for step in range(1, steps + 1):
        assert load_file(folder / "run" / f"checkpoint-{step}" / "model.safetensors")
    assert trainer.state.global_step == steps


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (card, "learning_curve", "The picture of the learning curve"),
        (card, "model_card", "The model card"),
        (card.Written, "write", "The model card"),
        (provenance, "license_of", "The model card"),
        (provenance, "dataset_source", "The model card"),
        (provenance, "command", "The run's command"),
        (Samples, "take", "The samples of completions"),
        (page, "page", "The report"),
    ],
)
def test_a_part_that_fails_costs_the_run_that_part_and_a_line(build, tmp_path, monkeypatch, caplog, owner, name, said):
    monkeypatch.setattr(owner, name, fail)
    trains_to_the_end(build(**LOOKED_AT), tmp_path)
    assert (
        f"{said} is left out, and the run goes on without it: OSError: [Errno 28] No space left on device"
        in caplog.text
    )


def test_a_table_of_completions_that_cannot_be_printed_stops_nothing(build, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("trl_ctopd.looking.publish.show", fail)
    trains_to_the_end(build(**LOOKED_AT), tmp_path)
    assert "The table of completions is left out" in caplog.text
    assert (tmp_path / "run" / "report.html").exists()


def test_a_disk_that_fills_up_while_the_report_is_written_stops_nothing(build, tmp_path, monkeypatch, caplog):
    write = Path.write_text
    monkeypatch.setattr(
        Path,
        "write_text",
        lambda path, *args, **kwargs: (fail if "report" in path.name else write)(path, *args, **kwargs),
    )
    trains_to_the_end(build(**LOOKED_AT), tmp_path)
    assert "The report is left out" in caplog.text
    assert not list((tmp_path / "run").glob("*report.html"))


def test_a_notebooks_table_of_figures_that_fails_stops_nothing(build, monkeypatch, caplog):
    trainer = build(max_steps=2)
    trainer.add_callback(NotebookProgressCallback())
    notebook.show_figures(trainer)
    monkeypatch.setattr(notebook, "figures", fail)
    monkeypatch.setattr(notebook.FigureTable, "on_train_begin", TrainerCallback.on_train_begin)
    monkeypatch.setattr(notebook.FigureTable, "on_step_end", TrainerCallback.on_step_end)
    monkeypatch.setattr(notebook.FigureTable, "on_train_end", TrainerCallback.on_train_end)
    trainer.train()
    assert trainer.state.global_step == 2
    assert "The table of figures is left out" in caplog.text


def test_a_working_folder_that_is_deleted_stops_nothing(build, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    here = os.getcwd()
    monkeypatch.chdir(gone)
    try:
        trainer = build(**LOOKED_AT)
        shutil.rmtree(gone)
        trains_to_the_end(trainer, tmp_path)
    finally:
        os.chdir(here)


def test_words_among_the_figures_stop_no_report(build, tmp_path):
    trainer = build(**LOOKED_AT)
    trainer.log({"phase": "warm-up"})
    trains_to_the_end(trainer, tmp_path)
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("kind", BROKEN_CARDS)
def test_a_card_that_cannot_be_read_beside_student_and_teacher_stops_no_save(build, tmp_path, kind):
    for name, model, tokenizer in (
        ("student", student_model(), student_tokenizer()),
        ("teacher", teacher_model(), teacher_tokenizer()),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "README.md").write_bytes(BROKEN_CARDS[kind])
    trainer = build(
        model=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"), save_strategy="steps", save_steps=1
    )
    trains_to_the_end(trainer, tmp_path, steps=1)
    assert "student" in (tmp_path / "run" / "checkpoint-1" / "README.md").read_text(encoding="utf-8")


def test_a_card_that_cannot_be_read_where_an_adapter_is_saved_is_replaced(build, tmp_path, caplog):
    trainer = build(peft_config=LoraConfig(target_modules="all-linear"))
    trainer.train()
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_bytes(BROKEN_CARDS["broken YAML"])
    trainer.save_model(str(folder))
    assert load_file(folder / "adapter_model.safetensors")
    assert f"The old card {folder}/README.md is left out" in caplog.text
    assert "# run" in (folder / "README.md").read_text().lower()
