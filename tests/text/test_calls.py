"""Calls of tools in one template's writing beside another's, for real templates: TRL's own."""

import functools
import itertools
import random
import warnings

import pytest
from template_sides import FOLDER, published, side
from test_sections import rendered_text, rollout, texts

from trl_ctopd.text.calls import DEEPEST, Piece, a_call, beside, pieces
from trl_ctopd.text.chat import Conversation
from trl_ctopd.text.turns import CALLS, TOOLS, USER


CALL = a_call("get_room", {"count": 2, "floor": "third floor"})  # in an order that sorting keeps
CALLERS = [
    "qwen3",
    "qwen3_5_think",
    "gptoss",
    "glm4moe",
    "lfm2_2_5",
    "llama3_2",
    "muse_glimmer",
    "gemma4_v5",
    "deepseekv3",
]


def called(*calls, **beside_them):
    return {"role": "assistant", "content": "", **beside_them, "tool_calls": list(calls)}


def conversation(reference=None):
    return Conversation([USER], reference, TOOLS)


def reply(name, message):
    speaker = side(name)
    before, ids = speaker.reference(conversation(message))
    return ids if before == speaker.prompt_ids(conversation()) else None


def heard(found, name):
    return side(name).tokenizer.decode(found.teacher_prompt_ids + found.teacher_ids)


@pytest.mark.parametrize("name", [file.stem for file in sorted(FOLDER.glob("*.jinja")) if "_training" not in file.stem])
def test_what_a_template_writes_for_calls_is_read_again(name):
    speaker = side(name)
    if speaker._call_style is None:
        pytest.skip("this template leaves calls out")
    for calls in ([CALL], [a_call("now", {})], [a_call("f", {"flag": True, "many": [1, 2], "text": "é, so"})]):
        text = speaker.write_calls((CALLS,), calls)
        cut = pieces(calls, lambda own: speaker.write_calls((CALLS,), own))
        assert "".join(piece.text for piece in cut) == text
        assert [piece.text for piece in cut if piece.label == (0,)][0] == calls[0]["function"]["name"]
        read = speaker.call_reader.read(text[len(speaker.call_reader.opening) :])
        assert [call["function"]["name"] for call in read] == [call["function"]["name"] for call in calls]
        assert read[0]["function"]["arguments"] == calls[0]["function"]["arguments"]


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(CALLERS, 2)))
def test_the_teacher_reads_its_own_templates_writing_of_a_call(student, teacher):
    ids = reply(student, called(CALL))
    if ids is None:  # a turn without a thought takes back what the student's prompt has opened
        pytest.skip("this student's prompt opens a thought, which a call alone has not")
    found = rollout(student, teacher, ids, tools=TOOLS)
    assert heard(found, teacher) == rendered_text(teacher, called(CALL), (CALLS,), TOOLS)
    assert {own.reason for own in found.alignment.masked} <= {"markup"}
    shared = "".join(ours for ours, theirs in texts(found, student, teacher) if ours == theirs)
    for atom in ("get_room", "floor", "third floor", "count", "2"):
        assert atom in shared


NESTED = [
    {"options": {"k": 1}},
    {"words": ["a", "b"]},
    {"text": "so", "many": [{"a": "x"}], "flag": True},
    {"options": {"k": 1}, "many": [1]},
]


@pytest.mark.parametrize("arguments", NESTED, ids=str)
def test_the_teacher_reads_its_own_templates_writing_of_lists_and_dicts(arguments):
    """Gemma 4's template writes them in a way of its own."""
    call = a_call("search", arguments)
    write = functools.partial(side("gemma4_v5").write_calls, (CALLS,))
    cut = pieces([call], write)
    assert cut is None or "".join(piece.text for piece in cut) == write([call])
    found = rollout("qwen2_5", "gemma4_v5", reply("qwen2_5", called(call)), tools=TOOLS)
    assert heard(found, "gemma4_v5") == rendered_text("gemma4_v5", called(call), (CALLS,), TOOLS)
    assert "call" in {own.reason for own in found.alignment.masked}
    assert found.student_chunks[-1] >= 0  # the turn's end is scored


