#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0
#
# With train_sampling_strategy="group_by_length" the order of an epoch is drawn from torch's global generator, when the epoch begins. A resumed run
# draws the order of the epoch in which it stopped with the generator as it is at its start, skips as many batches of that other order, and
# only then reads the checkpoint's generator. In the first epoch the two are mostly the same, in later ones not. "random" draws from the seed
# and the epoch, and goes on with the same rows. No error, no warning.
#
# Seen: 24 rows, two epochs, resumed from a checkpoint in the middle of the second: with "random" the rows are those of the uninterrupted run. With
# "group_by_length" they are others: 8 of 24 are read twice in that epoch, and 8 never.
#
# Why it matters: texts of distillation differ much in length, and this option is for them. Each time that a run of several epochs is resumed, part of
# its data is read twice and part is left out of that epoch, and the run does not become the uninterrupted one.
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
from transformers import Trainer, TrainingArguments

ROWS, BATCH = 24, 2
STEPS = ROWS // BATCH
DATA = Dataset.from_list([{"row": n, "length": n % 5} for n in range(ROWS)])


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, rows):
        self.seen.extend(rows.tolist())
        return {"loss": (self.weight - 1).square().sum()}


def read(strategy, output, checkpoint=None):
    model = Line()
    sizes = {"per_device_train_batch_size": BATCH, "num_train_epochs": 2, "save_steps": STEPS // 2}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", "remove_unused_columns": False}
    args = TrainingArguments(output, train_sampling_strategy=strategy, length_column_name="length", **sizes, **quiet)
    collate = {"data_collator": lambda rows: {"rows": torch.tensor([row["row"] for row in rows])}}
    Trainer(model, args, train_dataset=DATA, **collate).train(resume_from_checkpoint=checkpoint)
    return model.seen


def resumed(strategy):
    with tempfile.TemporaryDirectory() as output, tempfile.TemporaryDirectory() as second:
        whole = read(strategy, output)
        rest = read(strategy, second, f"{output}/checkpoint-{STEPS + STEPS // 2}")
    half = ROWS + ROWS // 2
    epoch = whole[ROWS:half] + rest
    return rest == whole[half:], len(epoch) - len(set(epoch)), ROWS - len(set(epoch))


found = {strategy: resumed(strategy) for strategy in ("random", "group_by_length")}
for strategy, (same, twice, never) in found.items():
    print(f"seen: {strategy}, resumed in the second epoch: goes on with the same rows: {same}; read twice: {twice}, never: {never}")
sys.exit(not (found["random"] == (True, 0, 0) and not found["group_by_length"][0] and found["group_by_length"][2] > 0))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
grep '^seen' "$folder/seen"
