#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0
#
# `trainable_token_indices` for an LM head with a bias takes the bias away: the layer that puts the trained rows beside the weight computes
# x W only. No error, no warning, and nothing needs to be trained: a fresh adapter, which should change nothing, changes all logits by the
# bias. `disable_adapter` brings the bias back; so does `merge_and_unload`.
#
# Seen: a Phi (Phi-1, Phi-1.5 and Phi-2 have such a head) with a fresh adapter for two tokens of its head: each logit differs by the bias of its
# token, 2.14 at most, and by nothing else. The merged model has the logits of the base model, not those of the adapted one.
#
# Why it matters: chat tokens that a student lacks are added for distillation, and `trainable_token_indices` is PEFT's way to train them. The
# student then starts as another model, is trained to make up for the bias that is missing, and has it once more when it is merged for use. Its
# base model, as the reference of a KL, keeps it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import PhiConfig, PhiForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = PhiForCausalLM(PhiConfig(vocab_size=40, **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)).eval()
with torch.no_grad():
    model.lm_head.bias.normal_()  # a published model's is not 0
bias = model.lm_head.bias.detach().clone()
ids = torch.arange(12)[None]


@torch.no_grad()
def logits(of):
    return of(ids).logits


base = logits(model)
adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [3, 4]})).eval()
fresh = logits(adapted)
with adapted.disable_adapter():
    disabled = logits(adapted)
merged = logits(adapted.merge_and_unload())
found = {
    "the fresh adapter changes logits by up to": (base - fresh).abs().max().item(),
    "and with the bias added back by": (base - fresh - bias).abs().max().item(),
    "disabled by": (base - disabled).abs().max().item(),
    "merged by": (base - merged).abs().max().item(),
}
print("seen:", "; ".join(f"{name} {value:.6f}" for name, value in found.items()))
changed, left, disabled, merged = found.values()
sys.exit(not (changed > 1 and max(left, disabled, merged) < 1e-5))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
cat "$folder/seen"
