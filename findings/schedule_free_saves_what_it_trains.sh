#!/usr/bin/env bash
# transformers 5.23.0, schedulefree 1.4.1
#
# A schedule-free optimizer (optim="schedule_free_adamw") trains one set of weights and is to be used with another, their average, which its
# eval() puts in place. Trainer calls eval() before an evaluation and train() before a step, and neither before it saves nor when training
# ends. So a checkpoint has the averaged weights if an evaluation came just before it, and otherwise those that are trained; save_model()
# after train() too. Without eval_strategy, the averaged weights are never saved.
#
# Seen: distance of the saved weights to the averaged and to the trained ones: without an evaluation .006 and 0, with one 0 and .006.
#
# Why it matters: a student is published or goes on to write with weights that the method does not mean for use, and two runs that differ
# in whether they were evaluated give different students. While a trainer writes rollouts between steps, an evaluation also changes who
# writes the next text, since train() is called only when the step begins.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 schedulefree==1.4.1
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


rows = Dataset.from_list([{"input_ids": [n, n + 1, n + 2], "labels": [n, n + 1, n + 2]} for n in range(16)])
found = []
for evaluated in ("no", "steps"):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    with tempfile.TemporaryDirectory() as output:
        settings = dict(max_steps=8, save_steps=8, eval_strategy=evaluated, eval_steps=8, learning_rate=1e-2, report_to="none", use_cpu=True)
        optim = dict(optim="schedule_free_adamw", lr_scheduler_type="constant", disable_tqdm=True)
        trainer = Trainer(model, TrainingArguments(output, **settings, **optim), train_dataset=rows, eval_dataset=rows)
        trainer.train()
        saved = flat(LlamaForCausalLM.from_pretrained(f"{output}/checkpoint-8"))
    trainer.optimizer.eval()
    averaged = flat(model).clone()
    trainer.optimizer.train()
    distances = [(saved - other).abs().max().item() for other in (averaged, flat(model))]
    found.append(distances)
    print(f"eval_strategy={evaluated!r}: saved weights differ from the averaged by {distances[0]:.4f}, from the trained by {distances[1]:.4f}")
(plain_averaged, plain_trained), (averaged, trained) = found
sys.exit(not (plain_averaged > 1e-3 > 1e-6 > plain_trained and trained > 1e-3 > 1e-6 > averaged))
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | grep '^eval_strategy'
