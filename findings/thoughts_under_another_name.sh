#!/usr/bin/env bash
# transformers 5.20.2 and 5.21.0, templates of trl 1.16.0
#
# From 5.21 on, apply_chat_template gives a message's thought to the template under `reasoning_content`, whichever of `reasoning_content`, `thinking`
# and `reasoning` the message has, and under `thinking` too. Up to 5.20 a template saw the name that the message has, and left the
# thought out where it reads another one, without a warning. gpt-oss's template refuses a thought beside content and calls: what it wrote in
# 5.20, without the thought, is an error from 5.21 on.
#
# Seen: a finished turn with a thought, by 72 templates: of which 5.20.2 writes it with 27, 5 and 5 under `reasoning_content`,
# `thinking` and `reasoning`, 5.21.0 with 30 under each. gpt-oss, with content and a call beside it: 5.20.2 leaves the thought out, 5.21.0 raises.
#
# Why it matters: vLLM 0.33 asks for transformers 5.20.2. A server that renders messages, and a trainer with a newer transformers beside
# it, then read two conversations with one template, and a reasoning teacher is scored on turns that it never thought about.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-deps trl==1.16.0 --target "$folder/trl"
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

templates = sorted(Path(sys.argv[1]).glob("trl/trl/chat_templates/*.jinja"))


def shown(template, message):
    messages = [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": "Six.", **message}]
    try:
        [[text], _] = render_jinja_template(conversations=[messages], chat_template=template.read_text(), bos_token="", eos_token="")
    except jinja2.TemplateError as error:
        return str(error)
    return "Two threes." in text


names = ("reasoning_content", "thinking", "reasoning")
counts = [sum(shown(template, {name: "Two threes."}) is True for template in templates) for name in names]
call = {"type": "function", "function": {"name": "add", "arguments": {"x": 3}}}
[gptoss] = [template for template in templates if template.stem == "gptoss"]
beside = shown(gptoss, {"reasoning_content": "Two threes.", "tool_calls": [call]})
print(json.dumps([len(templates), counts, beside if isinstance(beside, bool) else beside[:44]]))
PY
for version in 5.20.2 5.21.0; do
    "$folder/venv/bin/pip" install -qq transformers==$version jinja2==3.1.6
    "$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/$version" || { cat "$folder/warnings"; exit 1; }
    echo "$version: $(cat "$folder/$version")"
done
[ "$(cat "$folder/5.20.2")" = '[72, [27, 5, 5], false]' ]
[ "$(cat "$folder/5.21.0")" = '[72, [30, 30, 30], "Cannot pass both content and thinking in an "]' ]
