#!/usr/bin/env bash
# datasets 5.2.0, trl 1.16.0, transformers 5.23.0
#
# The same three rows with tool calls are other text to a chat template by how the dataset was made. `Dataset.from_list` gives each argument
# one type over all rows: 3 becomes 3.0 where another row has 2.5, and an argument that only another row has is there as null.
# `Dataset.from_generator`, a file of JSON lines, and from_list with on_mixed_types="use_json" leave arguments as they are.
#
# Seen: Qwen2.5's template (trl's copy) writes {"n": 3.0, "city": null} of from_list, and {"n": 3} in the three other ways.
#
# Why it matters: calls in prompts and references are what both models read and the student learns to write. 3.0 and null are other tokens,
# arguments that a function may refuse, and a student learns them with a loss that looks as it should. Nothing warns of it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import json
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import datasets
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

datasets.disable_progress_bars()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
tokenizer.chat_template = (files("trl") / "chat_templates" / "qwen2_5.jinja").read_text()


def row(**arguments):
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}


def rows():
    yield from [row(n=3), row(n=2.5), row(city="Oslo")]


with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "rows.jsonl")
    file.write_text("".join(json.dumps(own) + "\n" for own in rows()))
    ways = {
        "from_list": Dataset.from_list([*rows()]),
        "from_list, use_json": Dataset.from_list([*rows()], on_mixed_types="use_json"),
        "from_generator": Dataset.from_generator(rows, cache_dir=folder),
        "a file": load_dataset("json", data_files=str(file), split="train", cache_dir=folder),
    }
    found = {}
    for way, dataset in ways.items():
        text = tokenizer.apply_chat_template(dataset[0]["messages"], tokenize=False)
        found[way] = json.loads(text.rsplit("<tool_call>", 1)[1].split("</tool_call>")[0])["arguments"]
        print(f"seen: {way}: {json.dumps(found[way])}")
as_given, typed = '{"n": 3}', '{"n": 3.0, "city": null}'
sys.exit([json.dumps(own) for own in found.values()] != [typed, as_given, as_given, as_given])
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | grep '^seen'
