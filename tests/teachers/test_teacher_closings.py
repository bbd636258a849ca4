"""How a teacher in this process leaves the student's tokens closed: its own distribution, and what of it a step reads."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from protocol_server import ProtocolServer
from toys import prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer

from trl_ctopd.rollouts.closing import student_ends
from trl_ctopd.teachers.local import LocalTeacher
from trl_ctopd.teachers.readings import closing_of


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("size", [2, 8])
def test_a_closing_is_one_minus_the_probability_of_the_tokens_that_go_on(size, temperature):
    model = teacher_model().double()
    generator = torch.Generator().manual_seed(0)
    completions = [torch.randint(5, 100, (n,), generator=generator).tolist() for n in (7, 1, 0, 5)]
    asked = [[9, 8, 7], [3], [4, 4], [9, 8, 7]]
    going_on = []
    for completion in completions:
        places = np.repeat(np.arange(len(completion)), 20)[: 20 * (len(completion) // 2)]
        ids = np.concatenate(
            [np.random.default_rng(0).permutation(100)[:20] for _ in range(len(completion) // 2)] or [[]]
        )
        ids = ids.astype(np.int64)
        kept = ids != np.array([completion[place] for place in places], dtype=np.int64)
        going_on.append((places[kept], ids[kept]))
    teacher = LocalTeacher(model, Accelerator(cpu=True), temperature, batch_size=size)
    found = teacher.scores(asked, completions, None, [partial(tuple, own) for own in going_on])
    alone = teacher.log_probs(asked, completions)
    for row, (prompt, completion) in enumerate(zip(asked, completions, strict=True)):
        torch.testing.assert_close(found[row].log_probs, alone[row])
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1].double()
        p = (logits / temperature).softmax(-1)
        wanted = torch.ones(len(completion), dtype=torch.float64)
        for place, token in zip(*going_on[row], strict=True):
            wanted[place] -= p[place, token]
        torch.testing.assert_close(found[row].close.double(), wanted.log(), rtol=1e-5, atol=1e-5)


TEXT = "What is 12 plus 45, the sum?"


def rolled_out(build, **settings):
    """One micro-batch of a student whose tokens hold several of the teacher's: each has the other's toy tokenizer."""
    trainer = build(
        model=student_model(vocab_size=len(teacher_tokenizer())),
        teacher=teacher_model(vocab_size=len(student_tokenizer())),
        processing_class=teacher_tokenizer(),
        teacher_processing_class=student_tokenizer(),
        dataset=prompts(4),
        max_new_tokens=64,
        length_grouped=False,
        **settings,
    )
    rows = trainer.data_collator(list(trainer.train_dataset))["prompts"]
    ids = trainer.processing_class.encode(TEXT, add_special_tokens=False)
    trainer.rollouts.write = lambda model, given, step: [([*ids, trainer.stop_ids[0]], None)] * len(given)
    [batch] = trainer._roll_out(trainer.model, [rows], "train")
    return trainer, batch, ids


def test_a_step_reads_it_for_closed_chunks_and_not_for_open_ones(build_in, tmp_path):
    trainer, batch, ids = rolled_out(build_in(tmp_path / "closed"))
    [rollout] = trainer.panel.align_completions([[*ids, trainer.stop_ids[0]]])
    before, reverse = student_ends(rollout)[:-1].tolist(), trainer._continuations[""].reverse
    asked = {place for place, token in enumerate(before) if token >= 0 and len(reverse.of(token))}
    close = batch["teacher_close_log_probs"]
    assert close.shape == batch["teacher_log_probs"].shape and (close <= 0).all()
    assert {place for place, value in enumerate(close[0].tolist()) if value} == asked
    assert asked and close.min() < -1e-3
    _, batch, _ = rolled_out(build_in(tmp_path / "open"), distillation_loss_kwargs={"event": "open"})
    assert "teacher_close_log_probs" not in batch


def test_it_changes_the_gaps_of_chunks_and_not_their_sum(build_in, tmp_path):
    trainer, batch, _ = rolled_out(build_in(tmp_path), distillation_loss="dpca")
    scored, _, _ = trainer._score(trainer.model, trainer._prepare_inputs(batch))
    loss = trainer.distillation_loss
    both, one = (loss._gaps(own) for own in (scored, replace(scored, teacher_close_log_probs=None)))
    assert (both - one).abs().max() > 1e-3
    torch.testing.assert_close(both.sum(1), one.sum(1))


def test_of_a_servers_likeliest_tokens_a_closing_is_what_they_tell_and_with_all_of_them_the_teachers_own(
    build_in, tmp_path
):
    trainer, batch, ids = rolled_out(build_in(tmp_path))
    table, rows = trainer._continuations[""], trainer.data_collator(list(trainer.train_dataset))["prompts"]
    [view] = trainer.panel.pair(rows[:1], [[*ids, trainer.stop_ids[0]]])
    read = [*view.teacher_prompt_ids, *view.teacher_ids]
    logits = trainer.teacher_model(torch.tensor([read])).logits[0, len(view.teacher_prompt_ids) - 1 : -1]
    values, order = (logits / trainer.args.temperature).log_softmax(-1).sort(descending=True)
    own = batch["teacher_log_probs"][0]
    everything = closing_of(order, values, own, view, table)
    torch.testing.assert_close(everything, batch["teacher_close_log_probs"][0], rtol=1e-4, atol=1e-5)
    few = closing_of(order[:, :8], values[:, :8], own, view, table)
    assert (few >= everything - 1e-5).all() and (few > everything + 1e-4).any()
    assert not closing_of(order[:, :0], values[:, :0], own, view, table).any()
    assert not closing_of(order, values, own, view, None).any()
    rounded = closing_of(order, torch.zeros_like(values), own, view, table)  # as if all of them were certain
    assert (rounded >= own).all() and (rounded == own).any()


@pytest.mark.parametrize(("kind", "tells"), [("vllm", True), ("echo", False)])
def test_a_server_that_does_not_tell_the_likeliest_tokens_is_warned_of(build, kind, tells, caplog, monkeypatch):
    count = len(teacher_tokenizer())
    monkeypatch.setattr("trl_ctopd.teachers.panel.CLOSING_TOKENS", count)
    with ProtocolServer(teacher_model(), teacher_tokenizer(), protocol=kind) as server:
        trainer = build(teacher=server.url)
        [batch] = trainer._roll_out(
            trainer.model, [trainer.data_collator(list(trainer.train_dataset)[:2])["prompts"]], "train"
        )
        close = batch["teacher_close_log_probs"].log_probs
    assert (f"which does not return the ids of the {count} most likely tokens" in caplog.text) == (not tells)
    assert ("what is learned there is biased" in caplog.text) == (not tells)
    assert bool(close.any()) == tells
