"""Conversations in which the student calls tools, for real templates: TRL's own, and a student whose text is given."""

import json
import math
import re
import socket
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from template_sides import side
from toys import SGD
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer
from trl_ctopd.looking.viewer import alignment_of
from trl_ctopd.looking.viewer.segments import figures
from trl_ctopd.rollouts.closing import ends
from trl_ctopd.rollouts.metrics import rollout_metrics
from trl_ctopd.rollouts.pairing import Prompt, pair
from trl_ctopd.rollouts.prompts import COLUMNS, render_dataset, render_row
from trl_ctopd.rollouts.rewards import Judges
from trl_ctopd.rollouts.source import RolloutSource
from trl_ctopd.rollouts.tools import ToolLoop, schemas
from trl_ctopd.text.calls import DEEPEST, a_call
from trl_ctopd.text.chat import Conversation
from trl_ctopd.text.one_tokenizer import OneTokenizer
from trl_ctopd.text.sections import SectionAligner, aligner_of


# Templates whose finished turns are rendered in a longer conversation as they were alone.
CALLERS = ["qwen2_5", "llama3_2", "gptoss", "lfm2_2_5", "qwen3_5_nothink", "gemma4_v5", "muse_glimmer"]
ASKED = {"role": "user", "content": "What is 2 plus 3, and then 1?"}
SECRET = "the tool says"


def add(a: int, b: int) -> str:
    """Adds two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return f"{SECRET} {a + b}, {SECRET}"


def divide(a: int, b: int) -> float:
    """Divides two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a / b


TOOLS = [add, divide]


def called(name, *calls, **beside):
    """The ids with which a model of this template calls."""
    message = {"role": "assistant", "content": "", **beside, "tool_calls": list(calls)}
    return side(name).reference(Conversation([ASKED], message, schemas(TOOLS)))[1]


def said(name, text):
    return side(name).reference(Conversation([ASKED], {"role": "assistant", "content": text}, schemas(TOOLS)))[1]


def given(*turns, scores=False):
    """Writes one of `turns` after the other, whatever it is asked."""
    left = iter(turns)

    def write(model, prompts, step):
        write.asked.append([prompt.student_ids for prompt in prompts])
        ids = next(left)
        return [(list(ids), [-1.0] * len(ids) if scores else None) for _ in prompts]

    write.asked = []
    return write


def asked(student, teacher, **row):
    rendered = render_row(
        {"prompt": [ASKED], **row}, 0, side(student), {"": side(teacher)}, None, False, tools=schemas(TOOLS)
    )
    return Prompt(*(rendered[column] for column in COLUMNS))


TWO_CALLS = [a_call("add", {"a": 2, "b": 3}), a_call("add", {"a": 500, "b": 1})]


@pytest.mark.parametrize(
    ("name", "writes"), [("qwen2_5", True), ("qwen3", True), ("gptoss", False), ("llama3_1", False)]
)
def test_several_calls_of_a_message_are_all_written_or_refused(name, writes):
    """gpt-oss's template leaves all but the first out, without an error."""
    calling = {"role": "assistant", "content": "", "tool_calls": TWO_CALLS}
    results = [{"role": "tool", "tool_call_id": call["id"], "name": "add", "content": "7"} for call in TWO_CALLS]
    given = (
        lambda: side(name).prompt_ids(Conversation([ASKED, calling, *results], None, schemas(TOOLS))),
        lambda: side(name).reference(Conversation([ASKED], calling, schemas(TOOLS)))[1],
    )
    for ids in given:
        if writes:
            assert "500" in side(name).tokenizer.decode(ids())
        else:
            with pytest.raises(ValueError, match="does not write all calls of a message.*of its own|single tool-calls"):
                ids()


@pytest.mark.parametrize(("teacher", "follows"), [("qwen3_5_nothink", True), ("gptoss", False), ("llama3_1", False)])
def test_a_completion_ends_with_calls_of_which_the_teacher_would_read_one(teacher, follows):
    turns = called("qwen2_5", *TWO_CALLS), said("qwen2_5", "It is six.")
    prompt, (ids, _), figures = conversed("qwen2_5", teacher, *turns)
    assert ("It is six." in side("qwen2_5").tokenizer.decode(ids)) == follows
    assert figures["tools/unanswered_fraction"] == (0 if follows else 1, 1)


INSTRUCTIONS = {
    "two system messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        ASKED,
    ],
    "one amid the conversation": [
        ASKED,
        {"role": "assistant", "content": "5"},
        {"role": "system", "content": "Be kind."},
        ASKED,
    ],
}


@pytest.mark.parametrize(("name", "writes"), [("qwen2_5", True), ("gptoss", False), ("qwen3_vl", False)])
@pytest.mark.parametrize("case", INSTRUCTIONS)
def test_system_messages_are_all_written_or_refused(name, writes, case):
    conversation = Conversation(INSTRUCTIONS[case])
    if writes:
        assert "Be kind." in side(name).tokenizer.decode(side(name).prompt_ids(conversation))
    else:
        with pytest.raises(ValueError, match="leaves out the system message 'Be .*one system message of all"):
            side(name).prompt_ids(conversation)


