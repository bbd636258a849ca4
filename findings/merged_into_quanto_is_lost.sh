#!/usr/bin/env bash
# peft 0.21.2 with optimum-quanto 0.2.7 (transformers 5.23.0, torch 2.13.0)
#
# PEFT takes a layer that quanto quantized for a plain linear one, and adds the adapter to a copy of its weight: quanto unpacks the
# weight at each access. `merge_and_unload` returns the model without what was trained, and `merge_adapter` leaves the adapter out,
# without an error.
#
# Seen: an adapter that moves logits by 6; merged, they are those of the base model to the bit.
#
# Why it matters: the adapter of a student that was trained on quanto's weights is merged to be served, and what is served is the student
# as it was before the training. Merge it into the plain weights.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 optimum-quanto==0.2.7
cat > "$folder/look.py" <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, QuantoConfig

torch.manual_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)).save_pretrained(sys.argv[1])
ids, found = torch.arange(64)[None], []
with torch.no_grad():
    for config in (None, QuantoConfig(weights="int8")):
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
        base = model(ids).logits
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        adapted, merged = model(ids).logits, model.merge_and_unload()(ids).logits
        found.append([(one - other).abs().max().item() for one, other in ((adapted, base), (merged, adapted), (merged, base))])
        moved, off, still = found[-1]
        print(f"{'quanto int8' if config else 'plain weights'}: the adapter moves logits by {moved:.2f}; merged, they are off by {off:.2e}, and {still:.2f} from the base model's")
(_, right, _), (moved, wrong, still) = found
sys.exit(not (right < 1e-3 and wrong > 1 and still == 0))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder/model" 2>/dev/null
