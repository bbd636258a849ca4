#!/usr/bin/env bash
# transformers 5.23.0 with accelerate 1.15.0
#
# With `auto_find_batch_size=True`, Trainer begins again with smaller batches after an out-of-memory error: at step 0, with the first rows, the first
# learning rate and an empty log. The weights and the optimizer's moments are those that the interrupted try has left. No warning.
#
# Seen: runs of six steps, in which a batch of four is out of memory. Where it is from the first step on, the next try begins with the model's own
# weights: a loss of 7.360 in `eval_on_start`, 6.902 in the first step. Where it is from the fourth step on, it begins at step 0 with moved weights and
# Adam's moments, with 6.806 in `eval_on_start` and 5.116 in the first step; the log has six steps, and Adam has counted nine.
#
# Why it matters: where one long row, or the longest completion so far, is what memory has no room for, the error comes in the middle of a run. What is
# then logged and saved as step n has learned the first rows twice, the "before" of `eval_on_start` is a trained student, and runs with the same
# settings and seed on cards with more and with less memory differ by more than their batch size.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

ROWS = torch.randint(3, 200, (32, 12), generator=torch.Generator().manual_seed(1))
QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


class OutOfMemory(Trainer):
    """As on a device with room for two rows from `since` on."""

    since, begun = 0, ()

    def evaluate(self, *args, **kwargs):
        found = super().evaluate(*args, **kwargs)
        self.before = found["eval_loss"]  # of `eval_on_start`
        return found

    def compute_loss(self, model, inputs, **kwargs):
        rows, step = len(inputs["input_ids"]), self.state.global_step
        if rows == 4 and step >= self.since:
            raise RuntimeError("CUDA out of memory. ")
        if rows < 4 and not self.begun:
            moved = max((now - then).abs().max().item() for now, then in zip(model.parameters(), self.start))
            self.begun = step, moved, len(self.optimizer.state), len(self.state.log_history)
        return super().compute_loss(model, inputs, **kwargs)


def run(since):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=200, **sizes, initializer_range=0.5))
    data = [{"input_ids": row.clone(), "labels": row.clone()} for row in ROWS]
    plain = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "auto_find_batch_size": True, "eval_on_start": True}
    with tempfile.TemporaryDirectory() as output:
        trainer = OutOfMemory(model=model, args=TrainingArguments(output, **plain, **QUIET), train_dataset=data, eval_dataset=data)
        trainer.since, trainer.start = since, [weight.detach().clone() for weight in model.parameters()]
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    counted = max(int(state["step"]) for state in trainer.optimizer.state.values())
    step, moved, moments, _ = trainer.begun
    print(
        f"seen: out of memory from step {since + 1} on: the next try begins at step {step}, weights moved by {moved:.3f}, moments of {moments} weights, "
        f"eval_on_start {trainer.before:.3f}, first loss {losses[0]:.3f}; {len(losses)} losses in the log, {counted} steps of Adam"
    )
    return step, moved > 0, moments > 0, len(losses), counted


found = [run(since) for since in (0, 3)]
sys.exit(found != [(0, False, False, 6, 6), (0, True, True, 6, 9)])
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | { grep '^seen' || true; } || { cat "$folder/warnings"; exit 1; }
