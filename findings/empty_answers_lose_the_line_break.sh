#!/usr/bin/env bash
# transformers 5.23.0 with the chat templates of TRL 1.16.0
#
# `continue_final_message=True` with a last message of the assistant whose content is empty cuts off the line break that the templates of Llama 3,
# Gemma, Gemma 3, GLM-4.5 and Qwen3.5 write before an answer. With a content of one letter it is there, and in the first three with
# `add_generation_prompt=True` too. In Qwen2.5's, Qwen3's and Phi-3's it is there with an empty content as well. No error, no warning.
#
# Seen: Llama 3's prompt ends in "<|end_header_id|>", with "S" as the content in "<|end_header_id|>\n\nS", as a generation prompt in
# "<|end_header_id|>\n\n". Gemma's ends in "<start_of_turn>model" without its "\n".
#
# Why it matters: rows with a begun answer, which is empty in some, are rendered this way. There a model goes on from a place where its template
# lets no answer begin, and the line break is for the student to write and for the teacher to score. Two models whose templates differ in this
# read different prompts. Drop an empty last message, and ask for a generation prompt.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile transformers==5.23.0 jinja2==3.1.6
"$folder/venv/bin/pip" install -qq --no-compile --no-deps trl==1.16.0
cat > "$folder/look.py" <<'PY'
import io
import sys
import warnings
from importlib.metadata import files

import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

CUT = ["llama3", "gemma", "gemma3", "glm4moe", "qwen3_5_think"]
WHOLE = ["qwen2_5", "qwen3", "phi3"]
USER = {"role": "user", "content": "hi"}
templates = {one.name.removesuffix(".jinja"): one.read_text() for one in files("trl") if one.name.endswith(".jinja")}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), bos_token="<s>", eos_token="</s>")
said = io.StringIO()
transformers.utils.logging.get_logger().handlers[0].setStream(said)


def prompt(name, content):
    messages = [USER, {"role": "assistant", "content": content}]
    return tokenizer.apply_chat_template(messages, chat_template=templates[name], tokenize=False, continue_final_message=True)


expected = True
for name in (*CUT, *WHOLE):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        empty, begun = prompt(name, ""), prompt(name, "S")
        asked = tokenizer.apply_chat_template([USER], chat_template=templates[name], tokenize=False, add_generation_prompt=True)
    before = begun.removesuffix("S")
    print(f"seen: {name}: ends in {empty[-20:]!r}, with a letter in {begun[-20:]!r}, as a generation prompt in {asked[-20:]!r}")
    expected &= before != begun and before.startswith(empty) and not before[len(empty) :].strip("\n")
    expected &= (empty != before) == (name in CUT) and not warned and not said.getvalue()
    if name in ("llama3", "gemma", "gemma3"):
        expected &= asked == before
sys.exit(not expected)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
