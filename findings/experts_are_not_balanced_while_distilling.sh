#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# GKDTrainer, GOLDTrainer and DistillationTrainer leave the balancing loss of a mixture of experts out, also where the student's config has
# `output_router_logits=True` and a `router_aux_loss_coef`, by which SFTTrainer counts it. SFTTrainer leaves it out as well where it is given a
# `compute_loss_func`, a divergence of one's own, and logs it as `aux_loss` all the same. No error, no warning.
#
# Seen: one step of SGD of a random Qwen3-MoE with router_aux_loss_coef=1. With a teacher that equals it, so that all gradient there can be is that of the
# balancing loss, its router does not move in GKD, GOLD (both with lmbda=0) and DistillationTrainer. Under SFTTrainer it moves; with a compute_loss_func
# that returns zero times the logits it does not, and `aux_loss` is logged as the same number.
#
# Why it matters: a student with experts is distilled without what kept their load even in SFT, by settings that say otherwise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import DistillationConfig, DistillationTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}
CHAT, PROMPTS = [{"messages": [USER, ANSWER]}] * 4, [{"prompt": [USER]}] * 4
QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


def mixture():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "moe_intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 1.0}
    config = Qwen3MoeConfig(vocab_size=len(tokens), **sizes, **experts, head_dim=8, initializer_range=0.5, eos_token_id=None)
    return Qwen3MoeForCausalLM(config)


def run(Config, Its, rows, settings, **others):
    """How far a step moves the router, and the balancing loss that is logged."""
    student = mixture()
    router = student.model.layers[0].mlp.gate.weight
    before = router.detach().clone()
    plain = {"per_device_train_batch_size": 4, "max_steps": 1, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.0}
    with tempfile.TemporaryDirectory() as output:
        args = Config(output, **plain, **QUIET, **settings)
        trainer = Its(model=student, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **others)
        trainer.train()
    return (router.detach() - before).abs().max().item(), trainer.state.log_history[0].get("aux_loss")


def nothing(outputs, labels, num_items_in_batch=None):
    return outputs.logits.sum() * 0.0


found = {
    "GKD": run(GKDConfig, GKDTrainer, CHAT, {"lmbda": 0.0}, teacher_model=mixture()),
    "GOLD": run(GOLDConfig, GOLDTrainer, CHAT, {"lmbda": 0.0, "max_completion_length": 8}, teacher_model=mixture()),
    "DistillationTrainer": run(DistillationConfig, DistillationTrainer, PROMPTS, {"max_completion_length": 8}, teacher_model=mixture()),
    "SFT": run(SFTConfig, SFTTrainer, CHAT, {}),
    "SFT, compute_loss_func": run(SFTConfig, SFTTrainer, CHAT, {}, compute_loss_func=nothing),
}
for name, (moved, logged) in found.items():
    print(f"seen: {name}: the router moves by {moved:.6f}, aux_loss in the log: {logged}")
moves = [name for name, (moved, _) in found.items() if moved > 1e-5]
logs = [name for name, (_, logged) in found.items() if logged]
sys.exit((moves, logs) != (["SFT"], ["SFT", "SFT, compute_loss_func"]))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | { grep '^seen' || true; } || { cat "$folder/warnings"; exit 1; }
