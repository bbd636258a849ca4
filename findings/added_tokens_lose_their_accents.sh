#!/usr/bin/env bash
# tokenizers 0.23.3, transformers 5.23.0
#
# A byte-level decoder (GPT-2, Llama 3, Qwen, DeepSeek) takes the letters of every token for names of bytes, those of added tokens too. Of an added
# token that has letters of Latin-1 it makes other bytes: "é" is the name of byte E9, which is no text. `add_tokens` takes it, `encode` finds it, and
# `decode` writes U+FFFD, without an error. If one character of the token is not such a name (a space, a Cyrillic or Chinese letter),
# the whole token is written as it is.
#
# Seen: "<réponse>", "<größe>" and "<¿>" are encoded as one token each, and decoded as "<r?ponse>", "<gr??e>" and "<?>", with U+FFFD for each "?".
# "<ответ>", "<答え>" and "<ma réponse>" come back as they were. So do all of them with a tokenizer that has byte fallback (Llama 2).
# Saved and loaded, nothing changes. The published tokenizers of Llama 3.2, Qwen2.5, GPT-2 and DeepSeek-V3 do the same.
#
# Why it matters: markup in French, German or Spanish that is added to a student for distillation is trained as a token and never read again:
# a reward function or a parser looks for "<réponse>" in decoded text and finds none, and a teacher that is handed the decoded completion reads
# U+FFFD. Compare decode(encode(token)) with each token that you add, or spell markup in ASCII.
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

LATIN, OTHERS = ["<réponse>", "<größe>", "<¿>"], ["<ответ>", "<答え>", "<ma réponse>"]
LOST = "\N{REPLACEMENT CHARACTER}"


def byte_level():
    own = Tokenizer(models.BPE({piece: n for n, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own)


def byte_fallback():
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    own = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")


def written(tokenizer):
    """What becomes of "a", the token and "b"; None if the token is not encoded as one."""
    found = []
    for token in LATIN + OTHERS:
        ids = tokenizer.encode(f"a{token}b", add_special_tokens=False)
        found.append(tokenizer.decode(ids) if len(ids) == 3 else None)
    return found


found = {}
for name, tokenizer in (("byte-level", byte_level()), ("byte fallback", byte_fallback())):
    tokenizer.add_tokens(LATIN + OTHERS)
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        loaded = AutoTokenizer.from_pretrained(saved)
    found[name] = written(tokenizer)
    print(f"seen: {name}: {', '.join(map(repr, found[name]))}; saved and loaded the same: {written(loaded) == found[name]}")
    found[name].append(written(loaded) == found[name])
whole = [f"a{token}b" for token in LATIN + OTHERS]
spoilt = [f"a<r{LOST}ponse>b", f"a<gr{LOST}{LOST}e>b", f"a<{LOST}>b"]
sys.exit(found != {"byte-level": [*spoilt, *whole[3:], True], "byte fallback": [*whole, True]})
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
cat "$folder/seen"
