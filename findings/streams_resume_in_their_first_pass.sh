#!/usr/bin/env bash
# transformers 5.23.0
#
# Trainer knows no length of an IterableDataset, and takes all max_steps for one epoch. A run that has read its stream once and goes on with a second
# pass resumes from a checkpoint of that pass as if it stood in the first one: it skips as many batches as there were steps, comes to the end
# of the stream while it skips, and begins the stream anew. The epoch that it gives to set_epoch is 0 then, too. Nothing is said.
#
# Seen: a stream of 11 rows, 4 a step, 8 steps. After step 4 the uninterrupted run reads rows 4 to 7, the resumed one 0 to 3, and ends with other
# weights. Resumed after step 2, within the first pass, it reads what the uninterrupted run reads.
#
# Why it matters: on-policy runs are counted in steps, and prompts are often streamed. A job that is killed in the second pass reads the first prompts
# of the stream more often than the last ones, and a "resumed" run is another run.
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


class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.line, self.read = torch.nn.Linear(1, 1), []

    def forward(self, x=None, labels=None):
        if self.training:
            self.read.append([round(value * 16) for value in x[:, 0].tolist()])
        found = self.line(x)
        return {"loss": (found - labels).square().mean(), "logits": found}


def trained(folder, checkpoint=None):
    stream = Dataset.from_list([{"x": [n / 16], "labels": [n / 8]} for n in range(11)]).to_iterable_dataset()
    settings = dict(per_device_train_batch_size=4, save_steps=1, max_steps=8, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(Line(), TrainingArguments(folder, learning_rate=0.1, **settings), train_dataset=stream)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.model.read, trainer.model.line.weight.item()


whole, weight = trained(f"{sys.argv[1]}/whole")
found = {}
for step in (2, 4):
    read, found[step] = trained(f"{sys.argv[1]}/resumed-{step}", f"{sys.argv[1]}/whole/checkpoint-{step}")
    print(f"after step {step} rows {whole[step]}, weight at the end {weight:.4f}; resumed there, rows {read[0]}, weight {found[step]:.4f}")
    assert (read[0] == whole[step]) == (step == 2), "it has changed"
sys.exit(not (found[2] == weight != found[4]))
PY
mkdir "$folder/runs"
"$folder/venv/bin/python" "$folder/look.py" "$folder/runs" 2> "$folder/warnings" | grep "after step" || { cat "$folder/warnings"; exit 1; }
