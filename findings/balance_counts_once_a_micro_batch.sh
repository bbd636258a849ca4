#!/usr/bin/env bash
# transformers 5.23.0
#
# A mixture of experts adds router_aux_loss_coef times its load-balancing loss to the loss of each micro-batch. Trainer divides the cross-entropy by
# the number of tokens of the whole step and the sum by nothing: with gradient_accumulation_steps=n the balancing loss counts n times. (TRL's
# SFTTrainer divides it.) No error, no warning.
#
# Seen: the same four equal rows as one micro-batch, as two and as four, one step of SGD of a small Qwen3-MoE with output_router_logits=True: the
# step of the routers' weights, and the logged loss, hold the balancing loss once, twice and four times. The cross-entropy is in all three the same.
#
# Why it matters: a student or a teacher that is a mixture of experts is tuned with 8 or 32 micro-batches on small machines, and balanced as many
# times as strongly as was set, at the cost of what it learns; two machines with other micro-batches train other models. Divide
# router_aux_loss_coef by gradient_accumulation_steps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import torch
from datasets import Dataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

ROW = list(range(5, 21))
COEFFICIENT = 0.1


def model_of():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2}
    balance = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **balance, initializer_range=0.5))


def routers(model):
    return [weight for name, weight in model.named_parameters() if name.endswith("gate.weight")]


def gradients(model, loss):
    found = torch.autograd.grad(loss, routers(model), retain_graph=True)
    return torch.cat([own.flatten() for own in found])


def step(accumulation):
    """How the first step of SGD moves the routers' weights, in units of the learning rate, and the loss that is logged."""
    model = model_of()
    before = [own.detach().clone() for own in routers(model)]
    settings = {"optim": "sgd", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1}
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArguments(output, **settings, **sizes, **quiet)
        trainer = Trainer(model, args, train_dataset=Dataset.from_list([{"input_ids": ROW, "labels": ROW}] * 4))
        trainer.train()
    moved = torch.cat([(old - own.detach()).flatten() for own, old in zip(routers(model), before)]) / 1e-3
    return moved, next(row["loss"] for row in trainer.state.log_history if "loss" in row)


model = model_of()
rows = torch.tensor([ROW] * 4)
output = model(input_ids=rows, labels=rows)
balance = COEFFICIENT * output.aux_loss
entropy = output.loss - balance
of_balance, of_entropy = gradients(model, balance), gradients(model, entropy)
counts = []
for accumulation in (1, 2, 4):
    moved, loss = step(accumulation)
    times = torch.linalg.lstsq(torch.stack([of_entropy, of_balance], 1), moved[:, None]).solution.flatten().tolist()
    logged = (loss - entropy.item()) / balance.item()
    counts.append([round(value, 1) for value in (*times, logged)])
    print(f"seen: {accumulation} micro-batches: the routers' step is {times[0]:.2f} x the cross-entropy's + {times[1]:.2f} x the balancing", end="")
    print(f" loss's; the logged loss holds it {logged:.2f} times")
sys.exit(counts != [[1, 1, 1], [1, 2, 2], [1, 4, 4]])
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
grep '^seen' "$folder/seen"
