#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0
#
# The order of the data in an epoch of Trainer is drawn from seed + epoch (data_seed + epoch, where that is set). So the second epoch of seed 42 has
# the order of the first of seed 43, and the third that of the first of seed 44.
#
# Seen: 12 rows, two epochs: the second order of seed 42 is the first of seed 43, and likewise with data_seed 3 and 4.
#
# Why it matters: distillation runs are compared over a few seeds, mostly neighbouring ones, and small sets of prompts are seen several times. Such
# runs are not independent: they differ in when they see an order more than in which, and the spread over seeds is too small. Take seeds
# that lie further apart than a run has epochs.
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

SEEN = []


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)

    def forward(self, x=None, labels=None):
        SEEN.extend(x[:, 0].int().tolist())
        found = self.line(x)
        return {"loss": (found - labels).square().mean(), "logits": found}


def orders(**seeds):
    SEEN.clear()
    rows = Dataset.from_list([{"x": [float(n)], "labels": [2.0 * n]} for n in range(12)])
    settings = dict(num_train_epochs=2, per_device_train_batch_size=4, save_strategy="no", report_to="none", use_cpu=True)
    Trainer(Line(), TrainingArguments(sys.argv[1], **settings, **seeds), train_dataset=rows).train()
    print(f"{seeds}: first epoch {SEEN[:12]}, second {SEEN[12:]}")
    return SEEN[:12], SEEN[12:]


runs = [orders(seed=42), orders(seed=43), orders(data_seed=3), orders(data_seed=4)]
sys.exit(not (runs[0][1] == runs[1][0] and runs[2][1] == runs[3][0] and runs[0][0] != runs[1][0] != runs[1][1]))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" | grep "first epoch" || { cat "$folder/warnings"; exit 1; }
