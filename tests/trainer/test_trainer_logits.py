"""The trainer and the losses on whole distributions: each gets what it asks for, and nothing is computed for the others."""

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models
from toys import SGD, fix_rollouts, prompts, step_of, student_model, student_tokenizer, teacher_tokenizer, weights
from transformers import PreTrainedTokenizerFast

from trl_ctopd.losses import LOSSES
from trl_ctopd.teachers.local import LocalTeacher


ON_LOGITS = [name for name, loss in LOSSES.items() if loss.signal == "logits"]
# what a loss needs beside its name
NEEDS = {"sft": {"lmbda": 0.0}, "gvpo": {"num_generations": 2}}
OFF_POLICY = [name for name, loss in LOSSES.items() if loss.policy != "on"]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    """The vocabularies of these tests stay out of the user's cache."""
    monkeypatch.setattr("trl_ctopd.teachers.panel.CACHE_DIR", tmp_path / "cache")


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_evaluates_and_logs_what_it_compares(build, loss):
    trainer = build(distillation_loss=loss, **NEEDS.get(loss, {}), max_steps=2, eval_dataset=prompts(3))
    before = weights(trainer).clone()
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["grad_norm"] > 0 and torch.isfinite(torch.tensor(log["loss"]))
    assert (weights(trainer) - before).abs().max() > 0
    assert ("loss/compared_fraction" in log) == (loss not in ("dpca", "alm", "gvpo", "sft"))
    assert 0 < log.get("loss/compared_fraction", 1) <= 1
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in ON_LOGITS])
def test_no_distributions_are_prepared_for_a_loss_that_does_not_ask(build, monkeypatch, loss):
    score = LocalTeacher.scores

    def without_hidden(self, prompts, completions, other_ends, going_on, with_hidden):
        assert not with_hidden
        return score(self, prompts, completions, other_ends, going_on)

    monkeypatch.setattr(LocalTeacher, "scores", without_hidden)
    trainer = build(distillation_loss=loss, **NEEDS.get(loss, {}))
    seen = []
    trained = trainer.distillation_loss
    trainer.distillation_loss = trainer.off_policy_loss = lambda batch, n: seen.append(batch) or trained(batch, n)
    trainer.train()
    [batch] = seen
    assert batch.student is None and batch.teacher is None
    assert "vocabulary" not in trainer.__dict__


def test_only_micro_batches_whose_loss_asks_carry_the_teachers_hidden_states(build):
    own = {"distillation_loss": "dpca", "off_policy_loss": "gold"}
    trainer = build(lmbda=0.5, per_device_train_batch_size=2, **own)
    trainer.rollouts.lmbda_draws = lambda step, count: [0.1, 0.9]
    rows = trainer.data_collator(list(trainer.train_dataset))["prompts"]
    on, off = trainer._roll_out(trainer.model, [rows[:2], rows[2:4]], "train")
    assert on["on_policy"] and "teacher_hidden" not in on
    assert not off["on_policy"]
    assert off["teacher_hidden"].shape[:2] == off["teacher_chunks"].shape


@pytest.mark.parametrize(("temperature", "bf16"), [(1.0, False), (0.5, False), (1.0, True)])
def test_the_distributions_are_those_that_the_sampled_log_probs_come_from(build, temperature, bf16):
    def compare(batch, num_items):
        for side, ids, chunks, log_probs in (
            (batch.student, batch.student_ids, batch.student_chunks, batch.student_log_probs),
            (batch.teacher, batch.teacher_ids, batch.teacher_chunks, batch.teacher_log_probs),
        ):
            found = side.log_probs(side.hidden).gather(-1, ids[..., None])[..., 0]
            torch.testing.assert_close(found[chunks >= 0], log_probs[chunks >= 0].float(), rtol=1e-4, atol=1e-5)
        return log_probs.new_zeros((), requires_grad=True), {"compared": (torch.ones(()), torch.ones(()))}

    compare.signal = "logits"
    trainer = build(distillation_loss=compare, temperature=temperature, bf16=bf16)
    trainer.train()
    assert trainer.state.log_history[0]["compared"] == 1


@pytest.mark.parametrize("loss", ON_LOGITS)
def test_gradient_accumulation_windows_give_the_same_step(build, loss):
    settings = {"train_sampling_strategy": "sequential", "distillation_loss": loss, **SGD}
    whole = step_of(fix_rollouts(build(per_device_train_batch_size=8, **settings)))
    parts = step_of(fix_rollouts(build(per_device_train_batch_size=2, gradient_accumulation_steps=4, **settings)))
    assert whole.abs().max() > 1e-5
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", ON_LOGITS)
def test_the_tile_changes_no_result(build, loss):
    cut, whole = (
        step_of(fix_rollouts(build(distillation_loss=loss, logit_tile_tokens=tile, **SGD))) for tile in (7, 10**6)
    )
    assert whole.abs().max() > 1e-5
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [*ON_LOGITS, "strict_sampled"])
def test_a_student_with_the_teachers_own_weights_and_tokenizer_is_left_alone(build, loss):
    """A row at a time, so that both models round alike: what compares sorted probabilities learns from the sign of a difference."""
    trainer = build(
        model=student_model(),
        teacher=student_model(),
        teacher_processing_class=student_tokenizer(),
        distillation_loss=loss,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        max_new_tokens=16,
        **SGD,
    )
    assert step_of(trainer).abs().max() < 1e-5
    assert abs(trainer.state.log_history[0]["loss"]) < 1e-5
    assert trainer.state.log_history[0]["loss/compared_fraction"] > 0.5


