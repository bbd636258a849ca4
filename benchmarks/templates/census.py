"""Tests the package on many real chat templates: whether each kind of turn is right, masked or refused, and why, as a table.

    python -m benchmarks.templates.census [--folder more/templates] [--control REGEX] [--out docs/templates.md]

The templates are those of the installed TRL (`trl/chat_templates`), those of each `--folder`, and with `CTOPD_ASSETS` those of its
folder `templates`. Each is given to a toy byte-level tokenizer. The strings in its output that look like control tokens become
special tokens, and its tags ordinary added tokens. A template's turns do not depend on the vocabulary.

A kind of turn is *right* when, byte for byte,
- for the student, prompt, text and end together are the template's own rendering of the finished turn,
- a teacher with Qwen3's template reads the student's text as Qwen3's own rendering of the same turn,
- and as the teacher of a student with Qwen3's template, it reads its own rendering of the same turn.

Some templates write a thought while the model thinks, and leave it out of the finished turn. What they have of it is then put
together: the opening from the generation prompt, or thought and markup from a thought before a call. "put together" says so; the
first of the three cannot be checked then.

A template *has a place* for a thought if any rendering shows one, or if its source names a tag that closes one; for a call, if any
rendering shows one. The others are masked with the reason "no place for ...".
"""

import argparse
import os
import re
import warnings
from collections import Counter
from pathlib import Path

import transformers
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_ctopd.rollouts.pairing import Frame, Prompt, pair
from trl_ctopd.text.calls import with_ids
from trl_ctopd.text.chat import Conversation, Speaker
from trl_ctopd.text.sections import SectionAligner, aligner_of
from trl_ctopd.text.turns import ANSWER, CALLS, THOUGHT, TOOLS, USER, Turn
from trl_ctopd.text.turns import CALL as PROBE
from trl_ctopd.text.turns import RESULT as PROBES_RESULT


[CALL] = with_ids([PROBE])
RESULT = {**PROBES_RESULT, "tool_call_id": CALL["id"]}
THOUGHT_TEXT, ANSWER_TEXT = "Two and two.", "It is four.\nIndeed."
TURNS = {
    "answer": ((ANSWER,), {"content": ANSWER_TEXT}),
    "thought and answer": ((THOUGHT, ANSWER), {"reasoning_content": THOUGHT_TEXT, "content": ANSWER_TEXT}),
    "call": ((CALLS,), {"content": "", "tool_calls": [CALL]}),
    "thought and call": ((THOUGHT, CALLS), {"reasoning_content": THOUGHT_TEXT, "content": "", "tool_calls": [CALL]}),
}
NO_PLACE = "no place for"
THINK = {"enable_thinking": True, "thinking": True}
CLOSES_THOUGHT = re.compile(r"</think>|\[/THINK\]|channel\|?>")
CONTROL = re.compile(
    r"<\|[^|<>]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<\|[a-z_\"]{1,20}\|?>|<[a-z_]{1,20}\|>|\[/?[A-Z_]{2,20}\]|</?s>|<BOS>|<EOS>"
    r"|<(?:start|end|beginning)_of_\w+>|<SPECIAL_\d+>|\]~!?b[\[\]]|\[e~\["
)
TAG = re.compile(r"</?[a-z_]{2,20}>")


def tokenizer_for(template: str, control: re.Pattern = CONTROL) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the control strings and tags that the template writes."""
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"bos_token": "<BOS>", "eos_token": "<EOS>"}
    found = set()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)
    for _, message in TURNS.values():
        for tools in (None, TOOLS):
            for turns in (
                [USER],
                [USER, {"role": "assistant", **message}],
                [USER, {"role": "assistant", **message}, RESULT],
            ):
                try:
                    found.add(bare.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=True))
                    found.add(bare.apply_chat_template(turns, tools=tools, tokenize=False))
                except Exception:  # the census reports it later
                    continue
    written = "\n".join([*found, template])
    backend.add_special_tokens([*sorted({match[0] for match in control.finditer(written)} | {"<BOS>", "<EOS>"})])
    tags = sorted({match[0] for match in TAG.finditer("\n".join(found))})
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **names
    )


def rendered(side: Speaker, turn: Turn, conversation: Conversation, sections: tuple[str, ...]) -> str:
    """The template's own finished turn, up to its stop."""
    text = side._render([*conversation.prompt, conversation.reference], conversation)
    form = turn.forms[sections]
    return text + form.unwritten if form.rest is None else text.removesuffix(form.rest)


