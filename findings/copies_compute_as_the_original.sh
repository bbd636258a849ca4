#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0, torch 2.13.0
#
# SFTTrainer, DPOTrainer and GRPOTrainer add a fused LM head to the model that they train (`add_fused_lm_head`). Beneath it they keep the forward
# pass that is bound to this model. A deep copy of `trainer.model` has parameters of its own, and its logits and its loss are those of the original, with
# the original's weights, whatever is done to the copy's; a gradient goes to the original too. No error, no warning.
#
# Seen: a copy made before three steps of SFTTrainer. Its parameters are those from before. Its logits equal those of the trained model to the last
# bit, and so do they once all its parameters are set to 0. Backward through the copy leaves it without gradients and the original with. Torch's
# AveragedModel, which makes a deep copy, computes as the trained model and not as the average. The state dict of the copy, loaded into a model that no trainer has seen,
# gives the logits from before.
#
# Why it matters: a frozen copy as the teacher of self-distillation, a student "before" to compare with, and an average of weights all are the student
# as it is now: a gap to the teacher of 0 at every step, and a before and an after that are alike. Load the state dict into a new model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import copy
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

folder = sys.argv[1]
tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": 4}
quiet |= {"max_steps": 3, "learning_rate": 0.01, "gradient_checkpointing": False}
ids = tokenizer("How much is three and three?", return_tensors="pt")["input_ids"]


def fresh():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, pad_token_id=2))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids).logits


def numbers(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def trainer_of(kind):
    rows = {"prompt": [f"{n} plus {n} is " for n in range(16)]}
    if kind is SFTTrainer:
        rows |= {"completion": [str(2 * n) for n in range(16)]}
        return SFTTrainer(fresh(), SFTConfig(folder + "/out", **quiet), train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)
    if kind is DPOTrainer:
        rows |= {"chosen": [str(2 * n) for n in range(16)], "rejected": ["none"] * 16}
        return DPOTrainer(fresh(), fresh(), args=DPOConfig(folder + "/out", **quiet), train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)
    args = GRPOConfig(folder + "/out", num_generations=2, max_completion_length=4, **quiet)
    reward = lambda completions, **_: [float(len(text)) for text in completions]  # noqa: E731
    return GRPOTrainer(fresh(), reward, args=args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)


right, start = [], logits(fresh())
for kind in (SFTTrainer, DPOTrainer, GRPOTrainer):
    trainer = trainer_of(kind)
    before, average = copy.deepcopy(trainer.model), AveragedModel(trainer.model)
    trainer.train()
    now, kept = logits(trainer.model), torch.equal(numbers(before), numbers(fresh()))
    moved, like = not torch.equal(now, start), torch.equal(logits(before), now)
    print(f"seen: {kind.__name__}: the student has moved: {moved}; a copy from before has the parameters from before: {kept}, and the logits of now: {like}")
    average.update_parameters(trainer.model)
    mean = torch.equal(logits(average.module), now)
    loaded = fresh()
    loaded.load_state_dict(before.state_dict())
    loaded = torch.equal(logits(loaded), start)
    trainer.model.zero_grad()
    before.train()(input_ids=ids, labels=ids).loss.backward()
    own_gradient, others = (any(w.grad is not None for w in model.parameters()) for model in (before, trainer.model))
    for weight in before.parameters():
        weight.data.zero_()
    zeroed = torch.equal(logits(before), now)
    print(f"seen: the copy has a gradient: {own_gradient}, the original: {others}; with all parameters 0 the copy has the logits of now: {zeroed}")
    print(f"seen: AveragedModel has the logits of now: {mean}; the copy's state dict in a new model gives those from before: {loaded}")
    right.append(moved and kept and like and zeroed and mean and loaded and others and not own_gradient)
sys.exit(not all(right))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/said" || { tail -30 "$folder/warnings"; cat "$folder/said"; exit 1; }
grep '^seen' "$folder/said"
