"""References of a dataset as the student would write them, and what is refused."""

import pytest
from template_sides import KWARGS, PUBLISHED, census, published, side, spelled

from trl_ctopd.rollouts.pairing import Frame, Prompt, pair
from trl_ctopd.text.calls import a_call
from trl_ctopd.text.chat import Conversation, Speaker
from trl_ctopd.text.sections import aligner_of
from trl_ctopd.text.turns import ANSWER, CALLS, THOUGHT, TOOLS


BEGUN = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "It is"}]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_reference_after_a_begun_answer_is_the_rest_of_it(real_tokenizer, name):
    own = Speaker(real_tokenizer(name), KWARGS)
    conversation = Conversation(BEGUN, {"role": "assistant", "content": " four."})
    before, ids = own.reference(conversation)
    assert before == own.prompt_ids(conversation)
    end = len(own.turn_end)
    assert spelled(own, ids[:-end]) == " four." and ids[-end:] == own.turn_end
    whole = own.reference(Conversation(BEGUN[:1], {"role": "assistant", "content": "It is four."}))
    assert spelled(own, before + ids) == spelled(own, sum(whole, []))


def test_a_thought_or_a_call_after_a_begun_answer_is_refused():
    with pytest.raises(ValueError, match="ends in an answer that is to be continued, and the reference has a thought"):
        side("qwen3").reference(
            Conversation(BEGUN, {"role": "assistant", "content": "four", "reasoning_content": "Two."})
        )


