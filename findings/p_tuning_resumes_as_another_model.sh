#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0
#
# With P-tuning (PromptEncoderConfig) PEFT saves the virtual tokens that the encoder makes, and not the encoder. `load_adapter` of such a file
# into a model that has the encoder, as Trainer does it to resume a run and to load the best checkpoint, puts these tokens where the encoder reads
# what it makes tokens of. The model is then another one, and nothing says so. With a projected prefix (prefix_projection=True) the
# same raises a RuntimeError about a size. `PeftModel.from_pretrained` of the file, which has no encoder, gives the model that was saved.
#
# Seen: log-probs of a text change by 0 where the file is read by from_pretrained, and by more than 0.5 where it is loaded into the model that
# had just saved it, for both kinds of encoder. A run that resumes at step 2 ends with other virtual tokens than the run that was not interrupted,
# by more than a third of their norm, also with a learning rate of 0.
#
# Why it matters: a run that was interrupted goes on from a model that it never had, and load_best_model_at_end ends with one that was never
# evaluated.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 peft==0.21.2
cat > "$folder/look.py" <<'PY'
import sys
import tempfile
import warnings

import torch
from datasets import Dataset
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

IDS = torch.arange(8)[None]
OWN = dict(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM")
KINDS = {
    "P-tuning": PromptEncoderConfig(**OWN),
    "P-tuning by an LSTM": PromptEncoderConfig(**OWN, encoder_reparameterization_type="LSTM"),
    "a projected prefix": PrefixTuningConfig(**OWN, prefix_projection=True),
}


def base():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3)).eval()


@torch.no_grad()
def told(model):
    return model.eval()(input_ids=IDS).logits.log_softmax(-1)


def changes(config):
    """Of log-probs, read anew and loaded in place; None where that is an error."""
    model = get_peft_model(base(), config)
    before = told(model)
    with tempfile.TemporaryDirectory() as output, warnings.catch_warnings(record=True) as said:
        model.save_pretrained(output)
        anew = (told(PeftModel.from_pretrained(base(), output)) - before).abs().max().item()
        said.clear()
        try:
            model.load_adapter(output, "default", is_trainable=True)
        except RuntimeError:
            return anew, None, len(said)
    return anew, (told(model) - before).abs().max().item(), len(said)


def tokens(resumed, output):
    rows = Dataset.from_list([{"input_ids": IDS[0].tolist(), "labels": IDS[0].tolist()}] * 8)
    quiet = dict(use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=0.0, max_steps=4, save_steps=2)
    torch.manual_seed(1)
    model = get_peft_model(base(), PromptEncoderConfig(**OWN))
    Trainer(model, TrainingArguments(output, **quiet), train_dataset=rows).train(
        resume_from_checkpoint=f"{output}/checkpoint-2" if resumed else None
    )
    return model.get_prompt_embedding_to_save("default")


found = {name: changes(config) for name, config in KINDS.items()}
for name, (anew, in_place, said) in found.items():
    loaded = "an error" if in_place is None else f"{in_place:.3f}, with {said} warnings"
    print(f"seen: {name}: log-probs change, read anew, by {anew:.3f}; loaded in place, by {loaded}")
with tempfile.TemporaryDirectory() as output:
    whole, resumed = tokens(False, output), tokens(True, output)
moved, size = (whole - resumed).norm().item(), whole.norm().item()
print(f"seen: with a learning rate of 0, a resumed run ends with tokens that differ by {moved:.2f}, of a norm of {size:.2f}")
silent = all(found[name][1] is not None and found[name][1] > 0.01 and found[name][2] == 0 for name in list(KINDS)[:2])
exact = all(anew < 1e-5 for anew, _, _ in found.values())
sys.exit(not (silent and exact and found["a projected prefix"][1] is None and moved > 0.1 * size))
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | grep '^seen'
