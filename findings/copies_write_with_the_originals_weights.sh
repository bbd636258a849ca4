#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0
#
# After one `generate` with a static cache, which transformers compiles by itself on a GPU, the model keeps the compiled call as
# `model._compiled_call`, bound to itself. `copy.deepcopy(model)` copies the attribute as it is. The copy's own `generate` with a static
# cache then reads the prompt with the copy's weights and writes every further token with the original's, without an error or a warning.
#
# Seen: two copies with the same new weights. The one that was copied before the original had written gives the same greedy text compiled
# and uncompiled. Of the one copied afterwards, the first token is its own and the other 11 of 12 are not.
#
# Why it matters: a teacher, a reference or an average of weights is often a deep copy of a student that has written already. What it
# then writes is the student's text, and its forward passes, with which the text is scored, are its own.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0
cat > "$folder/copies.py" <<'PY'
import copy

import torch
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig

torch.manual_seed(0)
shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=500, initializer_range=0.3, **shape)).eval()
compiled = CompileConfig(backend="eager", mode=None)  # the same with inductor
compiled._compile_all_devices = True  # on a GPU, a static cache is enough
options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
static = {**options, "cache_implementation": "static", "compile_config": compiled}
prompt = {"input_ids": torch.tensor([[11, 12, 13]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}


def text(model, **how):
    return model.generate(**prompt, **how)[0, 3:].tolist()


before = copy.deepcopy(model)
text(model, **static)
after = copy.deepcopy(model)
found = []
for copied in (before, after):
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.normal_(0, 0.3)
    found.append((text(copied, **options), text(copied, **static)))
names = "a copy made before the original has written compiled", "a copy made afterwards"
for name, (plain, static_text) in zip(names, found):
    print(f"{name}:\n  uncompiled {plain}\n  compiled   {static_text}")
wrong = sum(a != b for a, b in zip(*found[1]))
print(f"of 12 greedy tokens of the later copy, {wrong} are not its own; the call is bound to the original: {after._compiled_call is model._compiled_call}")
assert found[0][0] == found[0][1] == found[1][0] and wrong and found[1][0][0] == found[1][1][0]
PY
"$folder/venv/bin/python" "$folder/copies.py" 2>/dev/null
