#!/usr/bin/env bash
# transformers 5.23.0, tiktoken 0.14.0
#
# `convert_tiktoken_to_fast`, transformers' way from a tiktoken encoding to a fast tokenizer, takes the names of the special tokens and not their
# ids: it numbers them one after the other from the end of the vocabulary. tiktoken's own encodings leave ids out there. No error, no warning.
#
# Seen: 258 tokens, <|endoftext|> with id 259 and <|endofprompt|> with 276, the gaps of cl100k_base and o200k_base on a small scale. The converted
# tokenizer has 258 and 259: its <|endofprompt|> is the model's <|endoftext|>. All other ids are the same.
#
# Why it matters: a model with such a vocabulary never sees the end of a text that it was trained on, and takes the end of a prompt for it. A
# teacher with it scores the end of each answer as a token that it has never seen. Give the special tokens' ids to the tokenizer.json by hand.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0 tokenizers==0.23.3 tiktoken==0.14.0 blobfile==3.0.0
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import tiktoken
from transformers import PreTrainedTokenizerFast
from transformers.integrations.tiktoken import convert_tiktoken_to_fast

ranks = {bytes([n]): n for n in range(256)} | {b"th": 256, b"the": 257}
special = {"<|endoftext|>": 259, "<|endofprompt|>": 276}
encoding = tiktoken.Encoding("small", pat_str=r"\p{L}+|\P{L}+", mergeable_ranks=ranks, special_tokens=special)
with tempfile.TemporaryDirectory() as saved:
    convert_tiktoken_to_fast(encoding, saved)
    converted = PreTrainedTokenizerFast.from_pretrained(saved)
text = "the a<|endoftext|>b<|endofprompt|>"
own, other = encoding.encode(text, allowed_special="all"), converted.encode(text)
print(f"seen: {text!r} is {own} to tiktoken and {other} to the converted tokenizer")
sys.exit(not (own == [257, 32, 97, 259, 98, 276] and other == [257, 32, 97, 258, 98, 259]))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
cat "$folder/seen"
