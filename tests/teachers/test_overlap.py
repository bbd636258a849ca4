"""A teacher in this process that reads in a thread of its own, beside one that has read before the student begins."""

import threading
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from toys import SGD, fix_rollouts, prompts, step_of, student_model, student_tokenizer, teacher_model, teacher_tokenizer

from trl_ctopd import CrossTokenizerGKDConfig
from trl_ctopd.models.forwards import base_model
from trl_ctopd.models.sharding import is_on
from trl_ctopd.teachers.local import LocalTeacher


ROWS = prompts(8)
TWO = {"dataset": ROWS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **SGD}
# one row in a forward pass of the teacher: its products are then the same in any order of rows
ALONE = {**TWO, "teacher_batch_size": 1}
WAIT = 120


def blended() -> dict:
    rows = ROWS.add_column("teacher_weights", [{"math": 0.3, "code": 0.7}] * len(ROWS))
    return {
        "dataset": rows,
        "teacher": {"math": teacher_model(), "code": student_model(seed=5)},
        "teacher_processing_class": {"math": teacher_tokenizer(), "code": student_tokenizer()},
    }


@pytest.fixture
def reference(tmp_path):
    model = student_model(
        seed=7, vocab_size=len(teacher_tokenizer())
    )  # a Llama: `AutoTokenizer` reads a Qwen2 folder as Qwen2's
    model.save_pretrained(tmp_path / "reference")
    teacher_tokenizer().save_pretrained(tmp_path / "reference")
    return str(tmp_path / "reference")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"distillation_loss": "reverse_kl"},
        {"distillation_loss": "gold"},
        {"lmbda": 0.5, "off_policy_loss": "sft"},
        {"num_generations": 2, "rollout_reuse": 2, "max_steps": 2},
    ],
    ids=lambda own: ", ".join(map(str, own.values())) or "dpca",
)
def test_a_teacher_in_a_thread_of_its_own_changes_no_weight(build, settings):
    expected = step_of(fix_rollouts(build(**ALONE, **settings)))
    assert torch.equal(step_of(fix_rollouts(build(**ALONE, **settings, teacher_overlap=True))), expected)
    assert expected.abs().max() > 0


def test_a_completion_ends_where_it_did(build):
    rule = {"window": 2, "patience": 1, "quantile": 0.5, "warmup_steps": 1, "warmup_rollouts": 1}
    settings = {**ALONE, "early_stop": "kat", "early_stop_kwargs": rule, "max_new_tokens": 16, "max_steps": 3}
    expected, trainer = step_of(build(**settings)), build(**settings, teacher_overlap=True)
    assert torch.equal(step_of(trainer), expected)
    assert any(log.get("early_stop/cut_fraction", 0) > 0 for log in trainer.state.log_history)


def test_blended_teachers_in_threads_of_their_own_change_no_weight(build):
    expected = step_of(fix_rollouts(build(**ALONE | blended())))
    assert torch.equal(step_of(fix_rollouts(build(**ALONE | blended(), teacher_overlap=True))), expected)


def test_a_reference_teacher_in_a_thread_of_its_own_changes_no_weight(build, reference):
    settings = {**ALONE, "reference_teacher": reference}
    expected = step_of(fix_rollouts(build(**settings)))
    assert torch.equal(step_of(fix_rollouts(build(**settings, teacher_overlap=True))), expected)


