#!/usr/bin/env bash
# transformers 5.23.0
#
# Many a tokenizer.json of Mistral's models on the hub splits text by a wrong pattern, and transformers warns of it and asks for fix_mistral_regex=True.
# In a local folder the flag does something only where a config.json lies beside, of a Mistral type, written by a transformers older than 5.
# Once a model has been saved by transformers 5 with the wrong tokenizer, or the tokenizer alone, the warning is gone, and the flag is
# taken without a word and changes nothing.
#
# Seen: "aBoSto" is a B oS to by the wrong pattern and a B o S to by Mistral's. With the flag it is the latter where config.json says
# "transformers_version": "4.57.1", and still the former where it says "5.23.0", and without config.json.
#
# Why it matters: a student that is trained, saved and distilled again, or a server's teacher of which only the tokenizer is here, is read with the
# wrong tokens though the caller has asked for the right ones. Replace the pre-tokenizer's pattern yourself, or load the original with
# the flag and pass that tokenizer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

wrong = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
others = [f"<unused{n}>" for n in range(100_000)]  # transformers looks at large vocabularies alone
tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "oS", "to", *others]
backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("o", "S"), ("t", "o")]))
backend.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(wrong), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
)
backend.decoder = decoders.ByteLevel()
folder, found = Path(sys.argv[1]), {}
PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
for version in (None, "4.57.1", "5.23.0"):
    if version is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "transformers_version": version}))
    for flag in ({}, {"fix_mistral_regex": True}):
        tokenizer = AutoTokenizer.from_pretrained(folder, **flag)
        found[version, bool(flag)] = tokenizer.tokenize("aBoSto")
        beside = "no config.json" if version is None else f"config.json of transformers {version}"
        print(f"{beside}, {flag}: {found[version, bool(flag)]}")
right = [key for key, read in found.items() if read == ["a", "B", "o", "S", "to"]]
sys.exit(right != [("4.57.1", True)] or any(read != ["a", "B", "oS", "to"] for key, read in found.items() if key not in right))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
