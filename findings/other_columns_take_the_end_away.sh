#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0, datasets 5.2.0
#
# SFTTrainer trains `prompt` and `completion` of plain text with the EOS token at the end, unless the rows have another column that it knows:
# - with a column `text`, the EOS is put after that text, which is not trained, and the completion has none;
# - with a formatting_func, whose result becomes that column, the result is not trained either: prompt and completion are, as they are, without EOS.
#   (completion_only_loss=False, which an error asks for first.)
# - with a column `messages`, the EOS is there in some processes and not in others: whether a row is a conversation is asked of the column that
#   comes first in a set of names, and Python orders those by PYTHONHASHSEED, a random number unless it is set.
# No error, no warning.
#
# Seen: the row "2+2?" and "It is 4." alone ends in EOS. With `text` it does not; with formatting_func=lambda row: f"### {row['prompt']}" it
# does not either, and the text has no "###". With `messages`, it ends in EOS with one PYTHONHASHSEED and without with another.
#
# Why it matters: a student that is prepared so never learns to stop, and on-policy distillation after it pays for the full length of every completion.
# The loss looks the same. With the third, the same command trains one text today and another tomorrow.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import json
import sys
import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
ROW = {"prompt": "2+2? ", "completion": "It is 4."}
TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}]
CASES = {"alone": {}, "text": {"text": "2+2? It is 4."}, "formatting_func": {}, "messages": {"messages": TURNS}}


def trained(name):
    """The text that is trained, as SFTTrainer has prepared it."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes))
    more, func = {}, None
    if name == "formatting_func":
        more, func = {"completion_only_loss": False}, lambda row: f"### {row['prompt']}=> {row['completion']}"
    with tempfile.TemporaryDirectory() as output:
        args = SFTConfig(output, use_cpu=True, bf16=False, report_to=[], **more)
        data = Dataset.from_list([{**ROW, **CASES[name]}])
        trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, formatting_func=func)
    return tokenizer.decode(trainer.train_dataset[0]["input_ids"])


print("found", json.dumps([trained(name) for name in sys.argv[1:]]))
PY
cat > "$folder/compare.py" <<'PY'
import json
import os
import subprocess
import sys

look = sys.argv[1]
ORDER = "print({name for name in ('prompt', 'completion', 'messages') if name}.pop())"


def python(seed, *command):
    return subprocess.run([sys.executable, *command], env={**os.environ, "PYTHONHASHSEED": str(seed)}, capture_output=True, text=True, check=True)


first = {}
for seed in range(64):
    first.setdefault(python(seed, "-S", "-c", ORDER).stdout.strip() == "messages", seed)
found = {}
for messages_first, names in ((False, ["alone", "text", "formatting_func", "messages"]), (True, ["messages"])):
    lines = python(first[messages_first], look, *names).stdout.splitlines()
    texts = json.loads(next(line for line in lines if line.startswith("found")).removeprefix("found"))
    found |= {f"{name}, PYTHONHASHSEED={first[messages_first]}" if name == "messages" else name: own for name, own in zip(names, texts)}
for name, text in found.items():
    print(f"seen: {name}: {text!r}")
plain = "2+2? It is 4."
sys.exit(list(found.values()) != [f"{plain}</s>", plain, plain, f"{plain}</s>", plain])
PY
"$folder/venv/bin/python" "$folder/compare.py" "$folder/look.py" 2> "$folder/warnings" || { tail -30 "$folder/warnings"; exit 1; }
