#!/usr/bin/env bash
# transformers 5.23.0, peft 0.21.2
#
# `model.generate_batch` (continuous batching) of a model with an activated LoRA (`alora_invocation_tokens`) writes what the base model
# writes, without a warning. PEFT switches such an adapter on in its own `generate` and `forward`, which see the invocation in the prompt;
# `generate_batch` is taken from the model inside. A plain LoRA, whose layers are on throughout, writes the same by both.
#
# Seen: two prompts with the invocation, greedy, eight tokens each:
#     LoRA: generate_batch writes what generate writes: True
#     activated LoRA: generate_batch writes what generate writes: False; what the model without its adapter writes: True
#
# Why it matters to people who distil across tokenizers: an on-policy trainer that writes by continuous batching scores and trains the
# adapter on text that the adapter never wrote, and the log-ratio to the teacher looks plausible all the while.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 peft==0.21.2

cat > "$folder/show.py" <<'PYTHON'
import warnings

warnings.filterwarnings("ignore")
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig
from transformers.generation import ContinuousBatchingConfig

INVOCATION = [5, 6]
PROMPTS = [[7, 8, 9, *INVOCATION, 10], [11, 12, 13, 14, *INVOCATION, 15]]
GREEDY = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def adapted(**settings):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None, **SIZES)
    model = AutoModelForCausalLM.from_config(config).eval()
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@torch.no_grad()
def one_by_one(model) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=GREEDY)
        found.append(written[0, len(prompt) :].tolist())
    return found


@torch.no_grad()
def batched(model) -> list[list[int]]:
    settings = ContinuousBatchingConfig(num_blocks=32, page_size=32, max_batch_tokens=128)
    found = model.generate_batch(PROMPTS, generation_config=GREEDY, continuous_batching_config=settings)
    return [found[name].generated_tokens for name in sorted(found)]


plain = adapted()
plain_agrees = one_by_one(plain) == batched(plain)
print("LoRA: generate_batch writes what generate writes:", plain_agrees)
activated = adapted(alora_invocation_tokens=INVOCATION)
text, own = batched(activated), one_by_one(activated)
with activated.disable_adapter():
    base = one_by_one(activated)
print("activated LoRA: generate_batch writes what generate writes:", text == own, end="; ")
print("what the model without its adapter writes:", text == base)
raise SystemExit(0 if plain_agrees and own != base and text == base else 1)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
