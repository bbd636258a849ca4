#!/usr/bin/env bash
# transformers 5.23.0 (5.20.2 alike; 5.24.0 saves the weights as they are)
#
# An FP8 checkpoint (DeepSeek-V3, Qwen3-FP8) that is dequantized as it is read (FineGrainedFP8Config(dequantize=True), or a machine without
# a GPU for it) is a plain bfloat16 model. save_pretrained quantizes it again, the embedding and the LM head too, and leaves quantization_config
# out of config.json. from_pretrained then takes the FP8 numbers for the weights, without their scales. The scales are listed as UNEXPECTED.
#
# Seen: logits up to 0.8 are wrong by 0.04 as read, which is FP8's rounding, and by thousands as saved and read again.
#
# Why it matters: dequantizing is how a model that is published in FP8 alone is trained, or an adapter merged into it. After the training, what has
# been saved is noise, and what was learned is rounded away. Call `del model._weight_conversions` before saving.
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
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig, LlamaForCausalLM

print(f"transformers {transformers.__version__}")
folder, again = Path(sys.argv[1]) / "fp8", Path(sys.argv[1]) / "again"
torch.manual_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, tie_word_embeddings=False, **shape)).bfloat16()
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

ids, logits = torch.arange(16)[None], []
with torch.no_grad():
    logits.append(model(ids).logits.float())
    read = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FineGrainedFP8Config(dequantize=True))
    logits.append(read(ids).logits.float())
    read.save_pretrained(again)
    logits.append(AutoModelForCausalLM.from_pretrained(again)(ids).logits.float())
dtypes = {name: str(weight.dtype) for name, weight in load_file(again / "model.safetensors").items()}
quantized = "quantization_config" in json.loads((again / "config.json").read_text())
print(
    f"dequantized, the weights are {read.dtype}; saved, lm_head.weight is {dtypes['lm_head.weight']}, and config.json names a quantization: {quantized}"
)
errors = [(one - logits[0]).abs().max().item() for one in logits[1:]]
print(f"logits, up to {logits[0].abs().max():.2f}: changed by {errors[0]:.3f} as read, and by {errors[1]:.0f} as saved and read again")
sys.exit(not (errors[0] < 0.1 and errors[1] > 10 and dtypes["lm_head.weight"] == "torch.float8_e4m3fn" and not quantized))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
