#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0, peft 0.21.2 and bitsandbytes 0.50.2
#
# TRL's trainers make the adapter of a quantized student bfloat16. A resumed run reads it by `load_adapter`, which makes every adapter in half
# precision float32 (`autocast_adapter_dtype=True`), and goes on in float32. No error, no warning.
#
# Seen: SFTTrainer, a student in four bits, four steps with a learning rate of 1e-5. Without an interruption the adapter is bfloat16, and 2% of the
# weights of A change in the last two steps: for the others bfloat16 is too coarse. Resumed after two steps the adapter is float32, and all change.
#
# Why it matters: a run that was interrupted goes on as another run, which learns what the first one could not. Two runs of one QLoRA recipe differ by
# whether the machine was restarted. Adapter and optimizer take twice the memory, so that a run which fitted may not fit when it is resumed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 bitsandbytes==0.50.2
cat > "$folder/look.py" <<'PY'
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.2)).save_pretrained(folder / "base")
data = Dataset.from_list([{"text": f"{n} and {n + 1} are neighbours"} for n in range(8)])


def run(resume=None):
    """A run of four steps, which saves at each: the trainer when it is done."""
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    student = LlamaForCausalLM.from_pretrained(folder / "base", quantization_config=four_bits)
    plain = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 1, "learning_rate": 1e-5, "lr_scheduler_type": "constant"}
    quiet = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True}
    args = SFTConfig(str(folder / "run"), **plain, **quiet)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = SFTTrainer(model=student, args=args, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(step):
    found = load_file(folder / "run" / f"checkpoint-{step}" / "adapter_model.safetensors")
    return torch.cat([part.float().flatten() for name, part in found.items() if "lora_A" in name])


found = {}
for name, resume in (("not interrupted", None), ("resumed after two steps", str(folder / "run" / "checkpoint-2"))):
    trainer = run(resume)
    kinds = {str(part.dtype) for part in trainer.model.parameters() if part.requires_grad}
    changed = (weights(4) != weights(2)).float().mean().item()
    found[name] = kinds, changed
    print(f"seen: {name}: the adapter is {' and '.join(kinds)}; {changed:.0%} of A's weights change in the last two steps")
(before, few), (after, all_of_them) = found.values()
sys.exit(not (before == {"torch.bfloat16"} and after == {"torch.float32"} and few < 0.5 and all_of_them > 0.9))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
grep '^seen' "$folder/seen"
