#!/usr/bin/env bash
# transformers 5.23.0 (5.20.2 to 5.24.0 alike), gguf 0.19.0
#
# How a byte-level BPE in a GGUF file splits text before it merges is a name, `tokenizer.ggml.pre`. transformers knows 23 of these names. For
# every other one, and for none, it splits as GPT-2 does, without a warning; llama.cpp refuses a name that it does not know. Among the others
# are GLM-4's (glm4, chatglm-bpe), DeepSeek's (deepseek-llm, deepseek-coder, deepseek-v3), kimi-k2, hunyuan, smollm, starcoder, command-r.
#
# Seen: a file with the pattern's name "llama-bpe" reads "a\n\nb" with the token for two newlines; with "glm4", whose pattern in
# llama.cpp is the same, as two newlines, and so with "no such name".
#
# Why it matters: the teacher's tokenizer is read from the GGUF file where nothing else lies beside it. Paragraph breaks, numbers and
# contractions are then tokens that the model has hardly met in its training, and its scores of them are those of another spelling. Pass the
# original model's tokenizer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 gguf==0.19.0
cat > "$folder/look.py" <<'PY'
import sys

import gguf
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokens = [*letters, "ĊĊ", "<end>"]
found = {}
for name in ("llama-bpe", "glm4", "no such name"):
    writer = gguf.GGUFWriter(f"{sys.argv[1]}/model.gguf", "llama")
    for setting in ("context_length", "embedding_length", "block_count", "feed_forward_length", "head_count", "head_count_kv"):
        getattr(writer, f"add_{setting}")(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types([*[1] * (len(tokens) - 1), 3])  # 3: control
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found[name] = AutoTokenizer.from_pretrained(sys.argv[1], gguf_file="model.gguf").tokenize("a\n\nb")
    print(f"{name}: {found[name]}")
split = ["a", "Ċ", "Ċ", "b"]
sys.exit(found != {"llama-bpe": ["a", "ĊĊ", "b"], "glm4": split, "no such name": split})
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
