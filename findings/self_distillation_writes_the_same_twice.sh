#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# SDPOTrainer and SDFTTrainer seed every process alike, and a prompt's num_generations completions are spread over the processes. Each process then
# draws the same random numbers for the same prompt: n processes write every completion n times. GRPOTrainer, whose sampler and batches are the
# same, seeds each process otherwise (`set_seed(args.seed, device_specific=True)`). No error, no warning.
#
# Seen: four completions of one prompt at temperature 1. In one process SDPO and SDFT write four different texts, in two processes with two rows
# each two, each twice; GRPO writes four in both. With two completions a prompt and one row a process, SDPO's two are one text, and the standard
# deviation of a group's rewards, which is logged, is 0.
#
# Why it matters: the groups of a run that is moved from one GPU to several hold fewer texts than num_generations says, and where every process has
# one row of a group, all of its rewards are equal: there is no advantage, and no other solution to read. The logged mean reward is that of fewer texts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import os
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

processes, folder = int(os.environ.get("WORLD_SIZE", "1")), sys.argv[1]
ROWS = Dataset.from_list([{"prompt": f"hello {n}", "privileged_context": "good day"} for n in range(8)])


def save_student():
    tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, eos_token_id=1, pad_token_id=2)).save_pretrained(folder)


def texts(config, trainer, rows, **given):
    """How many different completions of one prompt the processes have written in the first step, of `rows`, and the trainer."""
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    shared = {"ddp_backend": "gloo"} if processes > 1 else {}
    with tempfile.TemporaryDirectory() as output:
        sizes = {"per_device_train_batch_size": rows // processes, "num_generations": rows, "max_completion_length": 12, "max_steps": 1}
        trainer = trainer(model=folder, args=config(output, **sizes, **quiet, **shared), train_dataset=ROWS, **given)
        own, written = trainer._prepare_inputs, []

        def watch(batch):
            inputs = own(batch)
            written.extend(map(tuple, inputs["completion_ids"].tolist()))
            return inputs

        trainer._prepare_inputs = watch
        trainer.train()
    everything = [None] * processes
    if processes > 1:
        torch.distributed.all_gather_object(everything, written)
    else:
        everything = [written]
    assert sum(map(len, everything)) == rows
    return len({text for own in everything for text in own}), trainer


def reward(completion_ids, **rest):
    return [float(sum(ids)) for ids in completion_ids]


if processes == 1:
    save_student()
found = [texts(GRPOConfig, GRPOTrainer, 4, reward_funcs=reward)[0], texts(SDFTConfig, SDFTTrainer, 4)[0]]
found.append(texts(SDPOConfig, SDPOTrainer, 4, reward_funcs=reward)[0])
few, trainer = texts(SDPOConfig, SDPOTrainer, 2, reward_funcs=reward)
spread = next(row["self_distillation/group_reward_std_mean"] for row in trainer.state.log_history if "loss" in row)
if int(os.environ.get("RANK", "0")) == 0:
    print("measured", processes, *found, few, spread)
PY
cat > "$folder/compare.py" <<'PY'
import sys

found = {}
for line in open(sys.argv[1]):
    if line.startswith("measured"):
        _, processes, *rest = line.split()
        found[processes] = [int(own) for own in rest[:4]], float(rest[4])
        grpo, sdft, sdpo, few = found[processes][0]
        print(f"seen: {processes} process(es): of 4 completions of a prompt {grpo} differ with GRPO, {sdft} with SDFT, {sdpo} with SDPO; of 2, {few} with SDPO, "
              f"whose rewards have a standard deviation of {float(rest[4]):.3g}")
(one, spread), (two, none) = found["1"], found["2"]
sys.exit(not (one == [4, 4, 4, 2] and two == [4, 2, 2, 1] and spread > 0 and none == 0))
PY
{
    "$folder/venv/bin/python" "$folder/look.py" "$folder/student"
    "$folder/venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 "$folder/look.py" "$folder/student"
} 2> "$folder/warnings" > "$folder/measured" || { cat "$folder/warnings" "$folder/measured"; exit 1; }
"$folder/venv/bin/python" "$folder/compare.py" "$folder/measured"
