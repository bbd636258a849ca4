#!/usr/bin/env bash
# transformers 5.23.0 with accelerate 1.15.0
#
# With `auto_find_batch_size=True`, a Trainer that runs out of memory begins again at step 0 with fewer rows in a batch: counter, log, learning
# rate and the order of the rows are those of a new run. The model is not, nor is the optimizer: weights and Adam's moments stay as the first try
# left them. Its steps are nowhere in the log. No error, no warning.
#
# Seen: a run of 6 steps of 4 rows, of which the fourth batch does not fit (its rows are longer). The second try takes 6 steps of 3 rows: its log has 6
# steps, Adam has counted 9, and its first loss, on rows that were learned before, is 3.08, where that of a run with 3 rows from the beginning is
# 4.51. 12 rows were learned more than once, in that run none. Where the first batch does not fit, the weights are those of that run.
#
# Why it matters: where a student writes its own texts, memory is exceeded when they grow long, which is in the middle of a run. The weights are then
# those of more steps than are logged, the learning rate's schedule has begun twice, and a comparison step by step with another run is off.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys
import tempfile
from collections import Counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def row(n: int) -> dict:
    """A text of one token again and again, padded on the right: the last four rows are longer."""
    tokens = torch.arange(24) < (24 if n >= 12 else 8)
    ids = torch.full((24,), 3 + n)
    return {"input_ids": ids, "labels": ids.masked_fill(~tokens, -100), "attention_mask": tokens.long()}


DATA = [row(n) for n in range(16)]


def trained(rows_at_once: int, room: float, data: list, **more):
    """Of a run of six steps on a machine with room for so many tokens: weights, losses that are logged, steps that Adam has counted, and
    how many rows were learned more than once."""

    class OnThisMachine(Trainer):
        def compute_loss(self, model, inputs, *rest, **other):
            if inputs["attention_mask"].sum() > room:  # stands for the allocator, which raises the same
                raise torch.OutOfMemoryError("CUDA out of memory.")
            learned.update(inputs["input_ids"][:, 0].tolist())
            return super().compute_loss(model, inputs, *rest, **other)

    learned = Counter()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, initializer_range=0.2))
    quiet = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    plain = {"max_steps": 6, "learning_rate": 1e-2, "train_sampling_strategy": "sequential"}
    with tempfile.TemporaryDirectory() as output:
        args = TrainingArguments(output, per_device_train_batch_size=rows_at_once, **plain, **quiet, **more)
        trainer = OnThisMachine(model=model, args=args, train_dataset=data)
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    counted = int(next(iter(trainer.optimizer.state.values()))["step"])
    weights = torch.cat([part.detach().flatten() for part in model.parameters()])
    return weights, losses, counted, sum(times > 1 for times in learned.values())


good, auto = True, {"auto_find_batch_size": True}
for name, data in (("fourth", DATA), ("first", DATA[::-1])):
    plain, tried = trained(3, 1e9, data), trained(4, 80, data, **auto)
    same = torch.allclose(plain[0], tried[0], atol=1e-5)
    for what, own in (("3 rows from the beginning", plain), (f"4 rows, and the {name} batch does not fit", tried)):
        print(f"seen: {what}: {len(own[1])} steps logged, {own[2]} counted by Adam, first loss {own[1][0]:.2f}, {own[3]} rows learned more than once")
    print(f"seen: where the {name} batch does not fit, weights are {'' if same else 'not '}those of the run with 3 rows")
    late = name == "fourth"
    good = good and same != late and len(tried[1]) == len(plain[1]) == plain[2] == 6 and tried[2] == (9 if late else 6)
    good = good and (not late or tried[1][0] < plain[1][0] - 0.5)
sys.exit(not good)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
