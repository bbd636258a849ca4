#!/usr/bin/env bash
# transformers 5.24.0 with peft 0.21.2 (with transformers 5.23.0 all is well)
#
# transformers 5.24 calls the KV cache `cache` in `generate`, where it was `past_key_values`. PEFT's generation with virtual tokens (prompt
# tuning) looks for the old name to know whether the prompt has been read. It never finds it, and leaves the virtual tokens out or puts
# them in at the wrong time. No error, and no warning that the older version has not: the text is fluent, and not the one that the
# adapter's forward passes would write.
#
# Seen: with transformers 5.23.0 none of 24 greedy texts differs from the one that plain forward passes write. With 5.24.0 all 24 do.
#
# Why it matters: on-policy training takes what the student writes for a draw from the student. Here it is a draw from another model, and the
# log-probs it is trained with are of text that it would not write.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" <<'PY'
import sys

import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

set_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.4,
)
model = get_peft_model(LlamaForCausalLM(config), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
model = model.double().eval()
for weight in model.prompt_encoder.parameters():
    weight.data.normal_(0, 1)
differ = 0
for _ in range(24):
    prompt = torch.randint(3, 97, (1, 6))
    settings = dict(do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    written = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
    own = prompt
    for _ in range(12):
        with torch.no_grad():
            logits = model(input_ids=own, attention_mask=torch.ones_like(own)).logits
        own = torch.cat([own, logits[:, -1:].argmax(-1)], 1)
    differ += written.tolist() != own.tolist()
print(f"{differ} of 24 greedy texts differ from those of plain forward passes")
sys.exit((differ > 0) != (sys.argv[1] == "5.24.0"))
PY
for version in 5.23.0 5.24.0; do
    python3 -m venv --clear "$folder/venv"
    "$folder/venv/bin/pip" install -qq torch==2.13.0
    "$folder/venv/bin/pip" install -qq "transformers==$version" peft==0.21.2
    echo "transformers $version"
    "$folder/venv/bin/python" "$folder/look.py" "$version"
done
