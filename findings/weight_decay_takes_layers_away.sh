#!/usr/bin/env bash
# peft 0.21.2, transformers 5.23.0
#
# Trainer's weight decay reaches all weights of an adapter. LoRA, LoHa, VeRA and MiSS that have nothing to learn stay at the base model. DoRA, IA3,
# RoAd and PSOFT do not: their magnitudes and factors decay towards 0, and not to what they started at. PiSSA, OLoRA, trained token rows and modules
# that are trained whole leave the base model too. No error, no warning.
#
# Seen: 100 steps of AdamW with a gradient of 0, as of a student that equals its teacher; learning rate times decay times steps is 0.1, as in 5000
# steps with 2e-4 and 0.1. All start at the base model, a random Llama. Log-probs are then from its own by up to 0 (LoRA, LoHa, VeRA, MiSS), 1.1
# (DoRA, IA3, RoAd), 1.7 (PSOFT, PiSSA), 2.6 (OLoRA), 0.46 (a head trained whole) and 0.035 (three trained tokens). IA3's factors are
# 0.905, from 1. A DoRA of which only lora_A and lora_B decay stays.
#
# Why it matters: weight decay is set to keep a student near its start, and with LoRA it does. With DoRA or IA3, one word in a config away, it
# scales the adapted layers down, those of a student that has nothing left to learn too. Leave weight_decay at 0 with them, or let only lora_A
# and lora_B decay (`get_decay_parameter_names`).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/look.py" <<'PY'
import contextlib
import io
import sys
import warnings

import torch
import transformers
from peft import IA3Config, LoHaConfig, LoraConfig, MissConfig, PsoftConfig, RoadConfig, VeraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

where = {"target_modules": ["q_proj", "o_proj", "down_proj"]}
KINDS = {
    "LoRA": LoraConfig(r=4, **where),
    "LoHa": LoHaConfig(r=4, **where),
    "VeRA": VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "MiSS": MissConfig(r=4, **where),
    "DoRA": LoraConfig(r=4, use_dora=True, **where),
    "DoRA, A and B alone decay": LoraConfig(r=4, use_dora=True, **where),
    "IA3": IA3Config(feedforward_modules=["down_proj"], **where),
    "RoAd": RoadConfig(group_size=8, **where),
    "PSOFT": PsoftConfig(r=4, **where),
    "PiSSA": LoraConfig(r=4, init_lora_weights="pissa", **where),
    "OLoRA": LoraConfig(r=4, init_lora_weights="olora", **where),
    "trained tokens": LoraConfig(r=4, trainable_token_indices=[3, 10, 17], **where),
    "modules_to_save": LoraConfig(r=4, modules_to_save=["lm_head"], **where),
}
TO_THE_BASE = ["LoRA", "LoHa", "VeRA", "MiSS", "DoRA, A and B alone decay"]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ids = (torch.arange(40) * 7919 % 60 + 3)[None]


class Level(Trainer):
    """A loss without a gradient: what moves the weights is their decay."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        return model(input_ids=inputs["input_ids"]).logits.sum() * 0


class OfLora(Level):
    """Only A and B decay."""

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if "lora_A" in name or "lora_B" in name]


@torch.no_grad()
def log_probs(model):
    return model.eval()(input_ids=ids).logits.log_softmax(-1)


def after(config, trainer=Level):
    """How far log-probs are from the base model's, before and after the steps, and what is left of an IA3 vector, which starts at 1."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2))
    at_first = log_probs(base)
    model = get_peft_model(base, config)
    start = (log_probs(model) - at_first).abs().max().item()
    args = TrainingArguments(
        sys.argv[1], max_steps=100, learning_rate=1e-2, weight_decay=0.1, lr_scheduler_type="constant", per_device_train_batch_size=1,
        use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer(model=model, args=args, train_dataset=[{"input_ids": ids[0]}]).train()
    left = [part.mean().item() for name, part in model.named_parameters() if "ia3_l" in name]
    return start, (log_probs(model) - at_first).abs().max().item(), f", its factors {left[0]:.3f}" if left else ""


expected = True
for name, config in KINDS.items():
    said = io.StringIO()
    transformers.utils.logging.get_logger().handlers[0].setStream(said)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        start, end, left = after(config, OfLora if "alone" in name else Level)
    words = {str(one.message) for one in warned} | set(said.getvalue().splitlines())
    print(f"seen: {name}: log-probs are {start:.1g} from the base model's before the steps, {end:.2g} after them{left}")
    if any("decay" in one for one in words):
        sys.exit(f"it is said now: {words}")
    expected &= start < 1e-3 and (end < 1e-3 if name in TO_THE_BASE else end > 1e-2)
sys.exit(not expected)
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
