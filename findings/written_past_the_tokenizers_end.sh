#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# GKDTrainer and GOLDTrainer let the student write until a stop id of the model's generation config, and do not take the tokenizer's EOS for an end.
# Where the two differ, as they do where a base model (`<|endoftext|>`) is given the tokenizer of its chat model (`<|im_end|>`), completions go on
# behind the end of the answer, and all that follows is learned. Trainer then adds the tokenizer's EOS to the stop ids of the model that it
# trains, so that the saved student stops where it never did while it was trained. With `seq_kd=True`, GKD's teacher writes until the student's
# stop ids and not its own: its answers too go on behind their ends. DistillationTrainer stops at both. No error, no warning.
#
# Seen: 16 completions of up to 64 tokens by random models. Three have the tokenizer's EOS, in GKD, GKD with seq_kd and GOLD all three go on behind it,
# by 70, 70 and 95 tokens that are learned; in DistillationTrainer none. The student stops at `<|endoftext|>` before, and at both after.
#
# Why it matters: a base student with the tokenizer of a chat model is what one distils into, with GOLD across tokenizers too. It is taught what
# comes behind an answer, in text that it will never write once it is saved, and pays for that text's length. Set
# `model.generation_config.eos_token_id` before the trainer is built.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
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

tokens = ["<|endoftext|>", "<|im_end|>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
END_OF_TEXT, END_OF_TURN, PADDING = range(3)
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=own, eos_token="<|im_end|>", pad_token="<pad>", extra_special_tokens=["<|endoftext|>"]
)
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
ROW = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]}
PROMPT = {"prompt": ROW["messages"][:1]}


def model_of(seed, stop):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, eos_token_id=stop, pad_token_id=PADDING))


def trained(trainer_class, config_class, rows, **settings):
    """One step: how many completions have the tokenizer's EOS, how many of these go on behind it, how many tokens behind it are learned; the
    student's stop ids before and after."""
    student, teacher, seen = model_of(0, END_OF_TEXT), model_of(1, END_OF_TURN), []
    before = student.generation_config.eos_token_id
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as output:
        args = config_class(output, per_device_train_batch_size=16, max_steps=1, **quiet, **settings)
        trainer = trainer_class(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=Dataset.from_list([rows] * 16),
            processing_class=tokenizer,
        )
        loss = trainer.compute_loss

        def compute_loss(model, inputs, *args, **kwargs):
            if "labels" in inputs:
                learned = [[token for token in row if token != -100] for row in inputs["labels"].tolist()]
            else:
                pairs = zip(inputs["completion_ids"].tolist(), inputs["completion_mask"].tolist())
                learned = [[token for token, use in zip(*pair) if use] for pair in pairs]
            ended = [row[row.index(END_OF_TURN) + 1 :] for row in learned if END_OF_TURN in row]
            seen.append((len(ended), sum(map(bool, ended)), sum(map(len, ended))))
            return loss(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss
        trainer.train()
    return *seen[0], before, student.generation_config.eos_token_id


KINDS = {
    "GKD": (GKDTrainer, GKDConfig, ROW, {"max_new_tokens": 64, "lmbda": 1.0}),
    "GKD, seq_kd": (GKDTrainer, GKDConfig, ROW, {"max_new_tokens": 64, "lmbda": 0.0, "seq_kd": True}),
    "GOLD": (GOLDTrainer, GOLDConfig, ROW, {"max_completion_length": 64, "lmbda": 1.0}),
    "Distillation": (DistillationTrainer, DistillationConfig, PROMPT, {"max_completion_length": 64}),
}
right = True
for name, (trainer_class, config_class, rows, settings) in KINDS.items():
    ended, on, tokens_behind, before, after = trained(trainer_class, config_class, rows, **settings)
    print(
        f"seen: {name}: {ended} of 16 completions have the tokenizer's EOS, {on} go on behind it, by {tokens_behind} tokens that are learned; "
        f"the student stops at {before} before, at {after} after"
    )
    right &= ended > 0 and (on == tokens_behind == 0 if name == "Distillation" else on == ended)
    right &= (before, after) == (END_OF_TEXT, [END_OF_TURN, END_OF_TEXT])
sys.exit(not right)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
