#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# DistillationTrainer and GKDTrainer ask whether student and teacher have the same `vocab_size`, and refuse the teacher otherwise, with a pointer to
# GOLD. A teacher with another tokenizer of the same size is taken: its own tokenizer is not looked at, though both are given by name. It reads the
# student's ids as other text, and the student learns its ids. No error, no warning, and the loss falls as it does with the right teacher.
#
# Seen: the other tokenizer has the same bytes under other ids. After 150 steps with a teacher of the same tokenizer the student begins as its
# teacher does ("the answe"), loss 5.38 and 1.54; with the other one, whose teacher writes the same sentence, it writes a broken character, loss
# 4.30 and 1.08. GKD trains with it too.
#
# Why it matters: two families can have one size: transformers' LlamaConfig and MistralConfig, made after Llama 2 and Mistral 7B v0.1, both have 32,000.
# A run with such a pair looks like one that works, until somebody reads what the student writes.
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
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
SENTENCE = "the answer is four"


def save(folder, order, seed, lessons):
    """A byte-level tokenizer and a model of it in a folder, as on the hub. With `lessons` the model learns to write the sentence."""
    tokens = ["<s>", "</s>", "<pad>", *order]
    own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    chats = [[{"role": "user", "content": f"{n} and {4 - n}?"}] for n in range(5)]
    for step in range(lessons):
        opening = tokenizer.apply_chat_template(chats[step % 5], add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([tokenizer(opening + SENTENCE + "</s>").input_ids])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(folder, model=None):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = (model or AutoModelForCausalLM.from_pretrained(folder)).eval()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "1 and 3?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**chat, max_new_tokens=len(SENTENCE), do_sample=False)[0, chat["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
plain = {"per_device_train_batch_size": 5, "max_steps": 150, "learning_rate": 3e-3}
prompt = [[{"role": "user", "content": f"{n} and {4 - n}?"}] for n in range(5)]
answer = [{"role": "assistant", "content": SENTENCE}]
with tempfile.TemporaryDirectory() as folder:
    student = save(f"{folder}/student", letters, 0, 0)
    alike = save(f"{folder}/alike", letters, 1, 200)
    other = save(f"{folder}/other", letters[40:] + letters[:40], 1, 200)
    texts = []
    for teacher in (alike, other):
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=DistillationConfig(f"{folder}/out", max_completion_length=len(SENTENCE) + 1, **plain, **quiet),
            train_dataset=Dataset.from_list([{"prompt": row} for row in prompt]),
        )
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        texts += [written(teacher), written(student, trainer.model)]
        print(f"seen: {teacher.rsplit('/')[-1]}: the teacher writes {texts[-2]!r}, the student {texts[-1]!r}; loss {losses[0]:.3f}, at the end {losses[-1]:.3f}", flush=True)
    trainer = GKDTrainer(
        model=student,
        teacher_model=other,
        args=GKDConfig(f"{folder}/gkd", lmbda=0.0, max_length=64, **plain | {"max_steps": 2}, **quiet),
        train_dataset=Dataset.from_list([{"messages": row + answer} for row in prompt]),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    trainer.train()
    print("seen: GKD trains with the other teacher too")
sys.exit(not (texts[0] == texts[2] == SENTENCE and texts[1][:8] == SENTENCE[:8] != texts[3][:8] and losses[-1] < losses[0] / 2))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/out" || { cat "$folder/warnings" "$folder/out"; exit 1; }
grep ^seen "$folder/out"