@pytest.mark.parametrize(
    ("arguments", "loaded", "told"),
    [
        ([{"a": 3}, {"a": 2.5}], None, True),
        ([{"a": 3}, {"a": 2.5}], "use_json", False),
        ([{"a": 3}, {"b": 4}], None, False),
        ([{"a": 0.5}, {"a": 2.5}], None, False),
        (['{"a": 3}', '{"a": 2.5}'], None, False),
    ],
    ids=["as from_list makes it", "as JSON", "integers alone", "fractions alone", "as text"],
)
def test_integers_that_arrow_has_made_floats_of_are_told_of(tmp_path, caplog, arguments, loaded, told):
    calls = [{"type": "function", "function": {"name": "add", "arguments": own}} for own in arguments]
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]} for call in calls]
    answer = {"role": "tool", "name": "add", "content": "7"}
    rows = Dataset.from_list([{"prompt": [ASKED, turn, answer]} for turn in turns], on_mixed_types=loaded)
    args = CrossTokenizerGKDConfig(str(tmp_path), bf16=False, use_cpu=True)
    student = side("qwen2_5")
    rendered = render_dataset(rows, args, student, {"": side("qwen3")}, None, {}, "train")
    text = student.tokenizer.decode(rendered[0]["prompt_ids"])
    assert ('{"a": 3.0}' in text) == told and ("3.0" in caplog.text and "on_mixed_types" in caplog.text) == told


def conversed(student, teacher, *turns, scores=False, tools=TOOLS, context=None, prompt=None, **settings):
    settings = {"max_new_tokens": 2000, "max_tool_calling_iterations": None, **settings}
    loop = ToolLoop(
        tools, side(student), {"": side(teacher)}, side(student).stop_ids(), SimpleNamespace(**settings), context
    )
    [row], figures = loop(given(*turns, scores=scores), None, [prompt or asked(student, teacher)], 0)
    return *row, figures


def paired(student, teacher, prompt, ids, eos_policy="bridge", one_tokenizer=False, **kwargs):
    ours, theirs = side(student), side(teacher)
    aligner = aligner_of(ours, theirs)
    sections = SectionAligner(aligner, ours, theirs, eos_policy=eos_policy)
    [found] = pair(
        [prompt],
        [ids],
        OneTokenizer(ours.tokenizer) if one_tokenizer else aligner,
        turn_ends=dict.fromkeys(ours.stop_ids(), theirs.turn_end),
        eos_policy=eos_policy,
        sections=None if one_tokenizer else sections,
        **kwargs,
    )
    return found


def whole(name, *turns):
    """The template's own rendering: `turns` are calls, each answered by `add`, and at last a text."""
    messages = [ASKED]
    for n, turn in enumerate(turns[:-1]):
        call = {**turn, "id": f"call{n:05}"}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        content = add(**turn["function"]["arguments"])
        messages.append({"role": "tool", "tool_call_id": call["id"], "name": "add", "content": content})
    messages.append({"role": "assistant", "content": turns[-1]})
    return side(name)._render(messages, Conversation(messages, None, schemas(TOOLS)))


def scored(name, ids, chunks):
    return [side(name).tokenizer.decode([i]) for i, chunk in zip(ids, chunks, strict=True) if chunk >= 0]


@pytest.mark.parametrize("teacher", CALLERS)
@pytest.mark.parametrize("student", CALLERS)
def test_both_models_read_the_conversation_as_their_own_templates_write_it_and_no_tool_is_scored(student, teacher):
    first, second = a_call("add", {"a": 2, "b": 3}), a_call("add", {"a": 5, "b": 1})
    prompt, (ids, _), figures = conversed(
        student, teacher, called(student, first), called(student, second), said(student, "It is six.")
    )
    assert figures == {
        "tools/call_frequency": (2, 1),
        "tools/failure_frequency": (0, 2),
        "tools/unanswered_fraction": (0, 1),
    }
    found = paired(student, teacher, prompt, ids)
    own = side(student).tokenizer.decode(prompt.student_ids + ids)
    read = side(teacher).tokenizer.decode(found.teacher_prompt_ids + found.teacher_ids)
    assert own.count(SECRET) == read.count(SECRET) == 4
    assert whole(student, first, second, "It is six.").startswith(own)
    assert whole(teacher, first, second, "It is six.").startswith(read)

    texts = [scored(student, ids, found.student_chunks), scored(teacher, found.teacher_ids, found.teacher_chunks)]
    for tokens in texts:
        text = "".join(tokens)
        assert SECRET not in text and "It is six." in text
    assert {*found.student_chunks} - {-1} == {*found.teacher_chunks} - {-1} == {*range(found.num_chunks)}
    for start, stop in found.given:
        assert (found.student_chunks[start:stop] == -1).all() and (found.student_widths[start:stop] == 0).all()
        assert SECRET in side(student).tokenizer.decode(ids[start:stop])


