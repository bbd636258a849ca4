"""Several teachers, of which each row of the dataset chooses one: its own tokenizer, template and place."""

import re
from pathlib import Path

import pytest
import torch
from protocol_server import ProtocolServer
from toys import SGD, fix_rollouts, prompts, step_of, student_model, student_tokenizer, teacher_model, teacher_tokenizer


ROWS = prompts(8)
NAMED = ROWS.add_column("teacher", ["math", "code"] * 4)
TOKENIZERS = {"math": teacher_tokenizer(), "code": student_tokenizer()}  # the second reads as the student does


def teachers() -> dict:
    return {"math": teacher_model(), "code": student_model(seed=5)}


@pytest.fixture
def run(build):
    """One step with these teachers and rows: the trainer, and what the step adds to the weights."""

    def run(teacher, dataset, tokenizer, **settings):
        trainer = fix_rollouts(
            build(
                teacher=teacher, dataset=dataset, teacher_processing_class=tokenizer, train_sampling_strategy="sequential",
                per_device_train_batch_size=len(dataset), **{"distillation_loss": "dpca", **SGD, **settings},
            )
        )  # fmt: skip
        return trainer, step_of(trainer)

    return run


def test_each_row_is_scored_by_the_teacher_it_names(run):
    trainer, step = run(teachers(), NAMED, TOKENIZERS)
    parts = [
        run(model, ROWS.select(range(place, 8, 2)), TOKENIZERS[name])
        for place, (name, model) in enumerate(teachers().items())
    ]
    weights = [figure(part, "completions/mean_length") * 4 for part, _ in parts]
    masked = [figure(part, "alignment/masked_fraction") for part, _ in parts]
    scored = [weight * (1 - share) for weight, share in zip(weights, masked, strict=True)]
    expected = sum(own * n for (_, own), n in zip(parts, scored, strict=True)) / sum(scored)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)
    assert figure(trainer, "alignment/one_to_one_fraction") < 1 == figure(parts[1][0], "alignment/one_to_one_fraction")


def figure(trainer, name: str) -> float:
    return trainer.state.log_history[0][name]


def test_a_teacher_at_a_server_that_tells_all_tokens_and_one_here_train_as_two_here(run, monkeypatch):
    monkeypatch.setattr("trl_ctopd.teachers.panel.CLOSING_TOKENS", len(teacher_tokenizer()))
    _, expected = run(teachers(), NAMED, TOKENIZERS)
    with ProtocolServer(teacher_model(), teacher_tokenizer()) as server:
        trainer, step = run({**teachers(), "math": server.url}, NAMED, TOKENIZERS)
        assert figure(trainer, "teacher/failed_fraction") == 0
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)


def test_samples_are_read_again_with_their_own_teacher(run):
    trainer, _ = run(teachers(), NAMED, TOKENIZERS)
    ids = student_tokenizer().encode("two and three")
    one, other = trainer.panel.align_completions([ids, ids], [0, 1])
    assert one.teacher_ids != other.teacher_ids == ids


def test_a_report_says_which_teacher_has_read_each_of_its_samples(run):
    trainer, _ = run(teachers(), NAMED, TOKENIZERS, report=True)
    page = Path(trainer.args.output_dir, "report.html").read_text(encoding="utf-8")
    shown = r"<h3>First sample, step 1, teacher (\w+)</h3>(?:(?!<h3>).)*?<b>(\d+%)</b> of student tokens one-to-one"
    said = re.findall(shown, page, re.DOTALL)
    assert {name for name, _ in said} == {"math", "code"}
    assert {share for name, share in said if name == "code"} == {"100%"}, "which reads as the student does"
    assert "math (Qwen2ForCausalLM), code (" in page and "math: Unigram" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"dataset": ROWS},
            "Row 0 of the train dataset: its column `teacher` is None, and the teachers are 'math', 'code'",
        ),
        ({"dataset": ROWS.add_column("teacher", ["maths"] * 8)}, "column `teacher` is 'maths'"),
        (
            {"teacher_processing_class": {"maths": teacher_tokenizer()}},
            "is 'maths', and the teachers are 'math', 'code'",
        ),
        ({"teacher_processing_class": teacher_tokenizer()}, "pass a dict with their names"),
        ({"distillation_loss": "gold"}, "gold needs the teacher's logits.*dpca, strict_sampled, alm, gvpo, sft"),
        ({"lmbda": 0.5, "seq_kd": True}, "seq_kd: with several teachers"),
    ],
)
def test_what_several_teachers_cannot_do_is_refused(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**{"teacher": teachers(), "dataset": NAMED, "teacher_processing_class": TOKENIZERS, **arguments})
