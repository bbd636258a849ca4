#!/usr/bin/env bash
# transformers 5.23.0 with compressed-tensors 0.20.0 and torchao 0.18.0 (torch 2.13.0, peft 0.21.2)
#
# Layers that round what they are given to 8 bits (compressed-tensors' FP8, FP8-dynamic and W8A8 checkpoints, torchao's
# Int8DynamicActivationInt8WeightConfig) pass no gradient back. Transformers calls both trainable (`hf_quantizer.is_trainable`), PEFT
# puts LoRA on them, and there is no warning.
#
# Seen: of 14 LoRA layers of a model of two layers, 10 get a gradient of exactly 0 at the first step: all but the last ones before
# the residual stream. Loaded with `CompressedTensorsConfig(dequantize=True)`, all 14 get theirs.
#
# Why it matters: "-FP8-dynamic" and "-w8a8" are how many models are published in small. A student of one learns by two of seven
# matrices in each layer, from a gradient without the paths through attention and the MLP, and its loss still falls.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 compressed-tensors==0.20.0 torchao==0.18.0
cat > "$folder/look.py" <<'PY'
import sys
import warnings

warnings.filterwarnings("ignore")
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from peft import LoraConfig, get_peft_model
from torchao.quantization import Int8DynamicActivationInt8WeightConfig
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

torch.manual_seed(0)
shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
plain = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))
plain.save_pretrained(f"{sys.argv[1]}/plain")
scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
apply_quantization_config(plain, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
for layer in plain.modules():
    if hasattr(layer, "weight_scale"):
        layer.weight_scale.data.copy_(layer.weight.detach().abs().amax(1, keepdim=True) / 448)
compressor = ModelCompressor.from_pretrained_model(plain)
compressor.compress_model(plain)
plain.save_pretrained(f"{sys.argv[1]}/fp8")
compressor.update_config(f"{sys.argv[1]}/fp8")

ids, found = torch.arange(64)[None], {}
for name, folder, config in (
    ("compressed-tensors FP8-dynamic", "fp8", None),
    ("the same, dequantized", "fp8", CompressedTensorsConfig(dequantize=True)),
    ("torchao int8 with dynamic activations", "plain", TorchAoConfig(Int8DynamicActivationInt8WeightConfig())),
):
    given = {} if config is None else {"quantization_config": config}  # None itself would read a quantized model as a plain one
    model = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{folder}", **given)
    trainable = model.hf_quantizer.is_trainable if getattr(model, "hf_quantizer", None) else "plain"
    model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    norms = [part.grad.norm().item() for part_name, part in model.named_parameters() if "lora_B" in part_name]
    found[name] = sum(norm == 0 for norm in norms)
    print(f"{name}: is_trainable {trainable}; {found[name]} of {len(norms)} LoRA layers get a gradient of 0")
sys.exit(list(found.values()) != [10, 0, 10])
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2>/dev/null
