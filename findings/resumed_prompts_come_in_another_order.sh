#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0
#
# The sampler of GRPOTrainer, RLOOTrainer and DistillationTrainer (RepeatSampler) draws the order of each epoch from its own generator, which begins
# anew with the process, and it has no `set_epoch`. A run that is resumed in its second epoch or later skips as many batches as it has had of that
# epoch, but in the order of the first. No error, no warning. In the first epoch a resumed run goes on as the uninterrupted one.
#
# Seen: eight prompts, four steps an epoch, three epochs. Resumed after six steps, all three trainers read for the rest of the second epoch
# [2, 1] [4, 5] where the uninterrupted run reads [3, 2] [0, 5]: prompts 1 and 4 come twice in that epoch, 0 and 3 not at all. The third epoch has then
# the order that the second had. Resumed after two steps, they read what the uninterrupted run reads.
#
# Why it matters: on-policy runs are long and are killed and resumed. Each resume gives some prompts twice and takes others away, and a resumed run
# cannot be compared with an uninterrupted one.
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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
data = Dataset.from_list([{"prompt": str(n)} for n in range(8)])
QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "max_completion_length": 4}


def model_of(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes))


def prompts_of(kind, output, resume_from=None):
    """The two prompts of each step."""
    read = []
    saved = {"save_strategy": "steps", "save_steps": 2}

    class Watched(kind):
        def _generate_and_score_completions(self, inputs):
            read.append(sorted({row["prompt"] for row in inputs}))
            return super()._generate_and_score_completions(inputs)

    if kind is DistillationTrainer:
        args = DistillationConfig(output, per_device_train_batch_size=2, num_train_epochs=3, **QUIET, **saved)
        own = {"teacher_model": model_of(1)}
    else:
        config = GRPOConfig if kind is GRPOTrainer else RLOOConfig
        plain = {"per_device_train_batch_size": 4, "num_generations": 2, "num_train_epochs": 3, "beta": 0.0}
        args = config(output, **plain, **QUIET, **saved)
        own = {"reward_funcs": lambda completions, **columns: [float(len(text)) for text in completions]}
    Watched(model=model_of(0), args=args, train_dataset=data, processing_class=tokenizer, **own).train(resume_from_checkpoint=resume_from)
    return ["".join(step) for step in read]


found = []
for kind in (DistillationTrainer, GRPOTrainer, RLOOTrainer):
    with tempfile.TemporaryDirectory() as output:
        whole = prompts_of(kind, output)
        early = prompts_of(kind, output, f"{output}/checkpoint-2")
        late = prompts_of(kind, output, f"{output}/checkpoint-6")
    second = sorted("".join(whole[4:6] + late[:2]))
    print(f"seen: {kind.__name__}: uninterrupted {' '.join(whole[:4])} | {' '.join(whole[4:8])} | {' '.join(whole[8:])}")
    print(f"seen:     resumed after 2 steps {' '.join(early[:2])} | {' '.join(early[2:6])} | {' '.join(early[6:])}")
    print(f"seen:     resumed after 6 steps {' '.join(late[:2])} | {' '.join(late[2:])}; prompts of the second epoch: {' '.join(second)}")
    found.append((early == whole[2:], late == whole[6:], late[:2] == whole[2:4], late[2:] == whole[4:8], len(set(second))))
sys.exit(any(each[:4] != (True, False, True, True) or each[4] == 8 for each in found))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
