"""How one template writes an assistant's turn, found by rendering probes: no list of models, no reading of its source.

A turn has an *opening*: all that stands between the messages before it and its first section, such as the header and what the
generation prompt writes. Then come *sections* (thought, answer, calls) with markup between them. Then comes its *end*, whose
last token is the one at which a model stops writing. What a template puts after that token ("\\n") is written by no model.

    prompt       <|user|>Hi<|assistant|><think>\\n                     the generation prompt
    with thought <|user|>Hi<|assistant|><think>\\n T </think>\\n\\n A <|end|>
    plain        <|user|>Hi<|assistant|> A <|end|>                    drops what the prompt wrote

- The *stem* is what the prompt and all forms of a turn begin with. The *tail* is what the generation prompt writes after the
  stem. A form that does not begin with the tail *takes it back*.
- A section stands where its probe stands in the rendering. A section that a template leaves out has no form, and a reason.
- The end is what a finished turn and the same turn with another one after it have in common, up to the last control token
  (Phi-3 writes one more EOS at the end of everything). If they have no control token in common, the first one of the next
  turn's header is the end.

Left out: turns with two thoughts or two answers; media.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from os.path import commonprefix


THOUGHT, ANSWER, CALLS = "thought", "answer", "calls"
KINDS = ((ANSWER,), (THOUGHT, ANSWER), (CALLS,), (THOUGHT, CALLS), (ANSWER, CALLS), (THOUGHT, ANSWER, CALLS))

# Probes: texts that no template writes by itself or changes.
ANSWER_PROBE = "qzprobezq"
THOUGHT_PROBE = "qzmusezq"
NAME_PROBE, KEY_PROBE, VALUE_PROBE, RESULT_PROBE = "qzcallzq", "qzkeyzq", "qzvaluezq", "qzresultzq"
USER = {"role": "user", "content": "Hi"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": NAME_PROBE,
            "description": "A tool.",
            "parameters": {
                "type": "object",
                "properties": {KEY_PROBE: {"type": "string", "description": "A text."}},
                "required": [KEY_PROBE],
            },
        },
    }
]
CALL_ID = "qzcall001"  # nine letters or digits, which Mistral's templates ask for
CALL = {
    "id": CALL_ID,
    "type": "function",
    "function": {"name": NAME_PROBE, "arguments": {KEY_PROBE: VALUE_PROBE}},
}
RESULT = {"role": "tool", "tool_call_id": CALL_ID, "name": NAME_PROBE, "content": RESULT_PROBE}


REWRITES = "writes what comes before the turn otherwise than in the prompt"


def shared_space(own: str, other: str) -> str:
    """The whitespace that two sides' markup of one place begins with alike. It is text to both."""
    text = commonprefix([own, other])
    return text[: len(text) - len(text.lstrip())]


@dataclass(frozen=True)
class MarkupBeside:
    """Of one side's added tokens at which a template's markup ends a section, or a turn: the text of either side before it.

    Attributes:
        joins: ids to the text that the other side writes in the token's place, which its tokenizer may join with the section.
        after: ids to the text that the same template writes before the token and the other side does not. Once the token is there, this
            text was not the section's.
    """

    joins: Mapping[int, str] = field(default_factory=dict)
    after: Mapping[int, str] = field(default_factory=dict)


class Unrenderable(ValueError):
    """A template cannot write what it was asked to; the message is its own reason."""


@dataclass(frozen=True)
class Form:
    """One way of writing a turn, from its stem on.

    Attributes:
        sections: their kinds, in the order in which they are written.
        literals: what stands before, between and after the sections, one more than there are sections. The last one is the end
            of the turn, up to its stop token. A section of calls begins at the first call's name and ends with the last
            call's arguments, so the literals around it hold the markup of calls.
        rest: what a finished turn writes after its end; None where the end is part of the next turn's header.
        unwritten: the part of the end that stands in that header, and not in a finished turn.
        loose: True where no rendering shows the whitespace around the literal between thought and answer; any is then accepted from a
            student.
        inferred: True where no rendering shows the whole form, since the template leaves the thought out of a finished turn. It is
            put together from the generation prompt or from two other forms.
    """

    sections: tuple[str, ...]
    literals: tuple[str, ...]
    rest: str | None = ""
    unwritten: str = ""
    loose: bool = False
    inferred: bool = False

    @property
    def opening(self) -> str:
        return self.literals[0]

    @property
    def end(self) -> str:
        return self.literals[-1]


