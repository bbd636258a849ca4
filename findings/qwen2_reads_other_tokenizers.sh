#!/usr/bin/env bash
# transformers 5.23.0
#
# A folder with a fast tokenizer's own tokenizer.json (tokenizer_class TokenizersBackend) and a config.json of model_type "qwen2" is loaded
# by AutoTokenizer as Qwen2Tokenizer: of tokenizer.json the vocabulary is kept, and the model, the merges and the pre-tokenizer become
# Qwen2's. A Unigram becomes a BPE without merges. No error, no warning; every token keeps its id. "qwen3", "llama" and "mistral" load
# what is in the folder.
#
# Seen: "the dog" is ['▁the', '▁dog'] before saving and for llama, and t, h, e, d, o, g for qwen2, decoded to "thedog".
#
# Why it matters: who distils into or from a Qwen2 architecture with another tokenizer (a model trained from nothing, a transplanted
# vocabulary) gets wrong ids from a folder that save_pretrained wrote, and a comparison of token ids finds nothing. Compare
# encodings, or load with PreTrainedTokenizerFast.from_pretrained and pass the tokenizer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
pieces = [("<unk>", 0.0), ("▁", -2.0), *letters, ("▁the", -1.0), ("▁dog", -1.0)]
backend = Tokenizer(models.Unigram(pieces, unk_id=0))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
expected = tokenizer.tokenize("the dog")
print("saved:", expected)
right = {}
for kind in ("llama", "qwen3", "qwen2"):
    folder = Path(sys.argv[1]) / kind
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    found = AutoTokenizer.from_pretrained(folder)
    model, text = type(found.backend_tokenizer.model).__name__, found.decode(found("the dog").input_ids)
    print(f"{kind}: {type(found).__name__}, {model}, {found.tokenize('the dog')}, decoded {text!r}")
    assert found.get_vocab().items() >= tokenizer.get_vocab().items()  # "<|endoftext|>" is added
    right[kind] = found.tokenize("the dog") == expected
itself = PreTrainedTokenizerFast.from_pretrained(Path(sys.argv[1]) / "qwen2").tokenize("the dog") == expected
sys.exit((right, itself) != ({"llama": True, "qwen3": True, "qwen2": False}, True))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2>/dev/null
