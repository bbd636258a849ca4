#!/usr/bin/env bash
# transformers 5.23.0, peft 0.21.2
#
# `merge_and_unload().save_pretrained(folder)` into the folder that holds the adapter writes the merged model beside it and leaves the adapter
# there. `AutoModelForCausalLM.from_pretrained(folder)` then reads the merged model and puts the adapter on it once more: W + 2 BA, where W + BA was
# trained. So does the model's own class. `AutoPeftModelForCausalLM` reads the base model that the adapter names, and the adapter: what was trained. No
# error, no warning.
#
# Seen: log-probs of a random Llama whose adapter was merged so are up to 2.3 off from those of the trained model when AutoModelForCausalLM reads
# the folder, as far as the trained model's are from the base model's (2.25). With the adapter's files removed: less than 1e-5.
#
# Why it matters: a student is trained with LoRA, its adapter saved by `trainer.save_model(output_dir)`, and the merged model written to the same
# folder to be evaluated, served or made a teacher. The model that is then scored is another one than the one that was distilled. Save what was
# merged into an empty folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import logging
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TEXT = torch.arange(3, 40)[None]
base, out = (Path(sys.argv[1]) / name for name in ("base", "out"))
said = []
warned = logging.Handler(logging.WARNING)
warned.emit = lambda record: said.append(record.getMessage())
transformers.logging.add_handler(warned)


@torch.no_grad()
def log_probs(model):
    return model.eval()(TEXT).logits.log_softmax(-1)


def apart(one, other):
    return (one - other).abs().max().item()


torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, initializer_range=0.1)).save_pretrained(base)
untrained = log_probs(AutoModelForCausalLM.from_pretrained(base))
student = get_peft_model(
    AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
)
with torch.no_grad():
    for name, weight in student.named_parameters():
        if "lora_B" in name:  # as if it had learned something
            weight.normal_(0, 0.3)
trained = log_probs(student)
student.save_pretrained(out)
merged = student.merge_and_unload()
same = apart(log_probs(merged), trained)
merged.save_pretrained(out)

said.clear()
found = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for read in (AutoModelForCausalLM, LlamaForCausalLM, AutoPeftModelForCausalLM):
        found[read.__name__] = apart(log_probs(read.from_pretrained(out)), trained)
said += [str(one.message) for one in caught if "adapter" in str(one.message)]
for file in out.glob("adapter_*"):
    file.unlink()
alone = apart(log_probs(AutoModelForCausalLM.from_pretrained(out)), trained)
print(f"seen: the trained model is {apart(trained, untrained):.2f} from the base model, merged {same:.1g} from itself")
for name, own in found.items():
    print(f"seen: read by {name}, it is {own:.2g} off, without the adapter's files {alone:.1g}; warnings: {len(said)}")
sys.exit(
    not (
        min(found["AutoModelForCausalLM"], found["LlamaForCausalLM"]) > 0.1
        and max(found["AutoPeftModelForCausalLM"], alone, same) < 1e-4
        and not said
    )
)
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
