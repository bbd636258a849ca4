"""A completion with thoughts beside another template's writing of it, for real templates: TRL's own."""

import copy
import functools
import itertools
import random
import re
import warnings
from dataclasses import replace
from os.path import commonprefix

import numpy as np
import pytest
from template_sides import side

from trl_ctopd import token_bytes
from trl_ctopd.rollouts.pairing import Frame, Prompt, pair
from trl_ctopd.text.chat import Conversation, Speaker
from trl_ctopd.text.one_tokenizer import OneTokenizer
from trl_ctopd.text.parsing import START, Grammar, named, symbols
from trl_ctopd.text.planning import undecided_steps
from trl_ctopd.text.sections import SectionAligner, aligner_of
from trl_ctopd.text.token_bytes import token_table
from trl_ctopd.text.turns import ANSWER, CALL, CALLS, THOUGHT, TOOLS, USER, Form, Turn, shared_space


THINKERS = ["qwen3", "qwen3_5_think", "gptoss", "glm4moe", "nemotron_3_nano", "lfm2_2_5", "muse_glimmer", "gemma4_v5"]
ANSWERERS = ["qwen2_5", "llama3_2", "phi3", "gemma3"]
QWEN = "<think>\nTwo.\n</think>\n\nFour.<|im_end|>"
OSS = "<|channel|>analysis<|message|>Two.<|end|><|start|>assistant<|channel|>final<|message|>Four.<|return|>"


@functools.cache
def aligners(student, teacher, policies=()):
    ours, theirs = side(student), side(teacher)
    aligner = aligner_of(ours, theirs)
    return aligner, SectionAligner(aligner, ours, theirs, **dict(policies))


def rollout(student, teacher, completion, tools=None, fresh=False, **policies):
    """`completion`: text, or ids; `fresh`: nothing has been said yet."""
    ours, theirs = side(student), side(teacher)
    if fresh:
        aligners.cache_clear()
    aligner, sections = aligners(student, teacher, tuple(policies.items()))
    asked = Conversation([USER], tools=tools)
    opened, read = ours.opened(asked), theirs.opened(asked)
    frame = Frame.of(opened, read, opened.ids).to_json()
    ids = completion if isinstance(completion, list) else ours.tokenizer.encode(completion, add_special_tokens=False)
    ends = dict.fromkeys(ours.stop_ids(), theirs.turn_end)
    [found] = pair(
        [Prompt(opened.ids, read.ids, frame=frame)],
        [ids],
        aligner,
        turn_ends=ends,
        sections=sections,
        eos_policy=policies.get("eos_policy", "bridge"),
    )
    return found


def of_reference(student, teacher, message, one_tokenizer=False, tools=None):
    """The reference of a dataset's row, as the student reads it. `one_tokenizer`: the teacher reads the student's own ids."""
    ours, theirs = side(student), side(teacher)
    aligner, sections = aligners(student, teacher)
    if one_tokenizer:
        aligner, sections = OneTokenizer(ours.tokenizer), None
    opened, read = (one.opened(Conversation([USER], tools=tools)) for one in (ours, theirs))
    before, ids = ours.reference(Conversation([USER], message, tools))
    frame = Frame.of(opened, read, before).to_json()
    prompt = Prompt(opened.ids, read.ids, frame=frame).before_reference()
    ends = dict.fromkeys(ours.stop_ids(), theirs.turn_end)
    [found] = pair([prompt], [ids], aligner, turn_ends=ends, sections=sections)
    return opened.ids, before, found


def test_what_two_kinds_of_sections_begin_alike_with_is_read_alike_whatever_the_order_of_the_forms():
    """gpt-oss's template writes what is said before a call as it writes a thought."""
    speaker = side("gptoss")
    turn = speaker.turn(Conversation([USER], tools=TOOLS))
    assert turn.forms[(ANSWER, CALLS)].opening == turn.forms[(THOUGHT, CALLS)].opening
    table = token_table(speaker.tokenizer)
    message = {"role": "assistant", "content": "", "reasoning_content": "Two.", "tool_calls": [CALL]}
    ids = speaker.reference(Conversation([USER], message, TOOLS))[1]
    written, _ = symbols(np.array(ids), table)
    backwards = Turn(turn.tail, dict(reversed(turn.forms.items())))
    for forms in (turn, backwards):
        assert Grammar(forms, table).parse(written, True).kinds == (THOUGHT, CALLS)


