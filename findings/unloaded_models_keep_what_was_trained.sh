#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0
#
# `unload()` is documented to return the base model without all PEFT modules. What stands in `modules_to_save` it returns as trained, though PEFT
# keeps the original beside it and uses that in disable_adapter. Weights of trainable_token_indices it does take back. No error, no warning.
#
# Seen: with modules_to_save=["lm_head"], log-probs differ from the base model's by 0 in `with model.disable_adapter():`, and by more than 1
# after unload(), whose head is the trained one. With LoRA alone and with trainable_token_indices: 0 both ways.
#
# Why it matters: students with new tokens train embeddings and head whole. unload() is the way from such a student back to the model that it was, as a
# reference, as the teacher that distils itself, or as the base of the next adapter: it is then a model that nobody has trained, old layers
# under a new head, and the KL to it is not zero at the start. Use disable_adapter(), or load the base model again.
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
from transformers import LlamaConfig, LlamaForCausalLM

TEXT = torch.arange(3, 15)[None]


def base():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, initializer_range=0.2)).eval()


@torch.no_grad()
def log_probs(model):
    return model(TEXT).logits.log_softmax(-1)


def looked_at(**settings):
    """How far a trained student is from its base model with its adapter, with it switched off, and unloaded."""
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)).eval()
    torch.manual_seed(1)
    for part in model.parameters():
        if part.requires_grad:
            part.data += 0.1 * torch.randn_like(part)
    start, found = log_probs(base()), [log_probs(model)]
    with model.disable_adapter():
        found.append(log_probs(model))
    head = model.get_output_embeddings().weight.detach().clone()
    unloaded = model.unload()
    kept = torch.equal(unloaded.lm_head.weight, head) and not torch.equal(unloaded.lm_head.weight, base().lm_head.weight)
    found.append(log_probs(unloaded))
    return [(part - start).abs().max().item() for part in found], kept


holds = True
for settings, expected in (({}, False), ({"trainable_token_indices": [3, 4]}, False), ({"modules_to_save": ["lm_head"]}, True)):
    (adapted, switched_off, unloaded), kept = looked_at(**settings)
    named = ", ".join(f"{name}={value}" for name, value in settings.items()) or "LoRA alone"
    print(f"seen: {named}: from the base model by {adapted:.3f}, with disable_adapter {switched_off:.3f}, after unload {unloaded:.3f}; trained head kept: {kept}")
    holds &= adapted > 1 and switched_off == 0 and kept == expected and (unloaded > 1) == expected and (unloaded == 0) != expected
sys.exit(not holds)
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | grep '^seen'
