#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0
#
# Where a whole model is trained and no `ref_model` is given, DPOTrainer, KTOTrainer, GRPOTrainer and RLOOTrainer load their reference from the name
# or folder that the model's config remembers. A model that has changed since it was loaded (trained in the same script, an adapter merged into it, a
# folder that was overwritten) is compared with the checkpoint that it came from. DPOTrainer's docstring says that the reference is "the model state
# before DPO training starts". No error, no warning.
#
# Seen: a model is loaded and its weights are changed. In all four trainers the reference has the weights on the disk, none has the model's. Before
# the first update the loss of DPO is 0.772 where that of a model which equals its reference is log 2 = 0.693, rewards of chosen answers are
# -0.15 in DPO and KTO, and the KL is 1.2 in GRPO and 1.5 in RLOO. With a model that is as it was loaded all are 0, and the loss is 0.693.
#
# Why it matters: distillation is often followed by preference pairs or rewards in the same process. The reference is then the student from before
# distillation, and the KL pulls it back there. Save the student, and load it from there, or give `ref_model`.
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
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
PAIRS = [{"prompt": "hello", "chosen": " you", "rejected": " no one"}] * 4
LABELLED = [{"prompt": "hello", "completion": " you", "label": True}, {"prompt": "hello", "completion": " no one", "label": False}] * 2
torch.manual_seed(0)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
disk = f"{sys.argv[1]}/student"
LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.5)).save_pretrained(disk)


def student(changed):
    model = AutoModelForCausalLM.from_pretrained(disk)
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += changed * torch.randn_like(weight)  # as training, or a merged adapter, would
    return model


def same(one, other):
    return all(weight.equal(second) for weight, second in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def begin(kind, config, rows, changed):
    """Which model is the reference, and the figures of the first step, before its update."""
    written = config in (GRPOConfig, RLOOConfig)
    own = {"num_generations": 2, "max_completion_length": 8} if written else {}
    rewards = {"reward_funcs": lambda completions, **columns: [float(len(text)) for text in completions]} if written else {}
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    with tempfile.TemporaryDirectory() as output:
        args = config(output, per_device_train_batch_size=4, max_steps=1, beta=0.1, **quiet, **own)
        data = Dataset.from_list(rows)
        trainer = kind(model=student(changed), args=args, train_dataset=data, processing_class=tokenizer, **rewards)
        reference = "the given model" if same(trainer.ref_model, student(changed)) else "another"
        reference = "the one on the disk" if changed and same(trainer.ref_model, student(0.0)) else reference
        trainer.train()
    return reference, trainer.state.log_history[0]


found = []
for kind, config, rows in (
    (DPOTrainer, DPOConfig, PAIRS),
    (KTOTrainer, KTOConfig, LABELLED),
    (GRPOTrainer, GRPOConfig, PAIRS),
    (RLOOTrainer, RLOOConfig, PAIRS),
):
    for changed in (0.0, 0.1):
        reference, logged = begin(kind, config, rows, changed)
        names = ("loss", "rewards/chosen") if rows is LABELLED or kind is DPOTrainer else ("kl",)
        figures = {name: round(logged[name], 3) for name in names}
        print(f"seen: {kind.__name__}, weights {'changed' if changed else 'as loaded'}: the reference is {reference}; {figures}")
        found.append((reference, abs(figures.get("rewards/chosen", figures.get("kl"))) > 0.01))
sys.exit(found != [("the given model", False), ("the one on the disk", True)] * 4)
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
