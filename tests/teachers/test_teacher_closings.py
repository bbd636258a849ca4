"""How a teacher in this process leaves the student's tokens closed: its own distribution, and what of it a step reads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from toys import prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer

from trl_ctopd.rollouts.closing import student_ends
from trl_ctopd.teachers.local import LocalTeacher


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
    found = teacher.scores(asked, completions, None, going_on)
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
    trainer, batch, _ = rolled_out(build_in(tmp_path))
    scored, _, _ = trainer._score(trainer.model, trainer._prepare_inputs(batch))
    loss = trainer.distillation_loss
    both, one = (loss._gaps(own) for own in (scored, replace(scored, teacher_close_log_probs=None)))
    assert (both - one).abs().max() > 1e-3
    torch.testing.assert_close(both.sum(1), one.sum(1))
