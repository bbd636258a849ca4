#!/usr/bin/env bash
# transformers 5.23.0 (5.20.2 to 5.24.0 alike), gguf 0.19.0
#
# Llama 3's tokenizer has `ignore_merges`: a word that is a token is that token, though no merges lead to it. Hundreds of its tokens are reached in
# no other way, among them frequent words of Vietnamese, Turkish, Czech and Ukrainian (" nhiều", " Việt", " değiş", " розвитку"). A GGUF file
# does not hold this setting; llama.cpp infers it from the name of the pattern (llama-bpe, tekken). transformers does so for tekken.json
# and tiktoken's files, and not for GGUF: a tokenizer read with `gguf_file=` always merges.
#
# Seen: a vocabulary with the token "dog", and merges for "og" alone. "dog" is ["dog"] by tokenizer.json with ignore_merges, and ["d", "og"] by
# the GGUF file with the pattern's name "llama-bpe".
#
# Why it matters: English looks right, so nobody notices. In those languages a teacher in a GGUF file scores spellings that it has
# never met. Set `tokenizer.backend_tokenizer.model.ignore_merges = True`, or pass the original model's tokenizer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 gguf==0.19.0
cat > "$folder/look.py" <<'PY'
import sys

import gguf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "og", "dog", "<end>"]
own = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("o", "g")], ignore_merges=True))
own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
writer = gguf.GGUFWriter(f"{sys.argv[1]}/model.gguf", "llama")
for setting in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count", "head_count_kv"):
    getattr(writer, f"add_{setting}")(8)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(len(tokens))
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("llama-bpe")
writer.add_token_list(tokens)
writer.add_token_types([*[1] * (len(tokens) - 1), 3])  # 3: control
writer.add_token_merges(["o g"])
writer.add_eos_token_id(len(tokens) - 1)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
found = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file="model.gguf")
read = [own.encode("dog").tokens, found.tokenize("dog")]
found.backend_tokenizer.model.ignore_merges = True
read.append(found.tokenize("dog"))
print(f"tokenizer.json with ignore_merges: {read[0]}, GGUF: {read[1]}, GGUF with it set afterwards: {read[2]}")
sys.exit(read != [["dog"], ["d", "og"], ["dog"]])
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
