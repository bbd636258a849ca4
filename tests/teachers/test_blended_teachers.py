"""Several teachers of one row, through the trainer."""

import re
from pathlib import Path

import pytest
import torch
from protocol_server import ProtocolServer
from toys import SGD, fix_rollouts, prompts, step_of, student_model, student_tokenizer, teacher_model, teacher_tokenizer


ROWS = prompts(6)
TOKENIZERS = {"math": teacher_tokenizer(), "code": student_tokenizer()}
OPEN = {"event": "open", "credit": "macro", "advantage_clip": None}


def teachers() -> dict:
    return {"math": teacher_model(), "code": student_model(seed=5)}


def trainer_of(build, dataset, teacher=None, tokenizer=None, **settings):
    return fix_rollouts(
        build(
            teacher=teacher or teachers(), teacher_processing_class=tokenizer or TOKENIZERS, dataset=dataset,
            train_sampling_strategy="sequential", per_device_train_batch_size=len(dataset), **{**OPEN, **SGD, **settings},
        )
    )  # fmt: skip


def weighted(math: float):
    return ROWS.add_column("teacher_weights", [{"math": math, "code": 1 - math}] * len(ROWS))


def test_a_row_whose_whole_weight_is_on_one_teacher_is_that_teachers_row(build):
    expected = step_of(trainer_of(build, ROWS.add_column("teacher", ["math"] * 6)))
    found = step_of(trainer_of(build, weighted(1.0)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("event", ["open", "closed"])
def test_two_equal_teachers_are_the_one(build, event):
    expected = step_of(trainer_of(build, ROWS, teacher_model(), teacher_tokenizer(), event=event))
    twins = {"math": teacher_model(), "code": teacher_model()}
    tokenizers = {name: teacher_tokenizer() for name in twins}
    found = step_of(trainer_of(build, weighted(0.3), twins, tokenizers, event=event))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_closing_of_a_mixture_is_the_weighted_mean_of_its_teachers(build):
    def scored(dataset, **settings):
        trainer = trainer_of(build, dataset, **{"event": "closed", **settings})
        window = [next(iter(trainer.get_train_dataloader()))["prompts"]]
        [batch], _ = trainer.rollouts.roll_out(trainer.model, window, 0, "train", trainer._timers["train"])
        batch, entropy, _ = trainer._score(trainer.model, trainer._prepare_inputs(batch))
        return batch, entropy

    alone, expected_entropy = scored(ROWS.add_column("teacher", ["math"] * 6))
    both, entropy = scored(weighted(0.3))  # the other reads as the student does: nothing goes on with its tokens
    assert torch.equal(alone.student_chunks, both.student_chunks) and alone.close_log_probs.min() < -1e-3
    torch.testing.assert_close(both.close_log_probs, 0.3 * alone.close_log_probs)
    torch.testing.assert_close(both.student_log_probs, alone.student_log_probs)
    torch.testing.assert_close(entropy, expected_entropy)


def test_the_gap_to_a_mixture_is_the_weighted_mean_of_the_gaps(build):
    """Of the text that takes part with both: what the first cannot spell is masked in the mixture too."""

    def batch_of(dataset):
        trainer = trainer_of(build, dataset)
        window = [next(iter(trainer.get_train_dataloader()))["prompts"]]
        [batch], _ = trainer.rollouts.roll_out(trainer.model, window, 0, "train", trainer._timers["train"])
        return batch

    def sums(batch):
        inside = batch["teacher_chunks"] >= 0
        return (batch["teacher_log_probs"] * inside).sum(1), (batch["labels"] != -100).sum(1)

    (math, scored), (code, all_scored), (both, together) = (
        sums(batch_of(ROWS.add_column("teacher", ["math"] * 6))),
        sums(batch_of(ROWS.add_column("teacher", ["code"] * 6))),
        sums(batch_of(weighted(0.3))),
    )
    whole = (scored == all_scored).nonzero()[:, 0]
    assert len(whole) > 2 and torch.equal(together, torch.minimum(scored, all_scored))
    torch.testing.assert_close(both[whole], 0.3 * math[whole] + 0.7 * code[whole], rtol=1e-5, atol=1e-4)


def test_a_mixture_with_a_teacher_behind_a_server_trains_as_with_both_here_and_its_samples_are_shown(build):
    expected = step_of(trainer_of(build, weighted(0.3)))
    with ProtocolServer(teacher_model(), teacher_tokenizer()) as server:
        trainer = trainer_of(
            build, weighted(0.3), {**teachers(), "math": server.url}, report=True, log_completions=True
        )
        found = step_of(trainer)
    assert trainer.state.log_history[0]["teacher/failed_fraction"] == 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    page = (Path(trainer.args.output_dir) / "report.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", page)
    assert "100% of student tokens one-to-one" in text  # the heaviest teacher, which reads as the student does
    assert "sample, step 1, teachers code (70 %), math (30 %), with the tokens of code" in text


def test_the_table_of_completions_names_the_teachers_of_each_row(build, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    step_of(trainer_of(build, weighted(0.3), log_completions=True))
    head, *rows = [line for line in capsys.readouterr().out.splitlines() if "│" in line or "┃" in line]
    assert head.split("┃")[-2].strip() == "Teacher"
    assert any(row.split("│")[-2].strip() == "code (70 %), math (30 %)" for row in rows)


def test_rows_without_columns_take_the_weights_of_the_config(build):
    expected = step_of(trainer_of(build, weighted(0.3)))
    found = step_of(trainer_of(build, ROWS, teacher_weights={"math": 3, "code": 7}))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"teacher": teacher_model(), "tokenizer": teacher_tokenizer(), "teacher_weights": {"math": 1}},
            "there is one",
        ),
        ({"teacher_weights": {"maths": 1}, "dataset": ROWS}, "of the config is 'maths', and the teachers are 'math'"),
    ],
)
def test_what_a_mixture_cannot_do_is_refused(build, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(build, **{"dataset": weighted(0.5), **settings})


def test_stops_are_alike_only_where_all_teachers_of_a_mixture_read_the_same_end(build):
    student, both = student_model(), teachers()
    stops = student.generation_config.eos_token_id = [student_tokenizer().eos_token_id, 7]
    both["code"].generation_config.eos_token_id = stops  # it has the student's tokenizer, and each end is its own there
    found = []
    for share in (0.3, 1.0):
        trainer = trainer_of(build, weighted(share), both, model=student)
        prompts = trainer.data_collator(list(trainer.train_dataset))["prompts"][:1]
        [rollout] = trainer.panel.pair(prompts, [[*student_tokenizer().encode("one"), 7]])
        found.append(trainer.panel.alike_stops(rollout))
    assert found == [{}, {stops[0]: [7], 7: [stops[0]]}]
