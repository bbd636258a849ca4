"""What the teacher writes for `seq_kd`, as the student would write it: with TRL's templates, and with published tokenizers."""

import itertools
import warnings

import pytest
from template_sides import KWARGS, PUBLISHED, published, side
from template_sides import spelled as text_of

from trl_ctopd import token_bytes
from trl_ctopd.rollouts.frames import Frame, Prompt
from trl_ctopd.rollouts.respelling import Respeller
from trl_ctopd.text.chat import Conversation, Speaker
from trl_ctopd.text.turns import ANSWER, CALL, THOUGHT, TOOLS, USER


THINKERS = ["qwen3", "qwen3_5_think", "gptoss", "glm4moe", "nemotron_3_nano", "lfm2_2_5", "gemma4_v5"]
ANSWERERS = ["qwen2_5", "llama3_2", "phi3"]
TEXTS = ["It is four.", "def f():\n    return '四'", "fünf\n\n\tsix", "<|im_end|> ends a turn.", ""]


def prompt_of(student, teacher, conversation):
    """A row as `render_row` renders it where the teacher writes."""
    opened, read = student.opened(conversation), teacher.opened(conversation)
    return Prompt(opened.ids, read.ids, frame=Frame.of(opened, read, opened.stem, "", True).to_json())


def respelled(student, teacher, ids, conversation=None, thought_policy="mask"):
    respell = Respeller(student, teacher, teacher.stop_ids(), thought_policy)
    return respell(prompt_of(student, teacher, conversation or Conversation([USER])), ids)


def message(thought="Two and two.", answer="It is four."):
    return {"role": "assistant", "content": answer} | ({"reasoning_content": thought} if thought else {})


def whole(speaker, own, tools=None):
    """A finished turn after its prompt, as ids that the template's own writing has; and those that come before it."""
    before, ids = speaker.reference(Conversation([USER], own, tools))
    return before, ids


def spelled(speaker, ids):
    return text_of(speaker, ids).encode()


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(THINKERS + ANSWERERS, 2)))
@pytest.mark.parametrize("thought", [None, "Two and two."])
def test_a_turn_of_the_teachers_becomes_that_of_the_students_own_template(student, teacher, thought):
    ours, theirs = side(student), side(teacher)
    if thought and teacher in ANSWERERS:
        return  # it writes none
    before, ids = whole(theirs, message(thought))
    if before != theirs.prompt_ids(Conversation([USER])):
        return  # nor this, after its generation prompt
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = respelled(ours, theirs, ids)
    keeps = thought if student in THINKERS else None
    assert spelled(ours, found.prompt.student_ids + found.ids) == spelled(ours, sum(whole(ours, message(keeps)), []))
    assert found.size == len(spelled(theirs, ids))
    assert found.left_out == 0 if keeps == thought else len(thought) < found.left_out < found.size - len("It is four.")


def test_a_finished_answer_goes_on_from_before_the_thought_that_the_students_prompt_opens():
    ours, theirs = side("deepseek_r1_distill"), side("qwen2_5")
    before, ids = whole(ours, message(None))
    found = respelled(ours, theirs, whole(theirs, message(None))[1])
    assert (found.prompt.student_ids, found.ids) == (before, ids)
    assert before != ours.prompt_ids(Conversation([USER]))
    theirs = side("qwen3")  # which has a thought, and the student's prompt has opened it
    found = respelled(ours, theirs, whole(theirs, message())[1])
    assert found.prompt.student_ids == ours.prompt_ids(Conversation([USER]))
    assert spelled(ours, found.ids) == "Two and two.\n</think>\n\nIt is four.<｜end▁of▁sentence｜>".encode()


def test_calls_become_calls():
    called = {"role": "assistant", "content": "", "reasoning_content": "Two.", "tool_calls": [CALL]}
    asked = Conversation([USER], tools=TOOLS)
    for student, teacher in itertools.permutations(["qwen3", "gptoss", "glm4moe"], 2):
        ours, theirs = side(student), side(teacher)
        found = respelled(ours, theirs, whole(theirs, called, TOOLS)[1], asked)
        assert spelled(ours, found.ids) == spelled(ours, whole(ours, called, TOOLS)[1]), (student, teacher)
        assert found.left_out == 0


def test_calls_are_no_stray_markup_and_each_has_an_id_of_its_own(caplog):
    ours, theirs = side("qwen3"), side("gptoss")
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    respelled(ours, theirs, whole(theirs, called, TOOLS)[1], Conversation([USER], tools=TOOLS))
    assert "control tokens" not in caplog.text
    ours, theirs = published("Mistral-Small-3.2-24B-Instruct-2506"), side("qwen3")
    called = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    found = respelled(ours, theirs, whole(theirs, called, TOOLS)[1], Conversation([USER], tools=TOOLS))
    text = spelled(ours, found.ids).decode()
    assert "[CALL_ID]call00000[" in text and "[CALL_ID]call00001[" in text and CALL["id"] not in text


