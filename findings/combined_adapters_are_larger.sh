#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0
#
# `add_weighted_adapter` gives the adapter that it makes the config of the first one, with `lora_alpha` set to the new rank, so that its factor is
# one. With rsLoRA (`use_rslora=True`) the factor is then the root of the new rank: one adapter with weight 1 becomes itself, that many times too
# large, and the mean of two of rank 8, concatenated, four times too large. `layers_to_transform` stays that of the first adapter: what
# the second learned in other layers is left out. A DoRA adapter's magnitudes begin anew. No error, no warning, with each way of combining that was tried.
#
# Seen: the change that the new adapter makes to a weight, divided by the sum that was asked for: 2.83 for one rsLoRA adapter of rank 8 with weight 1
# ("cat", "svd" and "linear" alike), 4.00 for the mean of two with "cat", 1.00 for LoRA in its place. Of an adapter of layer 0 and one
# of layer 1 the sum has layer 0 alone. With one DoRA adapter and weight 1, log-probs are off by up to 2.3 nats.
#
# Why it matters: adapters that were distilled from several teachers, or on several sets of prompts, are combined so, and what comes out is
# not their mean. With `use_rslora=False` set in the configs beforehand it is: the loaded adapters keep their own factors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.arange(3, 15)[None]


@torch.no_grad()
def combined(way, own, other=None, fix=False):
    """The model with the combined adapter, what each layer was to change by, what it changes by, and what log-probs should be and are."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    plain = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)), LoraConfig(**plain, **own), "first")
    names = ["first"]
    if other is not None:
        model.add_adapter("second", LoraConfig(**plain, **other))
        names.append("second")
    for name, part in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:  # as if it had learned something
            part.copy_(0.2 * torch.randn_like(part))
        elif "magnitude" in name:
            part.mul_(1 + 0.3 * torch.randn_like(part))
    model.eval()
    before = model(input_ids=IDS).logits.log_softmax(-1)
    weights = [1 / len(names)] * len(names)
    layers = [layer.self_attn.q_proj for layer in model.base_model.model.model.layers]
    parts = [[weight * layer.get_delta_weight(name) for name, weight in zip(names, weights) if name in getattr(layer, "lora_A", {})] for layer in layers]
    if fix:
        for name in names:
            model.peft_config[name].use_rslora = False
    with warnings.catch_warnings(record=True) as said:
        model.add_weighted_adapter(names, weights, "both", combination_type=way)
    assert not [one for one in said if "adapter" in str(one.message) and "Already" not in str(one.message)], [str(one.message) for one in said]
    model.set_adapter("both")
    found = []
    for layer, asked in zip(layers, parts):
        got = layer.get_delta_weight("both").norm() if "both" in getattr(layer, "lora_A", {}) else torch.zeros(())
        found.append((got / sum(asked).norm()).item())
    return found, (model(input_ids=IDS).logits.log_softmax(-1) - before).abs().max().item()


rs = {"use_rslora": True}
seen = {}
for way in ("cat", "svd", "linear"):
    seen[f"one LoRA adapter, {way}"] = combined(way, {})[0]
    seen[f"one rsLoRA adapter, {way}"] = combined(way, rs)[0]
seen["two LoRA adapters, cat"] = combined("cat", {}, {})[0]
seen["two rsLoRA adapters, cat"] = combined("cat", rs, rs)[0]
seen["two rsLoRA adapters, cat, use_rslora=False beforehand"] = combined("cat", rs, rs, fix=True)[0]
seen["layer 0 and layer 1, cat"] = combined("cat", {"layers_to_transform": [0]}, {"layers_to_transform": [1]})[0]
for name, found in seen.items():
    print(f"seen: {name}: changes the two layers by {found[0]:.2f} and {found[1]:.2f} of what was asked")
lora, dora = combined("cat", {})[1], combined("cat", {"use_dora": True})[1]
print(f"seen: one adapter with weight 1: log-probs differ from its own by {lora:.2g} with LoRA, by {dora:.2g} with DoRA")
expected = {name: [2.83] * 2 if "one rsLoRA" in name else [4.0] * 2 if name == "two rsLoRA adapters, cat" else [1.0] * 2 for name in seen}
expected["layer 0 and layer 1, cat"] = [1.0, 0.0]
sys.exit(not ({name: [round(part, 2) for part in found] for name, found in seen.items()} == expected and lora < 1e-4 and dora > 0.1))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
