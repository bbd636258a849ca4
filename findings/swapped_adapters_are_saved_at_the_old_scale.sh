#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0
#
# `hotswap_adapter` puts the weights of another adapter in the place of those that a model has, also where its `lora_alpha` is another: the model then computes
# as that adapter does. The config that it keeps is still the first one's, and this is what `save_pretrained` writes beside the new weights. Read
# again, the adapter has another scale. No error, no warning.
#
# Seen: a random Llama, two LoRA adapters of rank 4 with lora_alpha 4 and 32. After the swap log-probs are those of the second one (off by less
# than 1e-4); saved and loaded they are off by up to 0.8 nats. With the same lora_alpha in both: by less than 1e-4.
#
# Why it matters: a compiled or serving student is given checkpoint after checkpoint by a swap, to compare runs whose alpha differs, and the best is saved
# from there: what is saved is none of those that were compared. Copy the folder of the adapter itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM, LlamaConfig

folder = sys.argv[1]
torch.manual_seed(0)
sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(f"{folder}/base")
text = torch.arange(3, 43)[None]


def base():
    return AutoModelForCausalLM.from_pretrained(f"{folder}/base")


@torch.no_grad()
def log_probs(model):
    return model.eval()(text).logits.log_softmax(-1)


def adapter(name, alpha, seed):
    """A folder with a LoRA adapter whose weights were moved, and what it computes."""
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(f"{folder}/{name}")
    return log_probs(model)


found = []
for alpha in (4, 32):
    adapter("first", 4, 1)
    wanted = adapter("second", alpha, 2)
    model = PeftModel.from_pretrained(base(), f"{folder}/first")
    hotswap_adapter(model, f"{folder}/second", adapter_name="default")
    swapped = (log_probs(model) - wanted).abs().max().item()
    model.save_pretrained(f"{folder}/saved")
    again = (log_probs(PeftModel.from_pretrained(base(), f"{folder}/saved")) - wanted).abs().max().item()
    found.append((swapped, again))
    print(f"seen: lora_alpha 4, swapped for one with {alpha}: off by {swapped:.4f} nats after the swap, by {again:.4f} saved and loaded")
(same, same_again), (other, other_again) = found
sys.exit(not (max(same, same_again, other) < 1e-4 and other_again > 0.1))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
