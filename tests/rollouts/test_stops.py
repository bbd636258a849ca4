"""Stop tokens of the student's with which a text ends alike: the log-prob of an end is that of all of them together."""

import copy

import pytest
import torch
from peft import LoraConfig
from toys import fix_rollouts, student_model, student_tokenizer

from trl_ctopd.losses import DPCA


class Seen(DPCA):
    """Keeps what it is called with."""

    def __call__(self, batch, num_items):
        self.batch = batch
        return super().__call__(batch, num_items)


def scored(build, count, one_tokenizer=False, moved=False, **settings):
    """What the loss reads of texts that end with one stop token each of a student's `count`; their ids, its log-probs (B, S, V) and its stops.
    `moved`: the log-probs are those of the student as it was, before it was trained."""
    tokenizer, student, loss = student_tokenizer(), student_model(), Seen()
    more = [token for token in range(5, len(tokenizer)) if token not in tokenizer.all_special_ids][: count - 1]
    stops = student.generation_config.eos_token_id = [tokenizer.eos_token_id, *more]
    if one_tokenizer:
        settings |= {"teacher": student_model(seed=1), "teacher_processing_class": student_tokenizer()}
        settings["teacher"].generation_config.eos_token_id = stops
    start = copy.deepcopy(student)
    trainer = fix_rollouts(build(model=student, processing_class=tokenizer, distillation_loss=loss, **settings))
    write = trainer.rollouts.write
    trainer.rollouts.write = lambda *given: [
        ([*(token for token in ids if token not in stops), stops[n % count]], None)
        for n, (ids, _) in enumerate(write(*given))
    ]
    if moved:
        generator = torch.Generator().manual_seed(1)
        for own in (own for own in trainer.model.parameters() if own.requires_grad):
            own.data += 0.2 * torch.randn(own.shape, generator=generator)
    prompts = trainer.data_collator(list(trainer.train_dataset))["prompts"][:4]
    [batch] = trainer._roll_out(trainer.model, [prompts], "train")
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=1)
    with torch.no_grad():
        told = (start if moved else student)(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    return loss.batch, batch, told, stops


@pytest.mark.parametrize(("count", "generations"), [(1, 1), (2, 1), (3, 1), (3, 4)])
def test_it_is_that_of_all_for_which_the_teacher_reads_the_same_end(build, count, generations):
    read, batch, told, stops = scored(build, count, num_generations=generations)
    ids = batch["input_ids"][:, 1:]
    own = told.gather(-1, ids[..., None])[..., 0]
    expected = torch.where(torch.isin(ids, torch.tensor(stops)), told[..., stops].logsumexp(-1), own)
    takes_part = batch["student_chunks"] >= 0
    assert (takes_part & torch.isin(ids, torch.tensor(stops))).sum() >= 4
    assert (read.student_log_probs - expected)[takes_part].abs().max() < 1e-5
    assert (read.drawn_log_probs - own)[takes_part].abs().max() < 1e-5


@pytest.mark.parametrize("generations", [1, 4])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_start_is_asked_for_the_end_with_all_of_them_too(build, adapter, generations):
    settings = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if adapter else {}
    read, batch, told, stops = scored(build, 3, moved=True, reference_kl=0.1, num_generations=generations, **settings)
    ids, takes_part = batch["input_ids"][:, 1:], batch["student_chunks"] >= 0
    own = told.gather(-1, ids[..., None])[..., 0]
    expected = torch.where(torch.isin(ids, torch.tensor(stops)), told[..., stops].logsumexp(-1), own)
    assert (read.reference_log_probs - expected)[takes_part].abs().max() < 1e-5
    assert (read.student_log_probs - expected)[takes_part].abs().max() > 0.01


def test_where_the_teacher_has_each_of_them_itself_it_is_its_own(build):
    read, batch, told, _ = scored(build, 3, one_tokenizer=True)
    own = told.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    assert "other_stops" not in batch
    assert (read.student_log_probs - own)[batch["student_chunks"] >= 0].abs().max() < 1e-5
