#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0
#
# A Lily adapter mixes its experts by the mean of its router's probabilities over all tokens of the batch. What it computes for a token therefore
# depends on the tokens after it, on the other rows, and on padding that the attention mask hides. A causal language model with such an adapter
# has no probability of a text: it is another for each batch that the text is in, and another when text is written token by token.
#
# Seen: the log-probs of the first six tokens of a text differ by 0.96 when six more follow, by 0.5 beside another row, and by 0.95 with masked
# padding before it. With LoRA in its place: by less than 1e-5.
#
# Why it matters: on-policy distillation compares the probability that a student wrote its text with, one token at a time, with the one that it
# has when the whole batch is scored. With this adapter the two are of different policies, and so are training and use.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from peft import LilyConfig, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TEXT, MORE, OTHER, PADDING = [3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25], [0] * 6


@torch.no_grad()
def apart(config):
    """How much the log-probs of TEXT differ between the text alone and three batches that it is in."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)), config).eval()
    for part in model.parameters():
        if part.requires_grad:  # as if it had learned something
            part += 0.3 * torch.randn_like(part)

    def log_probs(rows, mask=None):
        ids, mask = torch.tensor(rows), mask and torch.tensor(mask)
        places = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=places).logits.log_softmax(-1)

    alone = log_probs([TEXT])[0]
    followed, beside = log_probs([TEXT + MORE])[0, :6], log_probs([TEXT, OTHER])[0]
    padded = log_probs([PADDING + TEXT], [[0] * 6 + [1] * 6])[0, 6:]
    return [(own - alone).abs().max().item() for own in (followed, beside, padded)]


lily, lora = (apart(own(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")) for own in (LilyConfig, LoraConfig))
for name, found in (("Lily", lily), ("LoRA", lora)):
    print(f"seen: {name}: log-probs differ by {found[0]:.2g} when more follows, {found[1]:.2g} beside another row, {found[2]:.2g} after padding")
sys.exit(not (min(lily) > 0.05 and max(lora) < 1e-4))
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | grep '^seen'
