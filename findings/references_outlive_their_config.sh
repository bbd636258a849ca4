#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0 and datasets 5.2.0
#
# With `precompute_ref_log_probs=True`, DPOTrainer and KTOTrainer write the reference's log-probs into the dataset's cache and find them again by the
# dataset's fingerprint and the numbers in the model's weights. The model's config is not part of that, nor is DPO's `max_length` under
# `truncation_mode="keep_end"`, by which the collator cuts rows. Another run over the same files reads the log-probs of the reference as it was
# before. No error, no warning.
#
# Seen: runs in processes of their own over one dataset file, learning rate 0, each student its own reference, so that the loss must be 0.6931 in
# DPO and 0.5 in KTO, and rewards 0. They are in the first run. In the second, with the same weights and another rope_theta in their config, losses
# are 0.4299 and 0.3674, and chosen answers have rewards of 1.07 and 0.77 before any step; without the cache they are 0.6931 and 0.5. DPO with
# `keep_end` and max_length=24, then 48: 0.6931, then 0.6189 with a reward of -18.9.
#
# Why it matters: rope scaling is set in the config of a student or reference that shall read longer texts, and weights stay as they were. Preference
# training of a student after it is distilled then compares it with another model from its first step on, and a table over
# such settings compares with one reference that none but the first of them has.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

folder, name, cache, theta, more = *sys.argv[1:4], float(sys.argv[4]), json.loads(sys.argv[5])
tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
sides = {"chosen": " a good long answer of words" * 2, "rejected": " a bad and rather longer reply" * 2}
rows = {
    "dpo": [{"prompt": f"Say {n}.", **sides} for n in range(4)],
    "kto": [
        {"prompt": f"Say {n}.", "completion": text, "label": side == "chosen"} for n in range(4) for side, text in sides.items()
    ],
}[name]
file = f"{folder}/{cache}-{name}.jsonl"
if not Path(file).exists():  # a file that is written anew is another dataset
    Path(file).write_text("\n".join(json.dumps(row) for row in rows))
data = load_dataset("json", data_files=file, split="train", cache_dir=f"{folder}/{cache}")
torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
rope = {"rope_type": "default", "rope_theta": theta}
student = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.5, rope_parameters=rope))
Config, Its = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer)}[name]
quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
plain = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 0.0, "precompute_ref_log_probs": True}
trainer = Its(model=student, args=Config(f"{folder}/run-{name}", **plain, **quiet, **more), train_dataset=data, processing_class=tokenizer)
trainer.train()
log = next(row for row in trainer.state.log_history if "loss" in row)
print(f"measured {log['loss']:.4f} {log['rewards/chosen']:.2f}")
PY
run() { # method, folder of the dataset's cache, rope_theta, other settings
    "$folder/venv/bin/python" "$folder/look.py" "$folder" "$@" 2>> "$folder/warnings" > "$folder/out" || { cat "$folder/warnings" >&2; exit 1; }
    sed -n 's/^measured //p' "$folder/out"
}
for name in dpo kto; do
    run $name shared 10000 '{}' >> "$folder/$name"
    run $name shared 100 '{}' >> "$folder/$name"
    run $name fresh 100 '{}' >> "$folder/$name"
done
for cache in end end fresh_end; do
    run dpo $cache 10000 "{\"truncation_mode\": \"keep_end\", \"max_length\": $(test -s "$folder/end_of" && echo 48 || echo 24)}" >> "$folder/end_of"
done
cat > "$folder/compare.py" <<'PY'
import sys

good, rows = True, ("first", "the same dataset again", "with another cache")
for name, even, what in (("dpo", 0.6931, "DPO, rope_theta 10000, then 100"), ("kto", 0.5, "KTO, the same"), ("end_of", 0.6931, "DPO, keep_end, max_length 24, then 48")):
    found = [[float(number) for number in line.split()] for line in open(f"{sys.argv[1]}/{name}")]
    print(f"seen: {what}: " + "; ".join(f"{row}: loss {own[0]}, reward of chosen {own[1]}" for row, own in zip(rows, found, strict=True)))
    off = [abs(own[0] - even) > 0.01 and abs(own[1]) > 0.1 for own in found]
    good = good and off == [False, True, False]
sys.exit(not good)
PY
"$folder/venv/bin/python" "$folder/compare.py" "$folder"
