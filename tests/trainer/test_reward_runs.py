"""Rewards and gates through the trainer: what functions are called with, what their answers do to a step, and when they are not
called."""

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from toys import SGD, fix_rollouts, prompts, step_of, student_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaConfig

from trl_ctopd.rollouts.pairing import Prompt


ORDER = {"train_sampling_strategy": "sequential", "num_generations": 2, **SGD}


def varied(trainer):
    """The student 'writes' two texts for every prompt, in turn."""
    tokenizer, turn = trainer.processing_class, iter(range(10**6))

    def write(model, prompts, step):
        texts = [" is the sum" if next(turn) % 2 else "one plus two is the sum of what" for _ in prompts]
        return [(tokenizer.encode(text) + [tokenizer.eos_token_id], None) for text in texts]

    trainer.rollouts.write = write
    return trainer


def numbered():
    return prompts().add_column("answer", [str(n) for n in range(16)])


def longer(prompts, completions, **columns):
    return [float(len(completion[0]["content"])) for completion in completions]


def test_functions_are_called_as_grpo_calls_them(build):
    seen = []

    def spy(prompts, completions, completion_ids, answer, trainer_state, log_metric, **others):
        seen.append((prompts, completions, completion_ids, answer))
        log_metric("own", trainer_state.global_step + 3.0)
        assert not others
        return [0.0, 1.0] * (len(prompts) // 2)

    trainer = varied(build(dataset=numbered(), reward_funcs=spy, **ORDER))
    trainer.train()
    [(asked, completions, ids, answers)] = seen
    assert asked == [row for row in prompts()["prompt"][:4] for _ in range(2)]
    assert answers == [str(n) for n in range(4) for _ in range(2)]
    assert completions[:2] == [
        [{"role": "assistant", "content": text}] for text in ("one plus two is the sum of what", " is the sum")
    ]
    assert ids[1] == [*student_tokenizer().encode(" is the sum"), student_tokenizer().eos_token_id]
    log = trainer.state.log_history[0]
    assert log["rewards/spy/mean"] == log["reward"] == 0.5 and log["own"] == 3.0
    assert log["reward_std"] == pytest.approx(math.sqrt(0.5)) and log["frac_reward_zero_std"] == 0


def test_plain_text_reaches_functions_as_text(build):
    seen = []

    def spy(prompts, completions, **columns):
        seen.extend([*prompts, *completions])
        return [1.0] * len(prompts)

    rows = Dataset.from_list([{"prompt": f"What is {n}? "} for n in range(8)])
    varied(build(dataset=rows, reward_funcs=spy, **ORDER)).train()
    assert seen[:2] == ["What is 0? "] * 2 and seen[8:10] == ["one plus two is the sum of what", " is the sum"]


@pytest.mark.parametrize("loss", ["dpca", pytest.param("reverse_kl", marks=pytest.mark.slow)])
def test_the_step_is_the_teachers_and_in_proportion_to_the_weight_the_rewards(build, loss):
    settings = {"dataset": numbered(), "distillation_loss": loss, **ORDER}
    alone = step_of(varied(build(**settings)))
    steps = [
        step_of(varied(build(reward_funcs=longer, reward_weight=weight, **settings))) - alone
        for weight in (0.0, 0.5, 1.0)
    ]
    assert steps[0].abs().max() < 1e-7 and steps[2].abs().max() > 1e-3
    torch.testing.assert_close(steps[2], 2 * steps[1], rtol=1e-3, atol=1e-5)


def test_what_is_rewarded_becomes_more_likely_than_its_rival(build):
    def preferring(sign):
        trainer = varied(
            build(dataset=numbered(), reward_funcs=lambda completions, **_: [sign * v for v in longer(None, completions)],
                  reward_weight=30.0, **{**ORDER, "learning_rate": 0.1})
        )  # fmt: skip
        trainer.train()
        tokenizer = trainer.processing_class
        prompt = trainer.train_dataset[0]["prompt_ids"]
        scores = []
        for text in ("one plus two is the sum of what", " is the sum"):
            ids = torch.tensor([[*prompt, *tokenizer.encode(text)]])
            logits = trainer.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(logits.gather(1, ids[0, len(prompt) :, None]).mean().item())
        return scores[0] - scores[1]

    assert preferring(1.0) > preferring(-1.0)


def test_none_is_no_reward_and_several_functions_are_weighed(build):
    def some(completions, **columns):
        return [None, 3.0] * (len(completions) // 2)

    async def late(completions, **columns):
        return [1.0, 0.0] * (len(completions) // 2)

    trainer = varied(build(dataset=numbered(), reward_funcs=[some, late], reward_weights=[1.0, 2.0], **ORDER))
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["rewards/some/mean"], log["rewards/late/mean"], log["reward"]) == (3.0, 0.5, 2.5)


def test_a_reward_model_reads_the_conversation_in_its_own_template(build):
    tokenizer = student_tokenizer()
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer), num_labels=1)
    )  # fmt: skip
    trainer = varied(build(dataset=numbered(), reward_funcs=model, reward_processing_classes=tokenizer, **ORDER))
    trainer.train()
    expected = []
    for row in prompts()["prompt"][:4]:
        for text in ("one plus two is the sum of what", " is the sum"):
            ids = tokenizer.apply_chat_template([*row, {"role": "assistant", "content": text}], return_dict=True)[
                "input_ids"
            ]
            expected.append(model(input_ids=torch.tensor([ids])).logits[0, 0].item())
    assert trainer.state.log_history[0]["reward"] == pytest.approx(sum(expected) / 8, abs=1e-5)


