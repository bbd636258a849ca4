"""The data sets of the comparison: rows of prompt and completion, in a fixed random order.

- `mbpp`: programming tasks and their code. `gsm8k`: word problems and worked answers. Both go through each model's chat template.
- `text`: the first words of a paragraph of Wikipedia (XQuAD, English) and the rest of it, as plain text.

They come from the hub or, where `CTOPD_ASSETS` names a folder, from there.
"""

import json
import os
import random
from pathlib import Path

from datasets import load_dataset
from demo_real import problems

from benchmarks import report


PROMPT_WORDS = 40


def mbpp() -> list[dict]:
    folder = assets()
    tasks = problems.load_problems(str(folder / "datasets/mbpp/mbpp.jsonl") if folder else problems.HUB_NAME)
    return [{"prompt": task.messages, "completion": task.reference} for task in tasks]


def gsm8k() -> list[dict]:
    folder = assets()
    found = report.gsm8k(folder, 1_000) if folder else load_dataset("openai/gsm8k", "main", split="train[:1000]")
    return shuffled(
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in found
    )


def text() -> list[dict]:
    if folder := assets():
        lines = (folder / "datasets/multilingual/sample.jsonl").read_text(encoding="utf-8").splitlines()
        found = [row["text"] for row in map(json.loads, lines) if row["source"] == "xquad.en"]
    else:
        found = load_dataset("google/xquad", "xquad.en", split="validation")["context"]
    paragraphs = [paragraph.split(" ") for paragraph in dict.fromkeys(found)]
    return shuffled(
        {"prompt": " ".join(words[:PROMPT_WORDS]), "completion": " " + " ".join(words[PROMPT_WORDS:])}
        for words in paragraphs
        if len(words) > 2 * PROMPT_WORDS
    )


DATASETS = {"mbpp": mbpp, "text": text, "gsm8k": gsm8k}


def assets() -> Path | None:
    return Path(os.environ["CTOPD_ASSETS"]) if os.environ.get("CTOPD_ASSETS") else None


def shuffled(rows) -> list[dict]:
    rows = list(rows)
    random.Random(0).shuffle(rows)
    return rows
