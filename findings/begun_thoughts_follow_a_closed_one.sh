#!/usr/bin/env bash
# transformers 5.23.0 with the chat templates of TRL 1.16.0
#
# `continue_final_message=True` with an assistant's content that opens a thought and does not close it ("<think>\nTwo and two"): the templates of
# Qwen3, Qwen3.5, Qwen3.6 and GLM-4.5 write an empty thought first, closed, and the begun one behind it. No error, no warning.
#
# Seen: the prompt ends in "<think>\n\n</think>\n\n<think>\nTwo and two" (GLM-4.5: "<think></think>\n<think>\nTwo and two"). Qwen2.5's, Llama
# 3's and Nemotron 3 Nano's end in "<think>\nTwo and two". With the thought under reasoning_content and
# continue_final_message="reasoning_content" those of the four end in "<think>" and the begun thought alone.
#
# Why it matters: thoughts that were cut at a limit of tokens, or begun by hand, are continued this way. A student whose template does this goes on
# from a place where its thought has been closed, and a teacher with another template reads another prompt. Put the thought under
# reasoning_content, and name that field.
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

BEGUN = "Two and two"
BEHIND = ["qwen3", "qwen3_5_think", "qwen3_6", "glm4moe"]
AS_IT_IS = ["qwen2_5", "llama3", "nemotron_3_nano"]
templates = {one.name.removesuffix(".jinja"): one.read_text() for one in files("trl") if one.name.endswith(".jinja")}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), bos_token="<s>", eos_token="</s>")
said = io.StringIO()
transformers.utils.logging.get_logger().handlers[0].setStream(said)


def end(name, field, **message):
    """What the assistant's turn says so far."""
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", **message}]
    text = tokenizer.apply_chat_template(messages, chat_template=templates[name], tokenize=False, continue_final_message=field)
    return text[text.index("<think>", text.index("2 + 2?")) :]


expected = True
for name in (*BEHIND, *AS_IT_IS):
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        plain = end(name, True, content=f"<think>\n{BEGUN}")
    apart = end(name, "reasoning_content", content="", reasoning_content=BEGUN) if name in BEHIND else None
    print(f"seen: {name}: {plain!r}, under reasoning_content {apart!r}, warnings {len(warned)} {said.getvalue()!r}")
    behind = "</think>" in plain and plain.endswith(f"<think>\n{BEGUN}")
    expected &= behind == (name in BEHIND) and (apart is None or "</think>" not in apart and apart.endswith(BEGUN))
    expected &= not warned and not said.getvalue()
sys.exit(not expected)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