def test_the_text_of_all_turns_holds_each_tools_words_where_its_tokens_stand():
    first = a_call("add", {"a": 2, "b": 3})
    prompt, (ids, _), _ = conversed("gptoss", "qwen2_5", called("gptoss", first), said("gptoss", "It is five."))
    found = paired("gptoss", "qwen2_5", prompt, ids)
    alignment = found.alignment
    assert alignment.text == side("gptoss").tokenizer.decode(ids)
    data, stops = alignment.text.encode(), np.cumsum(alignment.student.widths)
    assert stops[-1] == len(data)
    [(start, stop)] = found.given
    for place in range(start, stop):
        spelled = data[stops[place] - alignment.student.widths[place] : stops[place]]
        assert spelled.decode() == side("gptoss").tokenizer.decode([ids[place]])
    [tool] = [data[one.start : one.end].decode() for one in alignment.masked if one.reason == "tool"]
    assert tool == side("gptoss").tokenizer.decode(ids[start:stop]) and tool.count(SECRET) == 2
    assert len(alignment.chunk_bytes) == alignment.num_chunks
    assert b"".join(alignment.chunk_bytes).endswith(b"It is five.<|return|>")


def test_the_next_turn_is_written_after_the_results_and_their_header():
    write = given(called("qwen2_5", a_call("add", {"a": 2, "b": 3})), said("qwen2_5", "Five."))
    args = SimpleNamespace(max_new_tokens=2000, max_tool_calling_iterations=None)
    speaker = side("qwen2_5")
    loop = ToolLoop(TOOLS, speaker, {"": side("gptoss")}, speaker.stop_ids(), args)
    loop(write, None, [asked("qwen2_5", "gptoss")], 0)
    [first], [second] = write.asked
    assert second[: len(first)] == first
    assert speaker.tokenizer.decode(second[len(first) :]) == (
        '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>\n'
        f"{SECRET} 5, {SECRET}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_figures_of_calls_are_a_mean_over_rows_that_do_not_only_pad_the_batch():
    call, end = called("qwen2_5", a_call("add", {"a": 2, "b": 3})), said("qwen2_5", "Five.")
    prompt, speaker = asked("qwen2_5", "gptoss"), side("qwen2_5")
    args = SimpleNamespace(max_new_tokens=2000, max_tool_calling_iterations=1)
    loop = ToolLoop(TOOLS, speaker, {"": side("gptoss")}, speaker.stop_ids(), args)
    rows = [prompt, prompt, replace(prompt, is_padding=True), replace(prompt, is_padding=True)]
    written = iter([[call] * 4, [call, end]])
    _, figures = loop(lambda model, prompts, step: [(ids, None) for ids in next(written)], None, rows, 0)
    assert figures == {
        "tools/call_frequency": (2, 2),
        "tools/failure_frequency": (0, 2),
        "tools/unanswered_fraction": (1, 2),
    }


def test_several_calls_at_once_get_their_results_in_order():
    calls = called("qwen2_5", a_call("add", {"a": 2, "b": 3}), a_call("divide", {"a": 1, "b": 4}))
    prompt, (ids, _), figures = conversed("qwen2_5", "qwen3_5_nothink", calls, said("qwen2_5", "Done."))
    assert figures["tools/call_frequency"] == (2, 1)
    found = paired("qwen2_5", "qwen3_5_nothink", prompt, ids)
    for name, own in (("qwen2_5", ids), ("qwen3_5_nothink", found.teacher_ids)):
        text = side(name).tokenizer.decode(own)
        assert text.index(f"{SECRET} 5") < text.index("0.25")


def test_a_call_that_the_teachers_template_cannot_write_ends_the_completion_and_is_told_of_once(caplog):
    calls = called("qwen2_5", a_call("add", {"a": 2, "b": 3}), a_call("divide", {"a": 1, "b": 4}))
    prompt, (ids, _), figures = conversed("qwen2_5", "llama3_1", calls)  # whose template writes one call a turn
    assert ids == calls and not prompt.framed.later
    assert figures["tools/unanswered_fraction"] == (1, 1)
    [said_once] = [record.message for record in caplog.records if "was not answered" in record.message]
    assert "single tool-calls" in said_once


def test_what_is_said_and_thought_before_a_call_is_aligned_too():
    ids = called("qwen3", a_call("add", {"a": 2, "b": 3}), reasoning_content="I add.", content="Let me see.")
    prompt, (ids, _), _ = conversed("qwen3", "qwen3_5_nothink", ids, said("qwen3", "Five."))
    found = paired("qwen3", "qwen3_5_nothink", prompt, ids)
    text = "".join(scored("qwen3_5_nothink", found.teacher_ids, found.teacher_chunks))
    assert all(part in text for part in ("I add.", "Let me see.", "Five."))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (a_call("divide", {"a": 1, "b": 0}), "{'error': 'division by zero'}"),
        (a_call("multiply", {"a": 1, "b": 0}), "{'error': 'Tool multiply not found.'}"),
        (a_call("divide", {"a": 1}), "missing 1 required positional argument"),
    ],
)
def test_an_error_is_given_back_as_the_result_and_counted(call, error):
    prompt, (ids, _), figures = conversed("qwen2_5", "gptoss", called("qwen2_5", call), said("qwen2_5", "Hm."))
    assert error in side("qwen2_5").tokenizer.decode(ids)
    assert figures["tools/failure_frequency"] == (1, 1)
    found = paired("qwen2_5", "gptoss", prompt, ids)
    assert "error" not in "".join(scored("qwen2_5", ids, found.student_chunks))