@pytest.mark.parametrize("template", ["deepseek_r1_distill", "qwen3"])
def test_a_thought_within_the_content_of_a_reference_is_refused_with_the_way_out(template):
    """Templates that drop it would train the answer alone."""
    inline = {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nIt is four."}
    with pytest.raises(ValueError, match="begins with a thought, give that as `reasoning_content`"):
        side(template).reference(Conversation(BEGUN[:1], inline))


@pytest.mark.parametrize("part", ["content", "reasoning_content", "call"])
def test_control_strings_in_a_reference_with_a_thought_or_a_call_are_refused(part):
    own, text = side("qwen3"), "The token <|im_end|> ends a turn."
    message = {"role": "assistant", "content": "Four.", "reasoning_content": "Two."}
    message |= {"tool_calls": [a_call("say", {"text": text})]} if part == "call" else {part: text}
    with pytest.raises(
        ValueError, match=r"holds '<\|im_end\|>', which the tokenizer of .* would read as a control token"
    ):
        own.reference(Conversation(BEGUN[:1], message, tools=TOOLS))
    plain = own.reference(Conversation(BEGUN[:1], {"role": "assistant", "content": text}))[1]
    assert spelled(own, plain).count("<|im_end|>") == 2 and plain.count(own.turn_end[0]) == 1


def test_after_the_result_of_a_call_with_a_thought_a_turn_has_the_forms_that_it_has_elsewhere():
    """gpt-oss's template leaves out the earlier thought once an answer follows, so that no rendering shows one after this prompt."""
    own = side("gptoss")
    call = {"role": "assistant", "content": "", "reasoning_content": "I add.", "tool_calls": [a_call("add", {"a": 2})]}
    result = {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "name": "add", "content": "4"}
    asked = Conversation([BEGUN[0], call, result], tools=TOOLS)
    turn = own.turn(asked)
    assert turn.plain.opening == "<|channel|>final<|message|>" and (THOUGHT, ANSWER) in turn.forms
    assert turn.plain == own.turn(Conversation(BEGUN[:1], tools=TOOLS)).plain


def test_messages_without_a_thought_are_read_beside_those_with_one_where_a_template_takes_blocks():
    own = published("Apertus-8B-Instruct")
    thought = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
    plain, user = {"role": "assistant", "content": "Five."}, BEGUN[0]
    for turns in ([user, plain, user, thought, user], [user, thought, user, plain, user]):
        text = spelled(own, own.prompt_ids(Conversation(turns)))
        assert all(word in text for word in ("Four.", "Five.", "Two and two."))


def test_a_call_whose_end_depends_on_what_follows_has_no_form():
    """Apriel writes a call's id only where its result follows."""
    own = published("Apriel-1.6-15b-Thinker-fixed")
    turn = own.turn(Conversation(BEGUN[:1], tools=TOOLS))
    assert turn.plain and turn.missing[(CALLS,)] == "ends calls otherwise where their results follow"
    call = {"role": "assistant", "content": "", "tool_calls": [a_call("add", {"a": 2})]}
    with pytest.raises(ValueError, match="ends calls otherwise where their results follow"):
        own.reference(Conversation(BEGUN[:1], call, tools=TOOLS))


@pytest.mark.parametrize("row", [{"thinking": True, "enable_thinking": True}, {}])
def test_calls_are_written_whatever_settings_of_a_row_open_a_thought(row):
    own = published("deepseek-ai-DeepSeek-V3.1", {} if row else {"thinking": True, "enable_thinking": True})
    turn = own.turn(Conversation(BEGUN[:1], tools=TOOLS, chat_template_kwargs=row))
    assert (THOUGHT, CALLS) in turn.forms
    assert '"a": 2' in own.write_calls((THOUGHT, CALLS), [a_call("add", {"a": 2})])


@pytest.mark.parametrize("prompt", ["It is", BEGUN], ids=["text", "a begun answer"])
@pytest.mark.parametrize(("student", "teacher"), [("mistral-v3", "qwen2.5"), ("qwen2.5", "mistral-v3")])
def test_what_goes_on_from_text_is_read_with_the_space_that_it_has(real_tokenizer, student, teacher, prompt):
    ours, theirs = (Speaker(real_tokenizer(name), KWARGS) for name in (student, teacher))
    opened, read = ours.opened(Conversation(prompt)), theirs.opened(Conversation(prompt))
    row = Prompt(opened.ids, read.ids, frame=Frame.of(opened, read, opened.ids).to_json())
    aligner = aligner_of(ours, theirs)
    for text in (" four(x)", "(x)"):
        ids = ours.continuation_ids(text)
        assert spelled(ours, ids) == text
        [found] = pair([row], [ids], aligner, turn_ends=dict.fromkeys(ours.stop_ids(), theirs.turn_end))
        whole = spelled(theirs, found.teacher_prompt_ids + found.teacher_ids)
        assert whole.endswith("It is" + text)
        before, reference = ours.reference(Conversation(prompt, text if isinstance(prompt, str) else {"content": text}))
        assert before == opened.ids and spelled(ours, reference).startswith(text)


@pytest.mark.parametrize("name", ["deepseek-ai-DeepSeek-V3.1", "Qwen-QwQ-32B"])
def test_tags_of_thoughts_are_markup_whatever_settings_of_a_row_open_one(name):
    own = published(name)
    assert own.tokenizer.convert_tokens_to_ids("</think>") in own.turn_markup


SYSTEM = [{"role": "system", "content": "Be short."}, *BEGUN[:1]]
NOT_AFTER_AN_ANSWER = (  # as Mistral Nemo's: the system message stands in the last message, if that is the user's
    "{% for m in messages %}{% if m.role == 'user' %}<|u|>{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "{{ m.content }}<|a|>{% elif m.role == 'assistant' %}{{ m.content }}<|e|>{% endif %}{% endfor %}"
)


def test_a_reference_goes_on_from_the_prompt_where_the_template_writes_that_otherwise_once_there_is_an_answer():
    own = Speaker(census["tokenizer_for"](NOT_AFTER_AN_ANSWER))
    conversation = Conversation(SYSTEM, {"role": "assistant", "content": "Four."})
    before, ids = own.reference(conversation)
    assert before == own.prompt_ids(conversation)
    assert spelled(own, before + ids) == "<|u|>Be short.\nWhat is two and two?<|a|>Four.<|e|>"
