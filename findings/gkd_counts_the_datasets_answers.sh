#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# GKDTrainer and GOLDTrainer (with one tokenizer) sum the loss over the tokens that the student has just written, and divide it by the number of
# tokens of the dataset's answers, which are not read: Trainer counts labels before the student writes. seq_kd=True likewise. DistillationTrainer
# counts what was written. No error, no warning.
#
# Seen: one step of SGD with lmbda=1, the same prompts and the same written texts, of 8 tokens: with answers of 2 tokens in the dataset the
# step is 18 times as long as with answers of 36, and the logged loss 18 times as large.
#
# Why it matters: on-policy, the answers of the dataset should not matter, and each step's gradient is multiplied by the ratio of the two
# lengths. It changes from step to step with answers that nobody reads, and over a run as the student writes longer or shorter. Short
# stand-ins for answers, which the dataset must have, make it 100 times too large. Adam hides a constant factor, not one that changes from step to
# step, and neither the logged loss nor max_grad_norm.
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
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
QUESTION = [{"role": "user", "content": "hello"}]
SHORT, LONG = "w", "world " * 5 + "world"


def model_of(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.5, eos_token_id=None))


def step(kind, config, answer, **settings):
    """How long the first step of SGD is, the loss that is logged, and what the student wrote."""
    student, teacher, written = model_of(0), model_of(1), []

    def generate(*args, original=student.generate, **kwargs):
        found = original(*args, **kwargs)
        written.append(getattr(found, "sequences", found).tolist())
        return found

    student.generate = generate
    plain = {"optim": "sgd", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "temperature": 1.0, "seed": 3}
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    rows = {"prompt": QUESTION} if answer is None else {"messages": [*QUESTION, {"role": "assistant", "content": answer}]}
    before = [weight.detach().clone() for weight in student.parameters()]
    with tempfile.TemporaryDirectory() as output:
        args = config(output, per_device_train_batch_size=4, max_steps=1, **plain, **quiet, **settings)
        data = Dataset.from_list([rows] * 4)
        trainer = kind(model=student, teacher_model=teacher, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    moved = torch.cat([(weight.detach() - old).flatten() for weight, old in zip(student.parameters(), before)])
    return moved.norm().item() / 1e-3, next(row["loss"] for row in trainer.state.log_history if "loss" in row), written


holds = True
KINDS = {
    "GKD": (GKDTrainer, GKDConfig, {"max_new_tokens": 8, "lmbda": 1.0, "max_length": 64}),
    "GOLD": (GOLDTrainer, GOLDConfig, {"max_completion_length": 8, "lmbda": 1.0, "max_length": 64, "top_p": 1.0}),
}
for name, (kind, config, settings) in KINDS.items():
    short, long = (step(kind, config, answer, **settings) for answer in (SHORT, LONG))
    ratios = [round(short[n] / long[n], 1) for n in (0, 1)]
    print(f"seen: {name}, the same texts written: {short[2] == long[2]}; [length of the step, logged loss] with short answers is {ratios}", end="")
    print(f" times that with long ones; the losses are {short[1]:.2f} and {long[1]:.2f}")
    holds &= short[2] == long[2] and ratios == [18.0, 18.0]
plain = step(DistillationTrainer, DistillationConfig, None, max_completion_length=8, beta=0.5)
print(f"seen: Distillation, which needs no answers: {plain[1]:.2f}")
sys.exit(not holds)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
grep '^seen' "$folder/seen"
