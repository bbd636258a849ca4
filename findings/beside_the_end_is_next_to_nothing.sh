#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# GKDTrainer and DistillationTrainer take `beta` from 0 (forward KL) to 1 (reverse KL), and between the two the generalized Jensen-Shannon divergence,
# which is not scaled: it goes to 0 with beta and with 1 - beta. beta=0.01 is not nearly the forward KL but nearly nothing, and so is beta=0.99 beside the
# reverse KL. DistillationTrainer divides both models' logits by `temperature` in its loss, without a factor T² on it; GKD uses it to sample alone.
#
# Seen: one step of SGD from the same weights. GKD's has the length 1.62 with beta=0, 0.014 with 0.01, 0.089 with 0.1, 0.19 with 0.5 (the default),
# 0.016 with 0.99 and 2.06 with 1. DistillationTrainer's has 1.10, 0.0096, 0.058, 0.12, 0.0077 and 0.85. The directions beside the ends are those of the
# ends (cosines of 0.995 and more). With temperature 2 and beta=0, the step of DistillationTrainer is 0.20 long, and GKD's as long as before.
#
# Why it matters: a sweep over beta is one over learning rates that differ a hundredfold wherever the length of the gradient counts: with SGD, with
# max_grad_norm (1.0 by default), beside a weight decay or another loss. Logged losses and gradient norms of two betas cannot be compared.
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
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
USER, ANSWER = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}
# GKD learns the dataset's answers here (lmbda=0), DistillationTrainer what the student writes
GKD = GKDTrainer, GKDConfig, {"lmbda": 0.0}, Dataset.from_list([{"messages": [USER, ANSWER]}] * 4)
DISTILLATION = DistillationTrainer, DistillationConfig, {"max_completion_length": 8}, Dataset.from_list([{"prompt": [USER]}] * 4)


def model_of(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.3, eos_token_id=1, pad_token_id=2))


def step(method, beta, temperature=1.0):
    """The gradient itself: what SGD with a learning rate of 0.01 changes, times 100."""
    trainer_class, config, settings, data = method
    student = model_of(0)
    before = [weight.detach().clone() for weight in student.parameters()]
    plain = {"optim": "sgd", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 1}
    quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as output:
        args = config(output, beta=beta, temperature=temperature, per_device_train_batch_size=4, **settings, **plain, **quiet)
        trainer = trainer_class(model=student, teacher_model=model_of(1), args=args, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return torch.cat([(weight.detach() - old).flatten() for weight, old in zip(student.parameters(), before)]).double() * 100


good = True
for name, method in (("GKD", GKD), ("DistillationTrainer", DISTILLATION)):
    steps = {beta: step(method, beta) for beta in (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)}
    lengths = {beta: own.norm().item() for beta, own in steps.items()}
    alike = torch.cosine_similarity(steps[0.01], steps[0.0], 0).item(), torch.cosine_similarity(steps[0.99], steps[1.0], 0).item()
    warm = step(method, 0.0, 2.0).norm().item()
    print(f"seen: {name}, length of the step by beta", {beta: round(length, 5) for beta, length in lengths.items()},
          f"; cosine of 0.01 with 0 {alike[0]:.3f}, of 0.99 with 1 {alike[1]:.3f}; beta 0 at temperature 2 {warm:.5f}")
    good &= lengths[0.01] < lengths[0.0] / 50 and lengths[0.99] < lengths[1.0] / 50 and min(alike) > 0.9
    good &= abs(warm / lengths[0.0] - 1) < 1e-3 if method is GKD else warm < lengths[0.0] / 2
sys.exit(not good)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
