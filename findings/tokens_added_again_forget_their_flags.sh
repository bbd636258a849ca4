#!/usr/bin/env bash
# tokenizers 0.23.3, transformers 5.23.0
#
# `add_special_tokens` and `add_tokens` with the name of a token that the tokenizer has already give it the flags of a new one: a token that
# swallowed the white space behind it (`rstrip`, as Phi-3's turn tokens do) no longer does. They return 1, though the tokenizer has as many tokens as
# before. `add_special_tokens({"eos_token": "<|end|>"})` is such a call, `tokenizer.eos_token = "<|end|>"` is not. What is saved has the new
# flags. No error, no warning.
#
# Seen: "<|user|>\nhi<|end|>\n<|assistant|>\n" are four tokens before and five after each of the three calls, with the line break
# behind "<|end|>", in memory and saved and loaded again; after the assignment they are four.
#
# Why it matters: naming a chat template's end of turn as EOS or padding before a student is trained puts a token behind every turn that the model
# has never seen there, in what is learned, sampled after and scored.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXT = "<|user|>\nhi<|end|>\n<|assistant|>\n"


def fresh():
    """A tokenizer whose turn tokens swallow the white space behind them, as Phi-3's do."""
    tokens = ["<s>", "</s>", "hi", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, [("h", "i")]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own.add_special_tokens([AddedToken(name, normalized=False, rstrip=True) for name in ("<|user|>", "<|end|>", "<|assistant|>")])
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>")


def assign(tokenizer):
    tokenizer.eos_token = "<|end|>"
    return 0


ways = {
    "nothing": lambda tokenizer: 0,
    'eos_token = "<|end|>"': assign,
    'add_special_tokens({"eos_token": "<|end|>"})': lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<|end|>"}),
    'add_special_tokens({"pad_token": "<|end|>"})': lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<|end|>"}),
    'add_tokens(["<|end|>"])': lambda tokenizer: tokenizer.add_tokens(["<|end|>"]),
}
found = []
for name, change in ways.items():
    tokenizer = fresh()
    count = change(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder)
    texts = [own.convert_ids_to_tokens(own.encode(TEXT, add_special_tokens=False)) for own in (tokenizer, again)]
    found.append([len(text) for text in texts] + [len(tokenizer)])
    print(f"seen: {name} ({count} added, {len(tokenizer)} tokens): {texts[0]}, loaded again {'the same' if texts[0] == texts[1] else texts[1]}")
sys.exit(found != [[4, 4, 262]] * 2 + [[5, 5, 262]] * 3)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
