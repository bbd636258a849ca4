#!/usr/bin/env bash
# A function given as a variable of a chat template arrives there as text: transformers 5.23.0.
#
# `apply_chat_template(messages, strftime_now=...)` is the obvious way to fix the day that Llama-3.2's and gpt-oss's templates write, since a
# variable hides the global of the same name. All variables are made plain data before they are rendered
# (`_plain_template_data`), functions too: the template then calls a string.
#
# Seen: TypeError: 'str' object is not callable
#
# Why it matters: prompts of these templates change with the day, so that a run that is resumed tomorrow, or a student and a teacher rendered
# on both sides of midnight, read other prompts. The day has to be fixed in the template's source.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 jinja2==3.1.6
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
tokenizer.chat_template = '{{ strftime_now("%Y") }}: {{ messages[0].content }}'
messages = [{"role": "user", "content": "hi"}]
plain = tokenizer.apply_chat_template(messages, tokenize=False)
print("without the variable:", plain)
try:
    found = tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=lambda form: "1999")
except TypeError as error:
    found = f"TypeError: {error}"
print("with a function:", found)
assert found == "TypeError: 'str' object is not callable", found
PYTHON
