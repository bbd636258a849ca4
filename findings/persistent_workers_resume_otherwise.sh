#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0, torch 2.13.0
#
# A run of Trainer that is resumed from a checkpoint ends with the weights of the uninterrupted one, dropout and all, with and without data
# loader workers. With dataloader_persistent_workers=True it does not, wherever in an epoch it was saved. Every new iterator of a DataLoader
# draws one number from the global generator, for its workers; persistent workers keep their iterator, so only the first epoch of a run
# draws one, and a resumed run has a first epoch of its own. All random numbers after that are others. The order of the data is the same.
#
# Seen: three epochs of four steps with dropout, resumed from step 6: equal weights with 0 workers and with 1, other weights with 1 that persists.
#
# Why it matters: on-policy distillation samples the student's completions from the same generator. A resumed run then trains on other
# completions than the run would have, and a comparison of seeds across an interruption compares unlike runs.
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
from transformers import Trainer, TrainingArguments, set_seed

SEEN = []


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line, self.dropout = torch.nn.Linear(4, 1), torch.nn.Dropout(0.5)

    def forward(self, x=None, labels=None):
        SEEN.append(x.tolist())
        found = self.line(self.dropout(x))
        return {"loss": (found - labels).square().mean(), "logits": found}


def run(output, workers, persistent, checkpoint=None):
    set_seed(1)
    SEEN.clear()
    rows = Dataset.from_list([{"x": [float(n), 1.0, 2.0, 3.0], "labels": [2.0 * n]} for n in range(8)])
    settings = dict(num_train_epochs=3, per_device_train_batch_size=2, save_steps=6, learning_rate=1e-3, report_to="none", use_cpu=True)
    settings |= dict(dataloader_num_workers=workers, dataloader_persistent_workers=persistent, disable_tqdm=True)
    trainer = Trainer(Line(), TrainingArguments(output, **settings), train_dataset=rows)
    trainer.train(resume_from_checkpoint=checkpoint)
    return list(SEEN), trainer.model.line.weight.detach().clone()


if __name__ == "__main__":
    found = []
    for workers, persistent in ((0, False), (1, False), (1, True)):
        output = f"{sys.argv[1]}/{workers}-{persistent}"
        data, weights = run(output, workers, persistent)
        data_after, weights_after = run(output, workers, persistent, f"{output}/checkpoint-6")
        found.append((data_after == data[6:], torch.equal(weights_after, weights)))
        print(f"{workers} workers, persistent {persistent}: the same data after resuming {found[-1][0]}, the same weights {found[-1][1]}")
    sys.exit(found != [(True, True), (True, True), (True, False)])
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" | grep workers || { cat "$folder/warnings"; exit 1; }