def texts(found, student, teacher):
    """Each chunk as it is spelled on both sides."""
    sides = (
        (side(student), found.student_ids, found.student_chunks),
        (side(teacher), found.teacher_ids, found.teacher_chunks),
    )
    return [
        tuple(
            speaker.tokenizer.decode([i for i, own in zip(ids, chunks.tolist(), strict=True) if own == chunk])
            for speaker, ids, chunks in sides
        )
        for chunk in range(found.num_chunks)
    ]


def spelled(found, name, chunks, ids):
    """Each chunk's bytes on one side, control tokens by name."""
    table, tokenizer = token_bytes(side(name).tokenizer), side(name).tokenizer
    rows = [
        [i for i, own in zip(ids, chunks.tolist(), strict=True) if own == chunk] for chunk in range(found.num_chunks)
    ]
    return [b"".join(table[i] or tokenizer.convert_ids_to_tokens(i).encode() for i in row) for row in rows]


def read(found, teacher):
    return side(teacher).tokenizer.decode(found.teacher_prompt_ids + found.teacher_ids)


def reply(name, thought="Two and two.", answer="It is four."):
    """A finished turn as the student writes it: ids from its generation prompt on, its turn's end included."""
    message = {"role": "assistant", "content": answer} | ({"reasoning_content": thought} if thought else {})
    before, ids = side(name).reference(Conversation([USER], message))
    return ids if before == side(name).prompt_ids(Conversation([USER])) else None


def rendered(name, thought="Two and two.", answer="It is four."):
    message = {"role": "assistant", "content": answer} | ({"reasoning_content": thought} if thought else {})
    return rendered_text(name, message, (THOUGHT, ANSWER) if thought else (ANSWER,))


def rendered_text(name, message, sections, tools=None):
    """A finished turn as the template itself writes it, up to its stop."""
    speaker, asked = side(name), Conversation([USER], tools=tools)
    form = speaker.turn(asked).forms[sections]
    text = speaker._render([USER, message], asked)
    return text + form.unwritten if form.rest is None else text.removesuffix(form.rest)


@pytest.mark.parametrize("teacher", ["qwen2_5", "gptoss", "qwen3", "deepseek_r1_distill"])
@pytest.mark.parametrize("student", ["deepseek_r1_distill", "deepseekv3", "nemotron_3_nano"])
def test_a_reference_without_the_thought_that_the_students_prompt_opens_is_an_answer(student, teacher):
    """It goes on from before the opened thought."""
    message = {"role": "assistant", "content": "It is four."}
    prompt, before, found = of_reference(student, teacher, message)
    assert before != prompt and found.prompt.student_ids == before
    assert read(found, teacher) == rendered(teacher, thought=None)
    assert {own.reason for own in found.alignment.masked} <= {"markup"}
    assert b"It is four." in b"".join(spelled(found, student, found.student_chunks, found.student_ids))


def test_with_one_tokenizer_the_teacher_reads_such_a_reference_after_what_the_student_reads():
    message = {"role": "assistant", "content": "It is four."}
    name = "deepseek_r1_distill"
    _, before, found = of_reference(name, name, message, one_tokenizer=True)
    assert found.teacher_prompt_ids == before and found.teacher_ids == found.student_ids
    assert read(found, name) == rendered(name, thought=None)


