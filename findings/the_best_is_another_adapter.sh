#!/usr/bin/env bash
# transformers 5.23.0, peft 0.21.2
#
# With `load_best_model_at_end=True`, Trainer looks for the best adapter in the checkpoint's folder itself. PEFT saves there the adapter that is
# called "default", and every other in a folder of its name. If the adapter that is trained has another name and a "default" stands beside it, the
# weights of "default" are loaded into the trained one, without an error or a warning. If there is no "default", the last weights stay under a warning
# that the model was not found and `save_on_each_node` might help. `resume_from_checkpoint` finds each adapter in its folder.
#
# Seen: an adapter of a random Llama is trained for six steps, and evaluated after each. Called "default", it ends with the loss of its
# best step, 5.677. Called "student", with that of the last step, 5.712. Called "student" beside a "default" that is not trained, it ends with the
# loss of "default", 6.209, where its best was 5.661 and its last 5.901, and with the weights of "default", in memory and in what `save_model` writes.
#
# Why it matters: a student that learns in a second adapter beside one that it came with, or beside its teacher's, is saved as that other adapter.
# What the run has logged is the loss of the one that is lost.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile transformers==5.23.0 accelerate==1.15.0 peft==0.21.2
cat > "$folder/look.py" <<'PY'
import logging
import sys
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

torch.manual_seed(7)
ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (8, 16))]
LEARNED, HELD_OUT = ROWS[:4], ROWS[4:]
PLAIN = {"optim": "sgd", "learning_rate": 3.0, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "max_steps": 6, "seed": 1}
EACH = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "load_best_model_at_end": True}
QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True}


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def weights_of(model, name):
    return {key.replace(f".{name}", ""): own.detach().clone() for key, own in model.named_parameters() if f".{name}." in key}


def same(these, those):
    return all(torch.equal(these[key], those[key]) for key in these)


def run(names):
    """The losses of the best step, of the last one, and of the model that training leaves; whether it is "default"; the warnings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, initializer_range=0.5))
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, lora, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora)
    trained = names[-1]
    model.set_adapter(trained)
    heard = Warnings()
    logging.getLogger("transformers").addHandler(heard)
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(model, TrainingArguments(output, **PLAIN, **EACH, **QUIET), train_dataset=LEARNED, eval_dataset=HELD_OUT)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        heard, texts = None, heard.texts
        losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
        assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{losses.index(min(losses)) + 1}"), trainer.state.best_model_checkpoint
        left = trainer.evaluate()["eval_loss"]
        trainer.save_model(output + "/saved")
        of_default = False
        if len(names) > 1:
            saved = [load_file(f"{output}/saved/{place}adapter_model.safetensors") for place in ("", f"{trained}/")]
            of_default = same(weights_of(model, trained), weights_of(model, "default")) and same(*saved)
            model.set_adapter("default")
            assert abs(trainer.evaluate()["eval_loss"] - left) < 1e-4
    lost = [text for text in texts if "best model" in text]
    print(f"seen: {trained!r} of {names}: loss of the best step {min(losses):.3f}, of the last {losses[-1]:.3f}, at the end {left:.3f}; "
          f"it is 'default': {of_default}; warnings {lost}")
    return [abs(left - min(losses)) < 1e-4, abs(left - losses[-1]) < 1e-4, of_default, len(lost)]


found = [run(names) for names in (["default"], ["student"], ["default", "student"])]
sys.exit(found != [[True, False, False, 0], [False, True, False, 1], [False, False, True, 0]])
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
