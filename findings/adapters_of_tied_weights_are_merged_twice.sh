#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0
#
# `LoraConfig(ensure_weight_tying=True)` is there for a model whose embeddings and head are one matrix: an adapter of the embeddings is then put
# on the head as well, with the same A and B. Merging merges each of the two into the one matrix, so that it is changed twice: W + 2 BA, where
# both were adapted by W + BA. merge_adapter does so too. A warning speaks of complications; getting the adapter gives none.
#
# Seen: the matrix that merge_and_unload leaves is W + 2 BA, and the log-probs of the merged model differ from the adapted one's by more than 1.
# With half of the adapter (lora_B of the embeddings halved before merging) the merged model is the adapted one. Saved and loaded as an adapter,
# nothing is lost.
#
# Why it matters: whoever gives a student new tokens trains its embeddings, and small students (Qwen2.5 and Qwen3 up to 4B, Llama-3.2, Gemma) have
# tied ones. The merged student is not the one that was trained and measured. Trainers that hand merged weights to vLLM, as TRL's do through
# merge_adapter, sample from the twice changed model and train the other: that is what on-policy distillation is to avoid.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import sys
import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TEXT = torch.arange(3, 15)[None]


def base():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, initializer_range=0.2)).eval()


def trained():
    """A student whose adapter has learned something."""
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)).eval()
    torch.manual_seed(1)
    for part in model.parameters():
        if part.requires_grad:
            part.data += 0.1 * torch.randn_like(part)
    return model


@torch.no_grad()
def log_probs(model):
    return model(TEXT).logits.log_softmax(-1)


def apart(one, other):
    return (one - other).abs().max().item()


with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = trained()
told = [text for text in map(str, (warning.message for warning in said)) if "tie" in text]
adapted, embeddings = log_probs(model), model.get_base_model().model.embed_tokens
before, change = embeddings.base_layer.weight.detach().clone(), embeddings.get_delta_weight("default").detach()
print(f"seen: warnings about tied weights when the adapter is put on: {len(told)}")
with tempfile.TemporaryDirectory() as output:
    model.save_pretrained(output)
    read = apart(log_probs(PeftModel.from_pretrained(base(), output).eval()), adapted)
model.merge_adapter()
for_a_while = apart(log_probs(model), adapted)
model.unmerge_adapter()
merged = model.merge_and_unload()
left = merged.get_input_embeddings().weight.detach()
once, twice, for_good = apart(left, before + change), apart(left, before + 2 * change), apart(log_probs(merged), adapted)
print(f"seen: the merged matrix differs from W + BA by {once:.3f}, from W + 2 BA by {twice:.6f}")
print(f"seen: log-probs differ from the adapted model's by {for_a_while:.3f} after merge_adapter, {for_good:.3f} after merge_and_unload, {read:.6f} saved and loaded")
model = trained()
model.get_base_model().model.embed_tokens.lora_embedding_B["default"].data /= 2
halved = apart(log_probs(model.merge_and_unload()), adapted)
print(f"seen: merged with half of the embeddings' adapter: {halved:.6f}")
holds = not told and twice < 1e-5 < 0.05 < once and for_a_while > 1 and for_good > 1 and read < 1e-5
sys.exit(not (holds and halved < 1e-4))
PY
"$folder/venv/bin/python" "$folder/look.py" 2>/dev/null | grep '^seen'