def test_an_answer_that_begins_as_a_thought_does_is_an_answer_where_the_turn_ends_with_it():
    """Apriel writes both raw, and only an answer after a thought has a mark."""
    forms = {
        (ANSWER,): Form((ANSWER,), ("", "<|im_end|>")),
        (THOUGHT, ANSWER): Form((THOUGHT, ANSWER), ("", "[FINAL]", "<|im_end|>")),
    }
    tokenizer = side("qwen2_5").tokenizer
    for turn, text, ended, kinds in (
        (Turn("", forms), "Four.<|im_end|>", True, (ANSWER,)),
        (Turn("", forms), "Two.[FINAL]Four.<|im_end|>", True, (THOUGHT, ANSWER)),
        (Turn("", forms), "Two", False, (THOUGHT,)),
        (Turn("Thoughts:", forms), "Two.<|im_end|>", True, (THOUGHT,)),
    ):
        written, _ = symbols(np.array(tokenizer.encode(text)), token_table(tokenizer))
        assert Grammar(turn, token_table(tokenizer)).parse(written, ended).kinds == kinds


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations(THINKERS, 2)))
def test_the_teacher_reads_its_own_templates_writing_of_thought_and_answer(student, teacher):
    found = rollout(student, teacher, reply(student))
    assert read(found, teacher) == rendered(teacher)
    assert not found.alignment.masked or {own.reason for own in found.alignment.masked} == {"markup"}
    chunks = texts(found, student, teacher)
    same = "".join(commonprefix([ours[::-1], theirs[::-1]])[::-1] for ours, theirs in chunks)
    for section in ("Two and two.", "It is four."):
        assert section in same
    for ours, theirs in chunks:
        assert theirs.endswith(ours) or not {*"TwoIfr"} & {*ours} or "<" in ours or "to=" in ours


@pytest.mark.parametrize("student", THINKERS)
@pytest.mark.parametrize("teacher", ANSWERERS)
def test_a_thought_that_the_teacher_cannot_have_is_masked_with_its_reason(student, teacher):
    found = rollout(student, teacher, reply(student))
    assert read(found, teacher) == rendered(teacher, thought=None)
    assert "thought" in {own.reason for own in found.alignment.masked}
    assert [ours for ours, _ in texts(found, student, teacher)][:-1] == [*"It is four."]
    assert found.student_widths.sum() == len("It is four.")


def test_what_is_masked_as_a_whole_is_said_once():
    with pytest.warns(UserWarning, match="no place for one.*thought_policy") as caught:
        for first in (True, False):
            rollout("qwen3", "qwen2_5", QWEN, fresh=first)
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("student", "teacher", "completion", "heard"),
    [
        ("gptoss", "qwen3", OSS, "assistant\n<think>\nTwo.\n</think>\n\nFour.<|im_end|>"),
        ("gptoss", "qwen2_5", OSS, "assistant\nFour.<|im_end|>"),
        ("qwen3", "deepseek_r1_distill", QWEN, "<think>\nTwo.\n</think>\n\nFour.<｜end▁of▁sentence｜>"),
        (
            "deepseek_r1_distill",
            "qwen3",
            "Two.\n</think>\n\nFour.<｜end▁of▁sentence｜>",
            "<think>\nTwo.\n</think>\n\nFour.<|im_end|>",
        ),
        ("qwen2_5", "gptoss", "Four.<|im_end|>", "assistant<|channel|>final<|message|>Four.<|return|>"),
        ("qwen2_5", "qwen3", "Four.<|im_end|>", "assistant\n<think>\n\n</think>\n\nFour.<|im_end|>"),
        ("qwen2_5", "deepseek_r1_distill", "Four.<|im_end|>", "<｜Assistant｜>Four.<｜end▁of▁sentence｜>"),
        (
            "qwen3",
            "gptoss",
            "<think>\n\n</think>\n\nFour.<|im_end|>",
            "assistant<|channel|>final<|message|>Four.<|return|>",
        ),
        ("qwen3", "gptoss", "Four.<|im_end|>", "assistant<|channel|>final<|message|>Four.<|return|>"),
        ("qwen3", "gptoss", "<think>\nTwo and", "assistant<|channel|>analysis<|message|>Two and"),
        (
            "qwen3",
            "gptoss",
            "<think>\nTwo.\n</think>\nFour",
            "<|message|>Two.<|end|><|start|>assistant<|channel|>final<|message|>Four",
        ),
        ("qwen3", "qwen2_5", "<think>\nTwo and", "assistant\n"),
        ("qwen3", "qwen2_5", "<think>\nTwo<|im_end|>", "assistant\n"),
    ],
)
def test_the_teacher_reads(student, teacher, completion, heard):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = rollout(student, teacher, completion)
    assert read(found, teacher).endswith(heard)