def grow(values: list[int]) -> list:
    """Adds one to the list.

    Args:
        values: Numbers.
    """
    values.append(77)
    return values


def leave(values: list[int]) -> list:
    """Ends.

    Args:
        values: Numbers.
    """
    sys.exit("no more")


def halve(values: list[int]) -> str:
    """Half a character.

    Args:
        values: Numbers.
    """
    return "half \ud83d"


@pytest.mark.parametrize(
    ("tool", "result", "failed"),
    [
        (grow, "[3, 77]", 0),
        (leave, "{'error': 'no more'}", 1),
        (halve, r"half \ud83d", 0),
    ],
)
def test_no_tool_ends_the_run_or_changes_its_call(tool, result, failed):
    call = called("qwen2_5", a_call(tool.__name__, {"values": [3]}))
    prompt, (ids, _), figures = conversed("qwen2_5", "qwen3", call, said("qwen2_5", "Hm."), tools=[tool])
    assert figures["tools/failure_frequency"] == (failed, 1) and figures["tools/unanswered_fraction"] == (0, 1)
    found = paired("qwen2_5", "qwen3", prompt, ids)
    for name, own in (("qwen2_5", ids), ("qwen3", found.teacher_ids)):
        assert f"<tool_response>\n{result}\n</tool_response>" in side(name).tokenizer.decode(own)
        assert '"arguments": {"values": [3]}' in side(name).tokenizer.decode(own)


def test_no_tool_is_run_for_a_result_that_the_teacher_cannot_read():
    calls = called("qwen2_5", a_call("add", {"a": 2, "b": 3}), content="Let me see.")
    _, _, figures = conversed("qwen2_5", "llama3_1", calls)  # whose template writes no text beside a call
    assert figures["tools/call_frequency"] == (0, 1) and figures["tools/unanswered_fraction"] == (1, 1)


def test_calls_are_executed_no_more_often_than_asked_and_the_completion_then_ends_with_one():
    again = called("qwen2_5", a_call("add", {"a": 2, "b": 3}))
    prompt, (ids, _), figures = conversed("qwen2_5", "gptoss", again, again, again, max_tool_calling_iterations=2)
    assert figures["tools/call_frequency"] == (2, 1) and figures["tools/unanswered_fraction"] == (1, 1)
    assert ids[-len(again) :] == again
    found = paired("qwen2_5", "gptoss", prompt, ids)
    assert found.ended and found.student_chunks[-1] >= 0


def test_results_without_room_are_left_out_and_a_later_turn_is_cut_at_max_new_tokens():
    call = called("qwen2_5", a_call("add", {"a": 2, "b": 3}))
    _, (whole_ids, _), _ = conversed("qwen2_5", "gptoss", call, said("qwen2_5", "Five."))
    prompt, (ids, _), figures = conversed("qwen2_5", "gptoss", call, max_new_tokens=len(call) + 5)
    assert ids == call and not prompt.framed.later
    assert figures["tools/unanswered_fraction"] == (1, 1)
    room = len(whole_ids) - 3
    prompt, (ids, scores), _ = conversed(
        "qwen2_5", "gptoss", call, said("qwen2_5", "Five."), scores=True, max_new_tokens=room
    )
    assert ids == whole_ids[:room] and len(scores) == room
    assert not paired("qwen2_5", "gptoss", prompt, ids).ended


def test_log_probs_of_the_writer_stand_beside_its_own_tokens_alone():
    call = called("qwen2_5", a_call("add", {"a": 2, "b": 3}))
    prompt, (ids, scores), _ = conversed("qwen2_5", "gptoss", call, said("qwen2_5", "Five."), scores=True)
    [later] = prompt.framed.later
    assert len(scores) == len(ids)
    assert [math.isnan(score) for score in scores] == [later.start <= n < later.stop for n in range(len(ids))]


