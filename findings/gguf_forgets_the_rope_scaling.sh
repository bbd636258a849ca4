#!/usr/bin/env bash
# transformers 5.23.0, gguf 0.19.0
#
# A model read from a GGUF file (`gguf_file=`) has unscaled rotary embeddings. Llama 3.1 and later keep their scaling in a tensor of the file,
# rope_freqs.weight; YaRN's and the linear one of Gemma 3 stand in its metadata, as rope.scaling.*. Neither is read. No error, no warning: the
# config says rope_type "default", and max_position_embeddings is the scaled model's. For gpt-oss alone the metadata is looked at, and a file with
# YaRN, which gpt-oss is published with, is a TypeError.
#
# Seen: a model with Llama-3.2-1B's scaling (32 times from 8192 tokens), written to a file as llama.cpp's converter writes it: what is read has the
# logits of the unscaled model, to the last bit. Its log-probs differ from the original's by .000 at the first token, by more than .1 within
# tokens 256 to 511, far below 8192, and by more than that later. Qwen2 and Qwen3 with YaRN and Gemma 3 with a linear factor of 8: "default".
#
# Why it matters: a GGUF file is the cheap way to hold a large teacher. Its scores drift from what llama.cpp would say of the same file, the further
# the longer the answer, and look sound at the first tokens, where one checks. Give the config of the original model:
# from_pretrained(folder, gguf_file=..., config=AutoConfig.from_pretrained(original)).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0
cat > "$folder/look.py" <<'PY'
import sys

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder, THETA, HEADS = sys.argv[1], 500000.0, 2
SCALING = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def llama(**rope):
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=HEADS, vocab_size=64, rms_norm_eps=1e-5)
    further = dict(max_position_embeddings=131072, initializer_range=0.1, tie_word_embeddings=False)
    return LlamaForCausalLM(LlamaConfig(**sizes, **further, rope_parameters=dict(rope_theta=THETA, **rope))).eval()


def begun(name, architecture, embedding, layers, theta):
    writer = gguf.GGUFWriter(f"{folder}/{name}", architecture)
    writer.add_context_length(131072)
    writer.add_block_count(layers)
    writer.add_embedding_length(embedding)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(64)
    return writer


def ended(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def written(model, factors):
    """As llama.cpp's converter does it, which keeps the rows of queries and keys in another order."""
    writer = begun("llama.gguf", "llama", 128, 2, THETA)
    writer.add_rope_dimension_count(64)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer.add_tensor("rope_freqs.weight", factors.numpy())
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            weight = weight.view(HEADS, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(weight.numpy()))
    ended(writer)


def rope_of(architecture, kind, factor, original):
    """What a file with a scaling in its metadata is read as; its embeddings alone are there."""
    name = f"{architecture}.gguf"
    writer = begun(name, architecture, 64, 1, 1000000.0)
    writer.add_key_length(32)
    writer.add_rope_scaling_type(kind)
    writer.add_rope_scaling_factor(factor)
    if original:
        writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    ended(writer)
    try:
        rope = AutoConfig.from_pretrained(folder, gguf_file=name).rope_parameters
    except Exception as error:
        return type(error).__name__
    return rope.get("full_attention", rope)["rope_type"]


original, unscaled = llama(**SCALING), llama(rope_type="default")
written(original, unscaled.model.rotary_emb.inv_freq / original.model.rotary_emb.inv_freq)
read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="llama.gguf", dtype=torch.float32).eval()
given = AutoModelForCausalLM.from_pretrained(folder, gguf_file="llama.gguf", dtype=torch.float32, config=original.config).eval()
text = torch.randint(0, 64, (1, 1024))
with torch.no_grad():
    expected, found, plain, mended = (model(text).logits[0].log_softmax(-1) for model in (original, read, unscaled, given))
print(f"seen: written with rope_type {original.config.rope_parameters['rope_type']!r}, read as {read.config.rope_parameters}")
apart = [(expected - found)[part].abs().max().item() for part in (slice(0, 1), slice(1, 64), slice(256, 512), slice(768, 1024))]
print(f"seen: log-probs differ by {apart[0]:.3f} at token 0, by up to {apart[1]:.3f}, {apart[2]:.3f}, {apart[3]:.3f} in tokens 1-63, 256-511, 768-1023")
print(f"seen: from the unscaled model's by {(found - plain).abs().max():.6f}; with the original's config, from the original's by {(expected - mended).abs().max():.6f}")
yarn, linear = gguf.RopeScalingType.YARN, gguf.RopeScalingType.LINEAR
kinds = {
    "qwen2": rope_of("qwen2", yarn, 4.0, 32768),
    "qwen3": rope_of("qwen3", yarn, 4.0, 32768),
    "gemma3": rope_of("gemma3", linear, 8.0, None),
    "gpt-oss": rope_of("gpt-oss", yarn, 32.0, 4096),
}
for name, kind in kinds.items():
    print(f"seen: {name} with a scaling in its metadata: {kind}")
holds = read.config.rope_parameters["rope_type"] == "default" and torch.equal(found, plain) and apart[0] < 1e-4 < 0.1 < apart[2]
holds &= (expected - mended).abs().max().item() < 1e-4
sys.exit(not (holds and kinds == {"qwen2": "default", "qwen3": "default", "gemma3": "default", "gpt-oss": "TypeError"}))
PY
mkdir "$folder/model"
"$folder/venv/bin/python" "$folder/look.py" "$folder/model" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
grep '^seen' "$folder/seen"
