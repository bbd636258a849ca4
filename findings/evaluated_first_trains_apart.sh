#!/usr/bin/env bash
# transformers 5.23.0, accelerate 1.15.0
#
# `trainer.evaluate()` before `trainer.train()`, over several processes: Trainer has Accelerate prepare the model for the evaluation, without DDP,
# and Accelerate then returns the same bare model for the training. Gradients are not averaged: every process trains a model of its own on its own
# rows. No error, no warning. `eval_on_start=True` does not do this.
#
# Seen: two processes, 16 steps of AdamW. Without the evaluation, and with `eval_on_start=True`, the model is in a DistributedDataParallel, and both
# processes end with the same weights. After an evaluation it is a bare LlamaForCausalLM, and the two are 1.1 times as far from each other as
# the first has come from its start. The loss over all rows is 3.37 in the one and 3.48 in the other, where it is 3.12 without the evaluation.
#
# Why it matters: the untrained student's figure is the one to compare with, and `evaluate()` before `train()` is how one gets it. There are then as
# many students as processes, and each has learned from its part of the rows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import multiprocessing
import os
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

IDS = [[3 + n, 4 + n, 3 + n * 3 % 61, 5, 6 + n, 7, 3 + n * 7 % 61] for n in range(32)]
ROWS = [{"input_ids": row, "labels": row} for row in IDS]


def run(rank, how, results):
    """One of two processes. Keeps the class that is trained, the weights before and after, and the loss over all rows."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    torch.distributed.init_process_group("gloo", init_method=f"file://{results}-meeting", rank=rank, world_size=2)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3))
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "ddp_backend": "gloo"}
    plain = {"per_device_train_batch_size": 2, "max_steps": 16, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    args = TrainingArguments(f"{results}-output", **plain, **quiet, eval_on_start=how == "eval_on_start=True")
    trainer = Trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS)
    assert trainer.accelerator.num_processes == 2
    flat = lambda: torch.cat([weight.detach().flatten() for weight in model.parameters()])
    before = flat()
    if how == "evaluate() first":
        trainer.evaluate()
    trainer.train()
    ids = torch.tensor(IDS)
    with torch.no_grad():
        loss = model.eval()(input_ids=ids, labels=ids).loss.item()
    torch.save((type(trainer.model_wrapped).__name__, before, flat(), loss), f"{results}-{rank}")


found = {}
for how in ("no evaluation", "evaluate() first", "eval_on_start=True"):
    results = os.path.join(sys.argv[1], f"results-{len(found)}")
    started = [multiprocessing.get_context("fork").Process(target=run, args=(rank, how, results)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    (trained, before, one, loss), (_, _, other, other_loss) = (torch.load(f"{results}-{rank}") for rank in range(2))
    apart = ((one - other).norm() / (one - before).norm()).item()
    print(f"seen: {how}: trained as {trained}; the two processes' weights are {apart:.2g} of their way apart; loss over all rows {loss:.3g} and {other_loss:.3g}")
    found[how] = trained, apart
same = all(found[how] == ("DistributedDataParallel", 0) for how in ("no evaluation", "eval_on_start=True"))
trained, apart = found["evaluate() first"]
sys.exit(not (same and trained == "LlamaForCausalLM" and apart > 0.2))
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
