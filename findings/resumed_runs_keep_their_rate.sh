#!/usr/bin/env bash
# transformers 5.23.0, torch 2.13.0
#
# A run that is resumed from a checkpoint takes learning_rate, weight_decay and Adam's betas from the checkpoint's optimizer.pt and
# scheduler.pt: what TrainingArguments says now is not used, without a word. A larger max_steps is used, but one step late: the first step
# has the learning rate that the old schedule ended with. After a finished run with a linear or cosine schedule that is 0, and the step
# changes nothing.
#
# Seen: a run resumed with a tenth of its learning rate and a weight decay goes on with the old ones. A run of 3 steps, resumed with
# max_steps=6, has the learning rate 0 at its 4th step, which leaves all weights as they are, and a third of the first rate at its 5th.
#
# Why it matters: "train on with a lower rate" and "train on for longer" are the two things that one resumes a distillation for by hand. The
# first does nothing, and the second loses a step, whose completions were paid for.
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
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

ROWS = Dataset.from_list([{"input_ids": [n, n + 1, n + 2], "labels": [n, n + 1, n + 2]} for n in range(16)])


class Moves(TrainerCallback):
    """How far each step moves the weights, and with which learning rate."""

    def __init__(self):
        self.seen = {}

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.before = torch.cat([own.detach().flatten() for own in model.parameters()])

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.group = {name: optimizer.param_groups[0][name] for name in ("lr", "weight_decay")}

    def on_step_end(self, args, state, control, model, **kwargs):
        now = torch.cat([own.detach().flatten() for own in model.parameters()])
        self.seen[state.global_step] = {**self.group, "moved": (now - self.before).abs().max().item()}


def run(folder, checkpoint=None, **settings):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    quiet = dict(save_strategy="steps", save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True)
    moves = Moves()
    args = TrainingArguments(folder, **{"learning_rate": 1e-2, **quiet, **settings})
    trainer = Trainer(LlamaForCausalLM(LlamaConfig(**sizes)), args, train_dataset=ROWS, callbacks=[moves])
    trainer.train(resume_from_checkpoint=checkpoint)
    return moves.seen


with tempfile.TemporaryDirectory() as folder:
    first = run(folder, max_steps=3)
    lower = run(folder, f"{folder}/checkpoint-1", max_steps=3, learning_rate=1e-3, weight_decay=0.5)
with tempfile.TemporaryDirectory() as folder:
    run(folder, max_steps=3)
    longer = run(folder, f"{folder}/checkpoint-3", max_steps=6)
print(f"second step, as it was begun {first[2]['lr']:.4f}; resumed with a tenth and weight_decay=0.5: {lower[2]['lr']:.4f}, {lower[2]['weight_decay']}")
print("resumed with max_steps=6:", {step: (round(own["lr"], 5), own["moved"] > 0) for step, own in longer.items()})
same = lower[2]["lr"] == first[2]["lr"] and lower[2]["weight_decay"] == 0
sys.exit(not (same and longer[4]["lr"] == 0 and longer[4]["moved"] == 0 and abs(longer[5]["lr"] - 1e-2 / 3) < 1e-6))
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | grep -E '^(second|resumed)'
