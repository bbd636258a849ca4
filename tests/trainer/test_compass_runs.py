"""A reference teacher through the trainer: here, behind a server, with adapters and reuse, and what is refused."""

import pytest
import torch
from peft import LoraConfig
from protocol_server import ProtocolServer
from toys import SGD, fix_rollouts, prompts, step_of, student_model, student_tokenizer, teacher_model, teacher_tokenizer


SHARP = {"initializer_range": 0.3}
SETTINGS = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 8, **SGD}


def reference_model():
    """A Llama, since `AutoTokenizer` would read the folder of a Qwen2 with another tokenizer as Qwen2's."""
    return student_model(seed=7, vocab_size=len(teacher_tokenizer()), **SHARP)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The toy reference teacher, saved."""
    path = tmp_path_factory.mktemp("reference")
    reference_model().save_pretrained(path)
    teacher_tokenizer().save_pretrained(path)
    return str(path)


def test_it_learns_from_the_difference_and_logs_it(build, folder):
    trainer = fix_rollouts(
        build(reference_teacher=folder, teacher=teacher_model(**SHARP), eval_dataset=prompts(3), **SETTINGS)
    )
    step = step_of(trainer)
    plain = step_of(fix_rollouts(build(teacher=teacher_model(**SHARP), **SETTINGS)))
    assert (step - plain).abs().max() > 0.1 * plain.abs().max()
    log = trainer.state.log_history[0]
    assert log["compass/neutralised_fraction"] == 0 and abs(log["compass/difference_nats_per_chunk"]) > 1e-3
    assert "reference/nats_per_token" not in log
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


def test_two_equal_teachers_leave_a_student_that_is_at_its_start(build, folder):
    adapter = LoraConfig(r=4, target_modules="all-linear")
    trainer = build(reference_teacher=folder, teacher=reference_model(), peft_config=adapter, **SETTINGS)
    assert step_of(fix_rollouts(trainer)).abs().max() < 1e-5


def test_a_server_gives_the_step_of_the_same_reference_teacher_in_this_process(build, folder):
    settings = {"teacher": teacher_model(**SHARP), **SETTINGS}
    local = step_of(fix_rollouts(build(reference_teacher=folder, **settings)))
    with ProtocolServer(reference_model(), teacher_tokenizer()) as served:
        trainer = fix_rollouts(build(reference_teacher=served.url, **settings))
        torch.testing.assert_close(step_of(trainer), local, rtol=1e-3, atol=1e-5)
        assert trainer.state.log_history[0]["reference_teacher/failed_fraction"] == 0


def test_it_goes_with_adapters_reuse_accumulation_and_a_reference_kl(build, folder):
    trainer = build(
        reference_teacher=folder,
        reference_teacher_share="even",
        reference_kl=0.1,
        rollout_reuse=2,
        max_steps=2,
        gradient_accumulation_steps=2,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "grad_norm" in entry][-1]
    assert last["grad_norm"] > 0 and "ratio/clipped_fraction" in last and "reference/nats_per_token" in last


def test_what_it_has_no_use_for_is_refused_with_the_way_out(build, folder, tmp_path):
    for settings, message in (
        ({"distillation_loss": "alm"}, "reference_teacher=.* has no effect on distillation_loss='alm'"),
        ({"credit": "last"}, "credit='last' has no effect with reference_teacher.*reference_teacher_share"),
        ({"event": "closed"}, "event='closed' has no effect with reference_teacher"),
        ({"reference_teacher_alpha": -1.0}, "reference_teacher_alpha .*-1.0"),
        ({"reference_teacher_share": "all"}, "reference_teacher_share 'all': choose one of mean, even"),
        ({"temperature": 0.5, "reference_teacher": "http://127.0.0.1:9"}, "temperature=0.5: a server's"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**{"reference_teacher": folder, **settings})
    student_model().save_pretrained(tmp_path / "other")
    student_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the teacher's.*a model of the teacher's own family"):
        build(reference_teacher=str(tmp_path / "other"))
    teachers = {name: teacher_model() for name in ("one", "two")}
    with pytest.raises(ValueError, match="reference_teacher=.*with several teachers, one, two"):
        tokenizers = dict.fromkeys(teachers, teacher_tokenizer())
        build(reference_teacher=folder, teacher=teachers, teacher_processing_class=tokenizers)


def test_a_text_beyond_the_context_of_the_reference_teacher_alone_is_left_unread(build, tmp_path):
    student_model(seed=7, vocab_size=len(teacher_tokenizer()), max_position_embeddings=40).save_pretrained(tmp_path)
    teacher_tokenizer().save_pretrained(tmp_path)
    trainer = fix_rollouts(build(reference_teacher=str(tmp_path), teacher=teacher_model(), **SETTINGS))
    trainer.train()
    assert trainer.panel.context == 40
    assert 0 < trainer.state.log_history[0]["alignment/teacher_context_exceeded_fraction"] <= 1
