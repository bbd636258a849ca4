#!/usr/bin/env bash
# trl 1.16.0, peft 0.21.2
#
# The KL of TRL's GRPOTrainer and the reference of its DPOTrainer are the student with its adapter switched off, if the adapter is a new one
# (peft_config). With init_lora_weights="pissa" or "olora", PEFT takes the adapter's first values out of the base weights, so that what is
# left is no model: the student without its largest singular values. Nothing says so.
#
# Seen: KL at GRPO's first step, before any update, 0 with init_lora_weights=True and .84 with "pissa", .86 with "olora". DPO's first loss
# log 2 = .693, and .739 with "olora".
#
# Why it matters: a student of which a term of the loss says that it stay near its start is drawn to a broken model instead. The same holds
# for any method that takes "the adapter switched off" as the student before training.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 peft==0.21.2
cat > "$folder/look.py" <<'PY'
import math
import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

QUIET = dict(
    use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_steps=1, logging_steps=1, learning_rate=0.0,
    per_device_train_batch_size=4, save_strategy="no", gradient_checkpointing=False,
)


def tokenizer():
    own = Tokenizer(models.BPE({letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own.add_special_tokens(["<eos>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>", pad_token="<pad>")


def student():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=258)
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2))


def first(trainer, name):
    trainer.train()
    return trainer.state.log_history[0][name]


rows = Dataset.from_list([{"prompt": f"What is {n}?", "chosen": f" {n}", "rejected": f" {n} {n}"} for n in range(8)])
kl, loss = {}, {}
for init in (True, "pissa", "olora"):
    adapter = dict(peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init), processing_class=tokenizer())
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(folder, **QUIET, num_generations=4, beta=0.1, max_completion_length=6)
        reward = lambda completions, **_: [float(len(text)) for text in completions]
        kl[init] = first(GRPOTrainer(student(), reward, args, rows.select_columns("prompt"), **adapter), "kl")
        loss[init] = first(DPOTrainer(student(), args=DPOConfig(folder, **QUIET), train_dataset=rows, **adapter), "loss")
    print(f"init_lora_weights={init}: before any update, GRPO's KL is {kl[init]:.3f}, DPO's loss {loss[init]:.4f} (log 2 = {math.log(2):.4f})")
same = abs(kl[True]) < 1e-4 and abs(loss[True] - math.log(2)) < 1e-4
sys.exit(not (same and kl["pissa"] > 0.05 and kl["olora"] > 0.05 and abs(loss["olora"] - math.log(2)) > 1e-3))
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | grep '^init'
