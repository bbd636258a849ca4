"""What is found of real templates by rendering: TRL's own, which every environment has."""

import functools
import json
import runpy
import warnings
from pathlib import Path

import pytest
import trl

from trl_ctopd.rollouts.prompts import render_row
from trl_ctopd.text.chat import Conversation, Speaker, read_example, unshared_markup
from trl_ctopd.text.turns import ANSWER, CALL, CALLS, RESULT, THOUGHT, TOOLS, USER, Turn, read_turn


census = runpy.run_module("benchmarks.templates.census")
FOLDER = Path(trl.__file__).parent / "chat_templates"
FILES = sorted(FOLDER.glob("*.jinja"))
PLAIN = {"role": "assistant", "content": "It is four.\nIndeed."}
REASONED = PLAIN | {"reasoning_content": "Two and two."}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@functools.cache
def tokenizer(name):
    return census["tokenizer_for"]((FOLDER / f"{name}.jinja").read_text())


def side(name, **kwargs):
    return Speaker(tokenizer(name), **kwargs)


def finished(speaker, reference, tools=None):
    if "reasoning_content" in reference:  # transformers gives it both names itself, from 5.21 on
        reference = {"thinking": reference["reasoning_content"], **reference}
    return speaker.tokenizer.apply_chat_template([USER, reference], tools=tools, tokenize=False)


def text(speaker, *parts):
    return "".join(part if isinstance(part, str) else speaker.tokenizer.decode(part) for part in parts)


# --- the turn that a template writes


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_prompt_answer_and_end_are_the_templates_own_finished_turn(file):
    speaker = side(file.stem)
    conversation = Conversation([USER], PLAIN)
    own = speaker._render([USER, PLAIN], conversation)
    student = text(speaker, *speaker.reference(conversation))
    opened = speaker.opened(conversation)
    teacher = text(speaker, opened.plain, PLAIN["content"], speaker.turn_end)
    if opened.turn.plain.rest is None:  # the end is the next turn's header
        assert student == teacher == own + opened.turn.plain.end
    else:
        assert student == teacher == own.removesuffix(opened.turn.plain.rest)


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("qwen3", "<think>\n\n</think>\n\n"),
        ("glm4moe", "\n<think></think>\n"),
        ("gptoss", "<|channel|>final<|message|>"),
        ("muse_glimmer", " to=user<|message|>"),
        ("qwen2_5", ""),
        ("llama3_2", ""),
    ],
)
def test_a_teachers_turn_is_opened_as_its_finished_turns_are(name, opening):
    speaker = side(name)
    opened = speaker.opened(Conversation([USER]))
    assert opened.turn.tail == ""
    assert text(speaker, opened.plain) == text(speaker, opened.ids, opening)


@pytest.mark.parametrize(
    ("name", "tail", "opening"), [("deepseek_r1_distill", "<think>\n", ""), ("nemotron_3_nano", "\n", "</think>")]
)
def test_a_generation_prompt_that_a_finished_turn_lacks_is_taken_back(name, tail, opening):
    speaker = side(name)
    opened = speaker.opened(Conversation([USER]))
    assert opened.turn.tail == tail
    assert text(speaker, opened.plain) == text(speaker, opened.ids).removesuffix(tail) + opening


@pytest.mark.parametrize(
    ("name", "literals"),
    [
        ("qwen3", ("<think>\n", "\n</think>\n\n", "<|im_end|>")),
        ("qwen3_5_think", ("", "\n</think>\n\n", "<|im_end|>")),
        (
            "gptoss",
            (
                "<|channel|>analysis<|message|>",
                "<|end|><|start|>assistant<|channel|>final<|message|>",
                "<|return|>",
            ),
        ),
        ("lfm2_2_5", ("<think>", "</think>", "<|im_end|>")),
    ],
)
def test_a_thought_stands_between_the_markup_that_the_template_writes(name, literals):
    assert side(name).turn(Conversation([USER])).forms[(THOUGHT, ANSWER)].literals == literals


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "gemma3", "phi3"])
def test_a_template_without_thoughts_says_so(name):
    turn = side(name).turn(Conversation([USER]))
    assert turn.missing[(THOUGHT, ANSWER)] == "leaves out the thought"
    assert turn.is_simple


def test_a_call_ends_otherwise_than_an_answer():
    speaker = side("gptoss")
    turn = speaker.turn(Conversation([USER], tools=TOOLS))
    assert turn.plain.end == "<|return|>"
    assert turn.forms[(CALLS,)].end.endswith("<|call|>")
    ends = speaker.tokenizer.convert_ids_to_tokens(speaker.stop_ids())
    assert {"<|return|>", "<|call|>"} <= set(ends)
    assert "<|end|>" not in ends  # a thought's


