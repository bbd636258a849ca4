#!/usr/bin/env bash
# transformers 5.21.0 (5.20.0 to 5.21.0 alike; 5.22.0 and newer load tokenizer.json for this family)
#
# A folder with a byte-level BPE in tokenizer.json and tokenizer_class LlamaTokenizerFast in tokenizer_config.json, as DeepSeek
# publishes its tokenizers, is loaded by AutoTokenizer in two ways: with a config.json of model_type "deepseek_v3" beside it as
# tokenizer.json says, without one as LlamaTokenizer, which takes the vocabulary and the merges and puts a SentencePiece-like
# pre-tokenizer around them. The latter loses spaces. No error, no warning; every token keeps its id.
#
# Seen: "the dog" is ['the', 'Ġdog'] with config.json, and ['the', 'dog'], decoded to "thedog", without.
#
# Why it matters: a teacher behind a server needs only its tokenizer here, and tokenizer.save_pretrained writes no config.json. vLLM 0.33
# asks for transformers 5.20.2. The scores of such ids are scores of another text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.21.0
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
merges = [("t", "h"), ("th", "e"), ("d", "o"), ("do", "g"), ("Ġ", "dog")]
vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
backend = Tokenizer(models.BPE(vocabulary, merges))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
folders = [Path(sys.argv[1]) / name for name in ("with config.json", "without")]
right = []
for folder in folders:
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizerFast"}))
    if folder == folders[0]:
        (folder / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    found = AutoTokenizer.from_pretrained(folder)
    text = found.decode(found.encode("the dog", add_special_tokens=False))
    print(f"{folder.name}: {type(found).__name__}, {found.tokenize('the dog')}, decoded {text!r}")
    right.append(text == "the dog")
itself = PreTrainedTokenizerFast.from_pretrained(folders[1]).tokenize("the dog")
print("without, by PreTrainedTokenizerFast:", itself)
sys.exit((right, itself) != ([True, False], ["the", "Ġdog"]))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2>/dev/null
