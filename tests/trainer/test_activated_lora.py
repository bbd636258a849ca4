"""A student with an activated LoRA: it is scored as it writes, and evaluations leave nothing behind."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from toys import SGD, prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer, weights

from trl_ctopd.rollouts import generation
from trl_ctopd.rollouts.generation import _generate, _SampledLogProbs
from trl_ctopd.training.student import check_activated


INVOCATION = student_tokenizer().encode("<|start|>assistant", add_special_tokens=False)


def activated(model=None, invocation=INVOCATION):
    """With an adapter that changes much."""
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", alora_invocation_tokens=invocation)
    model = get_peft_model(model or student_model(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("cache", ["kept", "read again"])
def test_a_text_in_which_the_student_writes_the_invocation_is_scored_as_it_was_drawn(build, monkeypatch, cache):
    trainer = build(model=activated(), per_device_train_batch_size=2, max_new_tokens=32, length_grouped=False)
    tokenizer, config = trainer.processing_class, trainer.generation_config
    one, two = (tokenizer.encode(text, add_special_tokens=False) for text in (" one two", " and three"))
    stop = tokenizer.eos_token_id
    texts = [[*one, stop], [*one, *INVOCATION, *two, *INVOCATION, *one, stop]]  # the first row leaves
    drawn = []

    def choose(logits):
        column = len(drawn)
        own = [text[min(column, len(text) - 1)] for text in texts[-len(logits) :]]
        drawn.append(len(logits))
        return torch.tensor(own)[:, None]

    if cache == "read again":
        monkeypatch.setattr(generation, "selected", lambda model, cache, rows: None)
    window = trainer.data_collator([trainer.train_dataset[row] for row in range(2)])["prompts"]
    recorder, asked = _SampledLogProbs(2, config), [prompt.student_ids for prompt in window]
    with torch.no_grad():
        trainer.model.eval()
        written = _generate(trainer.model, asked, config, rows_leave=True, recorder=recorder, choose=choose)
    assert [own[: len(text)] for own, text in zip(written, texts, strict=True)] == texts and set(drawn) == {1, 2}

    trainer.rollouts.write = lambda model, prompts, step: [(text, None) for text in texts]
    [batch] = trainer._roll_out(trainer.model, [window], "train")
    scored = trainer._score(trainer.model, batch)[0].student_log_probs
    for row, text in enumerate(texts):
        start = len(asked[row]) - 1
        found, takes_part = scored[row, start : start + len(text)], batch["student_chunks"][row, start:][: len(text)]
        expected = recorder.of_tokens[row, : len(text)]
        torch.testing.assert_close(found[takes_part >= 0], expected[takes_part >= 0], atol=1e-4, rtol=1e-4)
        assert (takes_part >= 0).any()


def test_a_teachers_score_of_a_token_does_not_depend_on_what_follows(build):
    tokenizer = teacher_tokenizer()
    invocation = tokenizer.encode("<|assistant|>", add_special_tokens=False)
    trainer = build(teacher=activated(teacher_model(), invocation))
    prompt, text = (tokenizer.encode(own, add_special_tokens=False) for own in ("<|user|>one<|assistant|>", "two plus"))
    [alone] = trainer.teacher.log_probs([prompt], [text])
    [followed] = trainer.teacher.log_probs([prompt], [[*text, *invocation, *text]])
    torch.testing.assert_close(followed[: len(text)], alone, atol=1e-5, rtol=1e-5)


def test_evaluations_and_the_start_under_gradient_checkpointing_change_no_step(build):
    """Both read without a backward pass, which alone takes off what PEFT hangs on checkpointed layers."""
    evaluated = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "eval_dataset": prompts(4)}

    def trained(**settings):
        trainer = build(model=activated(), max_steps=2, reference_kl=0.1, **{**SGD, "learning_rate": 1e-2}, **settings)
        before = weights(trainer)
        trainer.train()
        return trainer, weights(trainer) - before

    _, expected = trained()
    trainer, found = trained(gradient_checkpointing=True, **evaluated)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    assert expected.abs().max() > 1e-3 and "eval_loss" in trainer.state.log_history[-2]
    trainer.evaluate()
    assert trainer.compare(["one and two"], max_new_tokens=2)[0]["student_now"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"generation_backend": "transformers_continuous"},
            r"leave out an activated LoRA \(alora_invocation_tokens=\[.*choose 'transformers'",
        ),
        ({"use_vllm": True, "vllm_mode": "server"}, "an activated LoRA .* cannot be merged: choose a plain LoRA, or"),
        (
            {"early_stop": "kat", "early_stop_tokens": 4, "early_stop_kwargs": {"window": 2}},
            "early_stop_tokens=4 with an",
        ),
    ],
)
def test_what_would_write_without_the_adapter_or_begin_it_elsewhere_is_refused_before_training(
    build, settings, message
):
    with pytest.raises(ValueError, match=message):
        build(model=activated(), max_new_tokens=16, **settings)


def test_prompts_and_tools_for_which_the_adapter_does_not_begin_are_told_of(build, caplog):
    with pytest.raises(ValueError, match=r"never be on: it begins at \[7, 7\].* none of the 16 prompts has"):
        build(model=activated(invocation=[7, 7]))
    args, rows = build().args, [[1, *INVOCATION], [1, 2]]
    with pytest.raises(ValueError, match="tools with an activated LoRA"):
        check_activated(args, activated(), Dataset.from_dict({"prompt_ids": rows}), tools=True)
    check_activated(args, activated(), Dataset.from_dict({"prompt_ids": rows}))
    assert "1 of 2 prompts do not have the ids at which the student's adapter begins" in caplog.text