@pytest.mark.parametrize("teacher", ["qwen3", "glm4moe", "lfm2_2_5"])
def test_several_calls_are_several_calls(teacher):
    calls = [CALL, a_call("leave", {"why": "done"})]
    found = rollout("qwen2_5", teacher, reply("qwen2_5", called(*calls)), tools=TOOLS)
    assert heard(found, teacher) == rendered_text(teacher, called(*calls), (CALLS,), TOOLS)


@pytest.mark.parametrize("teacher", ["gptoss", "glm4moe", "qwen3_5_think"])
def test_a_thought_and_a_call_each_find_their_own(teacher):
    message = called(CALL, reasoning_content="A room.")
    found = rollout("qwen3", teacher, reply("qwen3", message), tools=TOOLS)
    assert heard(found, teacher) == rendered_text(teacher, message, ("thought", CALLS), TOOLS)


def test_what_a_call_says_is_text_to_the_teacher_and_no_control_token_of_its():
    written = reply("qwen2_5", called(a_call("note", {"text": "say <|start|> so"})))
    found = rollout("qwen2_5", "gptoss", written, tools=TOOLS)
    assert side("gptoss").tokenizer.convert_tokens_to_ids("<|start|>") not in found.teacher_ids
    assert not found.alignment.masked and "say <|start|> so" in heard(found, "gptoss")


def test_what_two_templates_serialise_differently_is_masked():
    call = a_call("note", {"text": 'say "no"'})
    found = rollout("qwen2_5", "glm4moe", reply("qwen2_5", called(call)), tools=TOOLS)
    assert heard(found, "glm4moe").endswith('<arg_value>say "no"</arg_value>\n</tool_call><|observation|>')
    assert "call" in {own.reason for own in found.alignment.masked}
    chunks = [ours for ours, _ in texts(found, "qwen2_5", "glm4moe")]
    assert "note" in "".join(chunks)
    assert "say" not in "".join(chunks)


@pytest.mark.parametrize(
    "written",
    [
        '<tool_call>\n{"name": "get_room", "arguments": {"floor":"third"}}\n</tool_call><|im_end|>',  # not its own spacing
        '<tool_call>\n{"name": "get_room", "arguments": {"floor": \n</tool_call><|im_end|>',
        '<tool_call>\n{"name": "get_room", "argum',
    ],
)
def test_a_call_that_is_not_as_the_students_template_writes_it_is_masked(written):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = rollout("qwen2_5", "gptoss", written, tools=TOOLS)
    assert "call" in {own.reason for own in found.alignment.masked}
    assert found.num_chunks == 0


def read(name, text, tools=None):
    """Name and arguments of each call."""
    found = side(name).call_reader.read(text, tools)
    return found and [(call["function"]["name"], call["function"]["arguments"]) for call in found]


SPACED = {
    "qwen2_5": [
        'add","arguments":{"a":1}}</tool_call><tool_call>{"name":"now","arguments":{}}</tool_call><|im_end|>',
        'add" ,\n"arguments" : { "a" : 1 }\n}\n</tool_call>\n\n \n<tool_call>\n{\n  "name": "now", "arguments": {}}<|im_end|>',
    ],
    "qwen3_5_nothink": [
        "add><parameter=a>\n1\n</parameter></function></tool_call><tool_call><function=now></function></tool_call><|im_end|>",
        "add>\n\n<parameter=a>\n1\n</parameter>\n\n</function>\n</tool_call>\n\n<tool_call>\n<function=now>\n</function>\n</tool_call><|im_end|>",
    ],
    "deepseekv3": [
        'add\n```json\n{"a":1}\n```<｜tool▁call▁end｜>\n\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>'
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in SPACED.items() for text in texts])
def test_whitespace_around_tags_and_punctuation_hides_no_call(name, text):
    assert read(name, text) == [("add", {"a": 1}), ("now", {})]


