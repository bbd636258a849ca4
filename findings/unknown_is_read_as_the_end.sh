#!/usr/bin/env bash
# transformers 4.57.3, 5.23.0 (5.20.2 and 5.24.0 alike)
#
# T5Tokenizer of transformers 5 takes the token 2 for the unknown one, as in T5's own model, whatever the SentencePiece model says. In
# SentencePiece's own numbering 2 is </s>. It also forgets byte fallback, and use_fast=False changes nothing. No error, no warning.
#
# Seen: "the 猫" ends in '</s>', the eos_token_id, under 5.23.0, also where the model has a token for every byte; under 4.57.3 in <unk>, or in
# three bytes. With T5's ids it ends in <unk> under both.
#
# Why it matters: Japanese language models (GPT-NeoX, GPT-2) are published as a SentencePiece model of this class. Each character that is not in
# the vocabulary then ends the prompt in the middle, and as a reference teaches a student to stop. A text with known characters is read
# right.
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

print(f"transformers {transformers.__version__}")
text = ["the dog sees the fox", "the fox sees the dog", "a fox and a dog see a cat"] * 20
found = {}
for name, settings in {
    "SentencePiece's own ids": {},
    "with byte fallback": {"byte_fallback": True},
    "T5's ids": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
}.items():
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    with open(folder / "spiece.model", "wb") as out:
        SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=out,
            model_type="unigram",
            vocab_size=320,
            hard_vocab_limit=False,
            minloglevel=2,
            **settings,
        )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    model = SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=False)
    own, right = tokenizer.encode("the 猫", add_special_tokens=False), model.encode("the 猫")
    print(
        f"{name} (unknown {model.unk_id()}, end {model.eos_id()}), {type(tokenizer).__name__}: {tokenizer.convert_ids_to_tokens(own)} {own[-3:]}, by SentencePiece {right[-3:]}; eos_token_id is {tokenizer.eos_token_id}"
    )
    found[name] = own == right, own[-1] == tokenizer.eos_token_id
before = [(True, False)] * 3
sys.exit(list(found.values()) != (before if transformers.__version__ < "5" else [(False, True), (False, True), (True, False)]))
PY
for name in before venv; do
    mkdir "$folder/$name-files"
    "$folder/$name/bin/python" "$folder/look.py" "$folder/$name-files" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
done
