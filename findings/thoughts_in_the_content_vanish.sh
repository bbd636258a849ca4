#!/usr/bin/env bash
# chat templates of trl 1.16.0 (transformers 5.23.0)
#
# Datasets of R1's answers hold the thought within the content: "<think>\nTwo and two.\n</think>\n\nIt is four." DeepSeek's templates cut off all up to
# the last </think> of an assistant's content, also in the message that is trained, so that the text has the answer alone, without an
# error. Given as reasoning_content they leave it out as well. Qwen3's, GLM's and Nemotron's keep the same thought.
#
# Seen: of TRL's templates deepseek_r1_distill, deepseekv3 and deepseekv3_training render such a conversation without its thought. deepseek_r1_distill_training
# keeps one within the content and leaves out one given apart. qwen3, glm4moe and nemotron_3_nano keep both.
#
# Why it matters: a student of R1's family that is trained on R1's own answers, in another family's data too, learns to answer without a thought, while
# its generation prompt opens one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 jinja2==3.1.6
cat > "$folder/look.py" <<'PY'
import sys
from pathlib import Path

import trl
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

folder = Path(trl.__file__).parent / "chat_templates"
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])), bos_token="<s>", eos_token="</s>")
thought, answer = "Two and two.", "It is four."
asked = {"role": "user", "content": "2+2?"}
within = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{answer}"}
apart = {"role": "assistant", "content": answer, "reasoning_content": thought}
found = {}
for name in ("deepseek_r1_distill", "deepseek_r1_distill_training", "deepseekv3", "deepseekv3_training", "qwen3", "glm4moe", "nemotron_3_nano"):
    template = (folder / f"{name}.jinja").read_text()
    texts = [tokenizer.apply_chat_template([asked, own], chat_template=template, tokenize=False) for own in (within, apart)]
    found[name] = [thought in text for text in texts]
    prompt = tokenizer.apply_chat_template([asked], chat_template=template, tokenize=False, add_generation_prompt=True)
    print(f"template {name}: thought within the content {'kept' if found[name][0] else 'lost'}, apart {'kept' if found[name][1] else 'lost'}; "
          f"the prompt ends {prompt[-9:]!r}")
expected = {name: [not name.startswith("deepseek")] * 2 for name in found} | {"deepseek_r1_distill_training": [True, False]}
sys.exit(found != expected)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | grep "^template" || { cat "$folder/warnings"; exit 1; }
