#!/usr/bin/env bash
# trl 1.16.0 with peft 0.21.2 and transformers 5.23.0
#
# SDFTTrainer with `teacher_model_kind="ema"` and LoRA makes its teacher as a second adapter whose weights are all set to zero, which for LoRA is
# the student before its first step. With DoRA the zeros are magnitudes too: every adapted layer of the teacher returns zero. With PiSSA and
# OLoRA, adding the second adapter takes a further part out of the base weights (with PiSSA the next r singular values), which the student's
# adapter does not hold: the student itself is another model before its first step. No error, no warning. SDPO has the same callback, to the
# letter.
#
# Seen: the teacher reads what the student reads, so there is nothing to learn. With LoRA the first loss is 0. With DoRA the teacher is 1.3 nats
# from the student and the first loss 0.24; with `teacher_model_kind="base"` it is 0. With PiSSA and OLoRA the student is 1.0 and 1.2 nats from
# the model that it was made of before its first step.
#
# Why it matters: a student that distils from itself, after or beside a teacher of another tokenizer, learns from noise or begins as a damaged
# model, without a sign of it but the first loss. Use plain LoRA there, or "base" or "live" with DoRA.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.sdft import SDFTConfig, SDFTTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
text = torch.tensor([tokenizer("What the student reads does not matter here.").input_ids])
STEPS = 4


def log_probs(model):
    with torch.no_grad():
        return model(input_ids=text).logits.log_softmax(-1)


def distance(first, second):
    return (first.exp() * (first - second)).sum(-1).mean().item()


def run(kind, **lora):
    """How far the student is from what it was, and the teacher from the student, before the first step; the first loss, and how far the student has gone."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    student = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.3, eos_token_id=None))
    start, seen = log_probs(student), []

    class Look(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if trainer.state.global_step:
                return
            now = teacher = log_probs(trainer.model)
            if "teacher" in trainer.model.peft_config:
                trainer.model.set_adapter("teacher")
                teacher = log_probs(trainer.model)
                trainer.model.set_adapter("default")
            seen.extend([distance(start, now), distance(now, teacher)])

    # What the teacher reads beside the prompt is empty: it reads what the student reads, and a student that equals it has nothing to learn.
    data = Dataset.from_list([{"prompt": f"Say {n}.", "privileged_context": ""} for n in range(16)])
    loss = {"teacher_prompt_template": "{prompt}{privileged_context}", "distillation_mode": "full_logits", "teacher_model_kind": kind}
    plain = {"num_generations": 2, "max_completion_length": 8, "per_device_train_batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-2}
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    with tempfile.TemporaryDirectory() as output:
        trainer = SDFTTrainer(
            model=student,
            args=SDFTConfig(output, **loss, **plain, **quiet),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules="all-linear", r=4, **lora),
            callbacks=[Look()],
        )
        trainer.train()
    first = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return *seen, first, distance(start, log_probs(trainer.model))


found = {}
for name, kind, lora in (
    ("LoRA, ema", "ema", {}),
    ("DoRA, ema", "ema", {"use_dora": True}),
    ("DoRA, base", "base", {"use_dora": True}),
    ("PiSSA, ema", "ema", {"init_lora_weights": "pissa"}),
    ("OLoRA, ema", "ema", {"init_lora_weights": "olora"}),
):
    found[name] = moved, apart, first, gone = run(kind, **lora)
    print(
        f"seen: {name}: before the first step the student is {moved:.3f} nats from the model it was made of, its teacher {apart:.3f} from it; "
        f"first loss {first:.3f}; after {STEPS} steps the student is {gone:.3f} from the model",
        flush=True,
    )
lora, dora, base, pissa, olora = found.values()
alike = max(lora[0], lora[1], base[0], base[1]) < 0.01 and dora[0] < 0.01
sys.exit(not (alike and dora[1] > 0.3 and pissa[0] > 0.3 and olora[0] > 0.3))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/out" || { cat "$folder/warnings" "$folder/out"; exit 1; }
grep ^seen "$folder/out"