@pytest.mark.parametrize("loss", OFF_POLICY)
def test_a_loss_for_any_text_learns_from_references(build, loss):
    log = {}
    more = {"num_generations": 2, "seq_kd": True} if loss == "gvpo" else {}
    trainer = build(distillation_loss="bpm", off_policy_loss=loss, lmbda=0.0, **more)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["off_policy_fraction"] == 1
    assert log["grad_norm"] > 0


def test_adapters_checkpointing_and_bf16_train_on_distributions(build):
    trainer = build(
        distillation_loss="escd", peft_config=LoraConfig(r=4), bf16=True, gradient_checkpointing=True, max_steps=2
    )
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, tensor in trainer.model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_a_function_may_ask_for_distributions_too(build):
    def forward_kl_at_the_first_token(batch, num_items):
        assert batch.vocabulary.shared.student_ids.numel() > 50
        chunks = batch.comparable_chunks
        log_p = batch.student.log_probs(batch.student.rows(chunks.student_first))
        return -log_p.mean(1).sum() / num_items, {}

    forward_kl_at_the_first_token.signal = "logits"
    trainer = build(distillation_loss=forward_kl_at_the_first_token)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.parametrize("loss", ["dpca", "bpm", "multi_level_ot"])
def test_texts_of_which_nothing_can_be_scored_give_nothing_and_are_counted(build, loss):
    from toys import teacher_model

    trainer = fix_rollouts(
        build(teacher=teacher_model(max_position_embeddings=40), per_device_train_batch_size=16, distillation_loss=loss)
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 < log["alignment/unscored_fraction"] == log["alignment/teacher_context_exceeded_fraction"] < 1
    nothing = build(teacher=teacher_model(max_position_embeddings=5), distillation_loss=loss, **SGD)
    assert step_of(nothing).abs().max() == 0
    assert nothing.state.log_history[0]["alignment/unscored_fraction"] == 1


# --- bad input


class LogProbsOnly(LocalTeacher):
    """As a server would be."""

    signals = ("logprobs",)


def test_a_loss_on_distributions_refuses_a_teacher_that_gives_log_probs_only(build, monkeypatch):
    monkeypatch.setattr("trl_ctopd.teachers.panel.LocalTeacher", LogProbsOnly)
    message = "bpm needs the teacher's logits, and a teacher behind a server gives logprobs only.*dpca, strict_sampled, alm, gvpo, sft"
    with pytest.raises(ValueError, match=message):
        build(distillation_loss="bpm")
    with pytest.raises(ValueError, match="gold needs"):
        build(distillation_loss="dpca", lmbda=0.5, off_policy_loss="gold")
    assert build(distillation_loss="strict_sampled").train().global_step == 1


def letters(alphabet: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*alphabet, "<e>"])}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<e>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", pad_token="<e>")


@pytest.mark.parametrize("loss", ["strict_topk", "simct", "gold", "xtoken", "cdm", "bpm", "escd"])
def test_vocabularies_without_a_shared_token_are_refused_before_training(build, loss):
    with pytest.raises(ValueError, match=r"2 different texts.*2\) share no token.*use a loss on log-probs.*dpca"):
        build(
            distillation_loss=loss,
            processing_class=letters("abc"),
            teacher_processing_class=letters("xy"),
            dataset=prompts().remove_columns("completion").map(lambda row: {"prompt": "abcxy"}),
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation_loss": "simct", "credit": "last"}, "credit='last' has no effect on .*'simct': .* dpca"),
        (
            {"distillation_loss": "bpm", "advantage_clip": 3.0},
            "advantage_clip=3.0 has no effect.*dpca and reverse_kl and strict_sampled",
        ),
        ({"credit": "last", "distillation_loss_kwargs": {"credit": "macro"}}, "credit is 'last' .* and 'macro' in"),
        (
            {"distillation_loss": "gold", "off_policy_loss_kwargs": {"beta": 1.0}},
            "off_policy_loss_kwargs has no effect",
        ),
        ({"off_policy_loss": "bpm"}, "'bpm' cannot learn from text .*: choose one of alm, gvpo, uld, .*sft"),
        ({"off_policy_loss": "alme"}, "'alme' is not the name of a loss: choose one of alm"),
        ({"logit_tile_tokens": 0}, "logit_tile_tokens must be at least 1, got 0"),
    ],
)
def test_a_setting_without_effect_or_out_of_range_is_an_error(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


@pytest.mark.parametrize(("attribute", "value"), [("signal", "logit"), ("policy", "offf")])
def test_a_functions_own_declarations_are_read_closely(build, attribute, value):
    def own(batch, num_items):
        raise AssertionError("never called")

    setattr(own, attribute, value)
    with pytest.raises(ValueError, match=f"own has {attribute}='{value}': choose one of .*on|log"):
        build(distillation_loss=own)


def test_teacher_tokenizer_is_a_real_pair_with_the_students():
    """What the tests above stand on: shared text, and text that only one side has in one token."""
    student, teacher = (set(t.get_vocab()) for t in (student_tokenizer(), teacher_tokenizer()))
    assert student & teacher and student - teacher and teacher - student
