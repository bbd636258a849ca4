#!/usr/bin/env bash
# trl 1.16.0, transformers 5.23.0
#
# GRPOTrainer, RLOOTrainer and DistillationTrainer pad prompts on the left, and give the model an attention mask but no position ids when they
# compute log-probs and losses. `generate` makes position ids from the mask. A model with learned positions that does not (GPT-2, GPT-BigCode as in
# StarCoder, GPT-Neo) then reads each row that stands beside a longer prompt as if it began that much later: the log-probs that are trained
# are not those that the text was drawn with. No error, no warning. With rotary positions (Llama) nothing changes.
#
# Seen: beside a prompt that is 32 tokens longer, the log-probs that GRPO and RLOO take for the drawn tokens differ by up to 7.8 nats from those of
# the row alone with GPT-2, 6.3 with GPT-BigCode and 7.5 with GPT-Neo, though `generate` writes after masked padding what it writes without.
# Without padding, and with Llama, they are equal (1e-5). In DistillationTrainer, the gradient of a batch of a short and a long prompt differs from
# the mean of the gradients of the two alone by 89% to 146% of its length with the three, by less than 0.1% with Llama.
#
# Why it matters: small students are often of GPT-2's family, and prompts of a batch have seldom one length. Student and teacher are compared, and
# rewards assigned, where neither reads the text as it will be used.
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
from transformers import AutoModelForCausalLM, GPT2Config, GPTBigCodeConfig, GPTNeoConfig, LlamaConfig, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
SHORT = "hello"
LONG = SHORT + " and 32 more letters, to be long"
QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "max_steps": 1}
PLAIN = {"optim": "sgd", "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "gradient_checkpointing": False}
SHARED = {"vocab_size": len(tokens), "initializer_range": 0.5, "eos_token_id": 1, "bos_token_id": 0}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NEO = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}
NEO |= {"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}
CONFIGS = {
    "Llama": LlamaConfig(**SHARED, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
    "GPT-2": GPT2Config(**SHARED, **GPT),
    "GPT-BigCode": GPTBigCodeConfig(**SHARED, **GPT),
    "GPT-Neo": GPTNeoConfig(**SHARED, **NEO),
}


def model_of(name, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name])


def log_probs(model, row):
    """Of each token of the row alone but the first."""
    with torch.no_grad():
        return model(row[None]).logits[0].log_softmax(-1)[:-1].gather(-1, row[1:, None])[:, 0]


def sampled(kind, config, name):
    """How far the log-probs that the loss takes are from those of the row alone: of rows without and with padding on their left."""
    taken = []

    class Watched(kind):
        def _get_per_token_logps_and_entropies(self, model, ids, mask, kept, *rest, **options):
            found = super()._get_per_token_logps_and_entropies(model, ids, mask, kept, *rest, **options)
            taken.append((ids, mask.bool(), kept, found[0].detach()))
            return found

    with tempfile.TemporaryDirectory() as output:
        args = config(output, per_device_train_batch_size=4, num_generations=2, beta=0.0, max_completion_length=8, **PLAIN, **QUIET)
        data = Dataset.from_list([{"prompt": SHORT}, {"prompt": LONG}])
        rewards = {"reward_funcs": lambda completions, **columns: [float(len(text)) for text in completions]}
        Watched(model=model_of(name), args=args, train_dataset=data, processing_class=tokenizer, **rewards).train()
    ids, mask, kept, found = taken[0]
    apart = {False: 0.0, True: 0.0}
    for row, own_mask, own in zip(ids, mask, found):
        padded, written = not own_mask[0].item(), int(own_mask[-kept:].sum())
        alone = log_probs(model_of(name).eval(), row[own_mask])[-written:]
        apart[padded] = max(apart[padded], (alone - own[:written]).abs().max().item())
    return apart[False], apart[True]


def writes_alike(name):
    """Whether `generate` writes the same after a padded prompt."""
    model, ids = model_of(name).eval(), tokenizer(SHORT, return_tensors="pt").input_ids
    ids = ids[:, -5:]
    padded, mask = torch.cat([torch.full((1, 32), 2), ids], 1), torch.cat([torch.zeros(1, 32), torch.ones(1, 5)], 1).long()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return alone[0, 5:].tolist() == model.generate(padded, attention_mask=mask, **options)[0, 37:].tolist()


def gradient(name, prompts):
    """Of one step of distillation, with completions that are given."""

    class Given(DistillationTrainer):
        def _generate_single_turn(self, prompt_ids, *rest, **options):
            return [[100 + (len(row) + n) % 90 for n in range(6)] for row in prompt_ids]

    student = model_of(name)
    before = [weight.detach().clone() for weight in student.parameters()]
    with tempfile.TemporaryDirectory() as output:
        args = DistillationConfig(output, per_device_train_batch_size=len(prompts), max_completion_length=8, **PLAIN, **QUIET)
        data = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
        Given(student, model_of(name, 1), args=args, train_dataset=data, processing_class=tokenizer).train()
    return torch.cat([(old - new.detach()).flatten() for old, new in zip(before, student.parameters())]) / 1e-3


sound = True
for name in CONFIGS:
    learned = name != "Llama"
    for kind, config in ((GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)):
        plain, padded = sampled(kind, config, name)
        print(f"seen: {name}, {kind.__name__}: log-probs differ from those of the row alone by {plain:.1g} without padding, {padded:.2g} with it")
        sound &= plain < 1e-3 and (padded > 0.5) == learned
    both, alone = gradient(name, [SHORT, LONG]), (gradient(name, [SHORT]) + gradient(name, [LONG])) / 2
    apart = ((both - alone).norm() / alone.norm()).item()
    print(f"seen: {name}, DistillationTrainer: gradient apart by {apart:.1%}; generate writes alike after padding: {writes_alike(name)}")
    sound &= (apart > 0.1) == learned and writes_alike(name)
sys.exit(not sound)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" | grep '^seen' || { cat "$folder/warnings"; exit 1; }
