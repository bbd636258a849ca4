#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0
#
# A checkpoint of Trainer counts optimizer steps alone. A run of `num_train_epochs` that is resumed takes the old count for steps of the new size:
# it divides it by the number of steps that an epoch has now. With twice as many processes, or twice the `gradient_accumulation_steps`, a run that
# was halfway is at its end: it reads nothing more, returns, and leaves the model as it was. With half as many processes it is at a quarter, and
# reads rows again that it has read. The warning that Trainer has for other settings (`compare_trainer_and_checkpoint_args`) looks at the batch size
# of a device, and is not given.
#
# Seen: four epochs of 32 rows, 4 a process and step, ended after two epochs and resumed. As it was: two more epochs. From one process to two: none,
# at `epoch` 2 of 4. With gradient_accumulation_steps=2 in the place of 1: none. From two processes to one: three more, five in all, and the linear
# learning rate, which had fallen to a half of its start, is at 0.72 of it a step later. No warning of other settings in any of these.
#
# Why it matters: long runs move between machines. A student whose run is resumed on twice as many GPUs is half-trained, and the job ends well: it
# saves, evaluates and uploads it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import logging
import multiprocessing
import os
import sys

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

ROWS, EPOCHS = 32, 4


class Model(torch.nn.Module):
    """Counts how often it was trained on each row."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.read = torch.zeros(ROWS)

    def forward(self, row):
        self.read[row] += 1
        return {"loss": (self.weight - row.float().mean() / ROWS) ** 2}


class Watch(TrainerCallback):
    """Ends a run that is to be resumed after half of its epochs, and keeps the learning rate after each step."""

    def __init__(self, halt):
        self.halt, self.rates = halt, []

    def on_step_end(self, args, state, control, lr_scheduler, **_):
        self.rates.append(lr_scheduler.get_last_lr()[0])

    def on_epoch_end(self, args, state, control, **_):
        control.should_training_stop = self.halt and state.epoch >= EPOCHS / 2


class Warned(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.found = 0

    def emit(self, record):
        self.found += "do not match" in record.getMessage()


def run(rank, processes, folder, halt, accumulated, results):
    """One process of a run. Rank 0 tells how often each row was read on average, the learning rates, the epoch at the end, and how often it was
    warned of other settings."""
    shared = {}
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1")
        torch.distributed.init_process_group("gloo", init_method=f"file://{results}.meeting", rank=rank, world_size=processes)
        shared = {"ddp_backend": "gloo"}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "epoch"}
    plain = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulated, "learning_rate": 1e-3}
    args = TrainingArguments(folder, num_train_epochs=EPOCHS, **plain, **quiet, **shared)
    model, watch, warned = Model(), Watch(halt), Warned()
    logging.getLogger("transformers").addHandler(warned)
    trainer = Trainer(model, args, train_dataset=[{"row": n} for n in range(ROWS)], callbacks=[watch])
    assert trainer.accelerator.num_processes == processes
    trainer.train(resume_from_checkpoint=not halt)
    if processes > 1:
        torch.distributed.all_reduce(model.read)
    if rank == 0:
        torch.save((model.read.mean().item(), watch.rates, trainer.state.epoch, warned.found), results)
        print(f"{folder} {processes} {trainer.state.global_step} of {trainer.state.max_steps} steps", file=sys.stderr)


def launch(processes, *task):
    """What rank 0 of `processes` new ones tells."""
    results = os.path.join(sys.argv[1], f"results-{launch.count}")
    launch.count += 1
    started = [multiprocessing.get_context("fork").Process(target=run, args=(rank, processes, *task, results)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    return torch.load(results)


launch.count = 0
found = {}
for text, before, after in (
    ("with the same settings", (1, 1), (1, 1)),
    ("on two processes, not one", (1, 1), (2, 1)),
    ("with two micro-batches a step, not one", (1, 1), (1, 2)),
    ("on one process, not two", (2, 1), (1, 1)),
):
    folder = os.path.join(sys.argv[1], f"run-{len(found)}")
    first, rates, *_ = launch(before[0], folder, True, before[1])
    more, after_rates, epoch, warnings = launch(after[0], folder, False, after[1])
    rates = f", learning rate {rates[-1]:.2g} at the halt and {after_rates[0]:.2g} a step later" if after_rates else ""
    print(f"seen: {first:g} of {EPOCHS} epochs, resumed {text}: {more:g} more, which ends at epoch {epoch:g}{rates}; {warnings} warnings of other settings")
    found[text] = first, more, warnings
sys.exit(list(found.values()) != [(2, 2, 0), (2, 0, 0), (2, 0, 0), (2, 3, 0)])
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
