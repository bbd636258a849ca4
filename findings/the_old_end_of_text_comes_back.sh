#!/usr/bin/env bash
# transformers 4.57.3, 5.23.0
#
# transformers 4 writes a special_tokens_map.json beside a tokenizer. transformers 5 leaves it as it is when it saves into that folder, and what it
# says prevails over tokenizer_config.json when the folder is loaded. A tokenizer that was loaded from such a folder, given another EOS and
# padding and saved into the folder has the old ones when it is loaded again. No error, no warning.
#
# Seen: a folder of 4.57.3 with <|endoftext|> for both roles; 5.23.0 loads it, sets <|im_end|> and <|pad|>, saves and loads it. In memory and in
# tokenizer_config.json are the new ones, loaded are the old ones, and a template that ends turns with eos_token ends them with the old one. Saved
# into an empty folder, or without special_tokens_map.json, or by 4.57.3, the new ones are loaded.
#
# Why it matters: this is how a student is prepared: a snapshot of the hub is given the EOS of its chat template and a padding token of its own.
# A run that loads the folder has the old EOS at the end of turns, the old padding, and a tokenizer_config.json that says
# otherwise. Save into an empty folder, or remove special_tokens_map.json.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile transformers==5.23.0 jinja2==3.1.6 requests==2.32.5
"$folder/venv/bin/pip" install -qq --no-compile --no-deps --target "$folder/before" transformers==4.57.3 tokenizers==0.22.1 huggingface-hub==0.36.0
cat > "$folder/write.py" <<'PY'
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
own = Tokenizer(models.BPE({token: n for n, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
own.add_special_tokens(special)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token=special[0], pad_token=special[0])
tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
tokenizer.save_pretrained(sys.argv[1])
PY
cat > "$folder/change.py" <<'PY'
import contextlib
import io
import json
import sys
import warnings
from pathlib import Path

import transformers
from transformers import AutoTokenizer

source, target = sys.argv[1:3]
without = sys.argv[3:] == ["without"]
tokenizer = AutoTokenizer.from_pretrained(source)
tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|pad|>"
tokenizer.save_pretrained(target)
if without:
    (Path(target) / "special_tokens_map.json").unlink()
said = io.StringIO()
with contextlib.redirect_stderr(said), warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    transformers.utils.logging.get_logger().handlers[0].setStream(said)
    loaded = AutoTokenizer.from_pretrained(target)
config = json.loads((Path(target) / "tokenizer_config.json").read_text())
turn = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
where = ("its own folder" if source == target else "an empty folder") + (", special_tokens_map.json removed" if without else "")
print(
    f"seen: {transformers.__version__}, saved into {where}: in memory {tokenizer.eos_token} {tokenizer.pad_token}, "
    f"in tokenizer_config.json {config['eos_token']} {config['pad_token']}, loaded {loaded.eos_token} {loaded.pad_token}, a turn {turn}, warnings {len(warned)} {said.getvalue()!r}"
)
new = ["<|im_end|>", "<|pad|>"]
old = ["<|endoftext|>"] * 2
comes_back = transformers.__version__ >= "5" and source == target and not without
expected = old if comes_back else new
right = [tokenizer.eos_token, tokenizer.pad_token] == new and [config["eos_token"], config["pad_token"]] == new
sys.exit(not (right and [loaded.eos_token, loaded.pad_token] == expected and turn.endswith(expected[0])))
PY
five() { "$folder/venv/bin/python" "$@"; }
four() { PYTHONPATH="$folder/before" "$folder/venv/bin/python" "$@"; }
{
    four "$folder/write.py" "$folder/for-five"
    four "$folder/write.py" "$folder/for-four"
    five "$folder/change.py" "$folder/for-five" "$folder/empty"
    five "$folder/change.py" "$folder/for-five" "$folder/for-five"
    five "$folder/change.py" "$folder/for-five" "$folder/for-five" without
    four "$folder/change.py" "$folder/for-four" "$folder/for-four"
} 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
