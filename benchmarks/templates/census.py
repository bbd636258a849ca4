"""What the package makes of many real chat templates: right, masked or refused, and why, as a table.

    python benchmarks/templates/census.py [--folder more/templates] [--out docs/templates.md]

The templates are those that the installed TRL brings (`trl/chat_templates`), and with `CTOPD_ASSETS` those of its folder
`templates`. Each is given to a toy byte-level tokenizer to which the strings that look like control tokens in what the
template writes are added as special tokens and its tags as others: a template's turns do not depend on the vocabulary.

A kind of turn is *right* when prompt, text and end put together are the template's own rendering of the finished turn, byte
for byte, both as a student (which goes on from the generation prompt where a finished turn does) and as a teacher.
"""

import argparse
import os
import re
import warnings
from collections import Counter
from pathlib import Path

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_ctopd.text.chat import Conversation, Speaker
from trl_ctopd.text.turns import ANSWER, CALL, RESULT, TOOLS, USER


TURNS = {
    "answer": {"content": "It is four.\nIndeed."},
    "thought": {"reasoning_content": "Two and two.", "content": "It is four."},
    "call": {"content": "", "tool_calls": [CALL]},
    "thought and call": {"reasoning_content": "Two and two.", "content": "", "tool_calls": [CALL]},
}
CONTROL = re.compile(
    r"<\|[^|<>]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<\|[a-z_\"]{1,20}\|?>|<[a-z_]{1,20}\|>|\[/?[A-Z_]{2,20}\]|</?s>|<BOS>|<EOS>"
    r"|<(?:start|end|beginning)_of_\w+>|<SPECIAL_\d+>|\]~!?b[\[\]]|\[e~\["
)
TAG = re.compile(r"</?[a-z_]{2,20}>")


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """Bytes, and the control strings and tags of what the template writes."""
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"bos_token": "<BOS>", "eos_token": "<EOS>"}
    found = set()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)
    for message in TURNS.values():
        for tools in (None, TOOLS):
            for turns in (
                [USER],
                [USER, {"role": "assistant", **message}],
                [USER, {"role": "assistant", **message}, RESULT],
            ):
                try:
                    found.add(bare.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=True))
                    found.add(bare.apply_chat_template(turns, tools=tools, tokenize=False))
                except Exception:  # whatever it refuses, the census will say
                    continue
    written = "\n".join([*found, template])
    backend.add_special_tokens([*sorted({match[0] for match in CONTROL.finditer(written)} | {"<BOS>", "<EOS>"})])
    tags = sorted({match[0] for match in TAG.finditer("\n".join(found))})
    backend.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **names
    )


def judged(side: Speaker, message: dict, kwargs: dict) -> str:
    """ "right", or what is wrong, or why it is refused."""
    reference = {"role": "assistant", **message}
    tools = TOOLS if "tool_calls" in message or side.needs_tools else None
    conversation = Conversation([USER], reference, tools, kwargs)
    try:
        before, ids = side.reference(conversation)
    except ValueError as refusal:
        return f"refused: {refusal}"
    finished = side._render([USER, reference], conversation)
    written = side.tokenizer.decode(before + ids)
    opened = side.opened(conversation)
    form = opened.turn.forms[(ANSWER,)] if opened.turn.plain else None
    if not (finished.startswith(written) or written.startswith(finished)):
        return f"wrong: {written[-60:]!r} for {finished[-60:]!r}"
    if "tool_calls" not in message and "reasoning_content" not in message:
        read = side.tokenizer.decode(opened.plain) + message["content"] + form.end
        if not (finished.startswith(read) or read.startswith(finished)):
            return f"wrong as a teacher: {read[-60:]!r} for {finished[-60:]!r}"
    return "right"


def census(files: list[Path]) -> dict[str, dict[str, str]]:
    found = {}
    for file in files:
        side = Speaker(tokenizer_for(file.read_text()))
        name = f"{file.parent.name}/{file.stem}"
        try:
            _ = side.turn_end
        except ValueError as refusal:
            found[name] = dict.fromkeys(TURNS, f"refused: {refusal}")
            continue
        found[name] = {kind: judged(side, message, {}) for kind, message in TURNS.items()}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, action="append", default=[])
    args = parser.parse_args()
    folders = [Path(trl.__file__).parent / "chat_templates", *args.folder]
    if "CTOPD_ASSETS" in os.environ:
        folders.append(Path(os.environ["CTOPD_ASSETS"]) / "templates")
    warnings.simplefilter("ignore")
    found = census([file for folder in folders for file in sorted(folder.glob("*.jinja"))])
    for name, kinds in found.items():
        for kind, verdict in kinds.items():
            print(f"{name:60} {kind:18} {verdict[:260]}")
    for kind in TURNS:
        print(kind, Counter(kinds[kind].split(":")[0] for kinds in found.values()))


if __name__ == "__main__":
    main()
