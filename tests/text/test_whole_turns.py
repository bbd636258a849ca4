"""Whole turns of published tokenizers: what a student writes and what its teacher reads are each template's own rendering."""

import copy
import functools
import itertools
import random
import warnings

import pytest
from template_sides import FOLDER, KWARGS, census, spelled

from trl_ctopd.rollouts.pairing import Frame, Prompt, pair
from trl_ctopd.text.calls import a_call, with_ids
from trl_ctopd.text.chat import Conversation, Speaker
from trl_ctopd.text.sections import SectionAligner, aligner_of
from trl_ctopd.text.turns import CALLS, THOUGHT


# A tokenizer with its own template, or with one of those that write thoughts; control strings that it lacks are added.
SIDES = [
    ("qwen2.5", ""),
    ("llama-3.2", ""),
    ("phi-3-mini", ""),
    ("deepseek-v3", ""),
    ("mistral-v3", ""),
    ("smollm2-instruct", ""),
    ("qwen2.5", "qwen3"),
    ("llama-3.2", "lfm2_2_5"),
    ("smollm2-instruct", "qwen3_5_think"),
    ("gpt2", "gptoss"),
    ("mistral-v3", "glm4moe"),
]
# Each student with four teachers: both ways, and no pair of neighbours alone.
PAIRS = [(one, SIDES[(n + away) % len(SIDES)]) for n, one in enumerate(SIDES) for away in (1, 4, 7, 10)]
WORDS = [
    "It",
    "is",
    "four\n",
    "Two",
    "and",
    "two",
    "make",
    "zweifellos",
    "naïve",
    "你好",
    "🙂",
    "x=1;",
    "#",
    "-",
    "*",
    "3.14",
    "(see),",
    "\n\n",
    "",
    "we're",
]
[CALL] = with_ids([a_call("get_room", {"count": 2, "floor": "third floor"})])
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_room",
            "description": "Finds a room.",
            "parameters": {"type": "object", "properties": {"count": {"type": "integer"}, "floor": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def side(real_tokenizer):
    @functools.cache
    def make(tokenizer, template):
        own = real_tokenizer(tokenizer)
        if template:
            source = (FOLDER / f"{template}.jinja").read_text()
            needed = census["tokenizer_for"](source)
            own = copy.deepcopy(own)
            controls = {str(token) for token in needed.added_tokens_decoder.values() if token.special}
            lacking = sorted(controls - set(own.get_vocab()) - {"<BOS>", "<EOS>"})
            own.add_tokens(lacking, special_tokens=True)
            own.chat_template = source
        return Speaker(own, KWARGS)

    return make


@functools.cache
def sections_of(student, teacher):
    aligner = aligner_of(student, teacher)
    return aligner, SectionAligner(aligner, student, teacher)


def conversations(seed):
    """One of each kind, of random words."""
    draw = random.Random(seed)

    def text():
        words = draw.choices(WORDS, k=draw.randint(1, 12))
        return " ".join(words).strip() or "Four."

    user = {"role": "user", "content": text()}
    answer = {"role": "assistant", "content": text()}
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": CALL["id"], "name": "get_room", "content": text()}
    yield Conversation([user], answer)
    yield Conversation([user, answer, user], {"role": "assistant", "content": text()})
    yield Conversation([user], {**answer, "reasoning_content": text()})
    yield Conversation([user], call, TOOLS)
    yield Conversation([user, call, result], answer, TOOLS)


def own_turn(speaker, conversation):
    """The template's finished turn up to its stop, as its tokenizer reads it; None where it cannot write it."""
    reference = conversation.reference
    kinds = (THOUGHT,) if "reasoning_content" in reference else ()
    kinds += (CALLS,) if reference.get("tool_calls") else ("answer",)
    try:
        turn = speaker.opened(conversation).turn
    except ValueError:
        return None
    if kinds not in turn.forms or turn.forms[kinds].loose or not turn.forms[kinds].end:
        return None
    text = census["rendered"](speaker, turn, conversation, kinds)
    return spelled(speaker, speaker.tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", SIDES, ids="-".join)
def test_prompt_completion_and_end_of_a_student_are_its_own_templates_finished_turn(name, side):
    student, seen = side(*name), 0
    for conversation in itertools.chain.from_iterable(map(conversations, range(3))):
        own = own_turn(student, conversation)
        if own is not None:
            before, ids = student.reference(conversation)
            assert spelled(student, before + ids) == own
            seen += 1
    assert seen >= 6  # two of the kinds, at least


def test_between_templates_a_teacher_reads_its_own_templates_finished_turn(side):
    seen = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, (one, other) in enumerate(PAIRS):
            student, teacher = side(*one), side(*other)
            aligner, sections = sections_of(student, teacher)
            for kind, conversation in enumerate(conversations(seed)):
                own, theirs = own_turn(student, conversation), own_turn(teacher, conversation)
                if own is None or theirs is None:
                    continue
                opened, read = student.opened(conversation), teacher.opened(conversation)
                before, ids = student.reference(conversation)
                frame = Frame.of(opened, read, before).to_json()
                [found] = pair(
                    [Prompt(opened.ids, read.ids, frame=frame).before_reference()],
                    [ids],
                    aligner,
                    turn_ends=dict.fromkeys(student.stop_ids(), teacher.turn_end),
                    sections=sections,
                )
                assert spelled(teacher, found.teacher_prompt_ids + found.teacher_ids) == theirs, (one, other, kind)
                seen[kind] = seen.get(kind, 0) + 1
    assert min(seen.get(kind, 0) for kind in range(5)) >= 5


def test_what_the_teachers_normalizer_changes_after_a_control_token_is_masked_where_it_stands(side):
    student, teacher = side("llama-3.2", "lfm2_2_5"), side("qwen2.5", "gptoss")  # Qwen's composes characters
    aligner, sections = sections_of(student, teacher)
    message = {"role": "assistant", "content": "In the Cafe\u0301 now.", "reasoning_content": "Two."}
    conversation = Conversation([{"role": "user", "content": "Where?"}], message)
    opened, read = student.opened(conversation), teacher.opened(conversation)
    before, ids = student.reference(conversation)
    prompt = Prompt(opened.ids, read.ids, frame=Frame.of(opened, read, before).to_json()).before_reference()
    ends = dict.fromkeys(student.stop_ids(), teacher.turn_end)
    [found] = pair([prompt], [ids], aligner, turn_ends=ends, sections=sections)
    text = found.alignment.text.encode()
    masked = [text[own.start : own.end].decode() for own in found.alignment.masked if own.reason == "normalized"]
    assert "".join(masked) == " Cafe\u0301"
