#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# IWOPDTrainer (importance-weighted on-policy distillation) divides its loss by the number of tokens of the dataset's answers, which Trainer counts
# before the student writes. It takes rows of prompts alone, which have none: the loss is divided by 0, and the first step makes every weight NaN. The
# logged loss of that step is 0. With answers, which are not read, the step is as many times too long as they are shorter than what is written.
#
# Seen: prompts alone, with the default objective, optimizer and clipping: after the first step no weight is finite, and the log says a loss of 0.0. One step of SGD on the
# same prompts and the same written texts of 4 tokens, with answers of 2 and of 36 tokens in the dataset: the step is 18 times as long with the short ones.
#
# Why it matters: prompts alone are all that on-policy distillation needs, and the default objective is on-policy. A run of few steps saves a student
# of NaN under a loss of 0; a longer one ends with an error about probabilities when it writes next. Who adds answers to get around it has multiplied
# the learning rate by the ratio of two lengths, of which one is of texts that nobody reads.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

folder = sys.argv[1]
tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def model_of(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.2, pad_token_id=2))


def step(answer, **plain):
    """How long the first step is, what share of the weights is finite after it, and the loss that is logged."""
    messages = [{"role": "user", "content": "hello"}, *([{"role": "assistant", "content": answer}] if answer else [])]
    student = model_of(0)
    student.generation_config.eos_token_id = None  # all texts have 4 tokens
    before = torch.cat([weight.detach().flatten().clone() for weight in student.parameters()])
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    size = {"per_device_train_batch_size": 4, "max_steps": 1, "max_completion_length": 4, "max_length": 96, "max_prompt_length": 32}
    args = IWOPDConfig(f"{folder}/out", **quiet, **size, **plain)
    data = Dataset.from_list([{"messages": messages}] * 4)
    trainer = IWOPDTrainer(model=student, teacher_model=f"{folder}/teacher", args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    after = torch.cat([weight.detach().flatten() for weight in student.parameters()])
    finite = torch.isfinite(after).float().mean().item()
    return (after - before).norm().item(), finite, trainer.state.log_history[0]["loss"]


model_of(1).save_pretrained(f"{folder}/teacher")
tokenizer.save_pretrained(f"{folder}/teacher")
_, finite, loss = step(None)
print(f"seen: prompts alone: {finite:.0%} of the weights are finite after the first step, and the logged loss is {loss}")
sgd = {"optim": "sgd", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
short, long = step("a", **sgd)[0], step("a" * 35, **sgd)[0]
print(f"seen: with answers of 2 tokens the step is {short / long:.1f} times as long as with answers of 36")
sys.exit(not (finite == 0 and loss == 0 and round(short / long) == 18))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/said" || { tail -30 "$folder/warnings"; cat "$folder/said"; exit 1; }
grep '^seen' "$folder/said"
