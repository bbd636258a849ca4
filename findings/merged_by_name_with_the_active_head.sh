#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0
#
# `merge_and_unload(adapter_names=["a"])` merges the matrices of adapter "a" and keeps the `modules_to_save` (a head, embeddings) of the adapter that
# is active, or the base model's if that one has none. Trained tokens (`trainable_token_indices`) go by the name. No error, no warning.
#
# Seen: a random Llama with two adapters that were moved. Merged by name, log-probs are off from those of the named adapter by up to 6.0 nats where both have a
# head and the other is active, by 4.6 where the active one has none, by 4.9 where the active one alone has one; by less than 1e-4 where the named
# one is active, and with trained tokens in the place of heads.
#
# Why it matters: a student that is distilled from one adapter to the next has several, of which the last is active. Merged by name for an
# evaluation, for the hub or as a teacher, each but the active one is a model that nobody trained. Call `set_adapter` before merging.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
TEXT = torch.arange(5, 90)[None]


@torch.no_grad()
def both(a, b):
    """A model with the adapters "a" and "b", as if both had learned something."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2))
    for name, own in (("a", a), ("b", b)):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **own)
        if name == "a":
            model = get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        for part in model.parameters():
            if part.requires_grad:
                part += 0.2 * torch.randn_like(part)
    return model.eval()


@torch.no_grad()
def off(a, b, active):
    """How much log-probs of "a", merged by its name, differ from those that it has."""
    model = both(a, b)
    model.set_adapter("a")
    own = model(input_ids=TEXT).logits.log_softmax(-1)
    model.set_adapter(active)
    merged = model.merge_and_unload(adapter_names=["a"])
    return (merged(input_ids=TEXT).logits.log_softmax(-1) - own).abs().max().item()


head, tokens = {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": list(range(40))}
found = {"both have a head": (head, head), "a has a head": (head, {}), "b has a head": ({}, head), "both have trained tokens": (tokens, tokens)}
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    found = {what: [off(*own, active) for active in ("b", "a")] for what, own in found.items()}
said = [str(one.message)[:150] for one in told if "modules_to_save" in str(one.message) or "merg" in str(one.message)]
for what, (other, named) in found.items():
    print(f"seen: {what}: \"a\" merged by name is off by {other:.2g} while \"b\" is active, by {named:.1g} while \"a\" is")
print(f"seen: warnings of it: {said}")
*wrong, trained = found.values()
sys.exit(not (min(other for other, _ in wrong) > 0.05 and max(*(named for _, named in wrong), *trained) < 1e-3 and not said))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
