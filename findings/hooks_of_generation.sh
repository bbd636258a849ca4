#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# trl.models.utils.unwrap_model_for_generation switches gradient checkpointing off for the length of a generation and on again after it.
# Each time it leaves one more forward hook on the model's input embeddings (the one that makes their output require gradients), since
# switching off does not take the old one away. No error, no warning.
#
# Seen: 1, 2, 3, 4, 5 hooks before each of five generations.
#
# Why it matters: on-policy training generates at every step, so a run of ten thousand steps calls ten thousand hooks a forward pass; and
# a model that torch has compiled is compiled anew after each generation, because its hooks have changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.models.utils import unwrap_model_for_generation

shape = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
model, accelerator = AutoModelForCausalLM.from_config(LlamaConfig(**shape)), Accelerator(cpu=True)
model.gradient_checkpointing_enable()
prompt = {"input_ids": torch.tensor([[11, 12, 13]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
hooks = []
for _ in range(5):
    hooks.append(len(model.get_input_embeddings()._forward_hooks))
    with unwrap_model_for_generation(model, accelerator) as unwrapped:
        unwrapped.generate(**prompt, max_new_tokens=2, pad_token_id=0)
print(f"forward hooks on the embeddings before each of five generations: {hooks}")
sys.exit(hooks != [1, 2, 3, 4, 5])
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | tail -1