def test_frame_words_are_markup_and_never_answer():
    found = rollout("gptoss", "qwen3", OSS)
    assert texts(found, "gptoss", "qwen3") == [
        (
            "<|channel|>analysis<|message|>T",
            "\nT",
        ),  # this newline might have been the first of an empty thought's two
        *((letter, letter) for letter in "wo."),
        ("<|end|><|start|>assistant<|channel|>final<|message|>", "\n</think>\n\n"),
        *((letter, letter) for letter in "Four."),
        ("<|return|>", "<|im_end|>"),
    ]
    assert found.student_widths.sum() == len("Two.Four.")


def test_markup_of_one_side_alone_is_one_event_with_what_follows_where_turns_may_begin_in_several_ways():
    """The teacher's prompt has the `<think>` already, and the student may answer at once."""
    found = rollout("qwen3", "qwen3_5_think", QWEN)
    assert read(found, "qwen3_5_think").endswith("<think>\nTwo.\n</think>\n\nFour.<|im_end|>")
    assert not found.alignment.masked
    assert texts(found, "qwen3", "qwen3_5_think")[:2] == [("<think>\nT", "T"), ("w", "w")]
    assert found.untold.tolist() == [True] * 3 + [False] * (len(found.student_ids) - 3)


@pytest.mark.parametrize(("student", "teacher"), list(itertools.permutations([*THINKERS, *ANSWERERS], 2)))
def test_whatever_form_a_turn_takes_the_teacher_reads_the_same_before_it(student, teacher):
    """So that its log-probs of all forms are of one law."""
    answer, thought = {"role": "assistant", "content": "Four."}, {"reasoning_content": "Two."}
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    for tools, messages in (
        (None, [answer, answer | thought]),
        (TOOLS, [answer, answer | thought, call, call | thought]),
    ):
        forms = side(student).turn(Conversation([USER], tools=tools)).forms
        if any(form.inferred for form in forms.values()):
            continue
        found = []
        for message in messages:
            kinds = ((THOUGHT,) if "reasoning_content" in message else ()) + (
                (CALLS,) if "tool_calls" in message else (ANSWER,)
            )
            if kinds in forms:
                _, before, rollout = of_reference(student, teacher, message, tools=tools)
                found.append((before, rollout.teacher_prompt_ids))
        assert all(read == other for before, read in found for prompt, other in found if before == prompt), tools


def test_an_answer_without_the_markup_that_its_template_writes_is_read_from_the_same_place_on():
    bare, own = (rollout("qwen3", "gptoss", text) for text in ("Four.<|im_end|>", QWEN))
    assert bare.teacher_prompt_ids == own.teacher_prompt_ids
    assert texts(bare, "qwen3", "gptoss")[0] == ("F", "final<|message|>F")


def test_where_markup_foretells_a_call_the_teachers_distributions_tell_nothing_of_the_text_before_it():
    """gpt-oss writes what is said before a call as a thought, and the student decides on the call after it."""
    message = {"role": "assistant", "content": "Four."}
    found = {tools is None: of_reference("qwen2_5", "gptoss", message, tools=tools)[2] for tools in (None, TOOLS)}
    assert found[True].untold is None
    assert np.array_equal(found[False].untold, found[False].student_chunks >= 0)


def test_what_all_forms_begin_with_is_read_in_the_tokens_of_a_finished_turn(real_tokenizer):
    """Its first newline is one token with the last one of the prompt, `<think>\\n`."""
    tokenizer = copy.deepcopy(real_tokenizer("qwen2.5"))
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = side("qwen3_5_think").tokenizer.chat_template
    ours, theirs = side("llama3_2"), Speaker(tokenizer)
    aligner, asked = aligner_of(ours, theirs), Conversation([USER], tools=TOOLS)
    opened, read = ours.opened(asked), theirs.opened(asked)
    prompt = Prompt(opened.ids, read.ids, frame=Frame.of(opened, read, opened.ids).to_json())
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    messages = {"role": "assistant", "content": "Four."}, call
    ids = [ours.reference(replace(asked, reference=message))[1] for message in messages]
    ends = dict.fromkeys(ours.stop_ids(), theirs.turn_end)
    found = pair([prompt] * 2, ids, aligner, turn_ends=ends, sections=SectionAligner(aligner, ours, theirs))
    finished = tokenizer.apply_chat_template([USER, messages[0]], tools=TOOLS, tokenize=False)
    assert [own.teacher_prompt_ids for own in found] == [read.plain] * 2
    assert tokenizer.encode(finished)[: len(read.plain)] == read.plain != read.ids