def test_rows_beyond_the_context_wait_until_those_with_more_room_have_written():
    """A row may write no further than `max_new_tokens` after its prompt, and the context ends there."""
    call, end = called("qwen2_5", a_call("add", {"a": 2, "b": 3})), said("qwen2_5", "Five.")
    prompts = [asked("qwen2_5", "gptoss"), asked("qwen2_5", "gptoss")]
    context, most = len(prompts[0].student_ids) + 300, []

    def write(model, rows, step):
        most.append(max(len(row.student_ids) for row in rows))
        first = len(most) == 1
        return [(call if first and n == 0 else end, None) for n, _ in enumerate(rows)]

    args = SimpleNamespace(max_new_tokens=300, max_tool_calling_iterations=None)
    loop = ToolLoop(TOOLS, side("qwen2_5"), {"": side("gptoss")}, side("qwen2_5").stop_ids(), args, context)
    done, _ = loop(write, None, prompts, 0)
    assert [len(prompt.framed.later) for prompt, _ in done] == [1, 0]
    assert len(most) == 2


QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
TIGHT = '<tool_call>\n{"name":"add","arguments":{"a":500,"b":1}}\n</tool_call>'


def qwen(text):
    return side("qwen2_5").tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False)


@pytest.mark.parametrize(
    ("written", "calls"),
    [
        (QWEN_CALL.replace('"a": 2, "b": 3', '"a":2,"b":3'), TWO_CALLS[:1]),
        (TIGHT, TWO_CALLS[1:]),
        (f"Let me see. {TIGHT}", TWO_CALLS[1:]),
        (f"{QWEN_CALL}\n{TIGHT}", TWO_CALLS),
        (f"{QWEN_CALL}\n\n{TIGHT}", TWO_CALLS),
        (f"{TIGHT}{QWEN_CALL}".replace("\n", ""), TWO_CALLS[::-1]),
    ],
)
def test_calls_that_are_spelled_otherwise_are_executed_and_masked_and_the_teacher_reads_its_own_spelling(
    written, calls
):
    teacher = "qwen3_5_nothink" if len(calls) > 1 else "gptoss"
    prompt, (ids, _), figures = conversed("qwen2_5", teacher, qwen(written), said("qwen2_5", "Five."))
    assert figures["tools/call_frequency"] == (len(calls), 1) and figures["tools/unanswered_fraction"] == (0, 1)
    found = paired("qwen2_5", teacher, prompt, ids)
    read = side(teacher).tokenizer.decode(found.teacher_prompt_ids + found.teacher_ids)
    assert side(teacher).calls_text(calls) in read and "Five." in read
    assert "call" in {stretch.reason for stretch in found.alignment.masked}
    arguments = {str(value) for call in calls for value in call["function"]["arguments"].values()}
    assert not arguments & {token.strip() for token in scored("qwen2_5", ids, found.student_chunks)}


@pytest.mark.parametrize(
    "written",
    [
        '<tool_call>\n{"arguments": {"a": 2, "b": 3}, "name": "add"}\n</tool_call>',
        '<tool_call>\n{"arguments": {"a": 2, "b": 3}, "name": "add"}\n</tool_call>\n' + QWEN_CALL,
        f"{QWEN_CALL}\nand then\n{QWEN_CALL}",
        QWEN_CALL.replace("3", r'"\ud83d"'),
        QWEN_CALL.replace('"b"', r'"\ud83d"'),
        QWEN_CALL.replace("3", "[" * DEEPEST + "]" * DEEPEST),
        QWEN_CALL.replace("3", "[" * DEEPEST),
    ],
)
@pytest.mark.parametrize("teacher", ["llama3_2", "gemma4_v5"])
def test_a_turn_with_a_call_that_cannot_be_read_is_counted_and_none_of_its_calls_is_executed(teacher, written):
    prompt, (ids, _), figures = conversed("qwen2_5", teacher, qwen(written))
    assert figures["tools/call_frequency"] == (0, 1) and figures["tools/unanswered_fraction"] == (1, 1)
    assert ids == qwen(written) and not prompt.framed.later
    paired("qwen2_5", teacher, prompt, ids)


def kind(text: str) -> str:
    """Tells what it is given.

    Args:
        text: A text.
    """
    return f"{type(text).__name__} {text}"


@pytest.mark.parametrize("student", ["qwen3_5_nothink", "glm4moe"])
def test_a_text_that_looks_like_a_number_stays_text(student):
    ids = called(student, a_call("kind", {"text": "2024"}))
    tools = [*TOOLS, kind]
    prompt = asked(student, "qwen2_5", tools=schemas(tools))
    prompt, (ids, _), _ = conversed(student, "qwen2_5", ids, said(student, "So."), tools=tools, prompt=prompt)
    assert "str 2024" in side(student).tokenizer.decode(ids)
    found = paired(student, "qwen2_5", prompt, ids)
    assert '{"text": "2024"}' in side("qwen2_5").tokenizer.decode(found.teacher_ids)


def test_what_is_no_call_of_the_students_template_is_text():
    ids = said("qwen2_5", 'Use add, as in {"name": "add", "arguments": {"a": 2, "b": 3}}.')
    prompt, (found, _), figures = conversed("qwen2_5", "gptoss", ids)
    assert found == ids and not prompt.framed.later
    assert figures["tools/call_frequency"] == (0, 1) and figures["tools/unanswered_fraction"] == (0, 1)


