#!/usr/bin/env bash
# tokenizers 0.23.3, transformers 5.23.0
#
# A tokenizer with byte fallback (Llama 2, Mistral, Gemma, Phi-3) spells characters that it has no token for as byte tokens. Where a text ends
# within such a character, `decode` does not lose that character alone: all byte tokens that stand side by side become U+FFFD, one for each
# byte, back to the last token that is not a byte. A byte-level tokenizer (GPT-2, Llama 3, Qwen) loses the one character. Both keep the text
# without an error.
#
# Seen: "ok: " and 24 letters of Ethiopic without a space, 72 byte tokens. Without the last byte, "ok: " and 71 times U+FFFD: 24 letters are lost,
# where the byte-level tokenizer loses one. A byte that is missing in the middle does the same to the letters on both sides. Decoded
# after each token that is written, the text is whole after each third one and all U+FFFD after the two others.
#
# Why it matters: `max_new_tokens` cuts completions anywhere. Rewards, logs and methods that hand the decoded text to a teacher (GOLD) then read
# a completion in Khmer, Lao, Amharic, or one of emoji, as nothing but U+FFFD since its last space, though the student wrote one byte too few. Each
# U+FFFD is three bytes or more to the teacher, whose scores go to tokens that were right. With Llama 2's published tokenizer, a greeting in
# Lao of 40 tokens has no letter left if one token is missing. Cut the ids at the last whole character before decoding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0 tokenizers==0.23.3
cat > "$folder/look.py" <<'PY'
import sys

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "".join(chr(0x1200 + 8 * n) for n in range(24))  # Ethiopic, three bytes each
TEXT, LOST = f"ok: {LETTERS}", "\N{REPLACEMENT CHARACTER}"


def with_byte_fallback():
    """Normalizer and decoder are those of Llama 2's tokenizer.json."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ok:"]
    own = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    own.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")


def of_bytes():
    own = Tokenizer(models.BPE({piece: n for n, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own)


found = {}
for name, tokenizer in (("byte fallback", with_byte_fallback()), ("byte-level", of_bytes())):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    middle = len(ids) - 36
    texts = {
        "whole": tokenizer.decode(ids),
        "without the last byte": tokenizer.decode(ids[:-1]),
        "without one in the middle": tokenizer.decode([*ids[:middle], *ids[middle + 1 :]]),
    }
    found[name] = {what: (sum(c in LETTERS for c in text), text.count(LOST)) for what, text in texts.items()}
    found[name]["kept while written"] = [sum(c in LETTERS for c in tokenizer.decode(ids[: len(ids) - back])) for back in (2, 1, 0)]
    for what, seen in found[name].items():
        said = f"{seen} letters after the last three tokens" if isinstance(seen, list) else f"{seen[0]} of {len(LETTERS)} letters, {seen[1]} times U+FFFD"
        print(f"seen: {name}, {what}: {said}")
fallback, level = found["byte fallback"], found["byte-level"]
sys.exit(
    fallback
    != {
        "whole": (24, 0),
        "without the last byte": (0, 71),
        "without one in the middle": (0, 71),
        "kept while written": [0, 0, 24],
    }
    or level["whole"] != (24, 0)
    or level["without the last byte"] != (23, 1)
    or level["without one in the middle"][0] != 23
    or level["kept while written"] != [23, 23, 24]
)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
cat "$folder/seen"
