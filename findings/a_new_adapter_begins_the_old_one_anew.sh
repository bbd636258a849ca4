#!/usr/bin/env bash
# peft 0.21.2, trl 1.16.0 with transformers 5.23.0
#
# `AutoModelForCausalLM.from_pretrained(folder)` of an adapter's folder returns the base model's class with the adapter in it, under the name "default".
# A trainer that gets this model and a peft_config calls `get_peft_model`, which makes an adapter of that name: in the layers that both have, the
# weights of the old one are begun anew, in the others they stay. PEFT warns of "multiple adapters in the model". There is one. Switched off, the
# student is the base model.
#
# Seen: an adapter on all linear layers moves the logits of a model by up to 2.8. SFTTrainer with a new LoraConfig on all linear layers begins 0 from the
# base model and 2.8 from the adapter. With one on q_proj alone, it begins 2.8 from the base model and 0.72 from the adapter. A PeftModel with a
# peft_config is an error in SFTTrainer.
#
# Why it matters: students are taught in turns (SFT, then distillation; one teacher, then the next). Loaded so, the second turn begins without what the
# first has taught, and looks like a run that learns slowly. Merge the first adapter, or load it with PeftModel and train it on.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile peft==0.21.2 trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys
import warnings

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

folder = sys.argv[1]
tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
ids = tokenizer("How much is three and three?", return_tensors="pt")["input_ids"]
torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, pad_token_id=2))
base.save_pretrained(f"{folder}/base")
first = get_peft_model(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
for name, weight in first.named_parameters():
    if "lora_" in name:  # as if it had learned something
        torch.nn.init.normal_(weight, std=0.1)
first.save_pretrained(f"{folder}/first")


@torch.no_grad()
def apart(model, other):
    return (model.eval()(input_ids=ids).logits - other.eval()(input_ids=ids).logits).abs().max().item()


def trainer_of(model, targets):
    args = SFTConfig(f"{folder}/out", use_cpu=True, bf16=False, report_to=[])
    rows = Dataset.from_dict({"text": ["three and three is six"] * 4})
    adapter = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    return SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)


print(f"seen: the first adapter moves the logits by {apart(first, base):.1f}; loaded by AutoModelForCausalLM, the model is 0 from it: ", end="")
loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/first")
right = [apart(first, base) > 0.1, apart(loaded, first) < 1e-4]
print(f"{right[1]}, a {type(loaded).__name__}")
for targets in ("all-linear", ["q_proj"]):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        student = trainer_of(AutoModelForCausalLM.from_pretrained(f"{folder}/first"), targets).model
    named = any("multiple adapters" in str(own.message) for own in said)
    from_base, from_first = apart(student, base), apart(student, first)
    with student.disable_adapter():
        off = apart(student, base)
    print(
        f"seen: SFTTrainer with a new adapter on {targets} begins {from_base:.2g} from the base model and {from_first:.2g} from the first adapter, and switched off "
        f"{off:.2g} from the base model; adapters: {sorted(student.peft_config)}; a warning of multiple adapters: {named}"
    )
    right += [named, sorted(student.peft_config) == ["default"], from_first > 0.01, off < 1e-4]
    right.append(from_base < 1e-4 if targets == "all-linear" else from_base > 0.01)
try:
    trainer_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), f"{folder}/first"), "all-linear")
    right.append(False)
except ValueError as error:
    print(f"seen: a PeftModel and a peft_config: {type(error).__name__}")
sys.exit(not all(right))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/said" || { tail -30 "$folder/warnings"; cat "$folder/said"; exit 1; }
grep '^seen' "$folder/said"
