#!/usr/bin/env bash
# tokenizers 0.23.3, transformers 5.23.0
#
# Tokens that are added to a vocabulary are numbered from its size on. Where its ids have holes, that is not behind its largest id: they get
# ids in the holes, and then ids that other tokens have. Two tokens share an id, and it is decoded as the added one. `add_tokens`,
# `add_special_tokens`, `eos_token=...` and a save all do so without an error. `len(tokenizer)` counts such an id twice.
#
# Seen: letters with the ids 0 to 252 and 256 to 258. The three special tokens added to it get 256, 257 and 258, which are x, y and z, and the
# end of text is y. "xyz box" is encoded with these ids, and decoded as "<s></s><pad> bo<s>", or, without special tokens, as " bo". So it is after
# saving and loading. Without the hole all is well.
#
# Why it matters: ids with holes are what a vocabulary has after tokens were taken out without numbering the others anew, and what tiktoken's
# published encodings have. A chat token or padding that is added to it for distillation then ends a text at a letter, and `skip_special_tokens`
# drops letters from what the teacher reads. Compare len(set(vocab.values())) with len(vocab) after adding.
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

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEXT = "xyz box"


def tokenizer_of(holes):
    """One token a letter; x, y and z have the last ids, behind `holes` ids that no token has."""
    letters = [letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter not in "xyz"]
    vocabulary = {letter: n for n, letter in enumerate(letters)}
    vocabulary |= {letter: len(letters) + holes + n for n, letter in enumerate("xyz")}
    own = Tokenizer(models.BPE(vocabulary, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def look(tokenizer):
    ids = tokenizer.encode(TEXT)
    shared = len(tokenizer) - len(set(tokenizer.get_vocab().values()))
    return shared, tokenizer.eos_token_id in ids, tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)


found = {}
for holes in (0, 3):
    own = tokenizer_of(holes)
    with tempfile.TemporaryDirectory() as saved:
        own.save_pretrained(saved)
        read = AutoTokenizer.from_pretrained(saved)
    found[holes] = look(own)
    shared, ends, text, bare = found[holes]
    print(f"seen: {holes} ids left out: {shared} ids have two tokens, end of text in {TEXT!r}: {ends}; decoded {text!r}, {bare!r}", end="")
    print(f"; saved and read the same: {look(read) == found[holes]}")
    found[holes] = (*found[holes], look(read) == found[holes])
sys.exit(found != {0: (0, False, TEXT, TEXT, True), 3: (3, True, "<s></s><pad> bo<s>", " bo", True)})
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
cat "$folder/seen"
