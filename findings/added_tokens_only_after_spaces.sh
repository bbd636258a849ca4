#!/usr/bin/env bash
# tokenizers 0.23.3, transformers 5.23.0
#
# A tokenizer.json whose normalizer puts "▁" before a text (Prepend: Llama 2's and Phi-3's own files) does so with added tokens too, unless
# they are special or say normalized=False. `add_tokens(["<tool>"])` adds what is "▁<tool>" after normalizing: it is found at the beginning of a
# text and after a space, and nowhere else. `encode` gives no error; "<tool>" after a letter, a line break or a bracket is its pieces.
#
# Seen: "<tool>" and "x <tool>" have the added token, "x<tool>", "(<tool>" and a line break before it have not. With AddedToken("<tool>",
# normalized=False), as a special token, or with Metaspace in the place of the normalizer, all five have. Saved and loaded the same.
#
# Why it matters: markup that is added to a student (calls, thoughts, roles) stands after line breaks and other markup, not after spaces. Its
# rows are then never trained, and the same text is read as other tokens by transformers 5's LlamaTokenizer, which has Metaspace, than by what
# reads the file itself (PreTrainedTokenizerFast, tokenizers). Add markup with normalized=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXTS = ["<tool>", "x <tool>", "x<tool>", "(<tool>", "x\n<tool>"]


def tokenizer(metaspace=False):
    """Normalizer and decoder are those of Llama 2's tokenizer.json, or Metaspace, as LlamaTokenizer has."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁x<>(tol"]
    own = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    if metaspace:
        own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    own.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")


def found_in(own):
    return [own.convert_tokens_to_ids("<tool>") in own.encode(text, add_special_tokens=False) for text in TEXTS]


ways = {
    'add_tokens(["<tool>"])': (tokenizer(), "<tool>", {}),
    "normalized=False": (tokenizer(), AddedToken("<tool>", normalized=False), {}),
    "special": (tokenizer(), "<tool>", {"special_tokens": True}),
    "Metaspace": (tokenizer(metaspace=True), "<tool>", {}),
}
found = {}
for name, (own, token, options) in ways.items():
    own.add_tokens([token], **options)
    with tempfile.TemporaryDirectory() as saved:
        own.save_pretrained(saved)
        loaded = AutoTokenizer.from_pretrained(saved)
    found[name] = found_in(own)
    print(f"seen: {name}: in {[text for text, one in zip(TEXTS, found[name], strict=True) if one]}", end="")
    print(f", not in {[text for text, one in zip(TEXTS, found[name], strict=True) if not one]}; loaded the same: {found_in(loaded) == found[name]}")
    found[name].append(found_in(loaded) == found[name])
first, *others = found.values()
sys.exit(first != [True, True, False, False, False, True] or any(other != [True] * 6 for other in others))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
cat "$folder/seen"
