"""How one template writes an assistant's turn, found by rendering it on probes: no list of models, no reading of its source.

A turn goes on from the messages before it. Its *opening* is all that is written before its first section, the header and
the generation prompt included; then come *sections* (thought, answer, calls) with markup between them; then its *end*, up to
the control token at which its writer stops. What comes after that token ("\\n") is the template's own and nobody's to write.

    prompt       <|user|>Hi<|assistant|><think>\\n                     the generation prompt
    with thought <|user|>Hi<|assistant|><think>\\n T </think>\\n\\n A <|end|>
    plain        <|user|>Hi<|assistant|> A <|end|>                    drops what the prompt wrote

- All forms of a turn and the prompt share a *stem*. What the prompt has beyond it is its *tail*: a form that does not begin
  with it takes it back.
- A section's place is where the probe stands in the rendering; what a template leaves out has no form, and a reason instead.
- An end is what a finished turn and the same turn with another one after it have in common, up to its last control token
  (Phi-3 writes an EOS more at the end of everything). Without one, it is the first control token of what comes next.

Left out: turns in which the same kind of section comes twice, but for calls; media.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from os.path import commonprefix


THOUGHT, ANSWER, CALLS = "thought", "answer", "calls"
KINDS = ((ANSWER,), (THOUGHT, ANSWER), (CALLS,), (THOUGHT, CALLS), (ANSWER, CALLS), (THOUGHT, ANSWER, CALLS))

# Texts that no template writes or changes.
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


class Unrenderable(ValueError):
    """A template cannot write what it was asked to; the message is its own reason."""


@dataclass(frozen=True)
class Form:
    """One way of writing a turn, from its stem on.

    Attributes:
        sections: kinds, in the order in which they are written.
        literals: what stands before, between and after them, one more than there are sections. The last is the end of the turn
            up to its stop; of calls, the literal before them reaches to the first one's name, the one after them goes on
            from the last one's arguments.
        rest: what a finished turn writes after its end; None where it writes no such end itself, and the next turn's header
            is it.
        unwritten: what of the end a finished turn leaves to that header.
        loose: whether the whitespace around the literal between thought and answer is not known, and is what a student writes.
    """

    sections: tuple[str, ...]
    literals: tuple[str, ...]
    rest: str | None = ""
    unwritten: str = ""
    loose: bool = False

    @property
    def opening(self) -> str:
        return self.literals[0]

    @property
    def end(self) -> str:
        return self.literals[-1]


@dataclass(frozen=True)
class Turn:
    """What was found of a template in one context.

    Attributes:
        tail: what the generation prompt writes beyond the stem.
        forms: by their sections.
        missing: why there is no form, by its sections.
    """

    tail: str = ""
    forms: dict[tuple[str, ...], Form] = field(default_factory=dict)
    missing: dict[tuple[str, ...], str] = field(default_factory=dict)

    @property
    def plain(self) -> Form | None:
        return self.forms.get((ANSWER,))

    @property
    def is_simple(self) -> bool:
        """An answer is written at once, and nothing else is known."""
        return not self.tail and set(self.forms) <= {(ANSWER,)} and not (self.plain and self.plain.opening)

    def takes_back(self, form: Form) -> bool:
        """Whether what the generation prompt wrote beyond the stem is not in this form."""
        return not form.opening.startswith(self.tail)

    def to_json(self) -> str:
        found = asdict(self)
        return json.dumps({"tail": self.tail, "forms": [*found["forms"].values()]}, ensure_ascii=False)


@lru_cache(maxsize=4096)
def read_turn(text: str) -> Turn:
    """`Turn.to_json` read again, without reasons."""
    found = json.loads(text)
    forms = [Form(tuple(form.pop("sections")), tuple(form.pop("literals")), **form) for form in found["forms"]]
    return Turn(found["tail"], {form.sections: form for form in forms})


def probe_message(sections: Iterable[str], call: Mapping) -> dict:
    """An assistant's message with a probe in each of its sections; `call` as the template takes it."""
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
    """What a template writes after the messages `before`.

    Args:
        render: of messages and, by keyword, `open_ended`: whether up to where the assistant goes on. Raises `Unrenderable`.
        controls: the strings of the control tokens.
        call: the call that the template writes, as it takes it.

    Raises `Unrenderable` where not even the prompt can be written.
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
            written[sections] = text, places, end, rest, "" if rest is not None else end.removeprefix(after)
    stem = clean_stem(prompt, [text[: places[0][0]] for text, places, *_ in written.values()], pattern)
    forms = {}
    for sections, (text, places, end, *after) in written.items():
        starts, stops = zip(*places, strict=True)
        between = [text[a:b] for a, b in zip(stops, starts[1:], strict=False)]
        forms[sections] = Form(sections, (text[stem : starts[0]], *between, end), *after)
    return Turn(prompt[stem:], forms, missing)


def _base(render, before, prompt: str, controls: re.Pattern | None) -> int:
    """How much of the prompt is there without a generation prompt, too, up to the last message's text: no turn may change
    that. (What a template writes after it, such as an instruction, a finished turn may lack.)"""
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
    """A finished turn, and where in it each section stands; calls from the first name to the last argument."""
    if text[:base] != prompt[:base]:
        raise Unrenderable("writes what comes before the turn otherwise than in the prompt")
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
    """What the same turn writes after its last section when another turn follows; None where none can."""
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
    """From the last section's end up to where the writer stops; "" where no control token is written at all."""
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
    """How much of the prompt all openings begin with, without half a tag or half a control token at its end."""
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
    """Finds any of `strings`, the longest first; None where there are none."""
    known = sorted({string for string in strings if string}, key=lambda string: (-len(string), string))
    return re.compile("|".join(map(re.escape, known))) if known else None