@dataclass(frozen=True)
class Turn:
    """All forms of a turn that a template writes in one context.

    Attributes:
        tail: what the generation prompt writes after the stem.
        forms: keyed by their sections.
        missing: for sections without a form, the reason.
    """

    tail: str = ""
    forms: dict[tuple[str, ...], Form] = field(default_factory=dict)
    missing: dict[tuple[str, ...], str] = field(default_factory=dict)

    @property
    def plain(self) -> Form | None:
        return self.forms.get((ANSWER,))

    @property
    def is_simple(self) -> bool:
        """Whether the template writes answers only, and nothing before them."""
        return not self.tail and set(self.forms) <= {(ANSWER,)} and not (self.plain and self.plain.opening)

    def takes_back(self, form: Form) -> bool:
        """Whether this form lacks what the generation prompt writes after the stem."""
        return not form.opening.startswith(self.tail)

    def to_json(self) -> str:
        found = asdict(self)
        return json.dumps({"tail": self.tail, "forms": [*found["forms"].values()]}, ensure_ascii=False)


@lru_cache(maxsize=4096)
def read_turn(text: str) -> Turn:
    """The inverse of `Turn.to_json`, which leaves the reasons out."""
    found = json.loads(text)
    forms = [Form(tuple(form.pop("sections")), tuple(form.pop("literals")), **form) for form in found["forms"]]
    return Turn(found["tail"], {form.sections: form for form in forms})


def probe_message(sections: Iterable[str], call: Mapping) -> dict:
    """An assistant message with a probe in each of its sections. `call`: in the form that the template takes."""
    message: dict = {"role": "assistant", "content": ""}
    for section in sections:
        if section == ANSWER:
            message["content"] = ANSWER_PROBE
        elif section == THOUGHT:
            message["reasoning_content"] = THOUGHT_PROBE
        else:
            message |= {"tool_calls": [dict(call)]}
    return message


def find_turn(
    render: Callable[..., str],
    before: list[dict],
    controls: Iterable[str],
    call: Mapping = CALL,
    kinds: Iterable[tuple[str, ...]] = KINDS,
) -> Turn:
    """How a template writes a turn after the messages `before`.

    Args:
        render: renders messages; `open_ended=True` adds the generation prompt. Raises `Unrenderable`.
        controls: the strings of the control tokens.
        call: the probe call, in the form that the template takes.
        kinds: the combinations of sections to look for.

    Raises `Unrenderable` where the template cannot write the prompt.
    """
    prompt = render(before, open_ended=True)
    pattern = one_of(controls)
    base = _base(render, before, prompt, pattern)
    written: dict[tuple[str, ...], tuple[str, list[tuple[int, int]], str, str | None, str]] = {}
    missing = {}
    for sections in kinds:
        message = probe_message(sections, call)
        try:
            text, places = _place(render([*before, message]), sections, base, prompt)
        except Unrenderable as refusal:
            missing[sections] = str(refusal)
        else:
            after = text[places[-1][1] :]
            followed = _followed(render, [*before, message])
            if sections[-1] == CALLS and not (pattern and pattern.search(after + (followed or ""))):
                missing[sections] = "ends calls without a control token"
                continue
            end = _end(after, followed, pattern)
            rest = after.removeprefix(end) if after.startswith(end) else None
            if sections[-1] == CALLS and rest is None and not end.startswith(after):
                missing[sections] = "ends calls otherwise where their results follow"
                continue
            written[sections] = text, places, end, rest, "" if rest is not None else end.removeprefix(after)
    stem = clean_stem(prompt, [text[: places[0][0]] for text, places, *_ in written.values()], pattern)
    forms = {}
    for sections, (text, places, end, *after) in written.items():
        starts, stops = zip(*places, strict=True)
        between = [text[a:b] for a, b in zip(stops, starts[1:], strict=False)]
        forms[sections] = Form(sections, (text[stem : starts[0]], *between, end), *after)
    return Turn(prompt[stem:], forms, missing)


