#!/usr/bin/env bash
# transformers 5.23.0 with peft 0.21.2
#
# `AutoModelForCausalLM.from_pretrained` of the folder of a DoRA adapter, and `load_adapter` of a transformers model, read its matrices A and B
# and not its magnitudes: these are the row norms of the base weights, as if DoRA had learned nothing of them. The file has them under
# `lora_magnitude_vector`, and transformers looks for `lora_magnitude_vector.weight`. Its load report calls the ones UNEXPECTED, which "can be
# ignored when loading from different task/architecture", and the others MISSING. No error. Saved from there, the adapter is another one for PEFT
# too, without any report. `PeftModel` and `AutoPeftModelForCausalLM` read the folder right.
#
# Seen: a random Llama with a DoRA adapter whose weights were moved. Log-probs are off by up to 2.8 nats through AutoModelForCausalLM and
# load_adapter, and by 0 through PEFT; saved from AutoModelForCausalLM and read by PEFT by 2.8. With LoRA in its place: 0.
#
# Why it matters: the folder of an adapter is given as a teacher by its name, which TRL's GKDTrainer passes to AutoModelForCausalLM. A teacher
# trained with DoRA then scores as another model. Load it with AutoPeftModelForCausalLM.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys
import warnings
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

warnings.filterwarnings("ignore")
torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 96}
root = Path(sys.argv[1])
LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).save_pretrained(root / "base")


@torch.no_grad()
def log_probs(model):
    return model.eval()(input_ids=torch.arange(5, 90)[None]).logits.log_softmax(-1)


def base():
    return AutoModelForCausalLM.from_pretrained(root / "base")


@torch.no_grad()
def ways(use_dora):
    """How much log-probs are off after each way to load the adapter."""
    own = root / f"adapter-{use_dora}"
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=use_dora, task_type="CAUSAL_LM"))
    for part in model.parameters():
        if part.requires_grad:  # as if it had learned something
            part += 0.2 * torch.randn_like(part)
    model.save_pretrained(own)
    right = log_probs(model)
    auto, put_on = AutoModelForCausalLM.from_pretrained(own), base()
    put_on.load_adapter(own)
    auto.save_pretrained(root / f"again-{use_dora}")
    loaded = {
        "AutoModelForCausalLM": auto,
        "load_adapter": put_on,
        "saved from there, read by PEFT": PeftModel.from_pretrained(base(), root / f"again-{use_dora}"),
        "PeftModel": PeftModel.from_pretrained(base(), own),
        "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM.from_pretrained(own),
    }
    if use_dora:
        layer = auto.model.layers[0].self_attn.q_proj
        norms = layer.base_layer.weight.norm(dim=1)
        begun = torch.allclose(layer.lora_magnitude_vector["default"].weight, norms, atol=1e-5)
        print(f"seen: the magnitudes are the row norms of the base weights: {begun}")
    return {name: (log_probs(one) - right).abs().max().item() for name, one in loaded.items()}


dora, lora = ways(True), ways(False)
for name, off in dora.items():
    print(f"seen: {name}: log-probs are off by {off:.2g} with DoRA, by {lora[name]:.2g} with LoRA")
peft = [off for name, off in dora.items() if name.startswith(("PeftModel", "AutoPeft"))]
others = [off for name, off in dora.items() if not name.startswith(("PeftModel", "AutoPeft"))]
sys.exit(not (min(others) > 0.05 and max(peft + [*lora.values()]) < 1e-4))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
