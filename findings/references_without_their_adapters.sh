#!/usr/bin/env bash
# trl 1.16.0, peft 0.21.2
#
# Given a PeftModel with a trained adapter and no reference, DPOTrainer and GRPOTrainer add an adapter "ref" and copy each parameter with ".default."
# in its name into it. PEFT keeps many adapters' weights under names that end in ".default": LoRA on embeddings, trained tokens, IA3, LoHa, LoKr,
# VeRA, BOFT, FourierFT, RandLoRA, HRA. Those are not copied, and the reference has a new adapter in their place. No error, no warning. With LoRA and
# DoRA on linear layers, OFT, `modules_to_save` and prompt tuning the reference is the given model.
#
# Seen: before the first update, a model that equals its reference has a DPO loss of log 2 = 0.693 and a GRPO KL of 0. It is so with the five that are
# copied. With the ten others the loss is between 0.28 and 1.17; GRPO's KL is 2.2, 0.5 and 0.3 with LoRA on the
# embeddings, IA3 and LoHa, and 0 with LoRA.
#
# Why it matters: a student that has learned new tokens or an embedding by distillation, and then learns from preference pairs or rewards, is held
# near a model that has not learned them, where it was to be held near itself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import math
import sys
import tempfile

import peft
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
data = Dataset.from_list([{"prompt": "hello", "chosen": " you mTa", "rejected": " no one"}] * 4)
QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "max_steps": 1}
COPIED = {
    "LoRA": peft.LoraConfig(target_modules=["q_proj", "v_proj"]),
    "DoRA": peft.LoraConfig(target_modules=["q_proj", "v_proj"], use_dora=True),
    "LoRA and a trained head": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "OFT": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=0, r=2),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
LOST = {
    "LoRA on embeddings": peft.LoraConfig(target_modules=["q_proj", "embed_tokens"]),
    "trained tokens": peft.TrainableTokensConfig(token_indices=[*range(3, 259)], target_modules=["embed_tokens"]),
    "IA3": peft.IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": peft.LoHaConfig(target_modules=["q_proj", "v_proj"]),
    "LoKr": peft.LoKrConfig(target_modules=["q_proj", "v_proj"]),
    "VeRA": peft.VeraConfig(target_modules=["q_proj", "o_proj"]),
    "BOFT": peft.BOFTConfig(target_modules=["q_proj"]),
    "FourierFT": peft.FourierFTConfig(target_modules=["q_proj"], n_frequency=50),
    "RandLoRA": peft.RandLoraConfig(target_modules=["q_proj"]),
    "HRA": peft.HRAConfig(target_modules=["q_proj"]),
}


def trained(config):
    """A model with an adapter, as if it had been trained."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.5)), config)
    torch.manual_seed(3)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.3 * torch.randn_like(weight)
    return model


def first(kind, config, name, adapter, **own):
    """What is logged under `name` of the first step, before its update."""
    options = {"num_generations": 2, "max_completion_length": 8, "beta": 0.1} if kind is GRPOTrainer else {}
    with tempfile.TemporaryDirectory() as output:
        args = config(output, per_device_train_batch_size=4, **QUIET, **options)
        trainer = kind(model=trained(adapter), args=args, train_dataset=data, processing_class=tokenizer, **own)
        trainer.train()
    return trainer.state.log_history[0][name]


right = True
for adapters, copied in ((COPIED, True), (LOST, False)):
    for name, adapter in adapters.items():
        loss = first(DPOTrainer, DPOConfig, "loss", adapter)
        print(f"seen: {name}: loss of DPO {loss:.3f}")
        right &= (abs(loss - math.log(2)) < 1e-3) == copied
lengths = {"reward_funcs": lambda completions, **columns: [float(len(text)) for text in completions]}
for name in ("LoRA", "LoRA on embeddings", "IA3", "LoHa"):
    kl = first(GRPOTrainer, GRPOConfig, "kl", (COPIED | LOST)[name], **lengths)
    print(f"seen: {name}: KL of GRPO {kl:.3f}")
    right &= (kl < 1e-3) == (name == "LoRA")
sys.exit(not right)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