def test_with_masked_ends_the_teacher_still_reads_the_end_of_a_call():
    call = a_call("add", {"a": 2, "b": 3})
    prompt, (ids, _), _ = conversed("qwen2_5", "gptoss", called("qwen2_5", call), said("qwen2_5", "Five."))
    found = paired("qwen2_5", "gptoss", prompt, ids, eos_policy="mask")
    read = side("gptoss").tokenizer.decode(found.teacher_prompt_ids + found.teacher_ids)
    assert whole("gptoss", call, "Five.").removesuffix("<|return|>") == read
    names = scored("qwen2_5", ids, found.student_chunks) + scored("gptoss", found.teacher_ids, found.teacher_chunks)
    assert not {"<|im_end|>", "<|call|>", "<|return|>"} & {*names}


def test_a_teacher_of_the_same_tokenizer_reads_the_students_own_ids_of_every_turn():
    call = a_call("add", {"a": 2, "b": 3})
    prompt, (ids, _), _ = conversed("qwen2_5", "qwen2_5", called("qwen2_5", call), said("qwen2_5", "Five."))
    found = paired("qwen2_5", "qwen2_5", prompt, ids, one_tokenizer=True)
    assert found.teacher_ids == ids and found.teacher_prompt_ids == prompt.student_ids
    written = [i for i, chunk in zip(ids, found.student_chunks, strict=True) if chunk >= 0]
    assert written == called("qwen2_5", call) + said("qwen2_5", "Five.")
    assert found.alignment.student.ids == ids[:-1]


def test_a_conversation_beyond_the_teachers_context_takes_no_part():
    call = a_call("add", {"a": 2, "b": 3})
    prompt, (ids, _), _ = conversed("qwen2_5", "gptoss", called("qwen2_5", call), said("qwen2_5", "Five."))
    found = paired("qwen2_5", "gptoss", prompt, ids)
    length = len(found.teacher_prompt_ids) + len(found.teacher_ids)
    assert not paired("qwen2_5", "gptoss", prompt, ids, teacher_context=length).unread
    short = paired("qwen2_5", "gptoss", prompt, ids, teacher_context=length - 1)
    assert short.unread and not short.teacher_ids and (short.student_chunks == -1).all()


def test_figures_of_completions_count_no_token_of_a_tool():
    call = called("qwen2_5", a_call("add", {"a": 2, "b": 3}))
    prompt, (ids, _), _ = conversed("qwen2_5", "llama3_2", call, said("qwen2_5", "Five."))
    figures = rollout_metrics([paired("qwen2_5", "llama3_2", prompt, ids)])
    written = [*call, *said("qwen2_5", "Five.")]
    assert figures["completions/mean_length"] == (len(written), 1)
    assert figures["masked_bytes/markup"][1] == len(side("qwen2_5").tokenizer.decode(written[:-1]).encode())
    assert figures["alignment/masked_fraction"][0] == 0


@pytest.mark.parametrize(("teacher", "one_tokenizer"), [("qwen2_5", True), ("qwen2_5", False), ("gptoss", False)])
def test_what_a_reader_is_shown_of_a_completion_counts_no_token_of_a_tool(teacher, one_tokenizer):
    written = called("qwen2_5", a_call("add", {"a": 2, "b": 3})), said("qwen2_5", "Five.")
    prompt, (ids, _), _ = conversed("qwen2_5", teacher, *written)
    found = paired("qwen2_5", teacher, prompt, ids, one_tokenizer=one_tokenizer)
    shown = figures([alignment_of(found)])
    assert shown["student_tokens"] == sum(map(len, written)) < len(ids)
    assert shown["bytes"] == rollout_metrics([found])["masked_bytes/markup"][1] == found.alignment.num_bytes
    [later], first = prompt.turns(ids)[1:], len(found.teacher_ids) - found.teacher_starts[0]
    assert shown["teacher_tokens"] == len(found.teacher_ids) - len(later.prompt.teacher_ids) > first
    assert shown["coverage"] == 1 and (not one_tokenizer or shown["one_to_one_fraction"] == 1)
    short = paired("qwen2_5", teacher, prompt, ids, one_tokenizer=one_tokenizer, teacher_context=10)
    unread = figures([alignment_of(short)])
    assert unread["student_tokens"] == shown["student_tokens"] and unread["teacher_tokens"] == unread["coverage"] == 0


def test_no_chunk_is_asked_to_close_what_a_tool_said():
    call = called("qwen2_5", a_call("add", {"a": 2, "b": 3}))
    prompt, (ids, _), _ = conversed("qwen2_5", "llama3_2", call, said("qwen2_5", "Five."))
    found = paired("qwen2_5", "llama3_2", prompt, ids)
    [(start, stop)], places = found.given, np.flatnonzero(ends(found) >= 0)
    assert {*places} & {*range(start, stop + 1)} <= {start}  # where the end of the call closes


