#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# neftune_noise_alpha is noise on the embeddings that a model learns from. TRL's on-policy trainers leave the student in train mode while it writes,
# so that it writes under the noise too. With a cache it is larger there: it falls with the square root of the number of tokens that
# are read at once, which are all of a row's while it learns, and one while it writes. No error, no warning.
#
# Seen: with alpha=5 and rows of 24 tokens, GOLD, Distillation and GRPO write each token but the first under noise that is 4.9 (the root of 24) times
# as large as the one they learn under; with rows of 1,000 tokens it would be 32 times. GKD, which writes without a cache, under one 1.3 times
# as large.
#
# Why it matters: the text is not the student's, and the noise it is written under does not shrink as rows grow longer. On-policy distillation
# then learns on prefixes that the student would not write, and GRPO from rewards for them.
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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
QUESTION = [{"role": "user", "content": "hello you"}]  # 14 tokens with the template
ANSWERED = {"messages": [*QUESTION, {"role": "assistant", "content": "good day."}]}
SIZE = 64


def model_of(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": SIZE, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, eos_token_id=None))


class Begin(TrainerCallback):
    """Once the noise is there."""

    def __init__(self, then):
        self.then = then

    def on_step_begin(self, *args, **kwargs):
        self.then()


def noises(kind, config, rows, teacher=True, **settings):
    """The largest noise on an embedding while the student writes a token, and while it learns."""
    student, largest, writing = model_of(0), {"writing": 0.0, "learning": 0.0}, []

    def generate(*args, original=student.generate, **kwargs):
        writing.append("prompt")
        try:
            return original(*args, **kwargs)
        finally:
            writing.pop()

    def look(table, inputs, output):
        size = (output - table.weight[inputs[0]]).abs().max().item()
        if writing:
            if writing[0] != "prompt":
                largest["writing"] = max(largest["writing"], size)
            writing[0] = "text"
        elif torch.is_grad_enabled():
            largest["learning"] = max(largest["learning"], size)

    student.generate = generate
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as output:
        args = config(output, per_device_train_batch_size=4, max_steps=1, neftune_noise_alpha=5.0, **quiet, **settings)
        extra = {"teacher_model": model_of(1)} if teacher else {"reward_funcs": lambda completions, **kwargs: range(len(completions))}
        trainer = kind(model=student, args=args, train_dataset=Dataset.from_list([rows] * 4), processing_class=tokenizer, **extra)
        trainer.add_callback(Begin(lambda: student.get_input_embeddings().register_forward_hook(look)))
        trainer.train()
    return largest["writing"], largest["learning"]


length = {"max_completion_length": 10}
KINDS = {
    "GKD": (GKDTrainer, GKDConfig, ANSWERED, True, {"max_new_tokens": 10, "lmbda": 1.0, "max_length": 64}),
    "GOLD": (GOLDTrainer, GOLDConfig, ANSWERED, True, {**length, "lmbda": 1.0, "max_length": 64}),
    "Distillation": (DistillationTrainer, DistillationConfig, {"prompt": QUESTION}, True, length),
    "GRPO": (GRPOTrainer, GRPOConfig, {"prompt": QUESTION}, False, {**length, "num_generations": 2}),
}
holds = True
for name, (kind, config, rows, teacher, settings) in KINDS.items():
    writing, learning = noises(kind, config, rows, teacher, **settings)
    print(f"seen: {name}: noise of up to {writing:.3f} on the embeddings while a token is written, of {learning:.3f} while it is learned")
    low, high = (1.1, 1.4) if name == "GKD" else (4.5, 5.3)
    holds &= learning > 0 and low < writing / learning < high
sys.exit(not holds)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
grep '^seen' "$folder/seen"
