#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3 (transformers 4.57.3 with tokenizers 0.22 alike)
#
# train_new_from_iterator of a tokenizer with byte fallback (Llama-2, Phi-3, Mistral) keeps byte_fallback=True and none of the 256 tokens for
# bytes, and its merges cross spaces, since such a tokenizer has no pre-tokenizer. No error, no warning.
#
# Seen: the published one reads "the 猫 é\n12" without loss. Trained anew it has 0 tokens for bytes, gives "the <unk> <unk>" back, and
# a whole sentence is one token.
#
# Why it matters: it is the documented way to a vocabulary of one's own for a student. Newlines, digits and letters that the corpus lacks are then
# <unk>, several of them one, and nothing can be compared with the teacher's reading there. Train a byte-level tokenizer instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/look.py" <<'PY'
import sys

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
# as the tokenizer.json of Llama-2, Phi-3 and Mistral is made up: every byte has a token
tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz", "th", "the"]
merges = [("t", "h"), ("th", "e")]
backend = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
first = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
second = first.train_new_from_iterator(iter([["the dog sees the fox and the fox sees the dog"] * 20]), 1000)
found = []
for name, tokenizer in (("as published", first), ("trained anew", second)):
    ids = tokenizer.encode("the 猫 é\n12", add_special_tokens=False)
    rows = sum(f"<0x{byte:02X}>" in tokenizer.get_vocab() for byte in range(256))
    model = tokenizer.backend_tokenizer.model
    print(
        f"{name}: {rows} tokens for bytes, byte_fallback {model.byte_fallback}, unk_token {model.unk_token!r}; 'the 猫 é\\n12' is {tokenizer.convert_ids_to_tokens(ids)}, decoded {tokenizer.decode(ids)!r}"
    )
    found.append((rows, tokenizer.decode(ids) == "the 猫 é\n12"))
longest = max(second.get_vocab(), key=len)
print(f"its longest token: {longest!r}")
sys.exit(found != [(256, True), (0, False)] or "▁" not in longest[1:])
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