@pytest.mark.parametrize("wrong", ['a": 5', "BAD"])
def test_what_a_gate_calls_wrong_is_found_in_the_turns_that_it_was_asked_about(wrong):
    """They are without the tools' results and the headers."""
    first, second = a_call("add", {"a": 2, "b": 3}), a_call("add", {"a": 5, "b": 1})
    turns = called("qwen2_5", first), called("qwen2_5", second), said("qwen2_5", "é, it is BAD.")
    prompt, (ids, _), _ = conversed("qwen2_5", "llama3_2", *turns)
    whole = paired("qwen2_5", "llama3_2", replace(prompt, row=json.dumps({"prompt": [ASKED]})), ids)

    def gate(completions, **columns):
        [text] = ["".join(turn["content"] for turn in completion) for completion in completions]
        assert text.count(wrong) == 1 and SECRET not in text
        return [[(text.index(wrong), text.index(wrong) + len(wrong))]]

    judges = Judges(None, None, gate, SimpleNamespace(reward_weights=None), side("qwen2_5").tokenizer)
    [kept] = judges.gated([whole], None, lambda figures: None)
    taken = scored("qwen2_5", ids, np.where(kept.student_chunks < 0, whole.student_chunks, -1))
    assert "".join(taken) == wrong


def test_a_padding_row_calls_no_tool():
    prompt = asked("qwen2_5", "gptoss")
    prompt.is_padding = True
    call = called("qwen2_5", a_call("add", {"a": 2, "b": 3}))
    _, (ids, _), figures = conversed("qwen2_5", "gptoss", call, prompt=prompt)
    assert ids == call and figures["tools/call_frequency"] == (0, 0)


def test_privileged_context_stays_the_teachers_after_results():
    prompt = asked("qwen2_5", "gptoss", teacher_prompt=[{"role": "system", "content": "Hint: 5"}, ASKED])
    call = called("qwen2_5", a_call("add", {"a": 2, "b": 3}))
    prompt, (ids, _), _ = conversed("qwen2_5", "gptoss", call, said("qwen2_5", "Five."), prompt=prompt)
    found = paired("qwen2_5", "gptoss", prompt, ids)
    read = side("gptoss").tokenizer.decode(found.teacher_prompt_ids + found.teacher_ids)
    assert "Hint: 5" in read and read.count(SECRET) == 2
    assert "Hint" not in side("qwen2_5").tokenizer.decode(prompt.student_ids + ids)


# --- refusals


async def fetch(url: str) -> str:
    """Fetches.

    Args:
        url: Of a page.
    """


def bare(x):
    return x


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([fetch], "'fetch' is asynchronous"),
        ([bare], "'bare' cannot be described to a model"),
        ([add, add], "several functions of the name 'add'"),
        (["add"], "tools holds 'add': pass functions"),
    ],
)
def test_tools_that_cannot_be_called_or_described_are_refused(tools, message):
    with pytest.raises(ValueError, match=message):
        schemas(tools)


@pytest.mark.parametrize(("student", "teacher"), [("phi3", "qwen2_5"), ("qwen2_5", "llama3")])
def test_a_template_that_writes_no_calls_is_refused_before_training(student, teacher):
    whose = "student" if student == "phi3" else "teacher"
    with pytest.raises(ValueError, match=rf"tools: the {whose} cannot go on after a call .*leaves out calls of tools"):
        conversed(student, teacher)


def test_plain_prompts_and_datasets_that_were_rendered_without_tools_are_refused():
    sides = side("qwen2_5"), {"": side("gptoss")}
    with pytest.raises(ValueError, match=r"Row 3 .*tools need a conversation"):
        render_row({"prompt": "What is 2 plus 3?"}, 3, *sides, None, False, tools=schemas(TOOLS))
    rendered = render_row({"prompt": [ASKED]}, 0, *sides, None, False)
    with pytest.raises(ValueError, match="rendered without tools"):
        conversed("qwen2_5", "gptoss", prompt=Prompt(*(rendered[column] for column in COLUMNS)))


# --- in a run


def model(name, config, seed):
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = side(name).tokenizer
    return AutoModelForCausalLM.from_config(config(**size, num_key_value_heads=1, vocab_size=len(tokenizer)))


@pytest.fixture
def trainer(tmp_path):
    args = CrossTokenizerGKDConfig(
        str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        max_new_tokens=600,
        use_cpu=True,
        bf16=False,
        report_to=[],
        log_completions=True,
        logging_steps=1,
        report=True,
        **SGD,
    )
    rows = Dataset.from_list([{"prompt": [ASKED]}, {"prompt": [{"role": "user", "content": "Hello"}]}])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = CrossTokenizerGKDTrainer(
            model=model("qwen2_5", LlamaConfig, 0),
            teacher_model=model("gptoss", Qwen2Config, 1),
            args=args,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=side("qwen2_5").tokenizer,
            teacher_processing_class=side("gptoss").tokenizer,
            tools=TOOLS,
        )
    call, end = called("qwen2_5", a_call("add", {"a": 2, "b": 3})), said("qwen2_5", "Five.")
    trainer.asked = []

    def write(model, prompts, step):
        trainer.asked.append(prompts)
        text = [trainer.processing_class.decode(prompt.student_ids) for prompt in prompts]
        return [(call if "2 plus 3" in own and SECRET not in own else end, None) for own in text]

    trainer.rollouts.write = write
    return trainer


