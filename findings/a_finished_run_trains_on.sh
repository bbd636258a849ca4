#!/usr/bin/env bash
# transformers 5.23.0
#
# Trainer looks whether a run has ended after a step, not before one. A run of max_steps that ended within an epoch and is started again from its
# last checkpoint takes one more step, and saves it: each further start one more. A run whose end is the end of an epoch takes none.
#
# Seen: max_steps=4 of 8 steps an epoch, started three times with resume_from_checkpoint: 4, 5 and 6 steps, the last ones with the learning rate 0 of
# a linear schedule, or with the full one of a constant schedule, which moves the weights. With max_steps=8: 8, 8 and 8.
#
# Why it matters: a cluster starts a job again that was killed while it evaluated, merged or uploaded the student. On-policy runs are counted in
# steps, since an epoch of prompts says little. The student that is uploaded is then not the one that was measured, and which one it is depends on
# how often the job was started.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def forward(self, x=None, labels=None):
        found = self.line(x)
        return {"loss": (found - labels).square().mean(), "logits": found}


def started(folder, schedule, max_steps):
    rows = Dataset.from_list([{"x": [n / 16], "labels": [n / 8]} for n in range(16)])
    settings = dict(per_device_train_batch_size=2, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    settings |= dict(learning_rate=0.1, lr_scheduler_type=schedule, max_steps=max_steps)
    trainer = Trainer(Line(), TrainingArguments(folder, **settings), train_dataset=rows)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder))
    return trainer.state.global_step, trainer.model.line.weight.item()


holds = True
for schedule, max_steps, expected in (("constant", 4, [4, 5, 6]), ("linear", 4, [4, 5, 6]), ("constant", 8, [8, 8, 8])):
    folder = f"{sys.argv[1]}/{schedule}-{max_steps}"
    (first, weight), (second, moved), (third, _) = [started(folder, schedule, max_steps) for _ in range(3)]
    print(f"{schedule}, max_steps={max_steps}: {[first, second, third]} steps, the weight {weight:.4f}, started again {moved:.4f}")
    holds &= [first, second, third] == expected and (weight != moved) == (schedule == "constant" and max_steps == 4)
sys.exit(not holds)
PY
mkdir "$folder/runs"
"$folder/venv/bin/python" "$folder/look.py" "$folder/runs" 2> "$folder/warnings" | grep "max_steps=" || { cat "$folder/warnings"; exit 1; }