# Abridged from Kimi-K3's and from Phi-3's way of ending.
SECTIONED = (
    "{% for m in messages %}{{ '<open>' + m.role + '<sep>' + m.content + '<close>' + m.role + '<sep><over>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<open>assistant<sep>' }}{% endif %}"
)
CLOSED = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<over>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% else %}{{ '<sep>' }}{% endif %}"
)


@pytest.mark.parametrize(("template", "end"), [(SECTIONED, "<close>assistant<sep><over>"), (CLOSED, "<over>")])
def test_a_turn_ends_where_it_does_when_another_follows(template, end):
    toy = tokenizer("qwen2_5").__class__(
        tokenizer_object=tokenizer("qwen2_5").backend_tokenizer.from_str(
            tokenizer("qwen2_5").backend_tokenizer.to_str()
        ),
        chat_template=template,
        eos_token="<EOS>",
    )
    toy.add_special_tokens({"additional_special_tokens": ["<open>", "<close>", "<sep>", "<over>"]})
    speaker = Speaker(toy)
    assert toy.decode(speaker.turn_end) == end
    assert toy.convert_ids_to_tokens(speaker.stop_ids()) == ["<EOS>", "<over>"]


def test_a_turn_is_read_again_from_its_json():
    turn = side("gptoss").turn(Conversation([USER], tools=TOOLS))
    assert read_turn(turn.to_json()) == Turn(turn.tail, turn.forms)


# --- rows


def test_the_teachers_own_template_kwargs_win_over_a_rows():
    row = Conversation([USER], chat_template_kwargs={"enable_thinking": False})
    own = {"enable_thinking": True}
    shown = [
        text(side("qwen3", **kwargs), side("qwen3", **kwargs).prompt_ids(row))
        for kwargs in ({"chat_template_kwargs": own}, {"chat_template_kwargs": own, "own_kwargs_win": True})
    ]
    assert shown[0].endswith("<think>\n\n</think>\n\n")
    assert not shown[1].endswith("</think>\n\n")


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_a_calls_arguments_are_the_same_as_a_dict_and_as_json_text(name):
    speaker = side(name)
    as_text = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
    rows = [
        {"prompt": [USER, {**CALLED, "tool_calls": calls}, RESULT], "tools": TOOLS}
        for calls in ([CALL], [as_text], json.dumps([CALL]), [CALL["function"]])
    ]
    conversations = [read_example(row) for row in rows]
    assert conversations[0] == conversations[1] == conversations[2]
    if speaker._call_style is None or not speaker._takes_results:
        with pytest.raises(ValueError, match="leaves out (calls of tools|the results)"):
            speaker.prompt_ids(conversations[0])
        return
    shown = text(speaker, speaker.prompt_ids(conversations[1]))
    for word in ("qzcallzq", "qzkeyzq", "qzvaluezq", "qzresultzq"):
        assert word in shown
    assert '\\"qzkeyzq' not in shown


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ("not json", "not JSON"),
        ([{"function": {"arguments": {}}}], "without a `name`"),
        ([{"name": "f", "arguments": "[1]"}], "must be a dict"),
    ],
)
def test_malformed_calls_say_what_is_wrong(calls, message):
    with pytest.raises(ValueError, match=message):
        read_example({"prompt": [USER, {"role": "assistant", "tool_calls": calls}]})


@pytest.mark.parametrize("name", [file.stem for file in FILES])
@pytest.mark.parametrize("before", [(), ("user", "assistant"), ("user",)], ids=["first", "later", "after the user"])
def test_a_message_of_an_unknown_role_is_shown_or_refused(name, before):
    speaker = side(name)
    turns = [{"role": role, "content": "Hi"} for role in before]
    for role in ("human", "User", "customer", "developer", "gpt"):
        try:
            ids = speaker.prompt_ids(Conversation([*turns, {"role": role, "content": "What is 3 plus 4?"}]))
        except ValueError:
            continue
        assert "What is 3 plus 4?" in text(speaker, ids)


@pytest.mark.parametrize(
    ("role", "way"), [("human", "user"), ("customer", "user"), ("gpt", "assistant"), ("developer", "system")]
)
def test_an_unknown_role_that_is_left_out_is_named_with_the_role_that_is_meant(role, way):
    prompt = [USER, PLAIN, {"role": role, "content": "What is 3 plus 4?"}]
    with pytest.raises(ValueError, match=f"leaves out the message of role '{role}'.*rename it to '{way}'"):
        side("qwen2_5").prompt_ids(Conversation(prompt))


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_messages_of_known_roles_are_not_taken_for_lost_whatever_a_template_does_to_their_text(name):
    speaker = side(name)
    for asked in (" Hi /think\n", "</think> <b>", '{"a": "\\n"}'):
        turns = [{"role": "system", "content": asked}, {"role": "user", "content": asked}, PLAIN, USER, REASONED]
        for prompt in (turns[:2], turns[:4], [*turns, USER], turns):
            assert speaker._lost_places(Conversation(prompt)) == []
            speaker.prompt_ids(Conversation(prompt))


