"""Two renderings of one conversation: what each prompt holds, where each turn ends, and what neither side may read."""

import copy
import functools
import itertools
import json
import pickle
import warnings
from datetime import date
from pathlib import Path

import needs
import pytest
import template_sides
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from trl import maybe_convert_to_chatml

from trl_ctopd.text.chat import Conversation, Speaker, read_example, unshared_markup


CHATTERS = ["qwen2.5", "llama-3.2", "phi-3-mini", "deepseek-v3", "mistral-v3", "smollm2-instruct"]
KWARGS = {"date_string": "26 Jul 2024"}  # Llama's template prints the day otherwise
LLAMA_DATE = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOL_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

# Abridged: Gemma's; one that opens <think>; GLM's, whose answers have no end of their own; the first Phi-3's, which
# leaves `system` out.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<start>' + m.role + '\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' + ('' if no_think else '<think>\n') }}{% endif %}"
)
GLM = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<start>' }}{{ '\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>' }}{% endif %}"
)
DROPS = "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"

USER = {"role": "user", "content": "What is 2+2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
REFERENCE = {"role": "assistant", "content": "It is four, zweifellos."}
LONG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Q1 <|im_end|>"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}],
}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "add", "content": "4"}


real = functools.cache(needs.tokenizer)


def speaker(name):
    return Speaker(real(name), KWARGS)


