#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# GOLDTrainer's gradient depends on how a step's rows are split into micro-batches. Trainer leaves the division to a loss that it thinks is divided
# by `num_items_in_batch` already.
# - Across tokenizers (use_uld_loss=True) the loss is a mean over the rows of a micro-batch, which nobody divides: with
#   gradient_accumulation_steps=n the gradient is n times too large.
# - With one tokenizer the loss is divided by that number, which counts each row n times, since the data loader gives the rows of a whole
#   step once for each micro-batch: the gradient is n times too small.
# The logged loss and grad_norm are off by the same factor. No error, no warning.
#
# Seen: the same four equal rows with gradient_accumulation_steps 1, 2 and 4, one step of SGD. Across tokenizers the step is 1, 2 and 4 times as long,
# with one tokenizer 1, 1/2 and 1/4 times. GKDTrainer's is the same in all three.
#
# Why it matters: max_grad_norm clips the one nearly always and the other never, and losses of runs with another micro-batch, or of GOLD and
# another trainer, cannot be compared. Adam hides a constant factor where nothing is clipped; SGD's steps are as many times too long. Take
# gradient_accumulation_steps=1 for a comparison.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world old"}]
ROWS = 4


def tokenizer_of(*merges):
    letters = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = [*letters, *(left + right for left, right in merges)]
    own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, list(merges)))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=own, chat_template=TEMPLATE, **names)


def model_of(tokenizer, seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, initializer_range=0.5))


def step(kind, config, student_tokenizer, teacher_tokenizer, accumulation, **settings):
    """How long the first step of SGD is, in units of the learning rate, and the loss that is logged."""
    student, teacher = model_of(student_tokenizer, 0), model_of(teacher_tokenizer, 1)
    sizes = {"per_device_train_batch_size": ROWS // accumulation, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    plain = {"optim": "sgd", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "lmbda": 0.0, "max_length": 64}
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    before = [own.detach().clone() for own in student.parameters()]
    with tempfile.TemporaryDirectory() as output:
        args = config(output, **sizes, **plain, **quiet, **settings)
        data = Dataset.from_list([{"messages": TURNS}] * ROWS)
        trainer = kind(model=student, teacher_model=teacher, args=args, train_dataset=data, processing_class=student_tokenizer)
        trainer.train()
    moved = torch.cat([(own.detach() - old).flatten() for own, old in zip(student.parameters(), before)])
    return moved.norm().item() / 1e-3, next(row["loss"] for row in trainer.state.log_history if "loss" in row)


def factors(*kinds, **settings):
    found = [step(*kinds, accumulation, **settings) for accumulation in (1, 2, 4)]
    return [[round(value / first, 2) for value, first in zip(own, found[0])] for own in found]


one, other = tokenizer_of(), tokenizer_of(("o", "r"), ("l", "d"))
with tempfile.TemporaryDirectory() as saved:
    other.save_pretrained(saved)
    uld = {"use_uld_loss": True, "use_extended_uld": True, "teacher_tokenizer_name_or_path": saved, "max_completion_length": 8}
    across = factors(GOLDTrainer, GOLDConfig, one, other, **uld)
within = factors(GOLDTrainer, GOLDConfig, one, one, max_completion_length=8)
gkd = factors(GKDTrainer, GKDConfig, one, one)
for name, found in (("GOLD across tokenizers", across), ("GOLD, one tokenizer", within), ("GKD", gkd)):
    print(f"seen: {name}, 1, 2 and 4 micro-batches of the same four rows: [length of the step, logged loss] is {found} times the first")
sys.exit(not (across == [[1, 1], [2, 2], [4, 4]] and within == [[1, 1], [0.5, 0.5], [0.25, 0.25]] and gkd == [[1, 1]] * 3))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
grep '^seen' "$folder/seen"
