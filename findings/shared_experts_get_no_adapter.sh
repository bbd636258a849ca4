#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0 (with 4.57.3 it is right)
#
# transformers 5 keeps the routed experts of a mixture in fused weights. "all-linear" leaves layers that are linear still and bear the names of what
# was fused, gate_proj, up_proj and down_proj, without an adapter then: the shared experts and dense first layers of DeepSeek-V3 and GLM-4.5. An
# adapter that was trained with transformers 4 loses its part in them when PeftModel loads it. An rsLoRA adapter of routed experts from
# transformers 4 is read otherwise even where no layer is left out (Qwen3-MoE). No error; what PEFT warns of, patterns for gate_up_proj that are not
# in the adapter's config, it warns of in the same words for a plain adapter of Qwen3-MoE, which is read rightly.
#
# Seen: "all-linear" leaves no linear layer but the head out under 4.57.3, and these under 5.23.0. Adapters written by 4.57.3, loaded by 5.23.0:
# log-probs of random models of two layers are 3.1 (DeepSeek-V3) and 2.2 (GLM-4.5) from those they were saved with, which the adapter had moved by
# 4.9 and 3.7. Qwen3-MoE's are the same within 1e-5, and with rsLoRA 1.8 away (moved by 5). With
# target_parameters=["mlp.shared_experts.gate_proj.weight", "mlp.gate_proj.weight", and so on for up and down] beside "all-linear" no layer is left
# out, the routed experts have adapters still, and the model saved and loaded is the same.
#
# Why it matters: every token passes through these layers, and "all-linear" is the usual choice: a student learns in fewer places than before, and a
# teacher or student with an adapter from transformers 4 is another model under 5. Look at what is trainable, and compare log-probs of one text
# under both versions.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 requests
"$folder/venv/bin/pip" install -qq --no-compile --no-deps --target "$folder/before" transformers==4.57.3 tokenizers==0.22.1 huggingface-hub==0.36.0
cat > "$folder/look.py" <<'PY'
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "initializer_range": 0.2,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES = {"DeepseekV3": LATENT, "Glm4Moe": {"head_dim": 16}, "Qwen3Moe": {"head_dim": 16, "num_experts": 4}}
ids = (torch.arange(60) * 7919 % 60 + 3)[None]
folder = Path(sys.argv[1])


@torch.no_grad()
def log_probs(model):
    return model.eval()(input_ids=ids).logits.float().log_softmax(-1)


def apart(one, other):
    return (one - other).abs().max().item()


def moved(model):
    """The model with an adapter as if it had learned something."""
    torch.manual_seed(1)
    for part in model.parameters():
        if part.requires_grad:
            torch.nn.init.normal_(part, std=0.1)
    return model


def without(model):
    """The linear layers but the head that no adapter is in, of the layer that is dense and of the one with experts."""
    found = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    return sorted(name.partition("layers.")[2] for name in found if "lora_" not in name and "base_layer" not in name and "lm_head" not in name)


expected, warned = True, {}
for name, own in FAMILIES.items():
    for rslora in (False, True):
        here = folder / f"{name}-{rslora}"
        lora = LoraConfig(r=4, target_modules="all-linear", use_rslora=rslora, task_type="CAUSAL_LM")
        if transformers.__version__ < "5":
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}Config")(**SIZES, **own)
            model = getattr(transformers, f"{name}ForCausalLM")(config)
            model.save_pretrained(here / "base")
            before = log_probs(model)
            adapted = moved(get_peft_model(model, lora))
            adapted.save_pretrained(here / "adapter")
            torch.save([before, log_probs(adapted)], here / "log_probs.pt")
            print(f"seen: {transformers.__version__}, {name}, rsLoRA {rslora}: all-linear leaves out {without(adapted)}")
            expected &= not without(adapted)
            continue
        base = AutoModelForCausalLM.from_pretrained(here / "base")
        before, after = torch.load(here / "log_probs.pt")
        bare = apart(log_probs(base), before)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loaded = PeftModel.from_pretrained(base, here / "adapter")
        other = apart(log_probs(loaded), after)
        new = get_peft_model(AutoModelForCausalLM.from_pretrained(here / "base"), lora)
        print(
            f"seen: {transformers.__version__}, {name}, rsLoRA {rslora}: all-linear leaves out {without(new)}; with the adapter of 4.57.3 log-probs are "
            f"{other:.2g} from those it was saved with, it had moved them by {apart(before, after):.2g}; without it {bare:.1g}; warnings: {len(said)}"
        )
        left_out = any("down_proj" in part for part in without(new))
        expected &= without(loaded) == without(new) and left_out == (name != "Qwen3Moe") and bare < 1e-3
        expected &= other > 0.05 if left_out or rslora else other < 1e-3
        warned[name, rslora] = {str(one.message) for one in said}
        if left_out and not rslora:
            names = [f"mlp.{part}{kind}_proj.weight" for part in ("", "shared_experts.") for kind in ("gate", "up", "down")]
            beside = LoraConfig(r=4, target_modules="all-linear", target_parameters=names, task_type="CAUSAL_LM")
            adapted = moved(get_peft_model(AutoModelForCausalLM.from_pretrained(here / "base"), beside))
            adapted.save_pretrained(here / "beside")
            again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(here / "base"), here / "beside")
            off = apart(log_probs(again), log_probs(adapted))
            trained = [key for key, part in adapted.named_parameters() if part.requires_grad and "lora_B" in key]
            kinds = [kind for kind in ("self_attn", "layers.0.mlp", "shared_experts", ".experts") if any(kind in key for key in trained)]
            print(
                f"seen: {name}, with these by target_parameters beside: adapters in {' '.join(kinds)}, left out {without(adapted)}, "
                f"log-probs saved and loaded {off:.2g} apart"
            )
            expected &= not without(adapted) and len(kinds) == 4 and off < 1e-3
if warned:
    alike = all(said == warned["Qwen3Moe", False] for said in warned.values())
    print(f"seen: the warnings are those of Qwen3Moe without rsLoRA, which is read rightly: {alike}: {sorted(warned['Qwen3Moe', False])}")
    expected &= alike
sys.exit(not expected)
PY
{
    PYTHONPATH="$folder/before" "$folder/venv/bin/python" "$folder/look.py" "$folder"
    "$folder/venv/bin/python" "$folder/look.py" "$folder"
} 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