def test_markup_before_a_turn_of_one_form_is_read_and_not_scored():
    found = rollout("qwen2_5", "qwen3", "Four.<|im_end|>")
    assert read(found, "qwen3").endswith("<think>\n\n</think>\n\nFour.<|im_end|>")
    assert found.untold is None and texts(found, "qwen2_5", "qwen3")[0] == ("F", "F")


def test_masked_markup_is_read_by_the_teacher_and_not_scored():
    found = rollout("qwen3", "gptoss", QWEN, markup_policy="mask")
    assert read(found, "gptoss") == read(rollout("qwen3", "gptoss", QWEN), "gptoss")
    assert texts(found, "qwen3", "gptoss") == [
        *((letter, letter) for letter in "Two.Four."),
        ("<|im_end|>", "<|return|>"),
    ]


def test_tokens_of_chunks_with_markup_are_marked():
    for student, teacher, completion in (("qwen3", "gptoss", QWEN), ("gptoss", "qwen3", OSS)):
        found = rollout(student, teacher, completion)
        chunks = spelled(found, student, found.student_chunks, found.student_ids)
        marked = {chunk for chunk, own in zip(found.student_chunks.tolist(), found.markup, strict=True) if own}
        plain = b"".join(chunk for n, chunk in enumerate(chunks) if n not in marked)
        assert plain.replace(b".", b"") == b"woFour" and -1 not in marked
        assert {n for n, chunk in enumerate(chunks) if b"|" in chunk or b"<" in chunk or b"think" in chunk} <= marked
    assert rollout("qwen2_5", "llama3_2", "Four.<|im_end|>").markup is None


def test_markup_is_undecided_where_that_before_another_section_begins_with_its_tokens():
    turn = side("qwen3").turn(Conversation([USER], tools=TOOLS))
    before_call = {(START, ANSWER), (THOUGHT, ANSWER)}  # </think> may be followed by an answer or a call
    assert undecided_steps(turn, list) == {(START, THOUGHT)} | before_call
    with_empty_lines = re.compile(r"\n\n|(?s:.)").findall  # a token for two newlines, as Qwen's vocabulary has
    assert undecided_steps(turn, with_empty_lines) == before_call
    assert undecided_steps(side("gptoss").turn(Conversation([USER])), list) == set()


def test_a_text_cut_off_at_undecided_markup_has_it_masked():
    for space in ("", "\n", "\n\n"):
        found = rollout("gptoss", "qwen3", "<|channel|>analysis<|message|>" + space)
        assert (found.student_chunks == -1).all() and found.num_chunks == 0
        assert {own.reason for own in found.alignment.masked} == {"markup"}
    found = rollout("gptoss", "qwen3", "<|channel|>analysis<|message|>\nT")
    assert texts(found, "gptoss", "qwen3") == [("<|channel|>analysis<|message|>\nT", "\n\nT")]


def test_a_masked_end_is_not_read_by_the_teacher():
    found = rollout("qwen3", "gptoss", QWEN, eos_policy="mask")
    assert read(found, "gptoss").endswith("Four.")
    assert found.student_chunks[-1] == -1


def test_a_thought_can_be_scored_as_text():
    found = rollout("qwen3", "qwen2_5", QWEN, thought_policy="text")
    assert read(found, "qwen2_5").endswith("assistant\nTwo.\n\nFour.<|im_end|>")
    assert found.student_widths.sum() == len("Two.Four.")


@pytest.mark.parametrize("teacher", ["qwen3", "llama3_2"])
def test_what_a_turn_is_cut_off_amid_is_markup_and_no_text(teacher):
    ids = side("gptoss").tokenizer.encode(OSS, add_special_tokens=False)
    texts = set()
    for size in range(1, len(ids)):
        found = rollout("gptoss", teacher, ids[:size])
        chunks = spelled(found, "gptoss", found.student_chunks, found.student_ids)
        heard = read(found, teacher)
        assert not any(word in heard for word in ("analysis", "final", "assistantfinal")), (size, heard)
        texts.add(b"".join(chunk for chunk in chunks if b"<|" not in chunk and b"final" not in chunk))
    assert b"Four." in {text[-5:] for text in texts}


