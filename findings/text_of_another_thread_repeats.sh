#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0
#
# `generate(do_sample=True)` draws from the random generator of the whole process. Gradient checkpointing puts that generator back each
# time it computes a layer again in the backward pass, and puts it forward again afterwards. Text that another thread samples meanwhile,
# by a copy of the model, draws the same random numbers again in every layer.
#
# Seen: a model of four layers without dropout, whose copy samples eight tokens of 32,000 while each layer is computed again: the same
# eight tokens four times. Sampled one after the other, four times others.
#
# Why it matters: on-policy distillation that writes the next step's completions while it learns (asynchronous rollouts) has less text
# than it counts, without a sign: the completions of a batch are copies of each other. And the trainer's dropout depends on which thread
# was faster, so that no seed repeats a run. Draw with a generator of one's own (a logits processor that leaves one token, and greedy
# decoding), or write in another process. A GPU has a generator of its own, which the trainer puts back only where it trains on it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0
cat > "$folder/threads.py" <<'PY'
import copy
import threading

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=32_000, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2,
    eos_token_id=None, pad_token_id=0,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config)
writer = copy.deepcopy(model).eval()
prompt = torch.arange(1, 9)[None]


def sample():
    options = {"do_sample": True, "max_new_tokens": 8, "attention_mask": torch.ones_like(prompt)}
    return tuple(writer.generate(prompt, **options)[0, 8:].tolist())


model.gradient_checkpointing_enable()
model.train()
loss = model(prompt, labels=prompt).loss
texts = []


def write_meanwhile(*_):
    thread = threading.Thread(target=lambda: texts.append(sample()))
    thread.start()
    thread.join()


for layer in model.model.layers:
    layer.self_attn.register_forward_pre_hook(write_meanwhile)  # now only in the backward pass
loss.backward()
alone = [sample() for _ in texts]
print(f"while {len(texts)} layers are computed again: {len(set(texts))} different texts; alone: {len(set(alone))}")
print(f"  {texts[0]}")
raise SystemExit(not (len(texts) == 4 and len(set(texts)) == 1 and len(set(alone)) == 4))
PY
"$folder/venv/bin/python" "$folder/threads.py" 2>/dev/null
