#!/usr/bin/env bash
# transformers 5.23.0 (5.20.2 and 5.24.0 alike)
#
# save_pretrained writes the templates that a tokenizer has, and leaves those that an earlier call has put into the folder. from_pretrained
# reads all of them. No error, no warning.
#
# Seen: a tokenizer with one template, saved over one with "default" and "tool_use", is read with "tool_use" of the old one, which every row with
# tools takes: '[new]hi' before saving, '[old, with tools]hi' after. With chat_template None, the old template comes back.
#
# Why it matters: whoever gives a student a new template and saves it beside the model trains with the one and serves with the other, and only for
# conversations with tools. Save into an empty folder, or remove chat_template.jinja and additional_chat_templates first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0 jinja2==3.1.6
cat > "$folder/look.py" <<'PY'
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

print(f"transformers {transformers.__version__}")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")), unk_token="<unk>")
messages, tool = [{"role": "user", "content": "hi"}], {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
found = []
for before, after in (
    (
        {"default": "[old]{{ messages[0].content }}", "tool_use": "[old, with tools]{{ messages[0].content }}"},
        "[new]{{ messages[0].content }}",
    ),
    ("[old]{{ messages[0].content }}", None),
):
    folder = Path(sys.argv[1]) / type(before).__name__
    tokenizer.chat_template = before
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = after
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    print(f"chat_template is {after!r}, saved over {before!r}, and read again as {again.chat_template!r}")
    if after is not None:
        own, read = (side.apply_chat_template(messages, tools=[tool], tokenize=False) for side in (tokenizer, again))
        print(f"  with tools: {own!r} before saving, {read!r} after")
        found.append(own == read)
    else:
        found.append(again.chat_template is None)
sys.exit(found != [False, False])
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