def test_an_answer_beside_a_call_that_a_later_answer_takes_away_is_refused():
    prompt = [USER, {**CALLED, "content": "I look."}, RESULT]
    speaker = side("gptoss")
    assert "I look." in text(speaker, speaker.prompt_ids(Conversation(prompt, tools=TOOLS)))
    with pytest.raises(ValueError, match="leaves out the message of role 'assistant', 'I look.'.*reasoning_content"):
        speaker.prompt_ids(Conversation([*prompt, PLAIN, USER], tools=TOOLS))


def test_tools_that_a_template_leaves_out_are_said_once():
    speaker = side("phi3")
    with pytest.warns(UserWarning, match="leaves out `tools`") as caught:
        for _ in range(2):
            speaker.prompt_ids(Conversation([USER], tools=TOOLS))
    assert len(caught) == 1


def test_a_reference_whose_thought_or_call_would_be_lost_is_refused():
    with pytest.raises(ValueError, match="reasoning_content.*leaves out the thought"):
        side("llama3").reference_ids(Conversation([USER], REASONED))
    with pytest.raises(ValueError, match="tool_calls.*leaves out calls"):
        side("phi3").reference_ids(Conversation([USER], CALLED, TOOLS))


@pytest.mark.parametrize("reference", [PLAIN, REASONED, CALLED], ids=["plain", "thought", "call"])
@pytest.mark.parametrize(
    "name", ["qwen3", "qwen3_5_think", "glm4moe_training", "gptoss", "nemotron_3_nano", "gemma4_v5"]
)
def test_a_reference_goes_on_from_its_prompt_as_the_template_writes_it(name, reference):
    speaker = side(name)
    tools = TOOLS if "tool_calls" in reference else None
    written = text(speaker, *speaker.reference(Conversation([USER], reference, tools)))
    assert finished(speaker, reference, tools).removesuffix("\n") == written


def test_content_reaches_a_template_that_takes_parts_alone():
    speaker = side("smolvlm")
    assert "User: What?" in text(speaker, speaker.prompt_ids(Conversation([{"role": "user", "content": "What?"}])))


def test_a_template_that_requires_tools_is_probed_with_some():
    template = (
        "{% for t in tools %}{{ t.function.name }}{% endfor %}{% for m in messages %}{{ '<|x|>' + m.content }}{% endfor %}"
        "{{ '<|x|>' }}"
    )
    speaker = Speaker(census["tokenizer_for"](template))
    assert text(speaker, speaker.turn_end) == "<|x|>"
    with pytest.raises(ValueError, match="cannot render the roles.*not iterable"):
        speaker.prompt_ids(Conversation([USER]))


