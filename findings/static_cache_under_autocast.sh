#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0
#
# A model with float32 weights writes under bf16 autocast with the default cache, and with cache_implementation="static" it raises. Rotary positions
# make the keys float32 and leave the values bf16; the dynamic cache keeps both as they are, the static one allocates both in the keys'
# dtype and copies without converting.
#
# Seen: four tokens with the default cache; with "static": "index_copy_(): self and source expected to have the same dtype, but got (self)
# Float and (source) BFloat16".
#
# Why it matters: Trainer's bf16=True is float32 weights under autocast, and the wrapper that Accelerate puts around the forward pass stays on for the
# generation of on-policy trainers. generation_kwargs={"cache_implementation": "static"}, with which the decode step would be compiled,
# ends such a run at its first completion. Load the student in bf16, or write outside autocast.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig

torch.manual_seed(0)
shape = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
model = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()
accelerator = Accelerator(cpu=True, mixed_precision="bf16")
unwrapped = accelerator.unwrap_model(accelerator.prepare_model(model))
found = []
for cache in (None, "static"):
    try:
        ids = unwrapped.generate(
            torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 3), min_new_tokens=4, max_new_tokens=4, cache_implementation=cache
        )
        found.append(ids.shape[1] - 3)
    except RuntimeError as error:
        found.append(str(error).partition(",")[0])
    print(f"cache_implementation={cache!r}: {found[-1]}")
sys.exit(found != [4, "index_copy_(): self and source expected to have the same dtype"])
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
