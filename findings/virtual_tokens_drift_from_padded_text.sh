#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.23.0
#
# With prompt tuning, what a model makes of a text depends on the padding on its left, though the attention mask hides it. PEFT puts its virtual
# tokens before the padding and leaves the position ids out, so that the text stands further from them by the length of the padding. `generate`
# does the same: a prompt is answered otherwise beside a long one than alone. Padding on the right changes nothing. No error; `generate` warns
# that position ids are ignored, with padding or without.
#
# Seen: a Llama with 4 virtual tokens. The logits after a text of 6 tokens with 10 of masked padding on its left differ by up to 1.0 from those of
# the text alone, in a forward pass and in `generate`; with padding on the right by nothing. Without an adapter and with LoRA they never differ.
#
# Why it matters: on-policy trainers write in batches that are padded on the left. Where rows are scored with padding on the right, or one by one,
# another policy is trained than has written. Where they stay padded on the left, the other rows of a batch decide what a student is.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

text, length, padding = torch.tensor([[5, 17, 9, 40, 22, 31]]), 6, torch.zeros(1, 10, dtype=torch.long)
hidden, shown = torch.zeros_like(padding), torch.ones_like(text)
rows = {
    "alone": (text, shown, length - 1),
    "on the left": (torch.cat([padding, text], 1), torch.cat([hidden, shown], 1), -1),
    "on the right": (torch.cat([text, padding], 1), torch.cat([shown, hidden], 1), length - 1),
}


@torch.no_grad()
def differences(config):
    """How far the logits after the padded text are from those after the text alone: padded on the left, on the right, and in `generate`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    own = LlamaConfig(**sizes, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    model = LlamaForCausalLM(own)
    virtual = 0
    if config is not None:
        model = get_peft_model(model, config)
        virtual = getattr(config, "num_virtual_tokens", 0)
        for part in model.parameters():
            if part.requires_grad:  # as if it had learned something
                part += torch.randn_like(part)
    model.eval()
    logits = {}
    for name, (ids, mask, place) in rows.items():
        found = model(input_ids=ids, attention_mask=mask).logits[0]
        logits[name] = found[place if place < 0 else virtual + place]
    written = {}
    for name in ("alone", "on the left"):
        ids, mask, _ = rows[name]
        kept = {"output_logits": True, "return_dict_in_generate": True}
        written[name] = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, do_sample=False, **kept).logits[0][0]
    apart = [logits["alone"] - logits[name] for name in ("on the left", "on the right")]
    return [own.abs().max().item() for own in (*apart, written["alone"] - written["on the left"])]


kinds = {
    "no adapter": None,
    "LoRA": LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}
right = True
for name, config in kinds.items():
    left, behind, written = differences(config)
    print(f"seen: {name}: padding on the left {left:.4f}, on the right {behind:.4f}, in generate {written:.4f}")
    right &= behind < 1e-3 and (min(left, written) > 0.05 if name == "prompt tuning" else max(left, written) < 1e-3)
sys.exit(not right)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
cat "$folder/seen"
