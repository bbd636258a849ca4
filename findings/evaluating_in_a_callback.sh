#!/usr/bin/env bash
# transformers 5.23.0
#
# A callback that calls trainer.evaluate() when a step ends, which one does to measure a student every few updates, takes the training loss
# of that step out of the log. The flag that asks for the step's log is set before callbacks hear that the step has ended, evaluate() logs
# its own figures, and logging clears the flag. With logging_steps=1 and an evaluation a step, log_history has no training loss at all.
# Setting control.should_log = True after evaluate() brings it back.
#
# Seen: 3 training losses in log_history without the callback, 0 with it.
#
# Why it matters: a training curve has holes exactly at the steps at which the student was measured, and a run that is measured at every step
# looks like one that was never logged. Nothing says so.
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
from transformers import Trainer, TrainerCallback, TrainingArguments


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def forward(self, x=None, labels=None):
        found = self.line(x)
        return {"loss": (found - labels).square().mean(), "logits": found}


class Measuring(TrainerCallback):
    trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.evaluate()


rows = Dataset.from_list([{"x": [float(n)], "labels": [2.0 * n]} for n in range(8)])
losses = []
for callback in (None, Measuring()):
    with tempfile.TemporaryDirectory() as output:
        settings = dict(max_steps=3, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True)
        trainer = Trainer(
            Line(), TrainingArguments(output, **settings), train_dataset=rows, eval_dataset=rows,
            callbacks=[callback] if callback else [],
        )
        if callback:
            callback.trainer = trainer
        trainer.train()
    losses.append(sum("loss" in entry for entry in trainer.state.log_history))
print(f"training losses in log_history of 3 steps: {losses[0]} without the callback, {losses[1]} with it")
sys.exit(losses != [3, 0])
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | tail -1
