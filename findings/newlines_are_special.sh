#!/usr/bin/env bash
# transformers 5.23.0, sentencepiece 0.2.1
#
# A SentencePiece model may have user-defined symbols: newlines, runs of spaces, tags, which are text (Gemma's has some hundred).
# Loaded from `tokenizer.model`, without a `tokenizer.json`, transformers puts all of them into `all_special_ids`, although each
# one's own AddedToken says special=False. `decode(..., skip_special_tokens=True)` goes by the AddedToken and keeps them.
#
# Seen: ids of "\n", "▁▁" and "<tool>" are in all_special_ids for LlamaTokenizer and GemmaTokenizer; special=False; decoded text whole.
#
# Why it matters: "special" decides what a teacher with another tokenizer reads. Code that drops or masks `all_special_ids` loses every
# newline of the student's text without a word: lists and code become one line. Special is what the AddedToken says, and what has a role.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0 sentencepiece==0.2.1 protobuf==6.33.0
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

from sentencepiece import SentencePieceTrainer
from transformers import AutoTokenizer

folder, symbols = Path(sys.argv[1]), ["\n", "▁▁", "<tool>"]
lines = ["one two three and four", "the quick brown fox jumps over the lazy dog", "what is the sum of five and six?"] * 20
SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=330, byte_fallback=True,
    normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=symbols, minloglevel=2,
)
listed = 0
for family in ("LlamaTokenizer", "GemmaTokenizer"):
    names = {"tokenizer_class": family, "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(symbols)
    special = [i in tokenizer.all_special_ids for i in ids]
    marked = [tokenizer.added_tokens_decoder[i].special for i in ids]
    text = tokenizer.decode(tokenizer.encode("one\n  two", add_special_tokens=False), skip_special_tokens=True)
    kept = [i for i in tokenizer.encode("one\n  two", add_special_tokens=False) if i not in tokenizer.all_special_ids]
    print(f"{family}: in all_special_ids {special}, special=True {marked}")
    print(f"  skip_special_tokens=True: {text!r}; without all_special_ids: {tokenizer.decode(kept)!r}")
    listed += all(special) and not any(marked)
sys.exit(listed != 2)
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2>/dev/null