def test_evaluation_calls_nothing_unless_asked(build):
    calls = []

    def reward(prompts, **columns):
        calls.append(len(prompts))
        return [2.0] * len(prompts)

    def gate(prompts, **columns):
        calls.append("gate")
        return [False] * len(prompts)

    for asked in (False, True):
        trainer = build(dataset=numbered(), eval_dataset=numbered(), reward_funcs=reward, teacher_gate=gate,
                        num_generations=2, rewards_in_evaluation=asked)  # fmt: skip
        figures = trainer.evaluate()
        assert calls == ([4] * 4 if asked else []), "one completion a prompt, and never the gate"
        assert figures.get("eval_reward") == (2.0 if asked else None)
        assert "eval_gap/nats_per_byte" in figures


def test_completions_called_wrong_leave_the_step_of_the_others(build):
    order = {**ORDER, "num_generations": 1}
    rows = numbered().select(range(8))

    def gate(prompts, answer, **columns):
        return [int(own) < 2 for own in answer]

    gated = build(dataset=rows, teacher_gate=gate, **order)
    step = step_of(fix_rollouts(gated))
    torch.testing.assert_close(
        step, step_of(fix_rollouts(build(dataset=rows.select(range(2)), **{**order, "per_device_train_batch_size": 2}))), rtol=1e-4, atol=1e-6
    )  # fmt: skip
    log = gated.state.log_history[0]
    assert log["gate/wrong_fraction"] == 0.5 and 0 < log["gate/masked_fraction"] < 1


