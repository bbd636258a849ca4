#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU (torch 2.13.0, transformers 5.23.0)
#
# A layer of 8 bits multiplies as LLM.int8 does in eval mode, with its input rounded to 8 bits, and with a dequantized weight and no
# rounding in train mode (on a GPU both are LLM.int8). The same weights and text have other logits in the two modes.
#
# Seen: logits of the two modes are up to 0.15 apart; from those of the dequantized weights, eval mode's are 0.16 and train mode's 0.05.
#
# Why it matters: on-policy training samples in eval mode and scores in train mode. On a CPU an 8-bit student learns from text of a
# slightly other model, and its log-probs differ though nothing was updated between.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0 bitsandbytes==0.50.2
cat > "$folder/look.py" <<'PY'
import sys

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

print(f"bitsandbytes {bitsandbytes.__version__}")
torch.manual_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
plain = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))
plain.save_pretrained(sys.argv[1])
eight_bits = BitsAndBytesConfig(load_in_8bit=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=eight_bits, dtype=torch.float32)
ids = torch.arange(64)[None]
with torch.no_grad():
    for name, layer in plain.named_modules():
        if name.endswith("_proj"):
            scale = layer.weight.abs().amax(1, keepdim=True) / 127
            layer.weight.copy_((layer.weight / scale).round() * scale)
    dequantized, writing, again = plain(ids).logits, model.eval()(ids).logits, model(ids).logits
    learning = model.train()(ids).logits
far = [(one - other).abs().max().item() for one, other in ((writing, again), (writing, learning), (writing, dequantized), (learning, dequantized))]
print("two passes in eval mode {:.4f}, eval and train mode {:.4f}, eval mode and dequantized {:.4f}, train mode and dequantized {:.4f} apart".format(*far))
sys.exit(not (far[0] == 0 and far[1] > 0.02 and far[2] > far[3]))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder/model" 2>/dev/null