def test_rows_read_together_give_the_same_step_but_for_rounding(build):
    expected = step_of(fix_rollouts(build(**TWO)))
    found = step_of(fix_rollouts(build(**TWO, teacher_overlap=True)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_student_learns_a_micro_batch_while_the_teacher_has_still_to_read_the_next(build):
    trainer, learned, read_by = fix_rollouts(build(**TWO, teacher_overlap=True)), threading.Event(), []
    read, learn = trainer.teacher._forward, trainer.training_step

    def second_waits(*args):
        if len(read_by) >= TWO["per_device_train_batch_size"]:
            assert learned.wait(WAIT), "the student waits for what it does not need yet"
        read_by.extend([threading.current_thread().name] * len(args[0]))
        return read(*args)

    def first_tells(*args, **kwargs):
        loss = learn(*args, **kwargs)
        learned.set()
        return loss

    trainer.teacher._forward, trainer.training_step = second_waits, first_tells
    trainer.train()
    assert read_by == ["teacher"] * 2 * TWO["per_device_train_batch_size"]


def test_the_students_forward_pass_does_not_wait_for_the_teacher(build):
    trainer, begun = fix_rollouts(build(**TWO, teacher_overlap=True)), threading.Event()
    read = trainer.teacher._forward
    base_model(trainer.model).base_model.register_forward_hook(lambda *_: begun.set())

    def after_the_student(*args):
        assert begun.wait(WAIT)
        return read(*args)

    trainer.teacher._forward = after_the_student
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["seconds/teacher_wait"] > 0 and "teacher/failed_fraction" not in log


@pytest.mark.parametrize("grouped", [True, False])
def test_rows_are_read_in_the_order_of_their_micro_batches(build, grouped):
    trainer, read = fix_rollouts(build(**ALONE, length_grouped=grouped, teacher_overlap=True)), []
    forward, score = trainer.teacher._forward, trainer._score
    trainer.teacher._forward = lambda *args: (read.append(args[1][0]), forward(*args))[1]
    wanted = []

    def scored(model, inputs):
        for ids, chunks in zip(inputs["teacher_ids"].tolist(), inputs["teacher_chunks"].tolist(), strict=True):
            wanted.append(tuple(ids[: len(chunks)]))
        return score(model, inputs)

    trainer._score = scored
    trainer.train()
    assert len(read) == len(wanted) == 8
    assert all(tuple(own) == ids[: len(own)] for own, ids in zip(read, wanted, strict=True))
    assert len({tuple(own) for own in read}) > 1


def test_an_error_of_the_teachers_thread_ends_the_run_with_it(build):
    trainer = fix_rollouts(build(**TWO, teacher_overlap=True))

    def fails(*args):
        raise RuntimeError("out of something")

    trainer.teacher._forward = fails
    with pytest.raises(RuntimeError, match="out of something"):
        trainer.train()


def test_a_step_that_was_given_up_is_read_to_its_end_before_the_next_one():
    accelerator = SimpleNamespace(distributed_type=DistributedType.NO, device=torch.device("cpu"), num_processes=1)
    accelerator.autocast = torch.no_grad
    teacher = LocalTeacher(teacher_model(), accelerator, batch_size=1, overlap=True)
    inside, most, lock, read = [0], [0], threading.Lock(), teacher._forward

    def counted(*args):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        try:
            return read(*args)
        finally:
            with lock:
                inside[0] -= 1

    teacher._forward = counted
    texts = [[5, 6]] * 6, [[40, 41, 42]] * 6, [()] * 6
    steps = [teacher.start(*texts) for _ in range(3)]
    for step in steps:
        assert all(len(step.row(row)) == 3 for row in range(6))
    assert most == [1]


# --- where


def placed(*devices) -> nn.Module:
    model = nn.Linear(2, 2)
    model.hf_device_map = dict(enumerate(devices))
    return model


@pytest.mark.parametrize(
    ("devices", "shared"),
    [
        (["cuda:0"], True),
        (["cuda:1"], False),
        (["cuda:0", "cuda:1"], True),
        (["cuda:1", "cuda:2"], False),
        (["cuda:0", "cpu"], True),  # what is offloaded is taken to the GPU
        (["cuda:1", "cpu", "disk"], False),
        (["cpu"], False),
    ],
)
def test_a_teacher_has_a_device_of_its_own_where_none_of_it_computes_on_the_students(devices, shared):
    model = placed(*(own if own == "disk" else torch.device(own) for own in devices))
    assert is_on(torch.device("cuda:0"), model) is shared


def test_on_one_device_a_teacher_has_read_before_the_student_begins(build):
    trainer = fix_rollouts(build(**TWO))
    names, read = [], trainer.teacher._forward
    trainer.teacher._forward = lambda *args: (names.append(threading.current_thread().name), read(*args))[1]
    trainer.train()
    assert set(names) == {threading.main_thread().name}
    assert "seconds/teacher_wait" not in trainer.state.log_history[0]


def test_a_compiled_student_and_a_teacher_in_a_thread_are_refused(tmp_path):
    with pytest.raises(ValueError, match="teacher_overlap=True with torch_compile=True"):
        CrossTokenizerGKDConfig(str(tmp_path), use_cpu=True, teacher_overlap=True, torch_compile=True)


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_a_teacher_that_processes_share_has_no_thread_of_its_own(kind, monkeypatch):
    monkeypatch.setattr("trl_ctopd.teachers.local.place_teacher", lambda model, accelerator: model)
    accelerator = SimpleNamespace(distributed_type=kind, device=torch.device("cuda:0"), num_processes=1)
    assert not LocalTeacher(teacher_model(), accelerator, overlap=None).overlaps
    with pytest.raises(ValueError, match=f"teacher_overlap=True under {kind.value}"):
        LocalTeacher(teacher_model(), accelerator, overlap=True)
    model = teacher_model()
    model.hf_device_map = {"": torch.device("cuda:1")}  # every process has a whole one, where the user wants it
    assert LocalTeacher(model, accelerator, overlap=None).overlaps
