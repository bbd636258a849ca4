#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3
#
# `tokenizer.pad_token_id = 0` with a vocabulary whose id 0 is text ("!" in GPT-2's, Llama 3's and Qwen's) changes nothing that the tokenizer in
# memory reads or writes. Its save writes "!" as a special token. Loaded again it is one: it cuts the text before all merges ("!=" and "!!"
# are not made any more), and `skip_special_tokens=True` drops each "!". So it is with any role (eos_token, bos_token, ...) and any token of the
# vocabulary. No error, no warning.
#
# Seen: "if x != y: wow!! stop!" has 9 tokens, before and after `pad_token_id = 0`, and is decoded as it was. Saved and loaded, the same text has
# 12 tokens. Encoded and decoded without special tokens it is "if x = y: wow stop". The ids that were trained on are decoded without their last
# "!". A token of its own (`add_special_tokens`) changes nothing. The published tokenizers of Llama 3.2, Qwen2.5 and GPT-2 do the same.
#
# Why it matters: `pad_token_id = 0` is copied from scripts for Llama 1, where 0 is <unk>. A student is then trained with one tokenizer and
# published with another: prompts with code reach it as tokens that it has never seen there, and its "!=" is printed as "=". Nothing shows before
# the tokenizer is loaded again. Compare `encode` before and after a save, or pad with the end of text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXT = "if x != y: wow!! stop!"
MERGES = [("!", "="), ("!", "!"), ("Ġ", "!="), *((word[:n], word[n]) for word in ("if", "Ġx", "Ġy", "Ġwow", "Ġstop") for n in range(1, len(word)))]


def tokenizer():
    """Byte-level BPE. Its first token is "!", as GPT-2's, Llama 3's and Qwen's is."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: n for n, piece in enumerate([*letters, *(first + second for first, second in MERGES)])}
    own = Tokenizer(models.BPE(vocabulary, MERGES))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=own)
    found.add_special_tokens({"eos_token": "</s>"})
    return found


def loaded(own):
    with tempfile.TemporaryDirectory() as saved:
        own.save_pretrained(saved)
        return AutoTokenizer.from_pretrained(saved)


def look(own, ids):
    """How many tokens the text has, it read and written again, and the text of `ids`."""
    read = own.encode(TEXT)
    return len(read), own.decode(read, skip_special_tokens=True), own.decode(ids, skip_special_tokens=True)


found, ids = {}, tokenizer().encode(TEXT)
for name, padded in (("none", {}), ("id 0", {"pad_token_id": 0}), ("of its own", {"pad_token": "<pad>"})):
    own = tokenizer()
    if name == "of its own":
        own.add_special_tokens(padded)
    for key, value in padded.items():
        setattr(own, key, value)
    found[name] = look(own, ids), look(loaded(own), ids)
    for where, seen in zip(("in memory", "saved and loaded"), found[name], strict=True):
        print(f"seen: padding {name}, {where}: {seen[0]} tokens, decoded {seen[1]!r}; the ids from before {seen[2]!r}")
same = (9, TEXT, TEXT)
sys.exit(
    tokenizer().convert_ids_to_tokens(0) != "!"
    or found != {"none": (same, same), "id 0": (same, (12, "if x = y: wow stop", TEXT[:-1])), "of its own": (same, same)}
)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
cat "$folder/seen"
