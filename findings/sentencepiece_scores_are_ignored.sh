#!/usr/bin/env bash
# transformers 4.57.3, 5.23.0 (5.20.2 and 5.24.0 alike), mistral-common 1.13.1 (for Mistral's file)
#
# From a SentencePiece BPE model (tokenizer.model without a tokenizer.json) transformers 5 takes the merges in the order of the pieces' ids, and
# SentencePiece merges in that of their scores. In Mistral's models the two differ: runs of spaces have low ids and the lowest score. No error,
# no warning.
#
# Seen, with the file of Mistral-7B-Instruct-v0.3: the line "    def f" begins with '▁▁▁▁', 'def' under 5.23.0, and with '▁▁▁', '▁def' under
# 4.57.3 and in SentencePiece. Of the indented lines of a package of Python's, 99 % are other tokens under 5.23.0 (flush lines: 1 %), and 0 %
# under 4.57.3.
#
# Why it matters: fine-tuned Mistrals are kept with a tokenizer.model alone, and their code is then read in tokens that they have never seen, as
# students and as teachers. Ordinary sentences are read alike, so nobody notices. Keep the tokenizer.json beside the model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/before"
"$folder/before/bin/pip" install -qq transformers==4.57.3 mistral-common==1.13.1 sentencepiece==0.2.3 protobuf==7.36.2
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0 mistral-common==1.13.1 sentencepiece==0.2.3 protobuf==7.36.2
cat > "$folder/look.py" <<'PY'
import json
import shutil
import sys
from pathlib import Path

import mistral_common
import transformers
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
shutil.copy(Path(mistral_common.__file__).parent / "data/mistral_instruct_tokenizer_240323.model.v3", folder / "tokenizer.model")
(folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
tokenizer = AutoTokenizer.from_pretrained(folder)
print(f"transformers {transformers.__version__}, {type(tokenizer).__name__}")
for piece in ("▁▁", "▁▁▁▁", "▁def"):
    print(f"  {piece}: id {model.piece_to_id(piece)}, score {model.get_score(model.piece_to_id(piece)):.0f}")
for text in ("if x:\n    def f", "a  b"):
    print(f"  {text!r}: {tokenizer.tokenize(text)}, and by SentencePiece {model.encode(text, out_type=str)}")
lines = [line for file in sorted(Path(json.__file__).parent.glob("*.py")) for line in file.read_text().split("\n") if line.strip()]
kinds = {"flush with the margin": [line for line in lines if line[0] != " "], "indented": [line for line in lines if line[0] == " "]}
parts = {}
for kind, own in kinds.items():
    own = ["x\n" + line for line in own]  # so that no text begins with a space
    parts[kind] = sum(tokenizer.encode(line, add_special_tokens=False) != model.encode(line) for line in own) / len(own)
    print(f"  lines of Python's json package that are {kind}: {parts[kind]:.0%} of {len(own)} are other tokens")
if transformers.__version__ < "5":
    sys.exit(any(parts.values()))
sys.exit(not (parts["flush with the margin"] < 0.05 and parts["indented"] > 0.5))
PY
for name in before venv; do
    mkdir "$folder/$name-files"
    "$folder/$name/bin/python" "$folder/look.py" "$folder/$name-files" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
done
