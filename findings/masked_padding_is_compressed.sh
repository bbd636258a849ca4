#!/usr/bin/env bash
# transformers 5.23.0
#
# DeepSeek-V4 reads masked padding. Its compressed attention takes one entry of every four tokens (128 in other layers), counted in columns of the
# batch, and has no mask of its own: a row with padding on its left has entries made of padding, and others made of its tokens that are cut
# at other places, and sees them as if they began with the row. No error, no warning, with the right attention mask and position ids.
#
# Seen: a random DeepSeek-V4, a text of 20 tokens. Its log-probs differ by up to 6.7 nats after 10 tokens of masked padding from those of the text alone,
# by 4.4 between two padding tokens, and by less than 1e-4 with the padding on its right. Of eight texts that are written greedily after padding, none is the one
# that is written without. DeepSeek-V3: less than 1e-4, and all eight.
#
# Why it matters: prompts of unlike length are padded on their left to be written for together, and in GRPO also to be scored. A student or teacher
# of this family then writes and scores by what stands beside a row. Write for prompts one at a time, and pad on the right where texts are scored.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV4Config

torch.set_num_threads(1)
SHARED = {"vocab_size": 96, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "n_routed_experts": 4}
SHARED |= {"num_experts_per_tok": 4, "q_lora_rank": 32, "qk_rope_head_dim": 8, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
V4 = {"head_dim": 16, "o_groups": 2, "o_lora_rank": 16, "index_head_dim": 16, "mlp_layer_types": ["moe"] * 4}
V4["layer_types"] = ["heavily_compressed_attention", "compressed_sparse_attention"] * 2
V3 = {"intermediate_size": 48, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1}
TEXT = torch.randint(5, 90, (8, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def look(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    def log_probs(ids, mask):
        places = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=places).logits.log_softmax(-1)

    def written(ids, mask):
        return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)[:, -20:]

    ones, none = torch.ones_like(TEXT), torch.zeros(8, 10, dtype=torch.long)
    alone = log_probs(TEXT, ones)
    mask = torch.cat([none, ones], 1)
    left, other = (log_probs(torch.cat([none + token, TEXT], 1), mask)[:, 10:] for token in (0, 93))
    right = log_probs(torch.cat([TEXT, none], 1), torch.cat([ones, none], 1))[:, :20]
    off = [(one - two).abs().max().item() for one, two in ((left, alone), (left, other), (right, alone))]
    same = (written(TEXT, ones) == written(torch.cat([none, TEXT], 1), mask)).all(1).sum().item()
    print(
        f"seen: {type(model).__name__}: log-probs differ by {off[0]:.2g} after padding, by {off[1]:.2g} between two padding tokens, by {off[2]:.2g} with padding "
        f"on the right; texts that are written alike: {same} of 8"
    )
    return *off, same


v4, v3 = look(DeepseekV4Config(**SHARED, **V4)), look(DeepseekV3Config(**SHARED, **V3))
sys.exit(not (min(v4[:2]) > 0.05 and v4[2] < 1e-3 and v4[3] < 8 and max(v3[:3]) < 1e-3 and v3[3] == 8))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
