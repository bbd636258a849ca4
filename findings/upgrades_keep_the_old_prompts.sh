#!/usr/bin/env bash
# transformers 5.20.2 and 5.21.0, trl 1.16.0, datasets 5.2.0
#
# `Dataset.map` finds its rows again by the code of the function that it is given and by its arguments, pickled. Functions and classes that are
# imported count by their names. So a dataset that was mapped with a tokenizer, by SFTTrainer too, is taken from the cache after
# transformers has been upgraded, though the new version reads the same conversation otherwise. No message says so.
#
# Seen: one conversation on disk, whose answer has its thought under `thinking`. transformers 5.20.2 leaves it out, 5.21.0 writes it. SFTTrainer
# under 5.20.2 trains without the thought, and under 5.21.0, in the same cache, too, where `apply_chat_template` writes it. With another cache
# it trains with the thought.
#
# Why it matters: what a student was trained on is then neither what the installed version writes, nor what the teacher's side reads
# that was rendered today. Remove the cache (HF_DATASETS_CACHE) after an upgrade of transformers, tokenizers or the package that renders.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile torch==2.13.0
"$folder/venv/bin/pip" install -qq --no-compile trl==1.16.0 transformers==5.20.2 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/make.py" <<'PY'
import json
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = sys.argv[1]
tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
tokenizer.chat_template = (
    "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}</s>{% endfor %}"
)
tokenizer.save_pretrained(f"{folder}/model")
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes)).save_pretrained(f"{folder}/model")
asked = {"role": "user", "content": "How much?", "thinking": None}
row = {"messages": [asked, {"role": "assistant", "content": "Six.", "thinking": "Two threes."}]}
with open(f"{folder}/rows.jsonl", "w") as file:
    file.write(f"{json.dumps(row)}\n" * 4)
PY
cat > "$folder/look.py" <<'PY'
import sys

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

folder, cache = sys.argv[1:]
rows = load_dataset("json", data_files=f"{folder}/rows.jsonl", split="train", cache_dir=f"{folder}/{cache}")
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model")
args = SFTConfig(f"{folder}/out", use_cpu=True, bf16=False, report_to=[])
trainer = SFTTrainer(f"{folder}/model", args, train_dataset=rows, processing_class=tokenizer)
texts = tokenizer.decode(trainer.train_dataset[0]["input_ids"]), tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
print(*["with the thought" if "(Two threes.)" in text else "without" for text in texts], sep=", ")
PY
export HF_HUB_OFFLINE=1
python="$folder/venv/bin/python"
"$python" "$folder/make.py" "$folder" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
look() {
    said=$("$python" "$folder/look.py" "$folder" "$2" 2> "$folder/warnings") || { cat "$folder/warnings"; exit 1; }
    echo "seen: transformers $1, $2 cache: trained and written now: $said"
}
look 5.20.2 one
[ "$said" = "without, without" ]
"$folder/venv/bin/pip" install -qq --no-compile transformers==5.21.0
look 5.21.0 one
[ "$said" = "without, with the thought" ]
look 5.21.0 another
[ "$said" = "with the thought, with the thought" ]