def put_together(
    side: Speaker, turn: Turn, asked: Conversation, sections: tuple[str, ...]
) -> tuple[str, list[int] | None]:
    """A finished turn of an inferred form, and what of it a model writes after the generation prompt; None where the turn does
    not go on from there."""
    form, message = turn.forms[sections], asked.reference
    rest = side.calls_text(message["tool_calls"]) if CALLS in sections else message["content"] + form.end
    opened = side.opened(asked)
    own = side.tokenizer.decode(opened.stem) + form.opening + message["reasoning_content"] + form.literals[1] + rest
    prompt = side.tokenizer.decode(opened.ids)
    if not own.startswith(prompt):
        return own, None
    return own, side.tokenizer.encode(own[len(prompt) :], add_special_tokens=False)


def read(student: Speaker, teacher: Speaker, asked: Conversation, written: list[int] | None = None) -> str | None:
    """What the teacher reads of the reference when the student writes it, or of what was `written`; None where that does
    not continue its prompt, or calls are masked."""
    opened, theirs = student.opened(asked), teacher.opened(asked)
    before, ids = (opened.ids, written) if written is not None else student.reference(asked)
    if before != opened.ids:
        return None
    aligner = aligner_of(student, teacher)
    [found] = pair(
        [Prompt(opened.ids, theirs.ids, frame=Frame.of(opened, theirs, before).to_json())],
        [ids],
        aligner,
        turn_ends=dict.fromkeys(student.stop_ids(), teacher.turn_end),
        sections=SectionAligner(aligner, student, teacher),
    )
    if "call" in {stretch.reason for stretch in found.alignment.masked}:
        return None
    return teacher.tokenizer.decode(found.teacher_prompt_ids + found.teacher_ids)


def judged(side: Speaker, other: Speaker, kind: str) -> str:
    """ "right", "masked: ...", "refused: ..." or "wrong: ..."."""
    sections, message = TURNS[kind]
    reference = {"role": "assistant", **message}
    tools = TOOLS if CALLS in sections or side.needs_tools else None
    asked = Conversation([USER], reference, tools)
    turn = side.turn(asked)
    if sections not in turn.forms:
        return f"masked: it {turn.missing.get(sections, 'leaves out calls of tools')}"
    form = turn.forms[sections]
    if not form.end:
        return "right, ended by the EOS token: it writes no control token there"
    if form.inferred:
        own, ids = put_together(side, turn, asked, sections)
        partner = rendered(other, other.turn(asked), asked, sections)
        heard = partner if ids is None else read(side, other, asked, ids)
        if heard != partner:
            return "masked: calls are not read" if heard is None else f"wrong: its teacher reads {heard[-60:]!r}"
    else:
        own = rendered(side, turn, asked, sections)
        before, ids = side.reference(asked)
        if side.tokenizer.decode(before + ids) != own:
            return f"wrong: as a student {side.tokenizer.decode(before + ids)[-60:]!r}, its own {own[-60:]!r}"
        partner = rendered(other, other.turn(asked), asked, sections)
        heard = read(side, other, asked)
        if heard is None and before == side.opened(asked).ids:
            return "masked: calls are not read"
        if heard is not None and heard != partner:
            return f"wrong: its teacher reads {heard[-60:]!r}"
    heard = read(other, side, asked)
    if heard is None:
        return "masked: calls are not written"
    if heard != own:
        return f"wrong: as a teacher {heard[-60:]!r}, its own {own[-60:]!r}"
    return "right, put together" if form.inferred else "right"


