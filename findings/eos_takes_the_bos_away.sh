#!/usr/bin/env bash
# transformers 5.23.0 (5.20.2 to 5.24.0 alike)
#
# A fast tokenizer whose tokenizer.json puts BOS before every text (Llama 3, Llama 2, Mistral), loaded with add_eos_token=True, puts EOS after it
# and no BOS before it any more: what tokenizer.json says is replaced by what the two flags say, and add_bos_token is False unless it was
# given. `tokenizer.add_eos_token = True` does the same, and save_pretrained keeps it. No warning.
#
# Seen: "a" is ['<s>', 'a'] as loaded, ['a', '</s>'] with add_eos_token=True, and ['<s>', 'a', '</s>'] with add_bos_token=True beside it.
#
# Why it matters: who asks for EOS to teach a student where an answer ends takes BOS away from all its plain texts, and Llama and Mistral write
# and score much worse without one. Two models of one pair then read unlike texts. Give both flags.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(sys.argv[1])
found = []
for flags in ({}, {"add_eos_token": True}, {"add_bos_token": True, "add_eos_token": True}):
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **flags)
    found.append(tokenizer.convert_ids_to_tokens(tokenizer.encode("a")))
    print(f"{flags}: {found[-1]}")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.add_eos_token = True
tokenizer.save_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
found.append(tokenizer.convert_ids_to_tokens(tokenizer.encode("a")))
print(f"set as an attribute, saved and loaded: {found[-1]}")
sys.exit(found != [["<s>", "a"], ["a", "</s>"], ["<s>", "a", "</s>"], ["a", "</s>"]])
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
