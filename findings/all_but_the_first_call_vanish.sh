#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0
#
# gpt-oss's chat template (trl's copy, the same as OpenAI's in this) writes the first of several tool calls of a message and leaves the others
# out, without an error, while it writes the results of all of them. Llama 3's refuses such a message; Qwen's, Gemma's and DeepSeek's write all.
# Likewise a second system message, or one after the first turn, is left out by gpt-oss's and Qwen3-VL's template; Qwen2.5's writes it.
#
# Seen: of two calls, "first" and "second", with their results: gpt-oss "first" and both results, Qwen2.5 both, Llama 3.2 an error. Of two
# system messages gpt-oss and Qwen3-VL write the first, Qwen2.5 both.
#
# Why it matters: two models with templates of their own read two conversations, of which one has a result for a call that was never made, or
# other instructions. A student that calls two tools at once is scored on what follows as if it had called one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import sys
from importlib.resources import files

import jinja2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<|eos|>", bos_token="<|bos|>")
MARKS = ("first", "second", "result of one", "result of two")


def written(template, messages, marks):
    tokenizer.chat_template = (files("trl") / "chat_templates" / f"{template}.jinja").read_text()
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, ValueError):
        return "an error"
    return [mark for mark in marks if mark in text]


def call(id, room):
    return {"id": id, "type": "function", "function": {"name": "look_up", "arguments": {"room": room}}}


def result(id, text):
    return {"role": "tool", "tool_call_id": id, "name": "look_up", "content": text}


ids = "abcdefgh1", "abcdefgh2"
user = {"role": "user", "content": "Which rooms are free?"}
calls = {"role": "assistant", "content": "", "tool_calls": [call(ids[0], "first"), call(ids[1], "second")]}
called = [user, calls, result(ids[0], "result of one"), result(ids[1], "result of two")]
told = [{"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}, user]
by_calls = {name: written(name, called, MARKS) for name in ("gptoss", "qwen2_5", "llama3_2")}
by_system = {name: written(name, told, ("Be brief.", "Be kind.")) for name in ("gptoss", "qwen3_vl", "qwen2_5")}
for name, found in by_calls.items():
    print(f"seen: two calls, {name}: {found}")
for name, found in by_system.items():
    print(f"seen: two system messages, {name}: {found}")
expected = {"gptoss": ["first", *MARKS[2:]], "qwen2_5": [*MARKS], "llama3_2": "an error"}
systems = {"gptoss": ["Be brief."], "qwen3_vl": ["Be brief."], "qwen2_5": ["Be brief.", "Be kind."]}
sys.exit(not (by_calls == expected and by_system == systems))
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | grep '^seen'
