#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0, accelerate 1.15.0
#
# IWOPDTrainer (importance-weighted on-policy distillation) that is resumed within an epoch passes most of the prompts by. Its data loader gives the
# prompts of a step once for each of the gradient_accumulation_steps micro-batches, and the first of them is used. Accelerate's
# `skip_first_batches` makes a new data loader out of what is inside, which gives each once. With n micro-batches the resumed run therefore skips
# n times as many prompts as were read, and of the rest it reads one step's in n. No error, no warning.
#
# Seen: 32 prompts, two a step, two micro-batches, one epoch, a checkpoint after 4 of 16 steps. The uninterrupted run reads the other 24 prompts in 12
# steps. The resumed one reads 8 of them in 4 steps and ends there, with step 8 and a learning rate that is half of what it began with. With one
# micro-batch a step nothing is lost.
#
# Why it matters: a student whose run was killed and resumed has learned from a part of the prompts, how many depends on where it was killed, and
# its learning rate has not come down. The run ends as one that has done all its work.
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
ROWS = Dataset.from_list([{"messages": [{"role": "user", "content": f"row {n:02}"}, ANSWER]} for n in range(32)])


def model_of(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.2, pad_token_id=2))


def run(parts, checkpoint=None):
    """The prompts of each step, by number; the step that the run ends with, and the learning rate there, as a share of the first."""
    read, output = [], f"{folder}/{parts}"

    class Watched(IWOPDTrainer):
        def _fill_buffer(self, batch, steps):
            read.append([int(tokenizer.decode(ids).split("row ")[1][:2]) for ids in batch["prompts"]])
            return super()._fill_buffer(batch, steps)

    plain = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "steps", "save_steps": 4}
    size = {"per_device_train_batch_size": 2 // parts, "gradient_accumulation_steps": parts, "num_train_epochs": 1}
    args = IWOPDConfig(output, **plain, **size, max_completion_length=2, max_length=48, max_prompt_length=32)
    trainer = Watched(model=model_of(0), teacher_model=f"{folder}/teacher", args=args, train_dataset=ROWS, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=checkpoint and f"{output}/{checkpoint}")
    return read, trainer.state.global_step, trainer.lr_scheduler.get_last_lr()[0] / args.learning_rate


model_of(1).save_pretrained(f"{folder}/teacher")
tokenizer.save_pretrained(f"{folder}/teacher")
found = []
for parts in (1, 2):
    whole, steps, _ = run(parts)
    again, ended, rate = run(parts, "checkpoint-4")
    left, seen = sum(whole[4:], []), sum(again, [])
    found.append((len(left), len(set(left) & set(seen)), steps, ended, rate))
    print(
        f"seen: {parts} micro-batches: {len(left)} prompts are left after the checkpoint, and the resumed run reads {len(set(left) & set(seen))} "
        f"of them; it ends with step {ended} of {steps}, and a learning rate of {rate:g} of the first"
    )
sys.exit(found != [(24, 24, 16, 16, 0.0), (24, 8, 16, 8, 0.5)])
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/said" && grep '^seen' "$folder/said" || { tail -30 "$folder/warnings"; cat "$folder/said"; exit 1; }
