#!/usr/bin/env bash
# transformers 5.23.0, trl 1.16.0, deepspeed 0.19.8
#
# Under DeepSpeed with bf16, Trainer rounds every floating-point column of a batch to bfloat16 when it moves the batch to the device, also those
# that no model reads. The log-probs that DPOTrainer computes beforehand (`precompute_ref_log_probs=True`) are such columns: sums over an answer,
# kept in float32, which lose up to 1 nat where they are below -256. No error, no warning.
#
# Seen: the first step of a student that is its own reference, in bf16 with beta=1, four pairs. Without DeepSpeed its loss is log 2 = 0.6931 and its
# rewards are 0, whether the reference is read beforehand or meanwhile. Under DeepSpeed (ZeRO-2, one process) they are too with the reference
# read meanwhile; read beforehand, the loss is 0.5086 and the rewards are +0.195 and -0.452, means over four rows, though the column in the
# dataset equals the student's own log-probs (-483.305) to 1e-3.
#
# Why it matters: the log-probs of a teacher, computed once and kept in the dataset, are how preference pairs and texts are distilled without a
# teacher in memory. Under DeepSpeed a trainer that takes such columns from its batches reads them in three digits, and the error grows with
# the length of the answer. A trainer whose `_prepare_input` moves tensors and leaves their dtype (`accelerate.utils.send_to_device`) does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0 setuptools
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
"$folder/venv/bin/pip" install -qq --no-build-isolation deepspeed==0.19.8
cat > "$folder/look.py" <<'PY'
import os
import sys
import tempfile

deep, folder = sys.argv[1] == "deepspeed", sys.argv[2]
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

if deep:
    import deepspeed

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29500 + os.getpid() % 1000))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo's all-reduce, which needs no compiler
tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
if not os.path.exists(f"{folder}/model"):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    model.to(torch.bfloat16).float().save_pretrained(f"{folder}/model")  # bfloat16's numbers: rounding the weights again changes nothing
ROWS = [{"prompt": f"{n} and {n + 1}", "chosen": " is a sum" * (8 + n), "rejected": " is what is asked" * (4 + n)} for n in range(4)]


def first_step(precompute):
    """The first step's log. The student is its own reference, so that the loss is log 2 and the rewards are 0."""
    quiet = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "gradient_checkpointing": False}
    if deep:
        stage = {"stage": 2, "reduce_bucket_size": 1000000, "allgather_bucket_size": 1000000}
        sizes = {"train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "gradient_accumulation_steps": "auto"}
        quiet["deepspeed"] = {"zero_optimization": stage, "bf16": {"enabled": "auto"}, "zero_allow_untested_optimizer": True, **sizes}
    with tempfile.TemporaryDirectory() as output:
        args = DPOConfig(
            output, per_device_train_batch_size=4, max_steps=1, optim="sgd", beta=1.0, bf16=True, precompute_ref_log_probs=precompute, **quiet
        )
        trainer = DPOTrainer(f"{folder}/model", None, args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
        column = trainer.train_dataset["ref_chosen_logps"][:] if precompute else []
        trainer.train()
    return trainer.state.log_history[0], list(column)


for precompute in (True, False):
    log, column = first_step(precompute)
    found = [log[name] for name in ("loss", "rewards/chosen", "rewards/rejected", "logps/chosen")]
    print("measured", "DeepSpeed" if deep else "plain", "beforehand" if precompute else "meanwhile", *found, sum(column) / 4, flush=True)
PY
cat > "$folder/compare.py" <<'PY'
import math
import sys

found = {}
for line in open(sys.argv[1]):
    if line.startswith("measured"):
        _, way, when, *figures = line.split()
        loss, chosen, rejected, log_probs, reference = found[way, when] = [float(figure) for figure in figures]
        print(f"seen: {way}, reference read {when}: first loss {loss:.4f}, rewards {chosen:+.3f} and {rejected:+.3f}; chosen answers have {log_probs:.3f}"
              + (f", in the column {reference:.3f}" if reference else ""))
apart = {key: abs(loss - math.log(2)) for key, (loss, *_) in found.items()}
sys.exit(not (apart.pop(("DeepSpeed", "beforehand")) > 0.02 and len(apart) == 3 and max(apart.values()) < 0.01))
PY
for way in plain deepspeed; do
    "$folder/venv/bin/python" "$folder/look.py" $way "$folder" >> "$folder/measured" 2> "$folder/warnings" || { cat "$folder/warnings" "$folder/measured"; exit 1; }
done
"$folder/venv/bin/python" "$folder/compare.py" "$folder/measured"