def test_a_run_scores_each_turn_once_and_its_gradient_does_not_depend_on_what_a_tool_says(trainer):
    window = [trainer.data_collator(list(trainer.train_dataset))["prompts"]]
    [batch] = trainer._roll_out(trainer.model, window, "train")
    labels = [side("qwen2_5").tokenizer.decode([i]) for i in batch["labels"].unique().tolist() if i >= 0]
    assert SECRET not in "".join(labels)
    row = next(n for n, ids in enumerate(batch["input_ids"]) if SECRET in side("qwen2_5").tokenizer.decode(ids))
    own = batch["labels"][row][batch["labels"][row] >= 0].tolist()
    assert own == called("qwen2_5", a_call("add", {"a": 2, "b": 3})) + said("qwen2_5", "Five.")
    assert json.loads(batch["frames"][row])["later"]
    trainer.train()
    figures = trainer.state.log_history[0]
    assert figures["tools/call_frequency"] == 0.5 and figures["tools/failure_frequency"] == 0
    assert figures["completions/mean_length"] == (len(own) + len(said("qwen2_5", "Five."))) / 2
    page = Path(trainer.args.output_dir, "report.html").read_text(encoding="utf-8")
    assert "what a tool returned" in page and "<dt>tools</dt><dd>add, divide</dd>" in page
    shown = [int(count) for count in re.findall(r"<b>(\d+)</b> student tokens", page)]
    assert sorted(shown) == sorted([len(own), len(said("qwen2_5", "Five."))]), "those that the log counts"
    trainer.create_model_card()
    card = Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")
    assert "| `tools` | add, divide |" in card and "its calls of `add`, `divide` were executed" in card


@pytest.mark.parametrize("asked_for", [False, True])
def test_no_tool_is_run_in_evaluation_unless_it_is_asked_for(trainer, asked_for):
    trainer.args.tools_in_evaluation = asked_for
    assert isinstance(trainer.rollouts, RolloutSource)
    window = [trainer.data_collator(list(trainer.eval_dataset))["prompts"]]
    batches, figures = trainer.rollouts.roll_out(trainer.model, window, 0, "eval", lambda name: nullcontext())
    texts = [side("qwen2_5").tokenizer.decode(ids) for ids in batches[0]["input_ids"]]
    assert any(SECRET in text for text in texts) == asked_for
    assert all("add" in text for text in texts)  # both models are shown the tools
    assert ("tools/call_frequency" in figures) == asked_for


def test_compare_asks_both_models_as_training_does_and_refuses_text(trainer, monkeypatch):
    rows = [{"prompt": [ASKED]}, {"prompt": [ASKED], "tools": schemas([divide])}]
    seen = []
    monkeypatch.setattr(
        "trl_ctopd.looking.compare.write", lambda model, ids, *_: seen.append(ids) or [([1], None) for _ in ids]
    )
    trainer.compare([rows[0]["prompt"], rows[1]], max_new_tokens=1)
    prompts = [asked("qwen2_5", "gptoss", **row) for row in rows]
    assert seen == [[own.student_ids for own in prompts], [own.teacher_ids for own in prompts]]
    with pytest.raises(ValueError, match="Prompt 1 of compare: its prompt is text, and tools need a conversation"):
        trainer.compare([[ASKED], "What is 2 plus 3?"])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_of_which_one_calls_tools_end_with_the_gradient_of_one_process(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "tools_run.py"), str(tmp_path)]
    for world in (1, 2):
        ranks = [
            subprocess.Popen([*code, str(rank), str(world), str(port)], stderr=subprocess.PIPE, text=True)
            for rank in range(world)
        ]
        for rank in ranks:
            said_last = rank.communicate(timeout=600)[1]
            assert rank.returncode == 0, said_last
    one, *two = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("0of1", "0of2", "1of2")]
    assert sorted(found["called"] for found in two) == [False, True]
    assert one["rounds"] == two[0]["rounds"] == two[1]["rounds"] == 2
    assert two[0]["figures"]["tools/call_frequency"] == one["figures"]["tools/call_frequency"] == 0.5
    alone, *together = [torch.load(tmp_path / f"{name}.pt") for name in ("0of1", "0of2", "1of2")]
    assert alone.norm() > 0
    for gradient in together:
        torch.testing.assert_close(gradient, alone, rtol=1e-4, atol=1e-5)


def test_calls_of_all_turns_have_ids_of_their_own():
    two = called("qwen2_5", *TWO_CALLS)
    prompt, *_ = conversed("qwen2_5", "qwen3_5_nothink", two, two, said("qwen2_5", "Done."))
    ids = [call["id"] for later in prompt.framed.later for call in json.loads(later.calls)]
    assert ids == [f"call{n:05}" for n in range(4)]
