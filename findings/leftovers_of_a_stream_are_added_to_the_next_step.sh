#!/usr/bin/env bash
# transformers 5.23.0, datasets 5.2.0
#
# With gradient accumulation, Trainer makes a step of the fewer micro-batches at the end of an epoch where it knows how many there are. Of a stream
# it does not: micro-batches that fill no step are run backward and no step is taken. Their gradient stays, and is added to that of the first step
# of the next pass. Both were divided by their own number of items, so that this step is of two steps' size, at each pass anew.
#
# Seen: three micro-batches a pass, two of them a step, SGD on one weight with a gradient of 1 an item: with a dataset each step moves the weight by
# 1. With the same rows as a stream the first moves it by 1, and each one after it, which is the first of a pass, by 2.
#
# Why it matters: prompts for distillation are often streamed, and a short or filtered stream is passed many times. The learning rate is then not the
# one that was set, and the logged loss is twice what it is. Clipping hides the size and not the weights of the rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 datasets==5.2.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments


class Weight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, labels=None, num_items_in_batch=None, **kwargs):
        return {"loss": -self.weight.sum() * labels.numel() / num_items_in_batch}


class Moves(TrainerCallback):
    def __init__(self):
        self.values = [0.0]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.values.append(round(model.weight.item(), 4))


def moves(stream):
    """By how much each of five steps moves the weight: rows of three micro-batches, two micro-batches a step."""
    rows = Dataset.from_dict({"labels": [[1]] * 3})
    seen = Moves()
    with tempfile.TemporaryDirectory() as output:
        settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 5}
        quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_strategy": "no"}
        args = TrainingArguments(output, **settings, **sizes, **quiet, remove_unused_columns=False)
        trainer = Trainer(Weight(), args, train_dataset=rows.to_iterable_dataset() if stream else rows, callbacks=[seen])
        trainer.model_accepts_loss_kwargs = True
        trainer.train()
    return [later - earlier for earlier, later in zip(seen.values, seen.values[1:])]


known, streamed = moves(False), moves(True)
print(f"seen: a dataset's steps move the weight by {known}, a stream's by {streamed}")
sys.exit(not (known == [1.0] * 5 and streamed == [1.0, 2.0, 2.0, 2.0, 2.0]))
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | grep '^seen'
