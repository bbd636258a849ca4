#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0, torch 2.13.0
#
# An evaluation during a run of GKDTrainer, GOLDTrainer, IWOPDTrainer or DistillationTrainer changes what the student writes, and so learns from,
# after it. GKD, GOLD and IW-OPD write nothing while they evaluate: they score the dataset's answers. A new torch data loader draws its seed from the
# random numbers of the process, which the training samples from. Nothing puts them back. No error, no warning.
#
# Seen: four steps with the same seed. Twice without an evaluation, all weights are the same to the last bit. With an evaluation after each step,
# the first step has the same loss and the second another one, in all four trainers. SFTTrainer, which samples nothing, ends with the same weights.
#
# Why it matters: two on-policy runs that differ in eval_steps alone, or of which one is evaluated, are runs of two seeds, though a seed is set. What
# looks like the effect of a setting can be that of when the run was looked at.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

folder = sys.argv[1]
tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
ANSWER = {"role": "assistant", "content": "good day"}
MESSAGES = Dataset.from_list([{"messages": [{"role": "user", "content": f"hello {n}"}, ANSWER]} for n in range(16)])
PROMPTS = Dataset.from_list([{"prompt": f"hello {n}"} for n in range(16)])
quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
plain = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", **quiet}
out, teacher, few = f"{folder}/out", f"{folder}/teacher", {"max_completion_length": 4}
on_messages = {"train_dataset": MESSAGES, "eval_dataset": MESSAGES, "processing_class": tokenizer}
on_prompts = {"train_dataset": PROMPTS, "eval_dataset": PROMPTS, "processing_class": tokenizer}


def model(role):
    return LlamaForCausalLM.from_pretrained(f"{folder}/{role}")


def make(name, more):
    student, settings = model("student"), {**plain, **more}
    if name == "SFT":
        return SFTTrainer(student, SFTConfig(out, **settings), **on_messages)
    if name == "GKD":
        return GKDTrainer(student, model("teacher"), GKDConfig(out, lmbda=1.0, max_new_tokens=4, **settings), **on_messages)
    if name == "GOLD":
        uld = {"use_uld_loss": True, "teacher_tokenizer_name_or_path": teacher, "lmbda": 1.0, "max_length": 96}
        return GOLDTrainer(student, model("teacher"), GOLDConfig(out, **uld, **few, **settings), **on_messages)
    if name == "IW-OPD":
        args = IWOPDConfig(out, max_length=96, max_prompt_length=64, **few, **settings)
        return IWOPDTrainer(student, teacher, args, **on_messages)
    args = DistillationConfig(out, **few, **settings)
    return DistillationTrainer(model=student, teacher_model=model("teacher"), args=args, **on_prompts)


def run(name, **more):
    """The weights in the end, and the losses of the steps."""
    trainer = make(name, more)
    trainer.train()
    weights = torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])
    return weights, [row["loss"] for row in trainer.state.log_history if "loss" in row]


sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.5, bos_token_id=0, eos_token_id=1, pad_token_id=2)
for seed, role in enumerate(("student", "teacher")):
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(f"{folder}/{role}")
    tokenizer.save_pretrained(f"{folder}/{role}")
right = True
for name in ("SFT", "GKD", "GOLD", "IW-OPD", "Distillation"):
    once, again, looked_at = run(name), run(name), run(name, eval_strategy="steps", eval_steps=1)
    apart = (once[0] - looked_at[0]).norm().item()
    first, second = ([own[1][n] for own in (once, looked_at)] for n in (0, 1))
    print(
        f"seen: {name}: a second run ends with {'the same' if once[0].equal(again[0]) else 'other'} weights, one that is evaluated {apart:.2f} away; "
        f"losses of the first step {first[0]:.4f} and {first[1]:.4f}, of the second {second[0]:.4f} and {second[1]:.4f}"
    )
    right = right and once[0].equal(again[0]) and first[0] == first[1] and (apart == 0 if name == "SFT" else apart > 0.01 and second[0] != second[1])
sys.exit(not right)
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/said" || { tail -30 "$folder/warnings"; cat "$folder/said"; exit 1; }
grep '^seen' "$folder/said"