def places(sides: list[Speaker]) -> dict[str, bool]:
    """Whether a template has a place for a thought and for calls; `sides` have its settings."""
    asked = [Conversation([USER], None, tools) for tools in (None, TOOLS)]
    kinds = set()
    for side in sides:
        for conversation in asked:
            try:
                kinds |= {section for sections in side.turn(conversation).forms for section in sections}
            except ValueError:
                continue
    source = sides[0].template
    return {THOUGHT: THOUGHT in kinds or bool(CLOSES_THOUGHT.search(source)), CALLS: CALLS in kinds}


def census(files: list[Path], control: re.Pattern = CONTROL) -> dict[str, dict[str, str]]:
    found = {}
    other = Speaker(tokenizer_for((Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()))
    for file in files:
        tokenizer, name = tokenizer_for(file.read_text(), control), f"{file.parent.name}/{file.stem}"
        sides, found[name] = [Speaker(tokenizer), Speaker(tokenizer, THINK)], {}
        has = places(sides)
        for kind, (sections, _) in TURNS.items():
            for side in sides if THOUGHT in sections else sides[:1]:
                try:
                    verdict = judged(side, other, kind)
                except ValueError as refusal:
                    verdict = f"refused: {str(refusal).partition(': ')[2] or refusal}"
                if verdict.startswith("right"):
                    verdict += ", with enable_thinking and thinking set" if side is sides[1] else ""
                    break
            lacking = [{THOUGHT: "a thought", CALLS: "a call"}[one] for one in sections if not has.get(one, True)]
            if lacking and verdict.startswith("masked"):
                verdict = f"masked: {NO_PLACE} {' and '.join(lacking)}"
            verdict = verdict.replace(
                "it leaves out the thought", "its source names a thought, and no rendering shows one"
            )
            found[name][kind] = verdict
    return found


def table(found: dict[str, dict[str, str]]) -> str:
    """The table in Markdown, with the counts first."""
    names = "\n".join(f"| {kind} | " + " | ".join(_counts(found, kind)) + " |" for kind in TURNS)
    rows = [f"| {name} | " + " | ".join(_cell(kinds[kind]) for kind in TURNS) + " |" for name, kinds in found.items()]
    return "\n".join(
        [
            "| kind of turn | right | masked | refused | wrong | of those with a place for it, right |",
            "|---|---|---|---|---|---|",
            names,
            "",
            f"| template | {' | '.join(TURNS)} |",
            f"|---|{'---|' * len(TURNS)}",
            *rows,
            "",
        ]
    )


def _counts(found, kind: str) -> list[str]:
    verdicts = [kinds[kind] for kinds in found.values()]
    counts = Counter(re.match(r"\w+", verdict)[0] for verdict in verdicts)
    placed = sum(NO_PLACE not in verdict for verdict in verdicts)
    share = f"{counts['right']} of {placed} ({counts['right'] / placed:.0%})"
    return [*(str(counts[verdict]) for verdict in ("right", "masked", "refused", "wrong")), share]


def _cell(verdict: str) -> str:
    return re.sub(r"\s+", " ", verdict).replace("|", "\\|")[:140]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, action="append", default=[], help="more templates, `*.jinja`")
    parser.add_argument("--control", type=re.compile, help="pattern of further control tokens")
    parser.add_argument(
        "--out", type=Path, help="Markdown page, of which what follows the line <!-- census --> is written anew"
    )
    args = parser.parse_args()
    folders = [Path(trl.__file__).parent / "chat_templates", *args.folder]
    if "CTOPD_ASSETS" in os.environ:
        folders.append(Path(os.environ["CTOPD_ASSETS"]) / "templates")
    warnings.simplefilter("ignore")
    control = re.compile(f"{CONTROL.pattern}|{args.control.pattern}") if args.control else CONTROL
    found = census([file for folder in folders for file in sorted(folder.glob("*.jinja"))], control)
    shown = f"trl {trl.__version__}, transformers {transformers.__version__}, {len(found)} templates\n\n{table(found)}"
    if args.out:
        head, mark, _ = args.out.read_text(encoding="utf-8").partition("<!-- census -->\n")
        args.out.write_text(f"{head}{mark}\n{shown}", encoding="utf-8")
    print(shown)


if __name__ == "__main__":
    main()
