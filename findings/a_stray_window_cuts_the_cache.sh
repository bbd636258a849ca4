#!/usr/bin/env bash
# transformers 5.23.0
#
# A key `sliding_window` in the config.json of a model without sliding windows (Llama, OLMo 2, Granite, GLM-4, Gemma, Cohere, Phi, GPT-NeoX, ...),
# or `attention_chunk_size`, cuts the cache: `generate` attends to so many last tokens, a forward pass to all of them.
# `use_sliding_window: false` beside it changes nothing. No error, no warning. Qwen2, which has such a key, takes use_sliding_window=False to mean
# that there is no window, and writes what it reads.
#
# Seen: random models with the key set to 16, in a folder that is loaded, a prompt of 24 tokens, 16 more written. The log-probs at which they were
# drawn and those of a forward pass over what was written differ by 0.3 to 8 nats in eight families, without the key or without the cache by less
# than 1e-3; in Qwen2 with use_sliding_window=False by less than 1e-3.
#
# Why it matters: configs of Qwen2 and Mistral have the key. Where it is carried over into that of a model in another layout, a student writes its
# text by other probabilities than it is scored with, from the window's length on. Remove the key.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

torch.set_num_threads(1)
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
SIZES |= {"head_dim": 8, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1, "initializer_range": 0.3}
PROMPT = torch.randint(5, 90, (1, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def apart(folder, keys, **how):
    """How much log-probs differ between writing and reading, with `keys` in the config.json that is there."""
    config = json.loads((folder / "plain.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    drawn = {"do_sample": False, "max_new_tokens": 16, "output_logits": True, "return_dict_in_generate": True, **how}
    written = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **drawn)
    read = model(written.sequences).logits[:, 23:-1].log_softmax(-1)
    return (torch.stack(written.logits, 1).log_softmax(-1) - read).abs().max().item()


wrong, right = [], []
for kind in ("llama", "olmo2", "granite", "glm4", "gemma", "cohere", "phi", "gpt_neox"):
    folder = Path(sys.argv[1]) / kind
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES), dtype=torch.float32).save_pretrained(folder)
    (folder / "config.json").rename(folder / "plain.json")
    window, chunk, off = {"sliding_window": 16}, {"attention_chunk_size": 16}, {"sliding_window": 16, "use_sliding_window": False}
    wrong += (found := [apart(folder, keys) for keys in (window, chunk, off)])
    right += (plain := [apart(folder, {}), apart(folder, window, use_cache=False)])
    print(
        f"seen: {kind}: written and read differ by {found[0]:.2g} with sliding_window, {found[1]:.2g} with attention_chunk_size, {found[2]:.2g} with "
        f"use_sliding_window=false too, {plain[0]:.1g} without the keys, {plain[1]:.1g} without the cache"
    )
folder = Path(sys.argv[1]) / "qwen2"
AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen2"](**SIZES), dtype=torch.float32).save_pretrained(folder)
(folder / "config.json").rename(folder / "plain.json")
right.append(apart(folder, {"sliding_window": 16, "use_sliding_window": False}))
print(f"seen: qwen2 with sliding_window and use_sliding_window=false: {right[-1]:.1g}")
sys.exit(not (min(wrong) > 0.05 and max(right) < 5e-3))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
[ ! -s "$folder/warnings" ] || ! grep -i "window" "$folder/warnings"
