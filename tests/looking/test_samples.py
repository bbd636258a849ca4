"""Completions kept to be looked at: what is kept is what was scored, and it is shown where the run reports to."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import fix_rollouts, prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer
from transformers.integrations.integration_utils import TensorBoardCallback

from trl_ctopd.looking.samples import Sample, Samples, _per_byte, show
from trl_ctopd.losses import ScoredChunks


@pytest.fixture
def taken(build, monkeypatch):
    """Trains with the settings given; the samples shown, and the trainer."""

    def train(**settings):
        shown = []
        monkeypatch.setattr("trl_ctopd.looking.publish.show", lambda samples, *_: shown.append(samples))
        trainer = fix_rollouts(build(log_completions=True, **settings))
        trainer.train()
        return shown, trainer

    return train


def test_a_steps_samples_have_its_logged_gap(taken):
    [samples], trainer = taken(num_completions_to_print=8, per_device_train_batch_size=4)
    assert len(samples) == 4
    widths = [
        len(rollout.alignment.text.encode()) for rollout in trainer.panel.align_completions([s.ids for s in samples])
    ]
    mean = sum(sample.gap * width for sample, width in zip(samples, widths, strict=True)) / sum(widths)
    [logged] = [entry["gap/nats_per_byte"] for entry in trainer.state.log_history if "gap/nats_per_byte" in entry]
    assert mean == pytest.approx(logged, rel=1e-5)


def wrong_half(completions, **columns):
    return [[(0, len(completion[0]["content"]) // 2)] for completion in completions]


RANDOM_CUTS = {
    "early_stop": "random",
    "early_stop_kwargs": {"window": 3, "patience": 1, "exempt": 2},
    "max_new_tokens": 40,
}


def blended() -> dict:
    return {
        "teacher": {"one": teacher_model(), "other": student_model(seed=5)},
        "teacher_processing_class": {"one": teacher_tokenizer(), "other": student_tokenizer()},
        "teacher_weights": {"one": 0.5, "other": 0.5},
    }


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({"distillation_loss": "dpca"}, "closing/unclosed_fraction"),
        ({"distillation_loss": "reverse_kl"}, "closing/unclosed_fraction"),
        ({"distillation_loss": "dpca", "teacher_gate": wrong_half}, "gate/masked_fraction"),
        ({"distillation_loss": "reverse_kl", "teacher_gate": wrong_half}, "gate/masked_fraction"),
        ({"distillation_loss": "dpca", **RANDOM_CUTS}, "early_stop/masked_fraction"),
        (blended, "closing/unclosed_fraction"),
    ],
    ids=["cut off", "cut off, reverse_kl", "gate", "gate, reverse_kl", "early stop", "cut off, blended"],
)
def test_a_samples_gap_is_the_logged_one_of_a_step_with_that_row_alone(
    build, tmp_path, monkeypatch, settings, left_out
):
    shown = []
    monkeypatch.setattr("trl_ctopd.looking.publish.show", lambda samples, *_: shown.append(samples))
    monkeypatch.setattr("trl_ctopd.rollouts.early_stop._dealt_out", lambda _, lengths: dict.fromkeys(lengths, 3))
    settings = settings() if callable(settings) else settings
    trainer = build(log_completions=True, report=True, per_device_train_batch_size=1, max_steps=2, **settings)
    ids = trainer.processing_class.encode("the sum of what is tw")  # a teacher's token may go on there
    trainer.rollouts.write = lambda model, prompts, step: [(ids, [-5.0] * len(ids)) for _ in prompts]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "gap/nats_per_byte" in entry]
    assert len(shown) == len(logs) == 2
    for [sample], logged in zip(shown, logs, strict=True):
        assert logged[left_out] > 0
        assert sample.gap == pytest.approx(logged["gap/nats_per_byte"], rel=1e-5)
        compared = [chunk >= 0 for chunk in sample.student_chunks]
        assert len(compared) == len(ids) and 0 < sum(compared) < len(ids)
    assert "left out" in (tmp_path / "run" / "report.html").read_text()


def test_log_probs_are_of_the_samples_own_tokens_on_both_sides(taken):
    [samples], trainer = taken(per_device_train_batch_size=4)
    for sample in samples:
        [rollout] = trainer.panel.align_completions([sample.ids])
        assert len(sample.student_log_probs) == len(sample.ids)
        assert len(sample.teacher_log_probs) == len(rollout.teacher_ids)
        assert all(value < 0 for value in sample.student_log_probs + sample.teacher_log_probs)
        assert sample.prompt.startswith("<|bos|><|start|>user\nWhat is")


def test_a_text_that_the_teacher_cannot_read_has_no_gap_and_no_scores_of_the_teacher(taken):
    [samples], _ = taken(teacher=teacher_model(max_position_embeddings=8))
    assert {(sample.gap, tuple(sample.teacher_log_probs)) for sample in samples} == {(None, ())}


def test_without_a_reader_nothing_is_kept(build, monkeypatch):
    trainer = build()
    monkeypatch.setattr(trainer._samples, "keep", lambda *_: pytest.fail("kept for nobody"))
    trainer.train()


def test_tensorboard_gets_every_figure_and_the_completions_as_a_table(build, tmp_path):
    evaluation = {"eval_dataset": prompts(4), "eval_strategy": "steps", "eval_steps": 2}
    trainer = build(report_to="tensorboard", log_completions=True, max_steps=2, **evaluation)
    trainer.train()
    [events] = (tmp_path / "run").rglob("events.*")
    found = EventAccumulator(str(events)).Reload()
    assert {"train/gap/nats_per_byte", "train/completions/mean_length", "train/seconds/step"} <= set(
        found.Tags()["scalars"]
    )
    texts = found.Tensors("completions/text_summary")
    assert [text.step for text in texts] == [1, 2]
    assert [text.step for text in found.Tensors("eval_completions/text_summary")] == [2]
    [table] = texts[0].tensor_proto.string_val
    head, _, *rows = table.decode().splitlines()
    assert head == "| prompt | completion | gap, nats/byte |"
    assert len(rows) == 4 and all("What is" in row for row in rows)


def test_a_completion_stays_one_cell_of_the_table_whatever_it_holds(capsys):
    class Writer:
        def add_text(self, tag, text, step):
            self.text = text

    tokenizer, callback = student_tokenizer(), TensorBoardCallback(Writer())
    ids = tokenizer.encode("a | b\x0b<script>alert(1)</script> *x*")
    show([Sample(3, "[red]", ids, [], [], None)], tokenizer, [callback], 1)
    [row] = callback.tb_writer.text.splitlines()[2:]
    assert row == r"| \[red\] | a \| b<br>&lt;script&gt;alert\(1\)&lt;/script&gt; \*x\* | nan |"
    assert "[red]" in capsys.readouterr().out


def test_rows_kept_are_no_views_of_a_whole_batch():
    inputs = {
        "input_ids": torch.arange(50).view(5, 10),
        "prompt_lengths": torch.full((5,), 4),
        "lengths": torch.full((5,), 9),
        "teacher_places": torch.zeros(5, dtype=torch.long),
        "frames": [""] * 5,
    }
    log_probs, chunks = -torch.ones(5, 9), torch.zeros(5, 9, dtype=torch.long)
    batch = ScoredChunks(log_probs, log_probs, chunks, chunks, chunks, 3)
    samples = Samples()
    samples.keep(inputs, batch, 2)
    assert len(samples) == 2
    assert all(tensor.untyped_storage().nbytes() <= 2 * 10 * 8 for row in samples._kept for tensor in row)
    assert math.prod(samples._kept[0][0].shape) == 10


def test_what_is_printed_hides_and_cuts_nothing(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    tokenizer = student_tokenizer()
    word, chinese = "compute_the_sum_of_" * 6, "".join(chr(code) for code in range(0x4E00, 0x4E00 + 60))
    ids = tokenizer.encode(f"\x1b[31mred \u202e{word} {chinese}\tend")
    show([Sample(3, "What\x07?\nTwo.", ids, [], [], 0.5)], tokenizer, [], 1)
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed and "\u202e" not in printed and "\x07" not in printed and "…" not in printed
    assert "⟨ESC⟩[31mred" in "".join(printed.split()).replace("│", "")
    letters = [character for character in printed if "\u4e00" <= character < "\u4e40"]
    assert "".join(letters) == chinese, "every one of them, in their order"
    assert printed.count("compute") + printed.count("comput\n") >= 1 and "⇥end" in printed.replace("\n", "")


def test_the_bytes_of_a_chunk_that_the_teacher_could_not_score_do_not_count():
    sides = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, float("nan")])
    chunks = torch.tensor([0, 1])
    assert _per_byte(*sides, chunks, chunks, torch.tensor([4, 6]), 2) == 2 / 4