def test_a_control_token_typed_as_text_is_text():
    """The student spells `<|im_end|>` byte by byte, amid its answer."""
    tokenizer = side("qwen3").tokenizer
    typed = tokenizer.encode("<|im_end|>", add_special_tokens=False, split_special_tokens=True)
    head = tokenizer.encode("<think>\nTwo.\n</think>\n\nSay ", add_special_tokens=False)
    found = rollout("qwen3", "gptoss", [*head, *typed, *tokenizer.encode(" now<|im_end|>", add_special_tokens=False)])
    assert read(found, "gptoss").endswith("<|message|>Say <|im_end|> now<|return|>")
    assert "".join(ours for ours, _ in texts(found, "qwen3", "gptoss")).endswith("Say <|im_end|> now<|im_end|>")


def test_a_stray_control_token_within_a_section_takes_no_part():
    tokenizer = side("qwen3").tokenizer
    ids = tokenizer.encode("<think>\nTwo.\n</think>\n\nFo<|im_start|>ur.<|im_end|>", add_special_tokens=False)
    found = rollout("qwen3", "gptoss", ids)
    assert read(found, "gptoss").endswith("<|message|>Four.<|return|>")
    assert found.student_chunks[ids.index(tokenizer.convert_tokens_to_ids("<|im_start|>"))] == -1


def test_invalid_bytes_are_masked_and_the_rest_is_aligned():
    table = token_bytes(side("qwen3").tokenizer)
    tokenizer = side("qwen3").tokenizer
    ids = tokenizer.encode("<think>\nTwo.\n</think>\n\n", add_special_tokens=False)
    ids += [table.index(b"F"), table.index(b"\xc3"), *map(table.index, (b"u", b"r"))]
    found = rollout("qwen3", "gptoss", ids)
    assert read(found, "gptoss").endswith("<|message|>F\N{REPLACEMENT CHARACTER}ur")
    assert [own.reason for own in found.alignment.masked] == ["invalid_utf8"]
    assert [ours for ours, _ in texts(found, "qwen3", "gptoss")][-3:] == ["F", "u", "r"]


@pytest.mark.parametrize("seed", range(20))
def test_random_completions_have_equal_bytes_in_every_chunk_of_text(seed):
    """Whatever a student writes: each chunk is the same text on both sides or markup on both; the sections' chunks are
    those of each section alone, and whitespace that the markup of both begins with is text too."""
    rng = random.Random(seed)
    student, teacher = rng.sample(THINKERS, 2)
    thought, answer = (
        "".join(rng.choice(["é", "two ", "\n", "🐔", "4", ". ", "ü"]) for _ in range(rng.randint(1, 12))) + "x"
        for _ in range(2)
    )
    literals, others = (
        side(name).turn(Conversation([USER])).forms[(THOUGHT, ANSWER)].literals for name in (student, teacher)
    )
    tail = side(student).turn(Conversation([USER])).tail
    opening = literals[0].removeprefix(tail)
    completion = opening + "a" + thought + literals[1] + "b" + answer + literals[2]
    found = rollout(student, teacher, completion)
    ours = spelled(found, student, found.student_chunks, found.student_ids)
    theirs = spelled(found, teacher, found.teacher_chunks, found.teacher_ids)
    space = shared_space(literals[1], others[1])
    markup = {part.encode() for part in (opening, literals[1].removeprefix(space), literals[2])}
    after = [next((one.removeprefix(own) for own in markup if own and one.startswith(own)), None) for one in ours]
    sections = [(one, other) for own, one, other in zip(after, ours, theirs, strict=True) if own is None]
    if theirs[0] != ours[0] == sections[0][0]:  # the teacher alone has markup before a thought
        assert theirs[0].endswith(ours[0])
        sections = sections[1:]
    assert all(one == other and len(one) == 1 for one, other in sections)  # each byte is a token on both sides
    # undecided markup brings the first letter after it
    assert all(len(own) <= 1 and other.endswith(own) for own, other in zip(after, theirs, strict=True) if own)
    spelled_text = b"".join(one if own is None else own for own, one in zip(after, ours, strict=True))
    assert spelled_text == ("a" + thought + space + "b" + answer).encode()
    assert found.student_widths.sum() == len(("a" + thought + space + "b" + answer).encode())
    assert np.all(np.diff([chunk for chunk in found.student_chunks if chunk >= 0]) >= 0)


