#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# GKDTrainer divides its loss by the number of tokens of all processes, and DDP then takes the mean of their gradients: with n processes, the step
# and the logged loss are n times too small. Trainer's own loss, and SFTTrainer's, are multiplied by n for that, but GKD's `compute_loss` is its
# own. `average_tokens_across_devices=True`, the default, is meant to make a run independent of n. No error, no warning.
#
# Seen: one step of SGD on the same four rows. Two processes with two rows each take a step half as long as one process with four (0.1066, 0.2131),
# and log half of its loss (0.235, 0.470).
#
# Why it matters: a run that is moved from one GPU to eight trains with an eighth of its learning rate where the optimizer is SGD or
# gradients are clipped. Under Adam, weight decay and max_grad_norm act otherwise, and losses of runs on different machines cannot be compared.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import os
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
ROW = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}
processes = int(os.environ.get("WORLD_SIZE", "1"))


def model_of(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.5, eos_token_id=None))


def step():
    """How long the first step of SGD is, and the loss that is logged. lmbda=0: the dataset's answers are learned, and nothing is sampled."""
    student = model_of(0)
    before = [weight.detach().clone() for weight in student.parameters()]
    plain = {"optim": "sgd", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "temperature": 1.0, "lmbda": 0.0}
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    shared = {"ddp_backend": "gloo"} if processes > 1 else {}
    with tempfile.TemporaryDirectory() as output:
        args = GKDConfig(output, per_device_train_batch_size=4 // processes, max_steps=1, **plain, **quiet, **shared)
        data = Dataset.from_list([ROW] * 4)
        trainer = GKDTrainer(model=student, teacher_model=model_of(1), args=args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    moved = torch.cat([(weight.detach() - old).flatten() for weight, old in zip(student.parameters(), before)])
    return moved.norm().item() / 1e-3, next(row["loss"] for row in trainer.state.log_history if "loss" in row)


moved, loss = step()
if int(os.environ.get("RANK", "0")) == 0:
    print(f"measured {processes} {moved:.4f} {loss:.4f}")
PY
cat > "$folder/compare.py" <<'PY'
import sys

found = {}
for line in open(sys.argv[1]):
    if line.startswith("measured"):
        _, processes, moved, loss = line.split()
        found[processes] = float(moved), float(loss)
one, two = found["1"], found["2"]
print(f"seen: length of the step {one[0]} in one process, {two[0]} in two; logged loss {one[1]} and {two[1]}")
sys.exit([round(two[n] / one[n], 2) for n in (0, 1)] != [0.5, 0.5])
PY
{
    "$folder/venv/bin/python" "$folder/look.py"
    "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 "$folder/look.py"
} 2> "$folder/warnings" > "$folder/measured" || { cat "$folder/warnings" "$folder/measured"; exit 1; }
"$folder/venv/bin/python" "$folder/compare.py" "$folder/measured"
