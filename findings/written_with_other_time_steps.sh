#!/usr/bin/env bash
# transformers 5.23.0
#
# Nemotron-H and Zamba2 read a text with all time steps of their Mamba-2 layers at least `time_step_min`, 0.001 by default, and write with the
# time steps as they are: the step of `generate` with its cache does not clamp. NemotronHConfig has a `time_step_limit` of (0, inf), which changes
# nothing. Mamba-2 itself goes by that key, and reads as it writes. No error, no warning.
#
# Seen: random models, 50 tokens sampled at temperature 1. The log-probs at which they were drawn and those of a forward pass over what was
# written differ by up to 0.16 nats in Nemotron-H and in Zamba2, and by less than 1e-3 in Mamba-2, without the cache, and once
# `time_step_limit` of the layers is (0, inf) in place of (0.001, inf). A Nemotron-H with time_step_limit=(0.01, 0.05) has the logits of one with (0, inf).
#
# Why it matters: on-policy distillation scores what a student wrote by a forward pass. Here the two are other policies, and ratios of the
# two (importance weights, clipping) are not 1 before the first update. Setting `time_step_limit` of every layer that has one, as below, makes them one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM, Mamba2Config, NemotronHConfig, Zamba2Config

torch.set_num_threads(1)
SHARED = {"vocab_size": 96, "hidden_size": 32, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": 1}
HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
NEMOTRON = {**SHARED, "initializer_range": 0.5, **HEADS, "head_dim": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 16}
NEMOTRON["layers_block_type"] = ["mamba", "attention", "mamba", "mlp"]
ZAMBA = {**SHARED, "initializer_range": 0.25, **HEADS, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "mamba_d_state": 16, "hybrid_layer_ids": [1, 3]}
ZAMBA["layers_block_type"] = ["linear_attention", "hybrid"] * 2
MAMBA = {**SHARED, "initializer_range": 0.5, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16}


def model_of(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def apart(model, **how):
    """How much log-probs differ between the drawing of four texts and a forward pass over them."""
    prompts = torch.randint(5, 90, (4, 8), generator=torch.Generator().manual_seed(1))
    drawn = {"do_sample": True, "top_k": 0, "max_new_tokens": 50, "output_logits": True, "return_dict_in_generate": True, **how}
    written = model.generate(prompts, attention_mask=torch.ones_like(prompts), **drawn)
    read = model(written.sequences).logits[:, 7:-1].log_softmax(-1)
    return (torch.stack(written.logits, 1).log_softmax(-1) - read).abs().max().item()


found = []
for config in (NemotronHConfig(**NEMOTRON), Zamba2Config(**ZAMBA), Mamba2Config(**MAMBA)):
    model = model_of(config)
    one, other = apart(model), apart(model, use_cache=False)
    layers = [own for own in model.modules() if hasattr(own, "time_step_limit")]
    before = layers[0].time_step_limit
    for own in layers:
        own.time_step_limit = (0.0, float("inf"))
    found.append((one, other, apart(model)))
    print(
        f"seen: {type(model).__name__}, time steps clamped to {before}: written and read differ by {one:.2g}, without the cache by {other:.1g}, "
        f"clamped to (0, inf) by {found[-1][2]:.1g}"
    )
text = torch.arange(5, 90)[None]
with torch.no_grad():
    limits = [model_of(NemotronHConfig(**NEMOTRON, time_step_limit=limit))(text).logits for limit in ((0.0, float("inf")), (0.01, 0.05))]
print(f"seen: Nemotron-H's time_step_limit changes its logits: {not limits[0].equal(limits[1])}")
(nemotron, *_), (zamba, *_), (mamba, *_) = found
right = max(mamba, *(value for own in found for value in own[1:]))
sys.exit(not (min(nemotron, zamba) > 0.02 and right < 1e-3 and limits[0].equal(limits[1])))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