def _base(render, before, prompt: str, controls: re.Pattern | None) -> int:
    """How many characters of the prompt no finished turn may change: those that stand there without a generation prompt too, up
    to the end of the last message's text. (A template may write an instruction after it that a finished turn lacks.)"""
    try:
        closed = render(before)
    except Unrenderable:
        return 0
    length, asked = clean_stem(prompt, [closed], controls), before[-1].get("content")
    at = prompt.rfind(asked) if isinstance(asked, str) else -1
    return min(length, at + len(asked)) if at >= 0 else length


def _probes(section: str) -> tuple[str, ...]:
    return {ANSWER: (ANSWER_PROBE,), THOUGHT: (THOUGHT_PROBE,)}.get(section, (NAME_PROBE, VALUE_PROBE))


def _place(text: str, sections, base: int, prompt: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of a finished turn, and the start and end of each section in it; calls reach from the first name to the last
    argument."""
    if text[:base] != prompt[:base]:
        raise Unrenderable(REWRITES)
    places = []
    for section in sections:
        found = [text.find(probe, base) for probe in _probes(section)]
        if -1 in found:
            raise Unrenderable(f"leaves out the {section}")
        places.append((found[0], max(text.rfind(probe) + len(probe) for probe in _probes(section))))
    ordered = all(stop <= start for (_, stop), (start, _) in zip(places, places[1:], strict=False))
    once = all(text.count(probe, base) == 1 for section in sections if section != CALLS for probe in _probes(section))
    if not ordered or not once:
        raise Unrenderable(f"writes {' and '.join(sections)} in another order, or one of them twice")
    return text, places


def _followed(render, turn: list[dict]) -> str | None:
    """What stands after the turn's last section when another turn follows; None where the template renders no turn after it."""
    calls = turn[-1].get("tool_calls")
    last = VALUE_PROBE if calls else ANSWER_PROBE
    for follow in [RESULT, USER] if calls else [USER]:
        try:
            found = render([*turn, follow])
        except Unrenderable:
            continue
        if (at := found.rfind(last)) >= 0:
            return found[at + len(last) :]
    return None


def _end(after: str, followed: str | None, controls: re.Pattern | None) -> str:
    """The end of a turn, from its last section up to its stop token; "" where no control token is written at all."""
    if controls is None:
        return ""
    common = after if followed is None else commonprefix([after, followed])
    if found := [match[0] for match in controls.finditer(common)]:
        return common[: common.index(found[-1]) + len(found[-1])]
    for text in (after, followed or ""):
        if first := controls.search(text):
            return text[: first.end()]
    return ""


def clean_stem(prompt: str, openings: Iterable[str], controls: re.Pattern | None) -> int:
    """The length of what the prompt and all openings begin with. It never ends within a tag or a control token."""
    ways = [prompt, *openings]
    length = len(commonprefix(ways))
    if length == len(prompt):
        return length
    rest = [way[length:] for way in ways]
    head = prompt[:length]
    borders = [head.rfind(mark) for mark in "<["]
    begun = max(borders)
    if begun >= 0 and not re.search(r"[\s>\]]", head[begun:]) and any(rest):
        return begun
    if controls is not None:
        for match in controls.finditer(prompt):
            if match.start() < length < match.end():
                return match.start()
    return length


def one_of(strings: Iterable[str]) -> re.Pattern | None:
    """A pattern that finds any of `strings`, the longest first; None where there are none."""
    known = sorted({string for string in strings if string}, key=lambda string: (-len(string), string))
    return re.compile("|".join(map(re.escape, known))) if known else None