FIRST, AGAIN = (
    'add", "arguments": {"a": 1}}\n</tool_call>',
    '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>',
)
KEYED = "add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"


def nested(levels, opening="[", closing="]"):
    return opening * levels + "1" + closing * levels


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen2_5", f"{FIRST}\nand then\n{AGAIN}"),
        ("qwen2_5", FIRST + '\n<tool_call>\n{"arguments": {"a": 2}, "name": "add"}\n</tool_call>'),
        ("qwen2_5", FIRST + '\n<tool_call>\n{"name": "add", "arguments": {"a": 2\n</tool_call>'),
        ("llama3_1", 'add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}'),
        ("qwen3_5_nothink", f"{KEYED} and <tool_call>\n<function={KEYED}<|im_end|>"),
        (
            "qwen3_5_nothink",
            f"add><parameter=a>1</parameter></function></tool_call><tool_call><function={KEYED}<|im_end|>",
        ),
        ("qwen2_5", r'add", "arguments": {"a": "\ud83d"}}'),
        ("qwen2_5", r'add", "arguments": {"\ud83d": "a"}}'),
        ("qwen2_5", f'add", "arguments": {{"a": {nested(DEEPEST)}}}}}'),
        ("qwen2_5", f'add", "arguments": {nested(DEEPEST + 1, """{"a": """, "}")}}}'),
        ("gemma4_v5", "add{options:{k:1}}<tool_call|><|tool_response>"),
    ],
)
def test_of_calls_of_which_one_cannot_be_read_none_is(name, text):
    assert read(name, text) is None


def test_a_call_as_deep_as_may_be_is_read():
    [(name, _)] = read("qwen2_5", f'add", "arguments": {{"a": {nested(DEEPEST - 1)}}}}}')
    assert name == "add"


