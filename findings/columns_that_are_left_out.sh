#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0
#
# SFTTrainer gives a row's `tools` and `chat_template_kwargs` to the chat template. GKDTrainer, IWOPDTrainer, DistillationTrainer and GRPOTrainer leave
# both columns out of the prompts that they make, GOLDTrainer the tools. GKD, GOLD and IW-OPD keep the columns up to the data collator, which does
# not read them. No error, no warning.
#
# Seen: one row with a tool `weather` and a variable of the template. The prompt of SFTTrainer has both. That of GOLD has the variable, that of
# the four others neither.
#
# Why it matters: on the same rows a student is trained with its tools by SFT and asked without them when it is distilled, and a variable that turns
# thoughts off (`enable_thinking`) does nothing. Teacher and student read the same prompt, so that the loss does not tell. Render prompts beforehand.
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
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

folder = sys.argv[1]
tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
tokenizer.chat_template = (
    "{% if tools %}tools:{% for tool in tools %}{{ tool.function.name }}{% endfor %}</s>{% endif %}{% if brief %}be brief</s>{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of today", "parameters": CITY}}
BESIDE = {"tools": [TOOL], "chat_template_kwargs": {"brief": True}}
TURNS = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
MESSAGES = Dataset.from_list([{"messages": TURNS, **BESIDE}] * 4)
PROMPTS = Dataset.from_list([{"prompt": TURNS[:1], **BESIDE}] * 4)
quiet = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
plain = {"per_device_train_batch_size": 2, "max_steps": 1, **quiet}


def model_of(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, initializer_range=0.2, pad_token_id=2))


def model(role):
    return LlamaForCausalLM.from_pretrained(f"{folder}/{role}")


def prompt_of(trainer):
    """Whether the text that is learned from in a step names the tool, and whether it has what the variable writes."""
    texts, own = [], trainer.compute_loss

    def watched(model, inputs, *args, **kwargs):
        ids = next(inputs[name] for name in ("prompts", "prompt_ids", "input_ids") if name in inputs)
        texts.append(tokenizer.decode(ids[0]))
        return own(model, inputs, *args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    return "weather" in texts[0], "be brief" in texts[0]


for seed, role in enumerate(("student", "teacher")):
    model_of(seed).save_pretrained(f"{folder}/{role}")
    tokenizer.save_pretrained(f"{folder}/{role}")
teacher, out, few = f"{folder}/teacher", f"{folder}/out", {"max_completion_length": 4}
shared = {"processing_class": tokenizer}
uld = {"use_uld_loss": True, "teacher_tokenizer_name_or_path": teacher}
on_messages = {**shared, "train_dataset": MESSAGES}
on_prompts = {**shared, "train_dataset": PROMPTS}
makers = {
    "SFT": lambda: SFTTrainer(model("student"), SFTConfig(out, **plain), **on_messages),
    "GOLD": lambda: GOLDTrainer(model("student"), model("teacher"), GOLDConfig(out, max_length=96, **few, **uld, **plain), **on_messages),
    "GKD": lambda: GKDTrainer(model("student"), model("teacher"), GKDConfig(out, max_new_tokens=4, **plain), **on_messages),
    "IW-OPD": lambda: IWOPDTrainer(
        model("student"), teacher, IWOPDConfig(out, max_length=96, max_prompt_length=64, **few, **plain), **on_messages
    ),
    "Distillation": lambda: DistillationTrainer(
        model=model("student"), teacher_model=model("teacher"), args=DistillationConfig(out, **few, **plain), **on_prompts
    ),
    "GRPO": lambda: GRPOTrainer(
        model("student"), lambda completions, **_: [0.0] * len(completions), GRPOConfig(out, num_generations=2, **few, **plain), **on_prompts
    ),
}
found = {name: prompt_of(make()) for name, make in makers.items()}
for name, (tool, variable) in found.items():
    print(f"seen: {name}: the prompt has {'the' if tool else 'no'} tool and {'the' if variable else 'no'} variable")
expected = {"SFT": (True, True), "GOLD": (False, True)}
sys.exit(found != {name: expected.get(name, (False, False)) for name in makers})
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" > "$folder/said" || { tail -30 "$folder/warnings"; cat "$folder/said"; exit 1; }
grep '^seen' "$folder/said"
