#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0
#
# `merge_adapter` adds an adapter to the frozen weights in place, and `unmerge_adapter` subtracts it again. Both round. With an adapter that stays
# as it is, the first round leaves an error, and no further one adds to it, so that a test of it passes. With an adapter that learns in between,
# each round leaves another: the frozen weights move further and further.
#
# Seen: bfloat16, a LoRA adapter of rank 8, the norm of what frozen weights have moved by over their own. The same adapter: 1.6e-4 after 1, 10 and
# 100 rounds. Learned from between rounds (each number of B by 2e-4 either way): 1.6e-4, 7.4e-4, 3.0e-3. float32: 5.1e-8 after 100.
#
# Why it matters: trl 1.16.0 does this whenever it hands a LoRA student to vLLM (`VLLMGeneration._iter_named_params`), thus at each step of
# on-policy distillation, and twice at the first. The adapter
# that is saved, put on the published weights, is not quite the student that was trained and measured.
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

ROUNDS = 1, 10, 100


@torch.no_grad()
def moved(dtype, learns):
    """The norm of the change of the frozen projections over their own, after so many rounds."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=256)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype), LoraConfig(r=8, target_modules="all-linear"))
    frozen = {name: part.double() for name, part in model.named_parameters() if "base_layer" in name}
    learned, found = [part for name, part in model.named_parameters() if "lora_B" in name], []
    for number in range(1, max(ROUNDS) + 1):
        if learns or number == 1:
            for part in learned:
                part += 2e-4 * torch.randn_like(part).sign()
        model.merge_adapter()
        model.unmerge_adapter()
        if number in ROUNDS:
            own = dict(model.named_parameters())
            found.append(max(((own[name].double() - part).norm() / part.norm()).item() for name, part in frozen.items()))
    return found


cases = {(dtype, learns): moved(dtype, learns) for dtype in (torch.bfloat16, torch.float32) for learns in (False, True)}
for (dtype, learns), found in cases.items():
    print(f"seen: {dtype}, the adapter {'learns' if learns else 'stays'}: {', '.join(f'{own:.1e}' for own in found)} after {ROUNDS} rounds")
still, learning = cases[torch.bfloat16, False], cases[torch.bfloat16, True]
holds = still[2] < 1.2 * still[0] and learning[2] > 10 * learning[0] > 1e-4
sys.exit(not (holds and cases[torch.float32, True][2] < 1e-6))
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | grep '^seen'