def test_a_row_with_tools_is_rendered_by_templates_that_require_some():
    template = (
        "{% if not tools %}{{ raise_exception('tools are required') }}{% endif %}{{ tools[0].function.name }}"
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|over|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    speaker = Speaker(census["tokenizer_for"](template))
    sides = (speaker, side("qwen2_5")), (side("qwen2_5"), speaker)
    row = {"messages": [{"role": "system", "content": "Be brief."}, USER, PLAIN], "tools": TOOLS}
    for student, teacher in sides:
        rendered = render_row(row, 0, student, {"": teacher}, None, needs_reference=True)
        own = text(student, rendered["prompt_ids"], rendered["reference_ids"])
        assert own.endswith(PLAIN["content"] + text(student, student.turn_end)) and TOOLS[0]["function"]["name"] in own
        assert (
            isinstance(unshared_markup(student, teacher), list) and student.stop_ids() and not speaker.prefills_thinking
        )
    del row["tools"]
    with pytest.raises(ValueError, match="Row 0 .*tools are required"):
        render_row(row, 0, speaker, {"": side("qwen2_5")}, None, needs_reference=False)


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_thought_that_a_template_writes_before_calls_only_stands_before_an_answer_as_its_next_version_writes_it(
    tools,
):
    asked = Conversation([USER], tools=tools)
    found = side("gemma4").turn(asked).forms[(THOUGHT, ANSWER)]
    own = side("gemma4_v5").turn(asked).forms[(THOUGHT, ANSWER)]
    assert found.inferred and not own.inferred
    assert found.literals == own.literals == ("<|channel>thought\n", "\n<channel|>", "<turn|>")
    with pytest.raises(ValueError, match="leaves the thought out of a finished turn, and the reference has one"):
        side("gemma4").reference(Conversation([USER], REASONED, tools))


BRACKETS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}{{ '[THINK]' + part.thinking + '[/THINK]' }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<|over|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for b in m.content.blocks %}{{ '<|in|>' + b.text + '<|out|>' if b.type == 'thoughts' else b.text }}{% endfor %}"
    "{% endif %}{{ '<|over|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LISTS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' ~ m.content ~ '<|over|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "literals"),
    [
        (BRACKETS, ("[THINK]", "[/THINK]", "<|over|>")),  # as Ministral's
        (BLOCKS, ("<|in|>", "<|out|>", "<|over|>")),  # as Apertus's
        (LISTS, None),  # would write the list itself
    ],
    ids=["parts", "blocks", "none"],
)
def test_a_thought_is_given_as_content_to_templates_that_read_it_from_there(template, literals):
    speaker = Speaker(census["tokenizer_for"](template))
    form = speaker.turn(Conversation([USER])).forms.get((THOUGHT, ANSWER))
    assert (form and form.literals) == literals
    if literals:
        written = text(speaker, *speaker.reference(Conversation([USER], REASONED)))
        opening, close, end = literals
        assert written.endswith(f"<|assistant|>{opening}Two and two.{close}{PLAIN['content']}{end}")
        assert "Two and two." in text(speaker, speaker.prompt_ids(Conversation([USER, REASONED, USER])))


def test_a_finished_turn_that_closes_the_prompts_tag_at_once_is_one_with_an_empty_thought():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content + '<|assistant|><think>' }}"
        "{% else %}{{ '</think>' + m.content + '<|over|>' }}{% endif %}{% endfor %}"
    )
    speaker = Speaker(census["tokenizer_for"](template))
    forms = speaker.turn(Conversation([USER])).forms
    assert forms[(ANSWER,)].literals == ("</think>", "<|over|>")
    assert forms[(THOUGHT, ANSWER)].literals == ("", "</think>", "<|over|>")


def test_after_a_thought_that_the_prompt_opens_a_call_follows_as_without_one():
    turn = side("deepseekv3").turn(Conversation([USER], tools=TOOLS))
    calls = turn.forms[(CALLS,)]
    assert turn.tail == "<think>\n" and turn.takes_back(calls)
    assert turn.forms[(THOUGHT, CALLS)].literals == ("<think>\n", "\n</think>\n\n" + calls.opening, calls.end)


def test_a_template_that_fails_at_tools_serves_rows_without():
    template = (
        "{% if tools %}{{ raise_exception('broken') }}{% endif %}{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{% if m.tool_calls %}{{ '<call>' + m.tool_calls[0].function.name + m.tool_calls[0].function.arguments|tojson }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|over|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    speaker = Speaker(census["tokenizer_for"](template))
    assert text(speaker, speaker.stop_ids()[-1:]) == "<|over|>"
    assert text(speaker, *speaker.reference(Conversation([USER], PLAIN))).endswith("Indeed.<|over|>")
    with pytest.raises(ValueError, match="broken"):
        speaker.prompt_ids(Conversation([USER], tools=TOOLS))


def test_an_earlier_thought_that_is_left_out_is_said_once():
    speaker = side("qwen3")
    with pytest.warns(UserWarning, match="reasoning of earlier turns") as caught:
        for _ in range(2):
            speaker.prompt_ids(Conversation([USER, REASONED, USER]))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        speaker.prompt_ids(Conversation([USER]))


def test_a_turn_depends_on_what_the_row_says_to_the_template():
    """Its system text switches the template's own mode."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|over|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% if 'quick' in messages[0].content %}{{ '<think></think>' }}"
        "{% endif %}{% endif %}"
    )
    speaker = Speaker(census["tokenizer_for"](template))
    assert speaker.opened(Conversation([USER])).turn.tail == ""
    quick = speaker.opened(Conversation([{"role": "system", "content": "quick"}, USER]))
    assert quick.turn.tail == "<think></think>"
    assert text(speaker, quick.plain).endswith("<|assistant|>")


def test_a_continued_turn_has_no_opening_of_its_own():
    opened = side("qwen3").opened(Conversation([USER, {"role": "assistant", "content": "Well,"}]))
    assert opened.turn.plain.literals == ("", "<|im_end|>")
    assert set(opened.turn.forms) == {(ANSWER,)}
