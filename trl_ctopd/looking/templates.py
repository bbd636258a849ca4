"""Explains what was found in a chat template: how turns open, their sections and ends, what it accepts and what it drops."""

import json
import warnings

from ..text.chat import Speaker
from ..text.conversation import Conversation
from ..text.turns import TOOLS, USER, Form, Turn


def explain(speaker: Speaker) -> str:
    """For a tokenizer's own template. Raises `ValueError` where it has none, or cannot render a question."""
    if not speaker.template:
        raise ValueError(
            "this tokenizer has no chat template: conversations are plain text, a turn ends with the EOS token"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the lines below say the same
        plain = speaker.turn(Conversation([USER], tools=TOOLS if speaker.needs_tools else None))
        tools = speaker.turn(Conversation([USER], tools=TOOLS))
        takes = {name: "yes" if taken else "no" for name, taken in speaker.takes().items()}
        stops = speaker.tokenizer.convert_ids_to_tokens(speaker.stop_ids())
    lines = ["a turn", *_described(plain)]
    if tools != plain:
        lines += ["with tools", *_described(tools)]
    lines += ["takes", *(f"  {name}: {taken}" for name, taken in takes.items()), f"stops at  {', '.join(stops)}"]
    return "\n".join(lines)


def _described(turn: Turn) -> list[str]:
    lines = (
        [f"  the generation prompt writes {_quoted(turn.tail)}, which not every finished turn has"] if turn.tail else []
    )
    lines += [f"  {_form(form)}" for form in turn.forms.values()]
    return lines + [f"  no {' and '.join(sections)}: it {reason}" for sections, reason in turn.missing.items()]


def _form(form: Form) -> str:
    parts = [_quoted(form.literals[0])]
    for section, literal in zip(form.sections, form.literals[1:], strict=True):
        parts += [section.upper(), _quoted(literal)]
    note = "  (any whitespace around its closing tag is taken)" if form.loose else ""
    return " ".join(part for part in parts if part != '""') + note


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