def turn_of(name, tools=None):
    return side(name).turn(Conversation([USER], tools=tools)).to_json()


def test_markup_that_the_teacher_writes_nothing_for_is_masked_markup_where_each_form_begins_as_its_template_opens_it():
    found = rollout("qwen3", "qwen3_5_think", QWEN, weighs_forms=False)
    assert [(own.start, own.end, own.reason) for own in found.alignment.masked] == [(0, len("<think>\n"), "markup")]


def test_markup_of_one_side_alone_before_all_else_is_masked_where_markup_is():
    found = rollout("qwen3", "qwen3_5_think", QWEN, markup_policy="mask")
    assert texts(found, "qwen3", "qwen3_5_think")[0] == ("T", "T")


def test_after_an_answer_whose_call_is_masked_the_teacher_reads_no_end():
    text = 'Four.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = rollout("qwen2_5", "gemma3", text, tools=TOOLS)
    assert read(found, "gemma3").endswith("model\nFour.") and found.student_chunks[-1] == -1


def test_markup_is_decided_where_only_that_after_another_section_begins_with_its_tokens():
    forms = {(THOUGHT, ANSWER): Form((THOUGHT, ANSWER), ("<t>", "<t><x>", "<e>"))}
    assert undecided_steps(Turn("", forms), list) == set()


@pytest.mark.parametrize(("teacher", "policy"), [("qwen2_5", "bridge"), ("gemma4_v5", "mask")])
def test_the_first_chunk_of_an_answer_is_untold_where_a_thought_or_its_markup_would_be_masked(teacher, policy):
    """Both sides write nothing before an answer, and the student's template something before a thought."""
    found = rollout("gemma4_v5", teacher, "Four.<turn|>", markup_policy=policy)
    assert texts(found, "gemma4_v5", teacher)[0] == ("F", "F")
    assert found.untold.tolist() == [True] + [False] * (len(found.student_ids) - 1)


def test_what_is_said_before_a_call_and_a_thought_are_two_things_though_markup_opens_them_alike():
    """gpt-oss's template, as the student's: the teacher opens them otherwise, and foretells nothing by that."""
    found = rollout("gptoss", "qwen3", OSS, tools=TOOLS)
    assert found.untold.any() and not found.untold[found.student_chunks > 0].any()


def test_a_turn_is_opened_for_each_form_of_the_teachers_own():
    """Rows of one run may have several, by their settings of the template."""
    aligners.cache_clear()
    sections = aligners("gemma4_v5", "qwen2_5")[1]
    assert [sections.untold(turn_of("gemma4_v5"), turn_of(name)) for name in ("qwen2_5", "gemma4_v5")] == ["first", ""]


def test_undecided_markup_goes_on_over_whitespace_of_several_bytes():
    found = rollout("gptoss", "qwen3", OSS.replace("Two.", "\N{NO-BREAK SPACE}Two."))
    assert texts(found, "gptoss", "qwen3")[:2] == [
        ("<|channel|>analysis<|message|>\N{NO-BREAK SPACE}T", "\n\N{NO-BREAK SPACE}T"),
        ("w", "w"),
    ]


def test_markup_takes_as_many_bytes_of_the_text_as_its_name_has():
    end = "<｜end▁of▁sentence｜>"
    found = rollout("deepseek_r1_distill", "qwen3", f"Two.\n</think>\n\nFour.{end}")
    assert found.alignment.chunk_bytes[-1] == end.encode()
    assert found.alignment.student_widths[-1] == len(end.encode()) > len(end)


def test_a_text_cut_off_at_what_may_begin_markup_is_text_where_no_control_token_is():
    for text in ("Two <", "Two </", "Two.\n</think"):
        assert read(rollout("qwen3", "gptoss", "<think>\n" + text), "gptoss").endswith("<|message|>" + text)


def test_control_tokens_count_by_the_bytes_of_their_names():
    tokenizer, text = side("deepseek_r1_distill").tokenizer, "Four.<｜end▁of▁sentence｜>"
    found, widths = named(tokenizer.encode(text, add_special_tokens=False), token_table(tokenizer))
    assert found == text and widths.sum() == len(text.encode()) > len(text)