def test_of_a_text_that_is_wrong_in_part_the_other_chunks_stay(build):
    trainer = build(dataset=numbered(), teacher_gate=lambda completions, **_: [[(4, 8)]] * len(completions), **SGD)
    tokenizer = trainer.processing_class
    ids = tokenizer.encode("one plus two")
    prompt = trainer.data_collator([trainer.train_dataset[0]])["prompts"][0]
    [whole] = trainer.panel.pair([prompt], [ids])
    [kept] = trainer.rollouts._judges.gated([whole], None, lambda figures: None)
    text = [tokenizer.decode(ids[place : place + 1]) for place in range(len(ids))]
    ends = [len("".join(text[: place + 1])) for place in range(len(ids))]
    for place, (end, own) in enumerate(zip(ends, text, strict=True)):
        touched = end > 4 and end - len(own) < 8
        chunk = whole.student_chunks[place]
        assert touched <= (kept.student_chunks[place] == -1)
        if kept.student_chunks[place] == -1 and chunk >= 0:
            assert chunk not in kept.teacher_chunks, "both sides lose the chunk"
    assert (kept.student_chunks >= 0).any() and (kept.student_chunks == -1).sum() > (whole.student_chunks == -1).sum()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1, "reward_funcs": longer}, "num_generations=1 makes one: set num_generations to 2"),
        ({"reward_funcs": longer, "lmbda": 0.0}, "no effect with lmbda=0.0"),
        (
            {"reward_funcs": longer, "distillation_loss": "alm"},
            "ALM has none: choose one of dpca, reverse_kl, strict_sampled",
        ),
        ({"reward_funcs": longer, "reward_weights": [1.0, 2.0]}, "reward_weights has 2 entries and reward_funcs 1"),
        ({"reward_funcs": 3}, "3 cannot be"),
        ({"reward_funcs": [longer, longer]}, "called 'longer'"),
    ],
)
def test_settings_that_cannot_work_are_told_before_training(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(dataset=numbered(), **{"num_generations": 2, **settings})


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "returned 1 entries for 8 completions"),
        (None, "returned None: return a list"),
        (["good"] * 8, "a number or None"),
        ([math.inf] * 8, "infinite"),
    ],
)
def test_an_answer_that_is_no_list_of_rewards_is_told(build, answer, message):
    trainer = varied(build(dataset=numbered(), reward_funcs=lambda **_: answer, **ORDER))
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize("setting", ["reward_funcs", "teacher_gate"])
@pytest.mark.parametrize(
    ("func", "message"),
    [
        (lambda completions, solution, **_: [True] * len(completions), "needs solution, which no row has. .*answer"),
        (lambda completions, answer: [True] * len(completions), r"does not take completion_ids, .*\*\*kwargs too"),
    ],
)
def test_a_function_that_cannot_take_the_columns_is_told_which_there_are(build, setting, func, message):
    trainer = varied(build(dataset=numbered(), **{setting: func}, **ORDER))
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        ("no", "return True .right., False"),
        ([(3, 900)], r"range \(3, 900\) for a completion of \d+ characters"),
        (None, "returned None for"),
    ],
)
def test_a_verdict_that_is_none_is_told(build, verdict, message):
    trainer = varied(build(dataset=numbered(), teacher_gate=lambda prompts, **_: [verdict] * len(prompts), **ORDER))
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_a_column_that_cannot_be_handed_on_is_named(build):
    import datetime

    rows = prompts().add_column("when", [datetime.datetime(2020, 1, 1)] * 16)
    with pytest.raises(ValueError, match="column 'when' cannot be handed to reward functions"):
        build(dataset=rows, reward_funcs=longer, num_generations=2)
    assert Prompt([1], [1]).row == "", "without functions no row is kept"
    build(dataset=rows)


def test_rows_that_only_pad_a_batch_are_in_no_figure(build):
    def reward(completions, answer, **columns):
        return [float(own) * len(text[0]["content"]) for own, text in zip(answer, completions, strict=True)]

    def gate(answer, **columns):
        return [own == "1" for own in answer]

    trainer = varied(build(dataset=numbered(), reward_funcs=reward, teacher_gate=gate, **ORDER))
    prompts = trainer.data_collator(list(trainer.train_dataset))["prompts"][:4]
    padding = [replace(prompt, is_padding=True) for prompt in prompts[2:]]
    found, wanted = (
        trainer.rollouts.roll_out(trainer.model, [rows], 0, "train", trainer._timers["train"])[1]
        for rows in ([*prompts[:2], *padding], prompts[:2])
    )
    assert wanted["gate/wrong_fraction"] == (2, 4) and wanted["reward_std"][0] > 0
    for name in (
        "reward",
        "rewards/reward/mean",
        "reward_std",
        "frac_reward_zero_std",
        "gate/wrong_fraction",
        "gate/masked_fraction",
    ):
        assert found[name] == wanted[name], name
