"""`trainer.compare`: what the student said before, says now, and what its teacher says."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from template_sides import side
from toys import student_model, teacher_model

from trl_ctopd.looking import compare
from trl_ctopd.looking.compare import NO_BEFORE
from trl_ctopd.rollouts.generation import write
from trl_ctopd.text.chat import Conversation, read_example


CHAT = [[{"role": "user", "content": "What is 3 plus 4?"}], [{"role": "user", "content": "What is 12 plus 30?"}]]


def greedy(model, tokenizer, ids: list[int], limit: int, stop_ids: list[int]) -> str:
    """One token after the other, without `generate`."""
    written = []
    with torch.no_grad():
        while len(written) < limit and not set(written) & set(stop_ids):
            written.append(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax().item())
    return tokenizer.decode(written[:-1] if written[-1] in stop_ids else written)


def expected(trainer, model, side, stop_ids, rows, limit):
    ids = [side.prompt_ids(read_example(row)) for row in rows]
    return [greedy(model, side.tokenizer, own, limit, stop_ids) for own in ids]


@pytest.mark.parametrize("prompts", [CHAT, ["What is 3 plus", "two and two is"]], ids=["conversations", "plain text"])
def test_an_adapters_student_is_shown_before_and_now_beside_its_teacher(build, capsys, prompts):
    before = student_model(7)
    trainer = build(
        model=student_model(7),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_alpha=64),
        max_steps=3,
        learning_rate=0.1,
    )
    trainer.train()
    rows = trainer.compare(prompts, max_new_tokens=6)
    asked = [{"prompt": prompt} for prompt in prompts]
    student = trainer.student_side, trainer.stop_ids, asked, 6
    teacher = trainer.panel.only.side, trainer.panel.only.stop_ids, asked, 6
    merged = trainer.model.merge_and_unload()
    columns = {
        "prompt": prompts,
        "student_before": expected(trainer, before, *student),
        "student_now": expected(trainer, merged, *student),
        "teacher": expected(trainer, trainer.teacher_model, *teacher),
    }
    assert rows == [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    assert columns["student_before"] != columns["student_now"]
    printed = capsys.readouterr().out
    assert (
        "Student before" in printed and "(adapter off)" in printed and "Teacher" in printed and NO_BEFORE not in printed
    )


def test_an_adapter_that_began_in_the_base_weights_has_no_before_and_the_table_says_why(build, capsys):
    """Without PiSSA's adapter, what is left of the weights is no student that ever was."""
    trainer = build(peft_config=LoraConfig(r=8, target_modules="all-linear", init_lora_weights="pissa"))
    [row] = trainer.compare(["What is 3 plus"], max_new_tokens=4)
    assert list(row) == ["prompt", "student_now", "teacher"]
    assert "init_lora_weights='pissa' takes what the adapter begins with" in " ".join(capsys.readouterr().out.split())


def on_a_frozen_one():
    model = get_peft_model(student_model(), ADDING, adapter_name="first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["first", "second"])
    for name, own in model.named_parameters():
        own.requires_grad_(".second." in name)
    return model


ADDING = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)


@pytest.mark.parametrize(
    "student",
    [
        lambda: {"model": get_peft_model(student_model(), ADDING)},
        lambda: {"peft_config": ADDING},
        lambda: {"model": on_a_frozen_one()},
    ],
    ids=["trained before", "begun with values", "a new one on a frozen one"],
)
def test_an_adapter_that_adds_something_at_its_start_has_no_before_and_the_table_says_why(build, capsys, student):
    """Without it the student is the base model, which was not the student before training."""
    trainer = build(**student())
    trainer.train()
    [row] = trainer.compare(["What is 3 plus"], max_new_tokens=4)
    assert list(row) == ["prompt", "student_now", "teacher"]
    assert "No student before: the adapter adds something at the start" in " ".join(capsys.readouterr().out.split())


def test_a_new_adapter_of_another_kind_than_lora_has_a_before(build):
    trainer = build(peft_config=IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]))
    trainer.train()
    [row] = trainer.compare(["What is 3 plus"], max_new_tokens=4)
    assert list(row) == ["prompt", "student_before", "student_now", "teacher"]


def test_a_student_trained_whole_has_no_before_and_the_table_says_so(build, capsys):
    trainer = build()
    trainer.train()
    [row] = trainer.compare(CHAT[:1])
    assert list(row) == ["prompt", "student_now", "teacher"]
    assert " ".join(NO_BEFORE.split()) in " ".join(capsys.readouterr().out.split())


def test_weights_of_an_adapter_that_are_frozen_stay_frozen(build):
    """LoRA-FA, say. PEFT makes them trainable when an adapter is switched on again, so that a run that compared before it trained them."""
    trainer = build(peft_config=LoraConfig(r=8, target_modules="all-linear"), max_steps=1)
    frozen = {name: own.clone() for name, own in trainer.model.named_parameters() if ".lora_A." in name}
    for name in frozen:
        trainer.model.get_parameter(name).requires_grad_(False)
    trainer.compare(CHAT[:1], max_new_tokens=2)
    assert not any(trainer.model.get_parameter(name).requires_grad for name in frozen)
    trainer.train()
    assert frozen and all(torch.equal(trainer.model.get_parameter(name), own) for name, own in frozen.items())
    assert any(own.abs().max() > 0 for name, own in trainer.model.named_parameters() if ".lora_B." in name)


