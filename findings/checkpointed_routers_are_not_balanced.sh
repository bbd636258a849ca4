#!/usr/bin/env bash
# transformers 5.23.0
#
# With gradient checkpointing of the reentrant kind, the balancing loss of a mixture of experts is computed, added to the loss and logged, and has
# no gradient. The router logits that it reads are recorded in the first forward pass, which reentrant checkpointing runs without a graph. The other
# losses train as they should. No error, no warning.
#
# Seen: Qwen3-MoE, Mixtral and gpt-oss. Without checkpointing, and with use_reentrant=False, the balancing loss has a gradient in the routers that is
# 1.01, 1.02 and 0.33 long; with use_reentrant=True none. Its value is the same each time.
#
# Why it matters: a student that is a mixture of experts is kept balanced by this loss alone, and its curve in the log looks right. TRL's trainers set
# use_reentrant=True themselves for PEFT under DeepSpeed ZeRO-3, whatever the user says.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
ids = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
own = {"head_dim": 16, "num_experts_per_tok": 2, "output_router_logits": True, "initializer_range": 0.2}
text = torch.arange(3, 23)[None]


def model_of(name):
    torch.manual_seed(0)
    if name == "Qwen3-MoE":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **ids, **own, num_experts=4, moe_intermediate_size=32))
    config, model = (MixtralConfig, MixtralForCausalLM) if name == "Mixtral" else (GptOssConfig, GptOssForCausalLM)
    return model(config(**sizes, **ids, **own, num_local_experts=4))


def balancing(name, reentrant):
    """The balancing loss, and the length of its gradient in the routers: of the loss with it minus the loss without it."""
    gradients = []
    for coefficient in (1.0, 0.0):
        model = model_of(name).train()
        model.router_aux_loss_coef = coefficient
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()  # as Trainer does where a model is frozen; reentrant checkpointing needs it
        output = model(text, labels=text, use_cache=False)
        output.loss.backward()
        routers = [part.grad for path, part in model.named_parameters() if path.endswith(("mlp.gate.weight", "router.weight"))]
        gradients.append(torch.cat([grad.flatten() for grad in routers]))
    return output.aux_loss.item(), (gradients[0] - gradients[1]).norm().item()


right = True
for name in ("Qwen3-MoE", "Mixtral", "gpt-oss"):
    (loss, plain), (same, other), (logged, reentrant) = (balancing(name, kind) for kind in (None, False, True))
    print(
        f"seen: {name}: gradient {plain:.4f} without checkpointing, {other:.4f} with it, {reentrant:.4f} with the reentrant kind; "
        f"loss {loss:.4f}, {same:.4f}, {logged:.4f}"
    )
    right &= plain > 0.01 and abs(plain - other) < 1e-3 * plain and reentrant < 1e-4 * plain
    right &= max(abs(loss - same), abs(loss - logged)) < 1e-4
sys.exit(not right)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
cat "$folder/seen"