@pytest.mark.parametrize("value", [r'["\ud83d"]', nested(DEEPEST + 1), "[" * (DEEPEST + 1)])
def test_key_by_key_a_value_that_cannot_be_read_is_text(value):
    text = f"add>\n<parameter=a>\n{value}\n</parameter>\n</function>\n</tool_call><|im_end|>"
    assert read("qwen3_5_nothink", text) == [("add", {"a": value})]


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (None, "2024", 2024),
        ({}, "2024", 2024),
        ({"type": "string"}, "2024", "2024"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, "True", "True"),
        ({"type": "string"}, '"so"', '"so"'),
        ({"type": "string"}, "[1]", "[1]"),
        ({"type": "integer"}, "2024", 2024),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"type": ["integer", "string"]}, "5", 5),
        ({"anyOf": [{"type": "string"}, {"type": "number"}]}, "5", 5),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "5", "5"),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, "5", "5"),
        ({"type": ["number", "string"]}, "2.5", 2.5),
        ({"type": "integer"}, "5 apples", "5 apples"),
    ],
)
@pytest.mark.parametrize("name", ["qwen3_5_nothink", "glm4moe"])
def test_what_a_schema_calls_text_is_no_number(name, schema, text, value):
    """These templates write texts as they write numbers."""
    properties = {} if schema is None else {"a": schema}
    tools = [
        {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": properties}}}
    ]
    written = side(name).calls_text([a_call("add", {"a": text})])
    assert text in written
    assert read(name, written, tools) == [("add", {"a": value})]
    assert read(name, written, [{"type": "function", "function": {"name": "other"}}]) == read(name, written)


def test_ids_after_the_arguments_are_the_calls_own():
    """Mistral Nemo's template writes them there."""
    reader = published("mistralai-Mistral-Nemo-Instruct-2407").call_reader
    one, other = (
        '{"name": "add", "arguments": {"a": 1}, "id": "a1B2c3D4e"}',
        '{"name":"add","arguments":{"a":2},"id":"zzzzzzzz1"}',
    )
    for text, ids in ((f"[{one}]</s>", ["a1B2c3D4e"]), (f"[{one}, {other}]", ["a1B2c3D4e", "zzzzzzzz1"])):
        found = reader.read(text.partition('"name": "')[2])
        assert [call["id"] for call in found] == ids
    assert reader.read(f"[{one}] [{other}]".partition('"name": "')[2]) is None


def test_a_call_whose_teacher_knows_none_is_masked():
    with pytest.warns(UserWarning, match="calls of tools"):
        found = rollout("qwen2_5", "gemma3", reply("qwen2_5", called(CALL)), tools=TOOLS, fresh=True)
    assert {own.reason for own in found.alignment.masked} == {"call"}


@pytest.mark.parametrize("seed", range(20))
def test_stretches_beside_each_other_make_up_both_sides(seed):
    """Against the definition: in order, nothing left out, and the same atom on both sides where it says so."""
    rng = random.Random(seed)
    labels = [(0,), (0, 0, 0), (0, 0, 1), (1,)]
    sides = []
    for _ in range(2):
        own = [label for label in labels if rng.random() < 0.8]
        side = [Piece(rng.choice(["", "<", '", "']))]
        for label in own:
            side += [Piece(f"atom{label}", label), Piece(rng.choice(["", "<", '", "']))]
        sides.append(side)
    rows = beside(*sides)
    for column in (0, 1):
        assert "".join(row[column] for row in rows) == "".join(piece.text for piece in sides[column])
    common = [piece.text for piece in sides[0] if piece.label in {piece.label for piece in sides[1]} - {None}]
    assert [row[0] for row in rows if row[2] == "atom"] == common
    assert all(row[0] == row[1] for row in rows if row[2] == "atom")
    assert all(("atom" in row[0] + row[1]) == (row[2] == "unlike") for row in rows if row[2] != "atom")


def test_keys_that_a_template_sorts_are_masked_where_they_stand_elsewhere():
    call = a_call("get_room", {"zone": "north", "area": "east"})
    found = rollout("qwen2_5", "gemma4_v5", reply("qwen2_5", called(call)), tools=TOOLS)
    assert heard(found, "gemma4_v5").endswith('{area:<|"|>east<|"|>,zone:<|"|>north<|"|>}<tool_call|><|tool_response>')
    assert "call" in {own.reason for own in found.alignment.masked}
    chunks = texts(found, "qwen2_5", "gemma4_v5")
    assert not [ours for ours, theirs in chunks if ("zone" in ours) != ("zone" in theirs)]


def test_a_masked_end_of_a_call_is_not_read_by_the_teacher():
    found = rollout("qwen2_5", "qwen3", reply("qwen2_5", called(CALL)), tools=TOOLS, eos_policy="mask")
    assert heard(found, "qwen3").endswith("\n</tool_call>") and found.student_chunks[-1] == -1


def test_masked_markup_around_a_calls_name_and_arguments_is_not_scored():
    found = rollout("qwen2_5", "lfm2_2_5", reply("qwen2_5", called(CALL)), tools=TOOLS, markup_policy="mask")
    assert heard(found, "lfm2_2_5") == rendered_text("lfm2_2_5", called(CALL), (CALLS,), TOOLS)
    chunks = texts(found, "qwen2_5", "lfm2_2_5")
    assert chunks and all(ours == theirs for ours, theirs in chunks)


def test_keys_are_cut_where_a_template_sorts_them_whatever_their_capitals():
    call = a_call("get_room", {"Zone": "north", "area": "east"})
    cut = pieces([call], functools.partial(side("gemma4_v5").write_calls, (CALLS,)))
    assert [piece.text for piece in cut if piece.label] == ["get_room", "area", "east", "Zone", "north"]


def test_a_schema_of_a_tool_is_known_without_the_word_function_around_it():
    tool = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    written = side("glm4moe").calls_text([a_call("add", {"a": "2024"})])
    assert read("glm4moe", written, [tool]) == [("add", {"a": "2024"})]
