#!/usr/bin/env bash
# trl 1.16.0, peft 0.21.2
#
# DistillationTrainer reads its teacher's backbone and the weight of its LM head, apart from the PeftModel that it is given. What an adapter
# does elsewhere is left out: LoRA on the LM head, and all virtual tokens (prompt tuning, prefix tuning, P-tuning). For the student the trainer
# refuses such adapters; a teacher with one is taken for its base model, without an error or a warning.
#
# Seen: the teachers' logits differ from the base model's by up to 7 (P-tuning) to 42 (LoRA on the head). A student that is the base model has a
# loss of 0.0 against the teachers with LoRA on the head, prompt tuning, prefix tuning and P-tuning, and one of 3.5 against a teacher with LoRA
# in its attention.
#
# Why it matters: a teacher that was specialised by such an adapter, to be distilled into a student, teaches what its base model knows, and the loss
# falls as it should. Merge LoRA into the teacher first (`merge_and_unload()`).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
TEXT = torch.tensor([[40, 50, 60, 70]])


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.5))


def teacher_with(config):
    """The base model with an adapter, as if it had been trained."""
    teacher = get_peft_model(base(), config)
    torch.manual_seed(1)
    for weight in teacher.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight)
    return teacher.eval()


def loss_of(teacher):
    """The loss of a student that is the base model."""
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    with tempfile.TemporaryDirectory() as output:
        args = DistillationConfig(output, per_device_train_batch_size=2, max_steps=1, max_completion_length=8, **quiet)
        data = Dataset.from_list([{"prompt": "hello"}] * 2)
        trainer = DistillationTrainer(base(), teacher, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    return next(row["loss"] for row in trainer.state.log_history if "loss" in row)


CONFIGS = {
    "LoRA in the attention": LoraConfig(target_modules=["q_proj", "v_proj"]),
    "LoRA on the LM head": LoraConfig(target_modules=["lm_head"]),
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
}
read = []
for name, config in CONFIGS.items():
    teacher = teacher_with(config)
    with torch.no_grad():
        apart = (teacher(TEXT).logits[:, -4:] - base()(TEXT).logits).abs().max().item()
    loss = loss_of(teacher)
    print(f"seen: {name}: logits differ from the base model's by up to {apart:.1f}; loss of the base model as the student: {loss:.4f}")
    read.append((apart > 0.5, loss > 0.01))
sys.exit(read != [(True, True)] + [(True, False)] * 4)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
