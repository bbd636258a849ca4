#!/usr/bin/env bash
# transformers 4.57.3, 5.23.0 (5.20.2 and 5.24.0 alike)
#
# Llama-2's and Phi-3's tokenizer.json puts "▁" before every stretch of text between control tokens (the normalizer Prepend). transformers 4
# reads them so. transformers 5 builds a LlamaTokenizer around the vocabulary, which puts "▁" before the first stretch alone, and before none
# that begins with a space. No error, no warning.
#
# Seen: the turn "<|user|>\nThe dog</s>" begins with 'The' under 5.23.0, and with '▁The' under 4.57.3 and in PreTrainedTokenizerFast, which reads
# the file. "The dog" by itself is read alike, " The dog" is not.
#
# Why it matters: with a chat template, the first word of every turn is another token than the one that a model fine-tuned with transformers
# 4 has seen in this place, for the student and for the teacher. A comparison of plain texts does not find it. Pass
# PreTrainedTokenizerFast.from_pretrained(name), or look at what the model was trained with.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/before"
"$folder/before/bin/pip" install -qq transformers==4.57.3
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# as the tokenizer.json of Llama-2 and of Phi-3 is made up
words = ["▁The", "The", "▁dog", "▁"]
merges = [("T", "h"), ("Th", "e"), ("▁", "The"), ("d", "o"), ("do", "g"), ("▁", "dog")]
letters = sorted(set("".join(words)))
tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "Th", "The", "▁The", "do", "dog", "▁dog"]
ids = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
backend.add_special_tokens([AddedToken(token, normalized=False, rstrip=True) for token in ("<|user|>", "<|assistant|>")])
folder = Path(sys.argv[1])
backend.save(str(folder / "tokenizer.json"))
config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
(folder / "tokenizer_config.json").write_text(json.dumps(config))

print(f"transformers {transformers.__version__}")
right = []
by_file = PreTrainedTokenizerFast.from_pretrained(folder)
for text in ("The dog", "<|user|>\nThe dog</s>\n<|assistant|>\n", "<s>The dog", "<s> The dog", " The dog"):
    found, expected = (tokenizer.tokenize(text) for tokenizer in (AutoTokenizer.from_pretrained(folder), by_file))
    print(f"  {text!r}: {found}" + ("" if found == expected else f", and by tokenizer.json {expected}"))
    right.append(found == expected)
sys.exit(right != ([True] * 5 if transformers.__version__ < "5" else [True] + [False] * 4))
PY
for name in before venv; do
    mkdir "$folder/$name-files"
    "$folder/$name/bin/python" "$folder/look.py" "$folder/$name-files" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
done
