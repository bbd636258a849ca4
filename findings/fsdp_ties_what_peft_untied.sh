#!/usr/bin/env bash
# accelerate 1.15.0, peft 0.21.2, transformers 5.23.0, torch 2.13.0
#
# LoRA with `modules_to_save=["embed_tokens"]` on a model with tied embeddings: PEFT trains a copy of the embeddings, and the LM head stays the base
# model's. Accelerate's FSDP2 with `cpu_ram_efficient_loading=True` calls `tie_weights()` when it has sharded the model, which makes the trained copy
# the LM head's weight too. What is trained is then another model than the one that is saved, in which the head is the base model's again. No
# error, and no warning but the one of PEFT that is given in any case.
#
# Seen: 20 steps of AdamW on a random Llama. Without FSDP2 the loss falls from 4.688 to 1.732, and the saved adapter, loaded on the base model, has
# 1.732. Under FSDP2 it falls from 4.688 to 0.915, and the adapter that it saved has 2.070: more than the one that was trained without FSDP2. With LoRA
# alone both ways end at 2.649 and load as that. `modules_to_save=["lm_head"]` raises a KeyError there, and without `cpu_ram_efficient_loading` FSDP2
# refuses `modules_to_save=["embed_tokens"]` with a ValueError; there `ensure_weight_tying=True` works, and ends at 0.915 both ways.
#
# Why it matters: whoever adds tokens to a tied student trains its embeddings whole beside LoRA. The losses and evaluations of the run are then of a
# model that exists in the run alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import os
import sys

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29500 + os.getpid() % 1000))
accelerator = Accelerator(cpu=True)
torch.manual_seed(2)
IDS = torch.randint(64, (4, 16))
STEPS = 20


def adapted(modules, tied):
    """A new adapter on the base model, whose embeddings are tied."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, tie_word_embeddings=True, initializer_range=0.2))
    return get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=modules, ensure_weight_tying=tied))


def sharded(model, efficient):
    """`model` as Accelerate prepares it for FSDP2, on one process."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=efficient)
    accelerator.state.fsdp_plugin = plugin
    return fsdp2_prepare_model(accelerator, model)


def losses(modules, way, tied):
    """The loss before the first step and after the last, and that of the saved adapter, loaded on the base model."""
    model = adapted(modules, tied)
    if way != "no FSDP2":
        model = sharded(model, efficient=way == "FSDP2")
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    first = None
    for _ in range(STEPS):
        loss = model(input_ids=IDS, labels=IDS).loss
        first = loss.item() if first is None else first
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in model.state_dict().items()}
    loaded = adapted(modules, tied)
    with torch.no_grad():
        last = model(input_ids=IDS, labels=IDS).loss.item()
        set_peft_model_state_dict(loaded, get_peft_model_state_dict(model, state_dict=whole))
        return first, last, loaded(input_ids=IDS, labels=IDS).loss.item()


found = {}
WITHOUT = "FSDP2 without cpu_ram_efficient_loading"
CASES = [(None, "no FSDP2"), (None, "FSDP2"), ("embed_tokens", "no FSDP2"), ("embed_tokens", "FSDP2"), ("lm_head", "FSDP2"), ("embed_tokens", WITHOUT)]
for name, way, tied in [(*case, False) for case in CASES] + [("embed_tokens", "no FSDP2", True), ("embed_tokens", WITHOUT, True)]:
    try:
        got = losses([name] if name else None, way, tied)
    except (KeyError, ValueError) as error:
        got = type(error).__name__
    found[name, way, tied] = got
    text = got if isinstance(got, str) else f"loss {got[0]:.3f}, after {STEPS} steps {got[1]:.3f}, of the saved adapter {got[2]:.3f}"
    print(f"seen: modules_to_save={name}{', ensure_weight_tying=True' if tied else ''}, {way}: {text}", flush=True)
wrong = found.pop(("embed_tokens", "FSDP2", False))
raised = [got for got in found.values() if isinstance(got, str)]
right = all(abs(got[1] - got[2]) < 0.01 for got in found.values() if not isinstance(got, str))
apart = isinstance(wrong, tuple) and wrong[2] - wrong[1] > 0.3 and wrong[2] > found["embed_tokens", "no FSDP2", False][2]
sys.exit(not (apart and right and raised == ["KeyError", "ValueError"]))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
grep '^seen' "$folder/seen"
