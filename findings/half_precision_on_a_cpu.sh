#!/usr/bin/env bash
# torch 2.13.0 (oneDNN), transformers 5.23.0, trl 1.16.0
#
# A matrix product in bfloat16 takes ten times as long as in float32 on a CPU with AVX2, and five times with AVX-512, if it has no
# instructions for bfloat16. So does float16. With AMX it takes a seventh. transformers 5 loads a checkpoint in the dtype that it was
# saved in, which for most published models is bfloat16, and TRL's trainers switch bf16 on where nothing is said, with use_cpu=True too.
#
# Seen, milliseconds for 256 rows through a layer of 896 x 4864, one thread of a Xeon with AMX, limited to what older ones have
# (ONEDNN_MAX_CPU_ISA):
#     AVX2: float32 17, bfloat16 166, float16 165.   AVX512_CORE: 15, 73, 179.   AVX512_CORE_BF16: 16, 26, 162.   all: 16, 2.3, 15.
#     a model saved in bfloat16 is loaded in torch.bfloat16; GKDConfig(use_cpu=True).bf16 is True
#
# Why it matters to people who distil across tokenizers: on a laptop a teacher that is named, or loaded with from_pretrained, scores ten
# times slower than it could, and nothing says so. Half of the memory is all that is gained.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 trl==1.16.0

cat > "$folder/show.py" <<'PYTHON'
import os
import sys
import time
import warnings

warnings.filterwarnings("ignore")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

torch.set_num_threads(1)


def milliseconds(dtype: torch.dtype) -> float:
    rows, weight = torch.randn(256, 896).to(dtype), torch.randn(4864, 896).to(dtype)
    least = float("inf")
    for _ in range(6):
        begin = time.process_time()
        torch.nn.functional.linear(rows, weight)
        least = min(least, time.process_time() - begin)
    return 1000 * least


def main(folder: str) -> int:
    found = {dtype: milliseconds(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    print("with AVX2:", {str(dtype): round(value, 1) for dtype, value in found.items()})
    slow = min(found[torch.bfloat16], found[torch.float16]) > 2.5 * found[torch.float32]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 32}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).bfloat16().save_pretrained(folder)
    dtype = AutoModelForCausalLM.from_pretrained(folder).dtype
    print("a model saved in bfloat16 is loaded in", dtype)
    from trl.experimental.gkd import GKDConfig

    bf16 = GKDConfig(folder, use_cpu=True, report_to="none").bf16
    print("GKDConfig(use_cpu=True).bf16 is", bf16)
    return 0 if slow and dtype == torch.bfloat16 and bf16 else 1


sys.exit(main(sys.argv[1]))
PYTHON
ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" "$folder/show.py" "$folder/model"
