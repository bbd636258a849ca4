#!/usr/bin/env bash
# transformers 5.23.0, trl 1.16.0
#
# A checkpoint with an LM head of its own whose config says `tie_word_embeddings: true` is loaded with its head, and a warning says that the two
# are not tied, and to update the config "to silence this warning". The config in memory still says true. `resize_token_embeddings` ties the head
# to the embeddings then, to the size that they have too, without a further message. TRL's GOLD (with `use_uld_loss=False`) and IW-OPD call it on the
# teacher when they are made, also where both vocabularies are of one size.
#
# Seen: after a resize to the same 64 rows, log-probs are off by up to 5.7 nats. So are the teacher's of GOLDTrainer and IWOPDTrainer, before their
# first step; DistillationTrainer's is as it was loaded. With `tie_word_embeddings: false` in the file all are.
#
# Why it matters: the student learns from a teacher that nobody has trained. Who follows the warning is safe; who takes it for noise is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

root = Path(sys.argv[1])
IDS = torch.arange(3, 15)[None]
tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
user, answer = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}


def model_of(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **SIZES, tie_word_embeddings=False))


@torch.no_grad()
def log_probs(model):
    return model.eval()(IDS).logits.log_softmax(-1)


trained = model_of(0)
for said in (True, False):
    trained.save_pretrained(root / str(said))
    tokenizer.save_pretrained(root / str(said))
    file = root / str(said) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": said}))


def made(trainer_class, config_class, said, **more):
    row = {"messages": [user, answer]} if trainer_class is not DistillationTrainer else {"prompt": [user]}
    args = config_class(str(root / "out"), use_cpu=True, bf16=False, report_to=[], **more)
    teacher = AutoModelForCausalLM.from_pretrained(root / str(said))
    trainer = trainer_class(model=model_of(1), teacher_model=teacher, args=args, train_dataset=Dataset.from_list([row] * 8), processing_class=tokenizer)
    return trainer.teacher_model


off = {}
for said in (True, False):
    model = AutoModelForCausalLM.from_pretrained(root / str(said))
    off["loaded", said] = model
    model = AutoModelForCausalLM.from_pretrained(root / str(said))
    model.resize_token_embeddings(len(tokens))
    off["resized to the same size", said] = model
    off["GOLD's teacher", said] = made(GOLDTrainer, GOLDConfig, said, use_uld_loss=False)
    off["IW-OPD's teacher", said] = made(IWOPDTrainer, IWOPDConfig, said)
    off["DistillationTrainer's teacher", said] = made(DistillationTrainer, DistillationConfig, said)
found = {}
for (name, said), model in off.items():
    found[name, said] = (log_probs(model) - log_probs(trained)).abs().max().item()
    print(f"seen: tie_word_embeddings {said}: {name}: log-probs are off by {found[name, said]:.2g}")
tied = {"resized to the same size", "GOLD's teacher", "IW-OPD's teacher"}
sys.exit(any((apart > 0.1) != (said and name in tied) for (name, said), apart in found.items()))
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
