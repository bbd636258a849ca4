#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# GOLD's hybrid loss takes the divergence over the tokens that both vocabularies have, without making their probabilities sum to 1. With beta=0
# (forward KL) and beta=1 (reverse KL) that is no divergence: it falls below 0, and a student that equals its teacher has a gradient. With
# beta=1 it is least where the student gives 63% (1 - 1/e) of its probability to tokens that its teacher does not have, with beta=0 where it gives
# them none. The other term, which should hold it back, weighs by default as much as these tokens' share of the vocabulary. With beta between 0
# and 1 a perfect student stays. No error, no warning.
#
# Seen: student and teacher with the same weights and, but for one token each, the same vocabulary of 260. At first the loss is 0 for each beta.
# The first step of SGD has length 0 with beta=0.5, 0.03 with 0 and 1. After 300 steps of AdamW with beta=1 the loss is -0.36, and the student
# gives 63% to its own token, which no text has and which began with 0.2%. With beta=0 the token has lost what it had.
#
# Why it matters: reverse KL is what on-policy distillation mostly minimizes, and the hybrid loss is meant for vocabularies that overlap. Training
# drives the student away from its teacher, to tokens that the teacher cannot judge, and the logged loss goes down all the while.
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
from trl.experimental.gold import GOLDConfig, GOLDTrainer

TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the sun is up"}]
STEPS = 300


def tokenizer_of(*merge):
    """One token for each byte, and one more that the other tokenizer does not have and that the text does not use."""
    tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "".join(merge)]
    own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, [merge]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=own, chat_template=TEMPLATE, **names)


mine, other = tokenizer_of("o", "r"), tokenizer_of("l", "d")
OWN_TOKEN = len(mine) - 1
saved = tempfile.TemporaryDirectory()
other.save_pretrained(saved.name)
answer = mine(TURNS[1]["content"], add_special_tokens=False)["input_ids"]
prompt = mine(mine.apply_chat_template(TURNS[:1], add_generation_prompt=True, tokenize=False), add_special_tokens=False)["input_ids"]
assert other(TURNS[1]["content"], add_special_tokens=False)["input_ids"] == answer
TEXT = torch.tensor([prompt + answer])


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(mine), **sizes, initializer_range=0.2))


@torch.no_grad()
def on_own_token(student):
    return student(TEXT).logits[0, len(prompt) : -1].softmax(-1)[:, OWN_TOKEN].mean().item()


def train(beta, steps, **settings):
    """The student, how far it has moved, and the losses that were logged."""
    student = model()
    before = [weight.detach().clone() for weight in student.parameters()]
    uld = {"use_uld_loss": True, "uld_use_hybrid_loss": True, "teacher_tokenizer_name_or_path": saved.name, "lmbda": 0.0}
    plain = {"per_device_train_batch_size": 2, "max_steps": steps, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_length": 64}
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    with tempfile.TemporaryDirectory() as output:
        args = GOLDConfig(output, beta=beta, max_completion_length=8, gradient_checkpointing=False, **uld, **plain, **quiet, **settings)
        data = Dataset.from_list([{"messages": TURNS}] * 2)
        trainer = GOLDTrainer(model=student, teacher_model=model(), args=args, train_dataset=data, processing_class=mine)
        trainer.train()
    moved = torch.cat([(weight.detach() - old).flatten() for weight, old in zip(student.parameters(), before)])
    return student, moved.norm().item(), [row["loss"] for row in trainer.state.log_history if "loss" in row]


right, start = True, on_own_token(model())
for beta in (0.0, 0.5, 1.0):
    _, moved, (first,) = train(beta, 1, optim="sgd", learning_rate=1e-3)
    student, _, losses = train(beta, STEPS, learning_rate=1e-3)
    end = on_own_token(student)
    print(
        f"seen: beta={beta}: loss {first:.4f}, first step {moved / 1e-3:.4f} long; after {STEPS} steps loss {losses[-1]:.4f}, "
        f"and {end:.3f} on the student's own token, where the teacher has {start:.3f}"
    )
    right &= abs(first) < 1e-4
    right &= moved / 1e-3 < 1e-3 if beta == 0.5 else moved / 1e-3 > 1e-2
    right &= (abs(end - start) < 0.1 * start) if beta == 0.5 else (end > 0.2 if beta == 1 else end < 0.5 * start)
sys.exit(not right)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
grep '^seen' "$folder/seen"
