#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0
#
# A compiled model checks the length of a table in which transformers enters each class of model that the process builds. Building a model
# of any new class, even if it is thrown away at once, makes torch compile all that was compiled once more.
#
# Seen: one graph after three calls of `generate` with a static cache, and after another model of the same class was built. A second graph
# after a model of another class was built.
#
# Why it matters: distillation loads models of several families in one process. A teacher, a judge or a reward model that is loaded after
# the student has begun to write costs the student's whole compile time again, for each shape of its batches, and each counts towards
# torch's limit of 8 recompilations, past which it runs uncompiled. Load all models before the first text is written.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0
cat > "$folder/classes.py" <<'PY'
import torch
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, Qwen2Config, StaticCache

torch.manual_seed(0)
shape = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
graphs = []


def counting(graph, inputs):
    graphs.append(graph)
    return graph.forward


compiled = CompileConfig(backend=counting, mode=None)
compiled._compile_all_devices = True  # on a GPU, a static cache is enough
student = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()


def write():
    prompt = {"input_ids": torch.tensor([[11, 12, 13]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    cache = StaticCache(config=student.config, max_cache_len=32)
    student.generate(**prompt, max_new_tokens=8, eos_token_id=None, pad_token_id=0, compile_config=compiled, past_key_values=cache)
    return len(graphs)


first = [write() for _ in range(3)]
AutoModelForCausalLM.from_config(LlamaConfig(**shape))
same = write()
AutoModelForCausalLM.from_config(Qwen2Config(**shape))  # a teacher, thrown away at once
other = [write() for _ in range(3)]
print(f"graphs after three calls {first}, after another Llama was built {same}, after a Qwen2 was built and thrown away {other}")
assert first == [1] * 3 and same == 1 and other == [2] * 3
PY
"$folder/venv/bin/python" "$folder/classes.py" 2>/dev/null