TURNS = {
    "gptoss": "<|channel|>analysis<|message|>THOUGHT<|end|><|start|>assistant to=functions.CALL",
    "gemma4_v5": "<|channel>thought\nTHOUGHT\n<channel|><|tool_call>call:CALL",
    "lfm2_2_5": "<think>THOUGHT</think><|tool_call_start|>[CALL",
}


@pytest.mark.parametrize("template", TURNS)
def test_the_control_tokens_that_part_thought_and_calls_are_shown_and_the_stop_token_is_not(
    build, capsys, monkeypatch, template
):
    """As the table of completions shows them. Without them the parts of a turn would run together."""
    own, tool = side(template), {"name": "CALL", "description": "", "parameters": {"type": "object", "properties": {}}}
    asked = Conversation(CHAT[0], a_turn(thought="THOUGHT"), [{"type": "function", "function": tool}])
    turn = own.reference(asked)[1]
    trainer = build(
        model=student_model(vocab_size=len(own.tokenizer), max_position_embeddings=512), processing_class=own.tokenizer
    )

    def written(model, ids, *args):
        return [(turn, None)] if model is trainer.model_wrapped else write(model, ids, *args)

    monkeypatch.setattr("trl_ctopd.looking.compare.write", written)
    assert turn[-1] in trainer.stop_ids
    [row] = trainer.compare(CHAT[:1], max_new_tokens=4)
    assert row["student_now"].startswith(TURNS[template])
    assert row["student_now"] + own.tokenizer.decode(turn[-1]) == own.tokenizer.decode(turn)
    capsys.readouterr()
    monkeypatch.setattr("trl_ctopd.looking.compare.write", lambda *args: [([*turn[:-1]], None)])
    [cut] = trainer.compare(CHAT[:1], max_new_tokens=4)
    assert cut["student_now"] == row["student_now"], "nothing is taken off a text that was cut off"
    assert compare.CUT_OFF in capsys.readouterr().out


def a_turn(thought: str) -> dict:
    call = {"type": "function", "function": {"name": "CALL", "arguments": {}}}
    return {"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [call]}


def test_comparing_leaves_the_run_as_it_was(build):
    one, other = build(max_steps=2, logging_steps=1), build(max_steps=2, logging_steps=1)
    other.compare(CHAT)
    one.train(), other.train()
    assert other.model.training
    assert one.state.log_history[-2]["loss"] == other.state.log_history[-2]["loss"]


def test_an_answer_ends_where_the_models_context_does(build, monkeypatch):
    trainer = build(model=student_model(max_position_embeddings=64), teacher=teacher_model(max_position_embeddings=48))
    limits = []
    monkeypatch.setattr(
        "trl_ctopd.looking.compare.write", lambda *args: limits.append(args[2].max_new_tokens) or write(*args)
    )
    trainer.compare(CHAT[:1], max_new_tokens=1000)
    asked = [
        len(side.prompt_ids(read_example({"prompt": CHAT[0]})))
        for side in (trainer.student_side, trainer.panel.only.side)
    ]
    assert limits == [64 - asked[0], 48 - asked[1]]
    with pytest.raises(ValueError, match=r"prompt of \d+ tokens leaves no room to answer in a context of 64"):
        trainer.compare(["What is the sum of " * 30])


def test_rows_of_a_dataset_are_prompts_too_and_none_have_no_answers_and_one_text_alone_is_refused(build):
    trainer = build()
    [row] = trainer.compare([{"prompt": CHAT[0], "completion": [{"role": "assistant", "content": "7"}]}])
    assert row["prompt"] == CHAT[0]
    with pytest.raises(TypeError, match="list of prompts, got the text 'What'"):
        trainer.compare("What")
    assert trainer.compare([]) == []


def test_long_words_and_chinese_are_folded_and_control_characters_are_named(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    word, chinese = "compute_the_sum_of_" * 6, "".join(chr(code) for code in range(0x4E00, 0x4E00 + 60))
    columns = {"student_now": [(f"{word} {chinese}", True)], "teacher": [("\x1b[31mred\u202e", True)]}
    compare._print([read_example({"prompt": "What\x07?"})], columns, 8)
    printed = capsys.readouterr().out
    assert "…" not in printed and "\x1b[31m" not in printed and "\u202e" not in printed and "\x07" not in printed
    assert "⟨ESC⟩[31mred" in printed
    assert "".join(character for character in printed if "\u4e00" <= character < "\u4e40") == chinese
    compare._print([read_example({"prompt": "What?"})], {"student_now": [("a", False)], "teacher": [("b", True)]}, 8)
    assert "…: cut off after 8 tokens." in capsys.readouterr().out
