"""Early stopping on two pretrained models in little: toy models in their place, a case at a time."""

import json

import pytest
from toys import student_model, student_tokenizer, teacher_model, teacher_tokenizer

from benchmarks.neighbours import real_pair


@pytest.fixture
def in_little(tmp_path, monkeypatch):
    """`in_little(case, ...)` runs these cases and reads the file of results."""
    for name, model, tokenizer in (
        (real_pair.STUDENT, student_model(), student_tokenizer()),
        (real_pair.TEACHER, teacher_model(), teacher_tokenizer()),
    ):
        model.save_pretrained(tmp_path / name.split("/")[-1].lower())
        tokenizer.save_pretrained(tmp_path / name.split("/")[-1].lower())
    tasks = [{"task_id": n, "text": "one plus two", "code": "", "test_list": [f"{n}"]} for n in range(8)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    monkeypatch.setattr(real_pair, "HELD_OUT", 2)
    monkeypatch.setattr(real_pair, "PROMPTS", 2)
    monkeypatch.setattr(real_pair, "TOKENS", 24)
    rule = {"window": 1, "patience": 1, "warmup_steps": 1, "warmup_rollouts": 1}
    monkeypatch.setitem(real_pair.CASES, "kat", {"early_stop": "kat", "early_stop_kwargs": rule})

    def run(*cases):
        output = tmp_path / "found.json"
        options = ["--models", tmp_path, "--data", tmp_path / "tasks.jsonl", "--updates", 2, "--output", output]
        real_pair.main([*map(str, options), "--cases", *cases])
        return json.loads(output.read_text())

    return run


def test_every_case_is_run_once_and_told_by_what_was_written_and_cut(in_little, monkeypatch, capsys):
    first = in_little("start", "kat")["runs"]
    assert first["start"]["gap"] != first["kat"]["gap"] and first["start"].keys() == {"gap"}
    before, after = first["kat"]["updates"]
    assert before == {"cut_fraction": 0, "masked_fraction": 0} and after.keys() == {*before, "threshold"}
    assert 0 <= first["kat"]["learned_from"] < first["kat"]["tokens_written"] <= 2 * 2 * 24
    assert in_little("start", "kat")["runs"] == first
    monkeypatch.setattr(real_pair, "TOKENS", 25)
    with pytest.raises(SystemExit):
        in_little("start")
    assert "max_new_tokens 24, now 25" in capsys.readouterr().err