def test_what_the_student_has_no_place_for_is_left_out_and_said_once():
    ours, theirs = side("llama3_2"), side("gptoss")
    respell = Respeller(ours, theirs, theirs.stop_ids(), "mask")
    prompt, ids = prompt_of(ours, theirs, Conversation([USER])), whole(theirs, message())[1]
    with pytest.warns(UserWarning, match="seq_kd: the teacher writes thoughts.*left_out_fraction"):
        found = respell(prompt, ids)
    assert spelled(ours, found.ids) == b"It is four.<|eot_id|>" and found.left_out >= len("Two and two.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert respell(prompt, ids).ids == found.ids
    as_text = respelled(ours, theirs, ids, thought_policy="text")
    assert spelled(ours, as_text.ids) == b"Two and two.\n\nIt is four.<|eot_id|>" and as_text.left_out == 0


@pytest.mark.parametrize("student", ["qwen3", "llama3_2"])
def test_a_turn_that_is_cut_off_is_cut_off_for_the_student(student):
    ours, theirs = side(student), side("gptoss")
    ids = whole(theirs, message())[1]
    places = [at for at in range(len(ids)) if spelled(theirs, ids[:at]).endswith((b"Two and", b"It is"))]
    assert len(places) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thinking, answering = (spelled(ours, respelled(ours, theirs, ids[:at]).ids) for at in places)
    thought = b"<think>\nTwo and two.\n</think>\n\n" if student == "qwen3" else b""
    assert answering == thought + b"It is"
    assert thinking == (b"<think>\nTwo and" if thought else b"")


def test_a_text_that_is_cut_off_amid_a_character_ends_before_it():
    """Half a character would be U+FFFD for the student."""
    ours, theirs = side("qwen2_5"), side("llama3_2")
    ids = theirs.tokenizer.encode("four 四", add_special_tokens=False)
    assert token_bytes(theirs.tokenizer)[ids[-1]] == "四".encode()[-1:], "one byte a token"
    for cut, text in ((0, "four 四"), (1, "four "), (2, "four ")):
        assert spelled(ours, respelled(ours, theirs, ids[: len(ids) - cut]).ids).decode() == text
    assert respelled(ours, theirs, []).ids == []


def test_with_one_tokenizer_and_template_the_teachers_ids_are_the_students_canonical_or_not():
    own = side("qwen3")
    ids = [i for letter in "It is four." for i in own.tokenizer.encode(letter)]
    assert ids != own.tokenizer.encode("It is four.") or len(ids) == len("It is four.")
    for written in (ids, [*ids, own.turn_end[0]], whole(own, message())[1]):
        found = respelled(own, own, written)
        assert found.ids == written and found.prompt.student_ids == own.prompt_ids(Conversation([USER]))


def test_a_stop_that_only_the_teacher_has_becomes_the_students():
    own = side("qwen3")
    other = own.tokenizer.convert_tokens_to_ids("<|im_start|>")
    respell = Respeller(own, own, [*own.stop_ids(), other], "mask")
    text = own.tokenizer.encode("four", add_special_tokens=False)
    assert respell(prompt_of(own, own, Conversation([USER])), [*text, other]).ids == [*text, own.turn_end[-1]]


def test_control_tokens_within_a_section_are_left_out_and_told_of_once(caplog):
    ours, theirs = side("qwen2_5"), side("llama3_2")
    [stray] = theirs.tokenizer.convert_tokens_to_ids(["<|start_header_id|>"])
    text = theirs.tokenizer.encode("four", add_special_tokens=False)
    respell = Respeller(ours, theirs, theirs.stop_ids(), "mask")
    prompt = prompt_of(ours, theirs, Conversation([USER]))
    for ids, told in ((text, 0), ([*text, stray, *text], 1), ([stray, *text], 1)):
        assert spelled(ours, respell(prompt, ids).ids) == b"four" * (ids.count(text[0]))
        assert caplog.text.count("has none ('<|start_header_id|>')") == told


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(PUBLISHED, 2)))
def test_published_tokenizers_spell_it_as_they_spell_a_reference(real_tokenizer, student, teacher):
    ours, theirs = (Speaker(real_tokenizer(name), KWARGS) for name in (student, teacher))
    for text in TEXTS:
        answer = message(None, text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                (_, ids), (before, expected) = whole(theirs, answer), whole(ours, answer)
            except ValueError:
                continue  # a template that changes this text
            found = respelled(ours, theirs, ids)
        assert spelled(ours, found.ids) == spelled(ours, expected), text
        assert found.prompt.student_ids == before


def test_the_forms_of_both_templates_are_kept_with_a_row_only_where_the_teacher_writes():
    ours, theirs = side("qwen2_5"), side("gptoss")
    opened, read = ours.opened(Conversation([USER])), theirs.opened(Conversation([USER]))
    assert opened.is_simple and (THOUGHT, ANSWER) in read.turn.forms
    frames = [Frame.of(opened, read, opened.ids, "", writes) for writes in (False, True)]
    assert [bool(frame.teacher) for frame in frames] == [False, True] and not any(frame.student for frame in frames)
