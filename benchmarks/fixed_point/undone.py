"""
How often more text undoes what the table of continuations says, by the kinds of characters beside the boundary.

    python -m benchmarks.fixed_point.undone --assets FOLDER      # writes benchmarks/results/fixed_point/undone.json

For each token boundary of the student's in real text: t, the last token of what the teacher's tokenizer makes of the text before it, and u,
the student's next token. The table (`trl_ctopd.text.continuations`) says whether u continues t; the teacher's encoding of the whole
text, whether there is a boundary in the end. "undone" boundaries are there although u continues t; "joined" ones are not although it does
not. Decision: a boundary within a character is left out, as no tokenizer can be given the text before it alone.
"""

import argparse
import json
from collections import Counter
from itertools import accumulate
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.report import header, save
from trl_ctopd import token_bytes
from trl_ctopd.text.aligner import encode_as_text
from trl_ctopd.text.continuations import Continuations


STUDENT = "smollm2-instruct"
TEACHERS = ("gpt2", "qwen2.5", "llama-3.2", "deepseek-v3", "mistral-v3")
ANSWERS, PROGRAMS = 60, 40
FILE = Path(__file__).parents[1] / "results" / "fixed_point" / "undone.json"


def texts(datasets: Path) -> list[str]:
    """GSM8K's answers and MBPP's programs."""
    answers = (datasets / "gsm8k/test.jsonl").read_text().splitlines()[:ANSWERS]
    programs = (datasets / "mbpp/mbpp.jsonl").read_text().splitlines()[:PROGRAMS]
    return [json.loads(line)["answer"] for line in answers] + [json.loads(line)["code"] for line in programs]


def kind(character: str) -> str:
    for name, holds in (("digit", str.isdigit), ("letter", str.isalpha), ("space", str.isspace)):
        if holds(character):
            return name
    return "sign"


def count(student, teacher, lines: list[str]) -> dict:
    own, theirs = token_bytes(student), token_bytes(teacher)
    table, counts = Continuations(student, teacher), Counter()
    for text in lines:
        spelled, ids = text.encode(), encode_as_text(student, [text])[0].ids
        read = encode_as_text(teacher, [text])[0].ids
        dummy = sum(len(theirs[token]) for token in read) - len(spelled)
        cuts = {end - dummy for end in accumulate(len(theirs[token]) for token in read)}
        ends = [*accumulate(len(own[token]) for token in ids)]
        places = [
            (end, token)
            for end, token in zip(ends, ids[1:], strict=False)
            if spelled[:end].decode(errors="ignore").encode() == spelled[:end]
        ]
        before = encode_as_text(teacher, [spelled[:end].decode() for end, _ in places])
        for (end, token), tokens in zip(places, before, strict=True):
            goes_on, cut = token in table.of(tokens.ids[-1]), end in cuts
            last, after = spelled[:end].decode()[-1], spelled[end:].decode()[0]
            counts["boundaries"] += 1
            counts["chunk ends"] += cut
            counts["chunk ends after a digit"] += cut and kind(last) == "digit"
            if goes_on == cut:
                counts[f"{'undone' if cut else 'joined'}: {kind(last)} {kind(after)}"] += 1
    return {"later_digits_undo": table.later_digits_undo, **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder with `tokenizers/` and `datasets/`")
    options = parser.parse_args()
    lines, found = texts(options.assets / "datasets"), {}
    student = AutoTokenizer.from_pretrained(options.assets / "tokenizers" / STUDENT)
    report = header()
    for name in TEACHERS:
        found[name] = count(student, AutoTokenizer.from_pretrained(options.assets / "tokenizers" / name), lines)
        print(name, found[name], flush=True)
    save(FILE, {**report, "student": STUDENT, "answers": ANSWERS, "programs": PROGRAMS, "teachers": found})


if __name__ == "__main__":
    main()
