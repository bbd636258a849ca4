#!/usr/bin/env bash
# peft 0.21.2, trl 1.16.0
#
# Leaving `with model.disable_adapter():` makes all weights of the active adapter trainable, also those that were frozen when the block was
# entered: the A of an adapter of which only B is to be trained (LoRA-FA), or an adapter loaded for inference. Nothing says so. merge_adapter
# and unmerge_adapter leave it alone.
#
# Seen: 7 frozen A before the block, none after it; of an adapter that `PeftModel.from_pretrained` has loaded to be read, 0 trainable weights
# before and 14 after. A DPOTrainer with the adapter's base model as its reference trains the frozen A if `evaluate()` was called before
# `train()` (by .04 in two steps), and leaves them as they are if not. With gradient checkpointing, its default, it raises a CheckpointError: the
# reference is asked between a step's forward pass and its repetition, in which other weights are trainable.
#
# Why it matters: the base model under an adapter is the usual reference, or the teacher of a student that distils itself, and is asked at
# every step. What the user froze is then trained where the optimizer is made later, and elsewhere takes memory for gradients, which count
# where gradients are clipped by their norm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 peft==0.21.2
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer


def tokenizer():
    own = Tokenizer(models.BPE({letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own.add_special_tokens(["<eos>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>", pad_token="<pad>")


def base():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=258)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def student():
    """Only B is to be trained."""
    model = get_peft_model(base(), LoraConfig(r=4, target_modules="all-linear"))
    for name, part in model.named_parameters():
        part.requires_grad_("lora_B" in name)
    return model


def frozen(model):
    return sum("lora_A" in name and not part.requires_grad for name, part in model.named_parameters())


def trainable(model):
    return sum(part.requires_grad for part in model.parameters())


def moved(evaluated, **settings):
    """How far A is from where it was after two steps."""
    rows = Dataset.from_list([{"prompt": f"What is {n}?", "chosen": f" {n}", "rejected": f" {n} {n}"} for n in range(4)])
    model, quiet = student(), dict(use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no")
    with tempfile.TemporaryDirectory() as output:
        args = DPOConfig(output, **quiet, max_steps=2, learning_rate=0.1, per_device_train_batch_size=4, **settings)
        trainer = DPOTrainer(model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer())
        before = {name: part.detach().clone() for name, part in model.named_parameters() if "lora_A" in name}
        if evaluated:
            trainer.evaluate()
        trainer.train()
    return max((model.get_parameter(name) - part).abs().max().item() for name, part in before.items())


model = student()
before = frozen(model)
with model.disable_adapter():
    pass
print(f"seen: frozen A before the block {before}, after it {frozen(model)}")
with tempfile.TemporaryDirectory() as output:
    model.save_pretrained(output)
    read = PeftModel.from_pretrained(base(), output)
to_read = trainable(read)
with read.disable_adapter():
    pass
print(f"seen: loaded to be read, trainable weights before the block {to_read}, after it {trainable(read)}")
plain, evaluated = (moved(before, gradient_checkpointing=False) for before in (False, True))
print(f"seen: DPO moves the frozen A by {plain:.3f}, and by {evaluated:.3f} if evaluate() was called before")
try:
    moved(False)
    raised = "nothing"
except Exception as error:
    raised = type(error).__name__
print(f"seen: with gradient checkpointing, DPO's default, raised is {raised}")
sys.exit(not (before == 7 and frozen(model) == 0 and to_read == 0 and trainable(read) == 14 and plain == 0 and evaluated > 0 and raised == "CheckpointError"))
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | grep '^seen'
