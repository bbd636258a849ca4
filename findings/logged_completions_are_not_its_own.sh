#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0, accelerate 1.15.0, datasets 5.2.0
#
# `LogCompletionsCallback` does not log what the student writes to its prompts. It renders a prompt by the chat template and tokenizes the text with
# special tokens once more: where the template writes BOS and the tokenizer adds it, as Llama-3.2's and Mistral's do, the student reads two. It writes
# in training mode, so under dropout. Over several processes each writes all prompts, since `split_between_processes` does not split a column of
# datasets 5, and every row is logged once for each process. Afterwards the trainer's tokenizer pads on the left. No error, no warning.
#
# Seen: eight prompts, greedy, a random Llama with attention dropout, after a step with a learning rate of 0. Of the logged texts, 3 are what the
# student writes to its prompt, and all 8 what it writes to the prompt with two BOS. With a dropout of 0.1, none is even that. Two processes log 16
# rows for the 8 prompts. The tokenizer padded on the right before.
#
# Why it matters: by these tables one judges whether a student learns to write, and compares runs and checkpoints. What they show is the student's
# answer to other tokens than it is trained on and under dropout, which differs from that of the saved model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import os
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import LogCompletionsCallback, SFTConfig, SFTTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, **names, padding_side="right")
tokenizer.chat_template = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
USERS = [[{"role": "user", "content": f"hello {n}"}] for n in range(8)]
ROWS = Dataset.from_list([{"prompt": user, "completion": [{"role": "assistant", "content": "good day"}]} for user in USERS])
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=2, eos_token_id=1)
processes = int(os.environ.get("WORLD_SIZE", "1"))


def answers(model, ids):
    """What the model writes to each prompt, one by one, without dropout."""
    model.eval()
    rows = [model.generate(torch.tensor([row]), generation_config=GREEDY)[0, len(row) :] for row in ids]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def look(dropout):
    """The logged texts, those to one BOS and to two, and the prompt ids that were read."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    student = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.5, attention_dropout=dropout))
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    shared = {"ddp_backend": "gloo"} if processes > 1 else {}
    with tempfile.TemporaryDirectory() as output:
        args = SFTConfig(output, per_device_train_batch_size=4, max_steps=1, learning_rate=0.0, **quiet, **shared)
        trainer = SFTTrainer(student, args, train_dataset=ROWS, eval_dataset=ROWS, processing_class=tokenizer)
        callback = LogCompletionsCallback(trainer, GREEDY, freq=1)
        trainer.add_callback(callback)
        trainer.train()
    assert student.training
    once = tokenizer.apply_chat_template(USERS, add_generation_prompt=True, return_dict=True)["input_ids"]
    learned = trainer.train_dataset[0]["input_ids"]
    assert [row[:2].count(0) for row in (*once, learned)] == [1] * 9
    logged = [row[2] for row in callback.table]
    return logged, answers(student, once), answers(student, [[0, *row] for row in once])


tokenizer.padding_side = "right"
logged, once, twice = look(0.0)
side = tokenizer.padding_side
dropped, _, _ = look(0.1)
if int(os.environ.get("RANK", "0")) == 0:
    assert len(dropped) == len(logged) == 8 * processes
    if processes > 1:
        print("measured two", len(logged), int(logged == twice * 2))
    else:
        print("measured one", *(sum(a == b for a, b in pairs) for pairs in (zip(logged, once), zip(logged, twice), zip(dropped, twice))), side)
PY
cat > "$folder/compare.py" <<'PY'
import sys

found = {line.split()[1]: line.split()[2:] for line in open(sys.argv[1]) if line.startswith("measured")}
once, twice, dropped, side = found["one"]
print(f"seen: of 8 logged texts, {once} are the student's to its prompt, {twice} those to the prompt with two BOS, and {dropped} with dropout 0.1; "
      f"the tokenizer pads on the {side}; two processes log {found['two'][0]} rows for 8 prompts")
sys.exit(not (int(once) < 8 and int(twice) == 8 and int(dropped) < 8 and side == "left" and found["two"] == ["16", "1"]))
PY
{
    "$folder/venv/bin/python" "$folder/look.py"
    "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 "$folder/look.py"
} 2> "$folder/warnings" > "$folder/measured" || { cat "$folder/warnings" "$folder/measured"; exit 1; }
"$folder/venv/bin/python" "$folder/compare.py" "$folder/measured"