def toy(template=None, added=(), **special):
    """A byte-level BPE with `<start>`, `<end>` special, `<user>` and `added` not."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        ["What is it? It is four."] * 9,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False),
    )
    model.add_special_tokens(["<start>", "<end>", *special.values()])
    model.add_tokens([AddedToken(text, normalized=False) for text in ("<user>", *added)])
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=template, **special)


def text_of(side, conversation):
    return side.tokenizer.decode(side.prompt_ids(conversation))


def ids_of(side, *tokens):
    return side.tokenizer.convert_tokens_to_ids(list(tokens))


# --- dataset shapes


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"prompt": "2+2="}, "2+2=", None),
        ({"prompt": "2+2=", "completion": " 4"}, "2+2=", " 4"),
        ({"prompt": [USER]}, [USER], None),
        ({"prompt": [USER, REFERENCE]}, [USER, REFERENCE], None),
        ({"prompt": [USER], "completion": [REFERENCE]}, [USER], REFERENCE),
        ({"messages": [USER, REFERENCE]}, [USER], REFERENCE),
        ({"messages": [USER, REFERENCE, USER]}, [USER, REFERENCE, USER], None),
        ({"messages": [USER, REFERENCE], "prompt": None, "id": 7}, [USER], REFERENCE),
    ],
)
def test_every_trl_shape_is_read(row, prompt, reference):
    assert read_example(row) == Conversation(prompt, reference)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_and_template_kwargs_columns_are_read(tools):
    conversation = read_example({"prompt": [USER], "tools": tools, "chat_template_kwargs": {"no_think": True}})
    assert conversation == Conversation([USER], None, [TOOL], {"no_think": True})


def test_no_tools_is_the_same_as_an_empty_list():
    assert read_example({"prompt": [USER], "tools": "[]"}).tools is None


def test_none_that_arrow_fills_in_is_dropped():
    row = {
        "messages": [USER | {"tool_calls": None}, CALL | {"content": None}, RESULT | {"x": None}],
        "tools": [TOOL | {"strict": None}],
        "chat_template_kwargs": {"a": None, "b": 1},
    }
    assert read_example(row) == Conversation([USER, CALL, RESULT], None, [TOOL], {"b": 1})


def test_text_parts_become_text():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}]
    assert read_example({"prompt": [{"role": "user", "content": parts}]}).prompt == [USER]


def test_a_list_of_texts_is_read_as_its_texts_one_after_the_other():
    for parts in (["What is ", "2+2?"], ["What is ", {"type": "text", "text": "2+2?"}]):
        assert read_example({"prompt": [{"role": "user", "content": parts}]}).prompt == [USER]


def as_sharegpt(messages):
    return [{"from": message["role"], "value": message["content"]} for message in messages]


@pytest.mark.parametrize("names", [{}, {"user": "human", "assistant": "gpt"}], ids=["roles", "human and gpt"])
def test_sharegpt_conversations_are_read_as_trl_converts_them(names):
    row = {"conversations": as_sharegpt([SYSTEM, USER, REFERENCE]), "id": 3}
    expected = maybe_convert_to_chatml(copy.deepcopy(row))
    for message in row["conversations"]:
        message["from"] = names.get(message["from"], message["from"])
    before = copy.deepcopy(row)
    assert read_example(row) == read_example(expected) == Conversation([SYSTEM, USER], REFERENCE)
    assert row == before


def test_from_and_value_are_read_in_every_column_of_messages():
    row = {"prompt": as_sharegpt([USER]), "completion": as_sharegpt([REFERENCE])}
    row["teacher_prompt"] = as_sharegpt([SYSTEM, USER])
    assert read_example(row) == Conversation([USER], REFERENCE, teacher_prompt=[SYSTEM, USER])


def test_the_teachers_prompt_takes_the_place_of_the_prompt_for_the_teacher_alone():
    row = {"prompt": [USER], "completion": [REFERENCE], "tools": [TOOL], "teacher_prompt": [SYSTEM, USER]}
    conversation = read_example(row)
    assert conversation.for_teacher == Conversation([SYSTEM, USER], REFERENCE, [TOOL])
    assert conversation.for_student == Conversation([USER], REFERENCE, [TOOL])
    assert read_example({"messages": [USER, REFERENCE], "teacher_prompt": [SYSTEM, USER]}) == Conversation(
        [USER], REFERENCE, teacher_prompt=[SYSTEM, USER]
    )
    assert read_example({"prompt": "2+2=", "teacher_prompt": "It is 4. 2+2="}).for_teacher.prompt == "It is 4. 2+2="
    begun = [USER, {"role": "assistant", "content": "It"}]
    assert read_example({"prompt": begun, "teacher_prompt": [SYSTEM, *begun]}).for_teacher.prompt == [SYSTEM, *begun]
    for same in ({"prompt": [USER]}, {"prompt": [USER], "teacher_prompt": None}):
        assert read_example(same).for_teacher == read_example(same).for_student == Conversation([USER])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "2+2"},
            r"neither \(columns \['question'\]\).*rename_column\(name, 'prompt'\).*`--prompt_column name`",
        ),
        ({"prompt": "hi", "messages": [USER]}, r"both \(columns \['messages', 'prompt'\]\).*remove_columns"),
        ({"prompt": None}, "its `prompt` is None.*dataset.filter"),
        ({"messages": None, "question": "2+2"}, "its `messages` is None"),
        ({"prompt": None, "conversations": None}, "its `prompt` and its `conversations` is None"),
        ({"messages": []}, "`messages` must be a list of at least one message"),
        ({"prompt": 3}, "`prompt` must be text or a list of at least one message, got 3"),
        ({"messages": "hi"}, "`messages` must be a list"),
        ({"prompt": ["hi"]}, "dicts with `role` and `content`, got 'hi'"),
        ({"prompt": [{"content": "hi"}]}, "`role`"),
        ({"prompt": [{"role": "user", "content": None}]}, "user message with neither"),
        ({"messages": [REFERENCE]}, "assistant turn only"),
        ({"prompt": "hi", "completion": [REFERENCE]}, "same kind"),
        ({"prompt": [USER], "completion": "hi"}, "`completion` must be a list"),
        ({"prompt": [USER], "completion": [CALL, RESULT, REFERENCE]}, "one assistant message.*move the earlier turns"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "only text"),
        ({"prompt": [USER], "tools": "not json"}, "`tools` is text that is not JSON"),
        ({"prompt": [USER], "tools": "{}"}, "`tools` must be a list"),
        ({"prompt": [USER], "teacher_prompt": "hi"}, "the prompt is messages and `teacher_prompt` is text: make both"),
        ({"prompt": "hi", "teacher_prompt": [USER]}, "the prompt is text and `teacher_prompt` is messages: make both"),
        ({"prompt": [USER], "teacher_prompt": []}, "`teacher_prompt` must be text or a list of at least one message"),
        (
            {"prompt": [USER], "teacher_prompt": [USER, REFERENCE]},
            "ends with no begun answer and `teacher_prompt` with the begun answer 'It is four, zweifellos.'",
        ),
        (
            {"conversations": [{"from": "bot", "value": "hi"}]},
            "`conversations` holds a message `from` 'bot': make it one",
        ),
        ({"conversations": [{"from": "user"}]}, "user message with neither"),
        ({"conversations": [USER], "prompt": [USER]}, "this one has prompt beside `conversations`"),
    ],
)
def test_a_malformed_row_says_what_is_wrong(row, message):
    with pytest.raises(ValueError, match=message):
        read_example(row)


# --- prompts through real templates


_CHATML_PROMPT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ1 <|im_end|><|im_end|>\n"
    "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
)
LONG_PROMPT = {
    "qwen2.5": _CHATML_PROMPT,
    "llama-3.2": (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{LLAMA_DATE}Be brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ1 <|im_end|><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "phi-3-mini": (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nQ1 <|im_end|><|end|>\n<|assistant|>\nA1<|end|>\n"
        "<|user|>\nQ2<|end|>\n<|assistant|>\n"
    ),
    "deepseek-v3": (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Q1 <|im_end|><｜Assistant｜>A1<｜end▁of▁sentence｜>"
        "<｜User｜>Q2<｜Assistant｜>"
    ),
    "mistral-v3": "<s>[INST] Q1 <|im_end|>[/INST] A1</s>[INST] Be brief.\n\nQ2[/INST]",
    "smollm2-instruct": _CHATML_PROMPT,
}
CONTINUED_PROMPT = {
    "qwen2.5": (
        f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\nWell,"
    ),
    "llama-3.2": (
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{LLAMA_DATE}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nWell,"
    ),
    "phi-3-mini": "<|user|>\nWhat is 2+2?<|end|>\n<|assistant|>\nWell,",
    "deepseek-v3": "<｜begin▁of▁sentence｜><｜User｜>What is 2+2?<｜Assistant｜>Well,",
    "mistral-v3": "<s>[INST] What is 2+2?[/INST] Well,",
    "smollm2-instruct": (
        f"<|im_start|>system\n{SMOL_SYSTEM}<|im_end|>\n<|im_start|>user\nWhat is 2+2?<|im_end|>\n"
        "<|im_start|>assistant\nWell,"
    ),
}


@pytest.mark.parametrize("name", CHATTERS)
def test_system_and_earlier_turns_are_rendered_as_the_own_template_does(name):
    side = speaker(name)
    assert side.prompt_ids(Conversation(LONG)) == side.tokenizer.encode(LONG_PROMPT[name], add_special_tokens=False)


@pytest.mark.parametrize("name", CHATTERS)
def test_a_prompt_that_ends_in_an_assistant_turn_is_continued_there(name):
    side = speaker(name)
    prompt = side.prompt_ids(Conversation([USER, {"role": "assistant", "content": "Well,"}]))
    assert prompt == side.tokenizer.encode(CONTINUED_PROMPT[name], add_special_tokens=False)


@pytest.mark.parametrize("name", ["add_generation_prompt", "continue_final_message", "tokenize", "tools"])
def test_how_a_template_is_called_is_no_variable_of_it(name):
    row = {"prompt": [USER], "chat_template_kwargs": {name: False}}
    with pytest.raises(ValueError, match=f"`chat_template_kwargs` has {name}"):
        read_example(row)
    with pytest.raises(ValueError, match=f"`chat_template_kwargs` has {name}"):
        Speaker(template_sides.side("qwen3").tokenizer, row["chat_template_kwargs"])
    assert read_example({"prompt": [USER], "chat_template_kwargs": {name: None}}).chat_template_kwargs == {}


@pytest.mark.parametrize(
    ("name", "refused"),
    [("qwen2_5", False), ("llama3", False), ("qwen3", True), ("qwen3_5_think", True), ("glm4moe", True)],
)
def test_a_thought_that_is_begun_in_the_content_is_not_continued_behind_a_closed_one(name, refused):
    side = template_sides.side(name)
    begun = Conversation([USER, {"role": "assistant", "content": "<think>\nTwo and two"}])
    if refused:
        with pytest.raises(ValueError, match="begins with '<think>', and the chat template of .* writes an empty one"):
            side.prompt_ids(begun)
    else:
        assert template_sides.spelled(side, side.prompt_ids(begun)).endswith("<think>\nTwo and two")
    answer = Conversation([USER, {"role": "assistant", "content": "<b>Two</b> and"}])
    assert template_sides.spelled(side, side.prompt_ids(answer)).endswith("<b>Two</b> and")


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(CHATTERS, 2)))
def test_no_control_token_of_the_other_side_gets_into_a_prompt(one, other):
    prompt = text_of(speaker(one), Conversation([USER]))
    own = {token.content for token in real(one).added_tokens_decoder.values()}
    foreign = {token.content for token in real(other).added_tokens_decoder.values() if token.special} - own
    assert foreign, "these two share all control tokens, so nothing is tested"
    assert not [token for token in foreign if token in prompt]


@pytest.mark.parametrize("name", CHATTERS)
@pytest.mark.parametrize("prompt", [[USER], LONG, "2+2="])
def test_there_is_never_a_second_bos(name, prompt):
    side = speaker(name)
    ids = side.prompt_ids(Conversation(prompt))
    if side.tokenizer.bos_token == "<|im_start|>":  # SmolLM2: each turn opens with it
        assert ids[:2] != [side.tokenizer.bos_token_id] * 2
    else:
        assert ids.count(side.tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("name", ["qwen2.5", "llama-3.2", "mistral-v3"])
def test_tools_are_described_in_the_prompt(name):
    conversation = Conversation([USER], tools=[TOOL])
    assert '"Adds."' in text_of(speaker(name), conversation)
    assert "Adds." not in text_of(speaker(name), Conversation([USER]))


@pytest.mark.parametrize(
    ("name", "result"), [("qwen2.5", "<tool_response>\n4"), ("llama-3.2", "ipython"), ("mistral-v3", "[TOOL_RESULTS]")]
)
def test_a_tool_result_is_part_of_the_prompt(name, result):
    prompt = text_of(speaker(name), Conversation([USER, CALL, RESULT], tools=[TOOL]))
    assert result in prompt
    assert '{"a": 2}' in prompt


def test_a_template_that_cannot_take_a_turn_says_which():
    with pytest.raises(
        ValueError, match=r"phi-3-mini.*cannot render or leaves out calls of tools.*\['user', 'assistant', 'tool'\]"
    ):
        speaker("phi-3-mini").prompt_ids(Conversation([USER, CALL, RESULT]))
    with pytest.raises(ValueError, match="mistral-v3.*Conversation must start with a user message, got assistant"):
        speaker("mistral-v3").prompt_ids(Conversation([REFERENCE, USER]))


def test_a_rows_template_kwargs_override_the_configured_ones():
    side = Speaker(real("llama-3.2"), {"date_string": "1 Jan 2001"})
    assert "Today Date: 1 Jan 2001" in text_of(side, Conversation([USER]))
    row = Conversation([USER], chat_template_kwargs={"date_string": "2 Feb 2002"})
    assert "Today Date: 2 Feb 2002" in text_of(side, row)


@pytest.mark.parametrize("name", [*CHATTERS, "gpt2", "llama-2"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, REFERENCE]},
        {"messages": [*LONG, REFERENCE]},
        {"prompt": [USER], "completion": [REFERENCE]},
        {"prompt": USER["content"], "completion": REFERENCE["content"]},
    ],
)
def test_nothing_of_the_reference_is_in_the_prompt(name, row):
    side, conversation = speaker(name), read_example(row)
    prompt = text_of(side, conversation)
    assert not [word for word in ("four", "zwei", "fellos") if word in prompt]
    assert side.prompt_ids(conversation) == side.prompt_ids(Conversation(conversation.prompt))


# --- plain text


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("llama-3.2", ["<|begin_of_text|>", "Hello"]),
        ("llama-2", ["<s>", "▁Hello"]),
        ("qwen2.5", ["Hello"]),
        ("t5-small", ["▁Hello"]),  # its own convention appends </s>: a prompt stays open
        ("bert-base-uncased", ["[CLS]", "hello"]),
    ],
)
def test_a_standard_prompt_is_opened_as_the_tokenizer_does_and_never_closed(name, tokens):
    side = speaker(name)
    assert side.prompt_ids(Conversation("Hello")) == ids_of(side, *tokens)


def test_a_standard_prompt_that_brings_its_bos_gets_no_second_one():
    side = speaker("llama-3.2")
    assert side.prompt_ids(Conversation("<|begin_of_text|>Hello")) == ids_of(side, "<|begin_of_text|>", "Hello")


def test_an_empty_prompt_is_the_bos_or_an_error():
    assert speaker("llama-3.2").prompt_ids(Conversation("")) == ids_of(speaker("llama-3.2"), "<|begin_of_text|>")
    with pytest.raises(ValueError, match="empty.*no BOS"):
        Speaker(toy()).prompt_ids(Conversation(""))


@pytest.mark.parametrize("empty", ["", " \n", [], [{"type": "text", "text": ""}]])
def test_a_conversation_that_asks_nothing_is_refused(empty):
    asked = [SYSTEM, {"role": "user", "content": empty}]
    begun = {"role": "assistant", "content": "The sum is"}
    for row in (
        {"prompt": asked},
        {"prompt": [*LONG[:3], asked[1]]},
        {"prompt": [*asked, begun]},
        {"prompt": asked, "completion": [REFERENCE]},
        {"messages": asked},
        {"messages": [*asked, REFERENCE]},
        {"prompt": [USER], "teacher_prompt": asked},
    ):
        with pytest.raises(ValueError, match="last user message of `.*` is empty.*leave such rows out"):
            read_example(row)


def test_a_begun_answer_may_be_empty_and_so_may_an_earlier_question():
    begun = {"role": "assistant", "content": ""}
    assert read_example({"prompt": [USER, begun]}).begun == ""
    assert read_example({"prompt": [{"role": "user", "content": ""}, REFERENCE, USER]}).prompt[-1] == USER


def test_without_a_template_the_conversation_is_plain_text():
    side = Speaker(toy())
    expected = "System:\nBe brief.\n\nUser:\nQ1 <|im_end|>\n\nAssistant:\nA1\n\nUser:\nQ2\n\nAssistant:\n"
    assert text_of(side, Conversation(LONG)) == expected
    assert text_of(side, Conversation(LONG[:3])) == expected.split("\n\nUser:\nQ2")[0]
    assert text_of(side, Conversation([USER], tools=[TOOL])).startswith('Tools:\n[{"type": "function"')
    assert '"name": "add"' in text_of(side, Conversation([USER, CALL, RESULT]))


def test_without_a_template_the_format_of_conversations_is_said_once():
    side = Speaker(real("gpt2"))
    with pytest.warns(
        UserWarning, match=r"has no chat template.*'User:\\nHi.*Assistant:\\n'.*chat_template_path"
    ) as said:
        for _ in range(2):
            side.prompt_ids(Conversation([USER]))
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Speaker(real("gpt2")).prompt_ids(Conversation("plain text"))


def test_without_a_template_plain_text_gets_one_bos():
    side = speaker("llama-2")
    rendered = "User:\nWhat is 2+2?\n\nAssistant:\n"
    assert side.prompt_ids(Conversation([USER])) == side.tokenizer.encode(rendered)
    assert side.prompt_ids(Conversation([USER])).count(side.tokenizer.bos_token_id) == 1


# --- templates that refuse a role


@pytest.mark.parametrize(
    ("template", "reason"), [(GEMMA, "refuses it: System role not supported"), (DROPS, "leaves it out")]
)
def test_refused_system_text_moves_into_the_first_user_turn_with_one_warning(template, reason):
    side = Speaker(toy(template, bos_token="<bos>"))
    with pytest.warns(UserWarning, match=reason) as caught:
        folded = [side.prompt_ids(Conversation(LONG)) for _ in range(2)]
    assert len(caught) == 1
    assert (
        folded[0]
        == folded[1]
        == side.prompt_ids(Conversation([{"role": "user", "content": "Be brief.\n\nQ1 <|im_end|>"}, *LONG[2:]]))
    )


def test_refused_system_text_alone_becomes_a_user_turn():
    with pytest.warns(UserWarning, match="System role"):
        prompt = text_of(Speaker(toy(GEMMA, bos_token="<bos>")), Conversation(LONG[:1]))
    assert prompt == "<bos><start>user\nBe brief.<end>\n<start>model\n"


def test_real_templates_take_system_text_without_a_warning(recwarn):
    for name in CHATTERS:
        assert "Be brief." in text_of(speaker(name), Conversation(LONG))
    assert not [warning for warning in recwarn if "system text" in str(warning.message)]


# --- turn ends


@pytest.mark.parametrize(
    ("name", "end", "stops"),
    [
        ("qwen2.5", "<|im_end|>", ["<|im_end|>"]),
        ("llama-3.2", "<|eot_id|>", ["<|eot_id|>"]),
        ("phi-3-mini", "<|end|>", ["<|endoftext|>", "<|end|>"]),
        ("deepseek-v3", "<｜end▁of▁sentence｜>", ["<｜end▁of▁sentence｜>"]),
        ("mistral-v3", "</s>", ["</s>"]),
        ("smollm2-instruct", "<|im_end|>", ["<|im_end|>"]),
        ("gpt2", "<|endoftext|>", ["<|endoftext|>"]),
    ],
)
def test_a_turn_ends_as_the_template_writes_it(name, end, stops):
    side = speaker(name)
    assert side.turn_end == ids_of(side, end)
    assert side.stop_ids() == ids_of(side, *stops)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<end>"),
        (GEMMA, "<end>"),
        (GLM, "<user>"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n.<end>\n' }}{% endfor %}", "\n.<end>"),
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}", "<eos>"),
        (None, "<eos>"),
    ],
)
def test_a_turn_end_reaches_to_its_first_control_token_and_else_is_the_eos(template, end, recwarn):
    side = Speaker(toy(template, eos_token="<eos>"))
    assert side.tokenizer.decode(side.turn_end) == end


def test_a_turn_end_needs_a_control_token_or_an_eos():
    with pytest.raises(ValueError, match="no EOS token.*set `tokenizer.eos_token`"):
        _ = Speaker(toy()).turn_end
    assert Speaker(toy()).stop_ids() == []


def test_a_template_without_the_assistants_words_is_an_error():
    with pytest.raises(ValueError, match="does not write the assistant's content"):
        _ = Speaker(toy("{{ messages[0].content }}", eos_token="<eos>")).turn_end


@pytest.mark.parametrize(
    ("configured", "stops"),
    [
        (None, ["<eos>", "<end>"]),
        ("<start>", ["<start>", "<eos>", "<end>"]),
        (["<start>", "<end>"], ["<start>", "<end>", "<eos>"]),
    ],
)
def test_stop_ids_join_both_configurations_and_the_template(configured, stops):
    side = Speaker(toy(CHATML, eos_token="<eos>"))
    config = GenerationConfig(eos_token_id=configured and side.tokenizer.convert_tokens_to_ids(configured))
    assert side.stop_ids(config) == ids_of(side, *stops)


def test_phi_stops_at_all_the_ids_of_its_generation_config():
    side = speaker("phi-3-mini")
    config = GenerationConfig(eos_token_id=[32000, 32001, 32007])
    assert side.stop_ids(config) == ids_of(side, "<|endoftext|>", "<|assistant|>", "<|end|>")


def test_a_turn_end_of_several_tokens_stops_at_its_control_token():
    side = Speaker(toy("{% for m in messages %}{{ m.content + '\n<end>' }}{% endfor %}", eos_token="<eos>"))
    assert len(side.turn_end) == 2
    assert side.stop_ids() == ids_of(side, "<eos>", "<end>")


# --- what a completion may not turn into


def test_control_ids_hold_role_markers_that_are_not_flagged_special():
    side = speaker("deepseek-v3")
    markers = ids_of(side, "<｜User｜>", "<｜Assistant｜>")
    assert not any(side.tokenizer.added_tokens_decoder[token].special for token in markers)
    assert set(markers) <= side.control_ids
    assert not set(ids_of(side, "<｜tool▁sep｜>")) & side.control_ids


def test_control_ids_hold_special_tokens_that_have_no_role_name():
    side = speaker("llama-3.2")
    assert set(ids_of(side, "<|start_header_id|>", "<|eom_id|>", "<|eot_id|>")) <= side.control_ids
    assert len(side.control_ids) == 256


def test_thinking_tags_are_content_and_not_control():
    side = Speaker(toy(CHATML, added=["<think>", "</think>"], eos_token="<eos>"))
    assert side.prompt_ids(Conversation([USER])).count(*ids_of(side, "<think>")) == 1
    assert not set(ids_of(side, "<think>", "</think>")) & side.control_ids


QWEN_MARKUP = {"<tool_call>", "</tool_call>"}
DEEPSEEK_MARKUP = {"<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>"} | {
    f"<｜tool▁{what}▁{edge}｜>" for what in ("calls", "call", "outputs", "output") for edge in ("begin", "end")
}


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(CHATTERS, 2)))
def test_markup_of_one_side_is_unshared_in_all_directions(one, other):
    markup = {"qwen2.5": QWEN_MARKUP, "deepseek-v3": DEEPSEEK_MARKUP}
    expected = markup.get(one, set()) | markup.get(other, set())
    assert unshared_markup(speaker(one), speaker(other)) == sorted(expected)


def test_markup_that_both_sides_know_is_not_masked():
    assert unshared_markup(speaker("qwen2.5"), speaker("qwen2.5")) == []
    hermes = toy(CHATML + "{# answers with <tool_call>...</tool_call> #}")
    assert unshared_markup(speaker("qwen2.5"), Speaker(hermes, {"no_think": True})) == []


def test_whitespace_and_unnamed_added_tokens_are_no_markup():
    side = Speaker(toy(CHATML, added=["\n\n", "\n", "<fim>", "<think>"]))
    assert side.markup == {"<think>"}


def test_a_prefilled_think_stays_on_its_side_and_masks_the_tags():
    thinks, answers = Speaker(toy(CHATML)), Speaker(toy(CHATML), {"no_think": True})
    assert text_of(thinks, Conversation([USER])).endswith("<start>assistant\n<think>\n")
    assert text_of(answers, Conversation([USER])).endswith("<start>assistant\n")
    assert unshared_markup(thinks, answers) == unshared_markup(answers, thinks) == ["</think>", "<think>"]
    assert unshared_markup(thinks, thinks) == unshared_markup(answers, answers) == []


def test_a_prefilled_think_that_is_closed_again_is_no_prefill():
    closed = CHATML.replace("<think>\n", "<think>\n\n</think>\n\n")
    assert not Speaker(toy(closed)).prefills_thinking


@pytest.mark.parametrize("name", ["llama3_2", "gptoss", pytest.param("muse_glimmer", marks=pytest.mark.slow)])
def test_a_template_that_writes_the_day_writes_the_day_it_is_given_whatever_day_it_is(name):
    source = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer, asked = real("llama-3.2"), Conversation([USER])
    sides = [Speaker(tokenizer, {"chat_template": source}, day=day) for day in (date(2001, 2, 3), date(2002, 3, 4))]
    texts = [side.tokenizer.decode(side.prompt_ids(asked)) for side in sides]
    spelled = [
        [day.strftime(form) for form in ("%d %b %Y", "%Y-%m-%d")] for day in (date(2001, 2, 3), date(2002, 3, 4))
    ]
    for text, own, other in zip(texts, spelled, spelled[::-1], strict=True):
        assert any(day in text for day in own) and not any(day in text for day in other)
    again = pickle.loads(pickle.dumps(sides[0]))
    assert again.prompt_ids(asked) == sides[0].prompt_ids(asked), "what a dataset is rendered by in other processes"
    assert sides[0].fingerprint == sides[1].fingerprint, "another day is no other model"


@pytest.mark.parametrize(
    "call",
    [
        '{{ strftime_now("%d %B %Y") }}',
        "{% set form = '%d %B %Y' %}{{ strftime_now(form) }}",
        '{{ strftime_now("%d" ~ " %B %Y") }}',
        '{{ strftime_now(format="%d %B %Y") }}',
        '{% if strftime_now is defined %}{% set now = strftime_now("%d %B %Y") %}{{ now }}{% endif %}',
        '{% macro head() %}{{ strftime_now("%d %B %Y") | trim }}{% endmacro %}{{ head() }}',
    ],
)
def test_the_day_is_the_one_it_is_given_however_a_template_asks_for_it(call):
    speaker = Speaker(toy(f"\n{call}.\n" + CHATML), day=date(2001, 2, 3))
    plain = Speaker(toy("\n03 February 2001.\n" + CHATML))
    assert speaker.prompt_ids(Conversation([USER])) == plain.prompt_ids(Conversation([USER]))
    for form in ("%-d.%-m.%y", "%A %j %p %I"):
        asked = Speaker(toy(f'{{{{ strftime_now("{form}") }}}}|' + CHATML), day=date(2001, 2, 3))
        written = Speaker(toy(date(2001, 2, 3).strftime(form) + "|" + CHATML))
        assert asked.prompt_ids(Conversation([USER])) == written.prompt_ids(Conversation([USER]))


def test_the_day_is_no_part_of_what_a_dataset_is_cached_by_where_no_template_writes_it():
    plain, dated = (
        [
            Speaker(real(name), {"chat_template": template} if template else None, day=date(2001, 2, day))
            for day in (3, 4)
        ]
        for name, template in (("qwen2.5", None), ("llama-3.2", "{{ strftime_now('%d') }}"))
    )
    assert plain[0].cache_key == plain[1].cache_key and plain[0].__getstate__() == plain[1].__getstate__()
    assert dated[0].cache_key != dated[1].cache_key


def test_what_changes_a_rendered_prompt_changes_what_a_dataset_is_cached_by():
    speaker = Speaker(copy.deepcopy(real("qwen2.5")))
    keys = [speaker.cache_key]
    speaker.tokenizer.split_special_tokens = True
    keys.append(speaker.cache_key)
    speaker.tokenizer.chat_template = "{{ pad_token }}" + speaker.tokenizer.chat_template
    keys.append(speaker.cache_key)
    padded = Speaker(copy.deepcopy(speaker.tokenizer))
    padded.tokenizer.pad_token = padded.tokenizer.eos_token
    keys.append(padded.cache_key)
    padded.tokenizer.add_tokens(["<réponse>"])
    keys.append(padded.cache_key)
    assert len(set(keys)) == 5


@pytest.mark.parametrize("begun", ["", " "])
@pytest.mark.parametrize(
    "name", ["llama3", "llama3_2", "gemma", "gemma3", "glm4moe", "qwen2_5", "qwen3", "qwen3_5_think", "phi3"]
)
def test_an_empty_answer_that_is_begun_is_opened_as_one_with_words_is(name, begun):
    source = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    speaker = Speaker(real("llama-3.2"), {"chat_template": source})

    def prompt(answer):
        conversation = Conversation([USER, {"role": "assistant", "content": answer}])
        return speaker.tokenizer.decode(speaker.prompt_ids(conversation)), speaker.opened(conversation).ids

    (empty, ids), (word, _) = prompt(begun), prompt("Six")
    assert empty in (word.removesuffix("Six"), word.removesuffix("Six") + begun)
    assert speaker.tokenizer.decode(ids) == empty


# --- references


@pytest.mark.parametrize("name", [*CHATTERS, "gpt2"])
def test_a_reference_is_its_text_and_the_turn_end(name):
    side = speaker(name)
    ids = side.reference_ids(Conversation([USER], REFERENCE))
    assert ids[-1:] == side.turn_end
    assert side.tokenizer.decode(ids[:-1]).strip() == REFERENCE["content"]


@pytest.mark.parametrize("name", [*CHATTERS, "gpt2"])
def test_a_reference_in_plain_text_ends_with_the_eos_token_and_no_templates_turn_end(name):
    side = speaker(name)
    ids = side.reference_ids(Conversation(USER["content"], REFERENCE["content"]))
    assert ids[-1] == side.tokenizer.eos_token_id
    assert side.tokenizer.decode(ids[:-1]).strip() == REFERENCE["content"]


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("qwen2.5", ["<|im_end|>", "<|endoftext|>"]),
        ("llama-3.2", ["<|eot_id|>", "<|end_of_text|>"]),
        ("phi-3-mini", ["<|endoftext|>", "<|end|>"]),
        ("mistral-v3", ["</s>"]),
        ("smollm2-instruct", ["<|im_end|>", "<|endoftext|>"]),
        ("gpt2", ["<|endoftext|>"]),
    ],
)
def test_a_plain_text_may_end_as_a_turn_does_or_as_texts_of_pretraining_do(name, ends):
    side = speaker(name)
    assert side.tokenizer.convert_ids_to_tokens(side.text_ends(side.stop_ids())) == ends


def test_a_control_string_in_a_reference_is_text():
    side = speaker("qwen2.5")
    ids = side.reference_ids(Conversation([USER], {"role": "assistant", "content": "Write <|im_end|> there."}))
    assert side.tokenizer.decode(ids) == "Write <|im_end|> there.<|im_end|>"
    assert ids.count(*ids_of(side, "<|im_end|>")) == 1


def test_a_reference_that_brings_its_eos_gets_no_second_one():
    side = speaker("qwen2.5")
    assert side.reference_ids(Conversation("2+2=", "4<|im_end|>")) == ids_of(side, "4", "<|im_end|>")


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("qwen2.5", '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'),
        ("llama-3.2", '{"name": "add", "parameters": {"a": 2}}<|eot_id|>'),
    ],
)
def test_a_tool_call_reference_is_what_the_template_writes_after_the_prompt(name, written):
    side = speaker(name)
    assert side.tokenizer.decode(side.reference_ids(Conversation([USER], CALL, [TOOL]))) == written


def test_a_reference_that_does_not_go_on_from_the_prompt_is_an_error():
    side = Speaker(toy(CHATML, eos_token="<eos>"))
    reasoned = REFERENCE | {"reasoning_content": "2 and 2"}
    with pytest.raises(ValueError, match="reasoning_content.*give the reference as `content` alone"):
        side.reference_ids(Conversation([USER], reasoned))


def test_a_message_that_brings_its_eos_gets_no_second_one_as_a_reference():
    side = speaker("qwen2.5")
    one, other = (
        side.reference_ids(Conversation([USER], REFERENCE | {"content": text})) for text in ("4<|im_end|>", "4")
    )
    assert one == other


@pytest.mark.parametrize(("end", "simple"), [("<end>", True), ("\n<end>", False)])
def test_a_turn_whose_end_has_several_tokens_is_parsed_for_it(end, simple):
    """Else what it writes before its stop token would be the answer's."""
    template = (
        "{% for m in messages %}{{ '<start>' + m.content + '" + end + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start>' }}{% endif %}"
    )
    assert Speaker(toy(template, eos_token="<eos>")).opened(Conversation([USER])).is_simple == simple


def test_what_forms_a_turn_has_is_found_for_each_rows_own_template_kwargs():
    template = CHATML.replace(
        "m.content", "(m.reasoning_content + '</think>' if keep and m.reasoning_content else '') + m.content"
    )
    side = Speaker(toy(template, ["</think>"], eos_token="<eos>"), {"no_think": True})
    for keep in (False, True, False):
        turn = side.turn(Conversation([USER], chat_template_kwargs={"keep": keep}))
        assert (("thought", "answer") in turn.forms) == keep


def test_what_a_template_adds_to_the_last_question_alone_is_no_part_of_what_an_answered_one_must_keep():
    template = (
        "{% for m in messages %}{{ '<start>' + m.content + (' /think' if loop.last and m.role == 'user' else '') + '<end>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start>' }}{% endif %}"
    )
    turn = Speaker(toy(template, eos_token="<eos>")).turn(Conversation([USER]))
    assert turn.plain and turn.plain.end == "<end>"
