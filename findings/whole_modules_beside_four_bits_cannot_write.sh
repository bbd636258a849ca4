#!/usr/bin/env bash
# trl 1.16.0 with peft 0.21.2 (transformers 5.23.0, bitsandbytes 0.50.2, torch 2.13.0)
#
# SFTTrainer makes all weights that are trained of a student in four bits bfloat16, also the modules that PEFT trains whole (modules_to_save).
# The rest of the student is float32, which is TRL's default for a student given by name. Such a head multiplies float32 states
# in training under autocast alone. In generation, also within training by an on-policy trainer or a callback, it raises an error.
#
# Seen: with modules_to_save=["lm_head"] training runs. The head is bfloat16 beside a base head of float32, and `generate` raises "expected m1 and m2
# to have the same dtype". With that head made float32 again, it writes.
#
# Why it matters: whoever adds tokens of another family to a student trains its head whole, and a student that is to be taught by its own text writes
# in every step.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq transformers==5.23.0 trl==1.16.0 peft==0.21.2 accelerate==1.15.0 datasets==5.2.0 bitsandbytes==0.50.2
cat > "$folder/look.py" <<'PY'
import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", pad_token="<p>")
shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(sys.argv[1])
four_bits = {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}}
settings = dict(max_steps=1, per_device_train_batch_size=2, max_length=64, report_to="none", use_cpu=True, disable_tqdm=True)
trainer = SFTTrainer(
    sys.argv[1],
    SFTConfig(sys.argv[2], bf16=False, gradient_checkpointing=False, model_init_kwargs=four_bits, **settings),
    train_dataset=Dataset.from_list([{"text": "two and two is four"}] * 4),
    processing_class=tokenizer,
    peft_config=LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
)
trainer.train()
wrapper = trainer.model.get_output_embeddings()
head = wrapper.modules_to_save["default"]
kinds = head.weight.dtype, wrapper.original_module.weight.dtype
ids = tokenizer("two", return_tensors="pt").input_ids


def writes():
    try:
        trainer.model.eval().generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    except RuntimeError as error:
        return str(error)
    return "writes"


found = writes()
head.float()
print(f"trained head {kinds[0]}, base head {kinds[1]}: {found}; made float32: {writes()}")
sys.exit(not (kinds == (torch.bfloat16, torch.float32) and "same dtype" in found and writes() == "writes"))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder/student" "$folder/run" 2> "$folder/warnings" | grep "trained head" || { cat "$folder/warnings"; exit 1; }
