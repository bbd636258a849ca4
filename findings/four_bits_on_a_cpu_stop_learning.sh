#!/usr/bin/env bash
# bitsandbytes 0.50.2 (torch 2.13.0, transformers 5.23.0, peft 0.21.2), on a CPU that computes in bfloat16 (avx512_bf16: Sapphire Rapids, Zen 4)
#
# A 4-bit layer on such a CPU packs its weights anew at the first forward pass in eval mode without gradients, for a kernel that has no
# backward pass. They stay packed in train mode, so that from then on the layer's input gets no gradient. All that is said is torch's warning
# of an operator without an autograd kernel, once. With biases (Qwen2), the next pass in train mode raises instead.
#
# Seen: after one pass in eval mode, the gradient of LoRA weights points elsewhere than before it: the median of the cosines is 0.14.
# With `support_avx512bf16_for_cpu = False` in each Linear4bit it is the same to the bit.
#
# Why it matters: on-policy distillation writes before it learns, so QLoRA on such a machine learns from a wrong gradient from its first
# step on, and the loss still falls, by the layers above.
set -euo pipefail
if ! grep -qw avx512_bf16 /proc/cpuinfo; then
    echo "this CPU does not compute in bfloat16 (no avx512_bf16), and nothing is packed on it"
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 bitsandbytes==0.50.2
cat > "$folder/look.py" <<'PY'
import sys

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

print(f"bitsandbytes {bitsandbytes.__version__}")
torch.manual_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape)).save_pretrained(sys.argv[1])
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
ids = torch.arange(64)[None]


def gradients(model):
    model.train().zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return [part.grad.flatten().double() for name, part in model.named_parameters() if "lora_" in name]


def cosines(packs: bool):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=four_bits)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if not packs:
        for layer in model.modules():
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                layer.support_avx512bf16_for_cpu = False
    before = gradients(model)
    with torch.no_grad():
        model.eval()(input_ids=ids)
    return [torch.cosine_similarity(one, other, 0).item() for one, other in zip(before, gradients(model), strict=True)]


found = {packs: cosines(packs) for packs in (True, False)}
for packs, own in found.items():
    print(f"{'as it is' if packs else 'never packed'}: cosine of LoRA gradients before and after a pass in eval mode, least and median: {min(own):.2f} {sorted(own)[len(own) // 2]:.2f}")
sys.exit(not (min(found[True]) < 0.5 and min(found[False]) > 0.999))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder/model" 2>"$folder/said" || { cat "$folder/said"; exit 1; }
grep -o "bitsandbytes::gemv_4bit: an autograd kernel was not registered[^.]*" "$folder/said"
