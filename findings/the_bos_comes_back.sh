#!/usr/bin/env bash
# transformers 5.23.0, 4.57.3
#
# A tokenizer of Llama's class whose tokenizer_config.json has `add_bos_token: false`, as Phi-3's, puts no BOS before a text, in transformers 4 and 5
# alike. transformers 5 leaves that setting out when it saves the tokenizer. It reads its own folder without a BOS, since its tokenizer.json says so;
# transformers 4 takes its default, True, and puts a BOS before every text. No error, no warning.
#
# Seen: such a tokenizer as transformers 4 writes it: "hi" is [262] under 4.57.3 and 5.23.0. Saved by 5.23.0, it is [262] under 5.23.0 and [1, 262]
# under 4.57.3. With `"add_bos_token": false` put back into tokenizer_config.json, [262] under both.
#
# Why it matters: a student that was trained with transformers 5 and is served or evaluated where transformers 4 is installed reads a token that it has
# not seen there before every text that is not rendered by a chat template. Put the setting back after `save_pretrained`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile transformers==5.23.0 jinja2==3.1.6 requests==2.32.5
"$folder/venv/bin/pip" install -qq --no-compile --no-deps --target "$folder/before" transformers==4.57.3 tokenizers==0.22.1 huggingface-hub==0.36.0
cat > "$folder/write.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

special = ["<unk>", "<s>", "</s>"]
tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "i", "▁hi", "hi"]
vocabulary = {token: n for n, token in enumerate(tokens)}
own = Tokenizer(models.BPE(vocabulary, [("h", "i"), ("▁", "hi")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
own.add_special_tokens([AddedToken(token, normalized=False) for token in special])
folder = Path(sys.argv[1])
folder.mkdir()
own.save(str(folder / "tokenizer.json"))
names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}
(folder / "tokenizer_config.json").write_text(json.dumps({**names, **settings}))
PY
cat > "$folder/look.py" <<'PY'
import json
import sys

import transformers
from transformers import AutoTokenizer

name, expected, *target = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name)
ids = tokenizer("hi")["input_ids"]
print(f"seen: {name.rsplit('/')[-1]}, read by {transformers.__version__}: 'hi' is {ids}")
if target:
    tokenizer.save_pretrained(target[0])
sys.exit(ids != json.loads(expected))
PY
look() {
    PYTHONPATH=$1 "$folder/venv/bin/python" "$folder/look.py" "${@:2}" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
}
"$folder/venv/bin/python" "$folder/write.py" "$folder/as_published"
look "$folder/before" "$folder/as_published" "[262]"
look "" "$folder/as_published" "[262]" "$folder/saved_by_5"
look "" "$folder/saved_by_5" "[262]"
look "$folder/before" "$folder/saved_by_5" "[1, 262]"
cp -r "$folder/saved_by_5" "$folder/put_back"
sed -i '1s/{/{"add_bos_token": false,/' "$folder/put_back/tokenizer_config.json"
look "" "$folder/put_back" "[262]"
look "$folder/before" "$folder/put_back" "[262]"
