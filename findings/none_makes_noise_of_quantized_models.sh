#!/usr/bin/env bash
# transformers 5.23.0
#
# AutoModelForCausalLM.from_pretrained(folder, quantization_config=None) takes the quantization out of the config of a model that was
# saved quantized, and reads its quantized numbers as weights, without their scales. LlamaForCausalLM with the same arguments reads it
# right. All that is said is that the scales are UNEXPECTED.
#
# Seen: an FP8 checkpoint whose logits, up to 0.8, are wrong by 0.04 as it is read without the argument, which is FP8's rounding, and by 1.2
# with None.
#
# Why it matters: None is what `trl.get_quantization_config(model_args)` gives where no quantization is asked for, and what a script passes
# on. PEFT's AutoPeftModelForCausalLM loads its base by the auto class, so an adapter on an FP8, GPTQ or compressed-tensors checkpoint
# trains, or teaches, on noise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

print(f"transformers {transformers.__version__}")
folder = Path(sys.argv[1])
torch.manual_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, tie_word_embeddings=False, **shape))
model.save_pretrained(folder)
weights = {}
for name, weight in load_file(folder / "model.safetensors").items():
    weights[name] = weight
    if "proj" in name:  # a scale for every 128 x 128 elements, as DeepSeek-V3's and Qwen3-FP8's files have
        scale = weight.float().unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).abs().amax((1, 3)) / 448
        whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        weights |= {name: (weight / whole).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
config = json.loads((folder / "config.json").read_text())
config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
(folder / "config.json").write_text(json.dumps(config))

ids, errors = torch.arange(16)[None], []
with torch.no_grad():
    logits = model(ids).logits
    for kind, given in ((AutoModelForCausalLM, {}), (LlamaForCausalLM, {"quantization_config": None}), (AutoModelForCausalLM, {"quantization_config": None})):
        errors.append((kind.from_pretrained(folder, **given)(ids).logits.float() - logits).abs().max().item())
        print(f"{kind.__name__}.from_pretrained(folder{', quantization_config=None' * bool(given)}): logits up to {logits.abs().max():.2f} are wrong by {errors[-1]:.3f}")
sys.exit(not (max(errors[:2]) < 0.1 < 0.3 < errors[2]))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder/model" 2>/dev/null
