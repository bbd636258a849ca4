#!/usr/bin/env bash
# transformers 4.57.3, 5.23.0 (5.20.2 and 5.24.0 alike)
#
# LlamaTokenizer of transformers 5 takes the vocabulary of a SentencePiece model (tokenizer.model without a tokenizer.json) and nothing else: its
# normalizer, remove_extra_whitespaces and add_dummy_prefix=False are forgotten. use_fast=False, under which transformers 4 gave the text to
# SentencePiece itself, changes nothing. No error, no warning.
#
# Seen: "the ﬁne  fox" (with the ligature ﬁ, and two spaces) is read alike for four models under 5.23.0; SentencePiece and 4.57.3 read
# four times otherwise: without "▁" at the beginning, with one space, with "fine".
#
# Why it matters: models of the Llama class with a SentencePiece model of their own, whose cards ask for use_fast=False, read tokens that they
# have never seen. Where the dummy prefix is forgotten, it is the first token of every text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/before"
"$folder/before/bin/pip" install -qq transformers==4.57.3 sentencepiece==0.2.3 protobuf==7.36.2
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0 sentencepiece==0.2.3 protobuf==7.36.2
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

import transformers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
KINDS = {
    "as Llama's": LLAMA,
    "add_dummy_prefix=False": {**LLAMA, "add_dummy_prefix": False},
    "remove_extra_whitespaces=True": {**LLAMA, "remove_extra_whitespaces": True},
    "normalization_rule_name=nmt_nfkc": {**LLAMA, "normalization_rule_name": "nmt_nfkc"},
}
print(f"transformers {transformers.__version__}")
text = ["the dog sees the fox", "the fine fox sees the dog", "f i n e"] * 20
right = []
for name, settings in KINDS.items():
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    with open(folder / "tokenizer.model", "wb") as out:
        SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=out,
            model_type="bpe",
            vocab_size=400,
            hard_vocab_limit=False,
            minloglevel=2,
            **settings,
        )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    own, expected = tokenizer.tokenize("the ﬁne  fox"), model.encode("the ﬁne  fox", out_type=str)
    print(f"{name}, {type(tokenizer).__name__}: {own}" + ("" if own == expected else f", by SentencePiece {expected}"))
    right.append(own == expected)
sys.exit(right != ([True] * 4 if transformers.__version__ < "5" else [True, False, False, False]))
PY
for name in before venv; do
    mkdir "$folder/$name-files"
    "$folder/$name/bin/python" "$folder/look.py" "$folder/$name-files" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
done
