#!/usr/bin/env bash
# trl 1.16.0 (its folder chat_templates), transformers 5.23.0
#
# OpenAI's API gives the arguments of a tool call as JSON text, and so do many datasets. Chat templates disagree about that, and those
# of Qwen2.5, Llama 3.2 and gpt-oss do not say so: they encode the text once more. DeepSeek-V3's takes nothing but text. Others fail.
#
# Seen, for the arguments {"room": 2} as text: "arguments": "{\"room\": 2}" for Qwen2.5, the same as "parameters" for Llama 3.2 and
# after <|message|> for gpt-oss; {"room": 2} for Qwen3 and DeepSeek-V3; errors for GLM, LFM2.5, Qwen3.5 and Gemma 4. As a dict, all but
# DeepSeek-V3's write {"room": 2} in their own way.
#
# Why it matters: a student and its teacher read one conversation by two templates. If one of them reads doubly encoded calls, it scores,
# or learns to write, calls that no runtime parses. Nothing is raised. Parse the text, and give each template the form that it takes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0 jinja2
"$folder/venv/bin/pip" download -qq --no-deps --no-binary :none: -d "$folder" trl==1.16.0
"$folder/venv/bin/python" -m zipfile -e "$folder"/trl-1.16.0-*.whl "$folder/trl"
cat > "$folder/look.py" <<'PY'
import sys
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

folder, found = Path(sys.argv[1]), {}
for name in ("qwen2_5", "llama3_2", "gptoss", "qwen3", "deepseekv3", "glm4moe", "lfm2_2_5", "qwen3_5_think", "gemma4_v5"):
    template = (folder / f"{name}.jinja").read_text()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({}, [])), chat_template=template, bos_token="<s>", eos_token="</s>"
    )
    for kind, arguments in (("text", '{"room": 2}'), ("dict", {"room": 2})):
        call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        try:
            written = tokenizer.apply_chat_template(messages, tokenize=False)
            found[name, kind] = "twice" if '\\"room' in written else "once" if "room" in written else "lost"
        except Exception as error:
            found[name, kind] = type(error).__name__
    print(f"{name}: as text {found[name, 'text']}, as a dict {found[name, 'dict']}")
twice = [name for (name, kind), what in found.items() if kind == "text" and what == "twice"]
sys.exit(twice != ["qwen2_5", "llama3_2", "gptoss"] or found["deepseekv3", "dict"] == "once")
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder/trl/trl/chat_templates" 2>/dev/null
