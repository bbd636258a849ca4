"""wandb and trackio themselves, offline: every figure and the completions arrive, an evaluation's apart from training's.

Neither is a dependency; each test is left out where its package is not installed.
"""

import json

import pytest
from toys import prompts


RUN = {
    "log_completions": True,
    "num_completions_to_print": 2,
    "max_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "run_name": "toy",
}
COLUMNS = ["step", "prompt", "completion", "gap, nats/byte"]


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_wandb_gets_every_figure_and_the_completions_as_tables(build, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    wandb = pytest.importorskip("wandb", reason="needs wandb: pip install wandb")
    trainer = build(report_to="wandb", eval_dataset=prompts(4), **RUN)
    trainer.train()
    summary = dict(wandb.run.summary)
    wandb.finish()
    for name in ("gap/nats_per_byte", "completions/mean_length", "alignment/masked_fraction"):
        assert summary[f"train/{name}"] == logged(trainer, name)[-1]
        assert summary[f"eval/{name}"] == logged(trainer, f"eval_{name}")[-1]
    tables = {}
    for file in sorted(tmp_path.rglob("*.table.json")):
        table = json.loads(file.read_text())
        assert table["columns"] == COLUMNS
        tables.setdefault(file.name.partition("_completions")[0].partition("completions")[0], []).extend(table["data"])
    assert sorted(row[0] for row in tables[""]) == [1, 1, 2, 2]
    assert sorted(row[0] for row in tables["eval"]) == [2, 2]
    assert all("What is" in prompt and gap > 0 for rows in tables.values() for _, prompt, _, gap in rows)


def test_trackio_gets_every_figure_and_the_completions_as_tables(build, tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio", reason="needs trackio: pip install trackio")
    for module in (trackio.utils, trackio.sqlite_storage):  # TRACKIO_DIR is read when the package is imported
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    trainer = build(report_to="trackio", eval_dataset=prompts(4), project="toys", **RUN)
    trainer.train()
    logs = trackio.sqlite_storage.SQLiteStorage.get_logs("toys", "toy")
    for name in ("gap/nats_per_byte", "completions/mean_length", "alignment/masked_fraction"):
        assert [log[f"train/{name}"] for log in logs if f"train/{name}" in log] == pytest.approx(logged(trainer, name))
        assert [log[f"eval/{name}"] for log in logs if f"eval/{name}" in log] == logged(trainer, f"eval_{name}")
    for table, steps in (("completions", [1, 1, 2, 2]), ("eval_completions", [2, 2])):
        rows = [row for log in logs if table in log for row in log[table]["_value"]]
        assert [row["step"] for row in rows] == steps
        assert all(list(row) == COLUMNS and "What is" in row["prompt"] for row in rows)
