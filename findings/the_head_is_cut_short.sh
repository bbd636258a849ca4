#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0
#
# SFTTrainer, GRPOTrainer and DistillationTrainer compute log-probs from the last hidden states and the weight of the output embeddings, not by the
# model's forward pass. ModernBertDecoderForCausalLM has a dense layer, an activation and a norm in between, its `lm_head`. They
# are left out: another model is trained than is used, and those weights get no gradient. No error, no warning.
#
# Seen: of the same text, SFTTrainer logs a loss of 7.88 where the model's own is 6.64; after a step of SGD `lm_head` is as it was. The log-probs that GRPO
# takes for the tokens that the model drew differ from the model's own by up to 6.3. A student has a loss of 0.0 against a teacher whose `lm_head` has
# other weights, whose logits differ by up to 8.8. With Llama SFTTrainer's loss and GRPO's log-probs are the model's own.
#
# Why it matters: a student of this kind learns the probabilities that it would have without this layer, while `generate` goes through it, and a
# teacher of this kind teaches them. Compare the first logged loss with `model(input_ids, labels=input_ids).loss`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, ModernBertDecoderConfig, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1, "max_steps": 1}
PLAIN = {"optim": "sgd", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "gradient_checkpointing": False}
TEXT = torch.tensor([[40, 50, 60, 70, 80, 90]])
prompts = Dataset.from_list([{"prompt": "hello"}] * 2)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.5}
SPECIAL = {"vocab_size": len(tokens), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CONFIGS = {
    "Llama": LlamaConfig(**SIZES, **SPECIAL),
    "ModernBERT's decoder": ModernBertDecoderConfig(**SIZES, **SPECIAL, cls_token_id=0, sep_token_id=1),
}


def model_of(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def tuned(name):
    """The loss of TEXT that SFTTrainer logs, and whether the head has moved in its step."""
    model, before = model_of(name), model_of(name).lm_head.state_dict()
    with tempfile.TemporaryDirectory() as output:
        args = SFTConfig(output, per_device_train_batch_size=1, **QUIET, **PLAIN)
        trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list([{"input_ids": TEXT[0].tolist()}]), processing_class=tokenizer)
        trainer.train()
    moved = any(not weight.equal(before[key]) for key, weight in model.lm_head.state_dict().items())
    return trainer.state.log_history[0]["loss"], moved


def sampled(name):
    """How far the log-probs that GRPO takes for what was drawn are from the model's own."""
    taken = []

    class Watched(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, model, ids, mask, kept, *rest, **options):
            found = super()._get_per_token_logps_and_entropies(model, ids, mask, kept, *rest, **options)
            taken.append((ids, mask, kept, found[0].detach()))
            return found

    with tempfile.TemporaryDirectory() as output:
        args = GRPOConfig(output, per_device_train_batch_size=2, num_generations=2, max_completion_length=8, beta=0.0, **QUIET, **PLAIN)
        rewards = {"reward_funcs": lambda completions, **columns: [float(len(text)) for text in completions]}
        Watched(model_of(name), args=args, train_dataset=prompts, processing_class=tokenizer, **rewards).train()
    ids, mask, kept, found = taken[0]
    with torch.no_grad():
        logits = model_of(name)(input_ids=ids, attention_mask=mask).logits
    alone = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[:, -kept:, 0]
    return ((alone - found) * mask[:, -kept:]).abs().max().item()


sound = True
for name in CONFIGS:
    with torch.no_grad():
        loss = model_of(name)(input_ids=TEXT, labels=TEXT).loss.item()
    logged, moved = tuned(name)
    apart = sampled(name)
    print(f"seen: {name}: loss {loss:.2f}, in SFTTrainer {logged:.2f}; its step moves lm_head: {moved}; GRPO's log-probs are apart by {apart:.2g}")
    right = name == "Llama"
    sound &= (abs(loss - logged) < 1e-3) == right and moved == right and (apart < 1e-3) == right

student, teacher = model_of("ModernBERT's decoder"), model_of("ModernBERT's decoder")
teacher.lm_head.dense.weight.data.normal_()
with torch.no_grad():
    apart = (student(TEXT).logits - teacher(TEXT).logits).abs().max().item()
with tempfile.TemporaryDirectory() as output:
    args = DistillationConfig(output, per_device_train_batch_size=2, max_completion_length=8, **QUIET, **PLAIN)
    trainer = DistillationTrainer(student, teacher, args=args, train_dataset=prompts, processing_class=tokenizer)
    trainer.train()
loss = trainer.state.log_history[0]["loss"]
print(f"seen: DistillationTrainer: a student and a teacher whose logits differ by up to {apart:.2g}: loss {loss:.4f}")
sys.exit(not (sound and apart > 0.5 and loss < 1e-4))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
