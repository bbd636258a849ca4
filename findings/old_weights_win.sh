#!/usr/bin/env bash
# transformers 5.23.0 (5.20.2 and 5.24.0 alike)
#
# save_pretrained with max_shard_size into a folder that holds a model.safetensors writes the shards and their index beside it and leaves it
# there; from_pretrained reads model.safetensors first. The other way round, and from shards to other shards, the old files are removed. No
# error, no warning.
#
# Seen: saved in one file, then another model in shards: the first model is read. The other way round: the second.
#
# Why it matters: transformers 5 writes one file up to 50 GB where 4 wrote shards of 5 GB, so a student trained by one and saved again by the
# other, or with max_shard_size for an upload, is read with the weights from before its training. Save into an empty folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

print(f"transformers {transformers.__version__}")
config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
torch.manual_seed(0)
first, second = LlamaForCausalLM(config), LlamaForCausalLM(config)


def loaded(folder: Path) -> str:
    """Which of the two models is read back."""
    weight = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    return (
        "the first model"
        if weight.equal(first.lm_head.weight)
        else "the second model"
        if weight.equal(second.lm_head.weight)
        else "neither"
    )


found = []
for sizes in (("50GB", "5KB"), ("5KB", "50GB"), ("5KB", "20KB")):
    folder = Path(sys.argv[1]) / "-".join(sizes)
    for model, size in zip((first, second), sizes, strict=True):
        model.save_pretrained(folder, max_shard_size=size)
    found.append(loaded(folder))
    print(
        f"saved with max_shard_size={sizes[0]}, then the second with {sizes[1]}: {len(list(folder.glob('*.safetensors')))} files, and {found[-1]} is read"
    )
sys.exit(found != ["the first model", "the second model", "the second model"])
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
