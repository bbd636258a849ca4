#!/usr/bin/env bash
# transformers 5.23.0
#
# `add_eos_token=True` fixes the id that is put behind every text when the tokenizer is loaded. Another EOS that is set afterwards
# (`tokenizer.eos_token = "<|im_end|>"`, as SFTTrainer does it for its `eos_token`) leaves the old one there. Saved and loaded again, the tokenizer
# says `add_eos_token` False and still adds the old EOS. No error, no warning. Only loaded with `add_eos_token=True` given once more it adds the new
# one, and with False none.
#
# Seen: with EOS "</s>" (1), then "<|im_end|>" (2), "a" is [67, 1] before, after, and once loaded again, where `add_eos_token` is False; with
# `add_eos_token=False` given it is [67], with True [67, 2].
#
# Why it matters: a student that is given another end of turn before it is trained on plain texts learns the old end behind them, and a
# prompt that is read with special tokens ends with it, where the tokenizer says that nothing is added.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/look.py" <<'PY'
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

folder = sys.argv[1]
tokens = ["<s>", "</s>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
names = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|im_end|>"]}
PreTrainedTokenizerFast(tokenizer_object=own, **names).save_pretrained(folder)


def show(when, tokenizer):
    print(f"seen: {when}: EOS is {tokenizer.eos_token_id}, add_eos_token {tokenizer.add_eos_token}, 'a' is {tokenizer('a')['input_ids']}")
    return tokenizer.eos_token_id, tokenizer.add_eos_token, (tokenizer("a")["input_ids"] + [None])[1]


tokenizer = AutoTokenizer.from_pretrained(folder, add_eos_token=True)
found = [show("loaded with add_eos_token=True", tokenizer)]
tokenizer.eos_token = "<|im_end|>"
found.append(show("another EOS is set", tokenizer))
tokenizer.save_pretrained(folder)
found.append(show("saved and loaded", AutoTokenizer.from_pretrained(folder)))
found.append(show("loaded with add_eos_token=False", AutoTokenizer.from_pretrained(folder, add_eos_token=False)))
found.append(show("loaded with add_eos_token=True", AutoTokenizer.from_pretrained(folder, add_eos_token=True)))
sys.exit(found != [(1, True, 1), (2, True, 1), (2, False, 1), (2, False, None), (2, True, 2)])
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder/tokenizer" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
