#!/usr/bin/env bash
# transformers 5.23.0 with accelerate 1.15.0, trl 1.16.0
#
# Over several processes, Trainer's eval_loss counts the rows that are left for the last batch more or less than others, by the length of rows
# that do not belong there. Accelerate fills the last batch with rows from the dataset's beginning, so that each process has some. Trainer
# divides each process's loss by the tokens of all processes, those of the filling rows too, multiplies it by the number of processes, and then
# drops the filling rows' values: what is left is no mean. SFTTrainer, whose `prediction_step` is its own, takes each process's mean. No error,
# no warning.
#
# Seen: a model whose head is 0 gives each token of each row the loss log 259 = 5.557, and so its eval_loss in one process, whatever the rows. In
# two processes with one row each Trainer's is 7.216 for two short rows and a long one, in this order, and 3.897 for two long ones and a short
# one. With four rows, of which none is left over, it is 5.557. SFTTrainer's is 5.557 for all of them.
#
# Why it matters: eval_loss chooses the checkpoint that `load_best_model_at_end` loads, and students are compared by it. Here it changes with the
# number of processes and with the order of rows, and its exponential is no perplexity; trainers of one's own that are made of Trainer, for a
# distillation loss say, take over its evaluation. The smaller the held-out set, the larger a part of it is the last batch. A number of rows
# that is a multiple of the batches of all processes avoids it.
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
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
SHORT, LONG = "a word", "a longer text, of several words, which fills some of its row and has more to say than a word"
processes = int(os.environ.get("WORLD_SIZE", "1"))
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2))
torch.nn.init.zeros_(model.lm_head.weight)  # all tokens have one probability: each has the loss log(259)


def loss_of(kind, texts):
    ids = [tokenizer(text)["input_ids"] for text in texts]
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True} | ({"ddp_backend": "gloo"} if processes > 1 else {})
    with tempfile.TemporaryDirectory() as output:
        data = Dataset.from_dict({"input_ids": ids})
        if kind == "SFTTrainer":
            args = SFTConfig(output, per_device_eval_batch_size=1, **quiet)
            trainer = SFTTrainer(model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)
        else:
            args = TrainingArguments(output, per_device_eval_batch_size=1, **quiet)
            collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
            trainer = Trainer(model=model, args=args, eval_dataset=data, data_collator=collate)
        return trainer.evaluate()["eval_loss"]


for name, texts in {"SSL": [SHORT, SHORT, LONG], "LLS": [LONG, LONG, SHORT], "SSLL": [SHORT, SHORT, LONG, LONG]}.items():
    losses = [loss_of(kind, texts) for kind in ("Trainer", "SFTTrainer")]
    if int(os.environ.get("RANK", "0")) == 0:
        print("measured", processes, name, *losses)
PY
cat > "$folder/compare.py" <<'PY'
import math
import sys

NAMES = {"SSL": "two short rows and a long one", "LLS": "two long rows and a short one", "SSLL": "two short and two long rows"}
found = {}
for line in open(sys.argv[1]):
    if line.startswith("measured"):
        _, processes, rows, *losses = line.split()
        found[processes, rows] = [float(loss) for loss in losses]
for rows, name in NAMES.items():
    for n, kind in enumerate(("Trainer", "SFTTrainer")):
        print(f"seen: {name}: eval_loss of {kind} {found['1', rows][n]:.3f} in one process, {found['2', rows][n]:.3f} in two; of each token {math.log(259):.3f}")
wrong = found["2", "SSL"].pop(0) > 7 and found["2", "LLS"].pop(0) < 4.2  # Trainer's; all others are right
good = all(abs(loss - math.log(259)) < 1e-3 for losses in found.values() for loss in losses)
sys.exit(not (good and wrong))
PY
{
    "$folder/venv/bin/python" "$folder/look.py"
    "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 "$folder/look.py"
} 2> "$folder/warnings" > "$folder/measured" || { cat "$folder/warnings" "$folder/measured"; exit 1; }
"$folder/venv/bin/python" "$folder/compare.py" "$folder/measured"
