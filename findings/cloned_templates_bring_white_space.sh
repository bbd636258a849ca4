#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.23.0, tokenizers 0.23.3
#
# `clone_chat_template`, and SFTTrainer's `chat_template_path` with the folder of another model, give the student all added tokens of the other
# tokenizer that it lacks, not those of the template alone. Where runs of white space are added tokens of the
# other tokenizer, the student then cuts all text at them: they win over its own tokens. No error, no warning.
#
# Seen: a student with tokens of its own for four spaces and for two newlines. Of the other tokenizer it gets its one chat token and 24 for white
# space. From then on it reads the indentation of a line of code and an empty line as new tokens, whose embeddings were never trained.
#
# Why it matters: a student takes the template of its teacher's family so that both read the same turns. It then reads every paragraph and all
# indented code otherwise than it was trained to, and ULD or chunks pair other tokens than before. Render the template with the student's own tokens,
# from a .jinja file, or compare `tokenizer.tokenize` of plain text before and after.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq torch==2.13.0
"$folder/venv/bin/pip" install -qq trl==1.16.0 transformers==5.23.0 tokenizers==0.23.3 accelerate==1.15.0 datasets==5.2.0
cat > "$folder/look.py" <<'PY'
import sys
import tempfile

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import clone_chat_template

TEXT = "def f():\n        return 1\n\nx"


def tokenizer_of(merges, added):
    tokens = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="</s>", pad_token="<pad>")
    tokenizer.add_tokens(added)
    return tokenizer


student = tokenizer_of([("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ċ", "Ċ")], [])
# Runs of 24 to 2 spaces, and an empty line.
spaces = [AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)]
chat = AddedToken("<|im_end|>", special=True, normalized=False)
other = tokenizer_of([], [chat, *spaces, AddedToken("\n\n", normalized=False)])
other.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
size, before = len(student), student.tokenize(TEXT)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=size, **sizes))
with tempfile.TemporaryDirectory() as saved:
    other.save_pretrained(saved)
    _, student, _ = clone_chat_template(model, student, saved, resize_to_multiple_of=None)
after, ids = student.tokenize(TEXT), student.encode(TEXT, add_special_tokens=False)
white = [token for token in student.convert_ids_to_tokens(range(size, len(student))) if not token.strip()]
new = [token for token, n in zip(after, ids) if n >= size]
print(f"seen: before: {before}")
print(f"seen: after: {after}")
print(f"seen: {len(student) - size} tokens added, {len(white)} of them white space; of the text, new tokens are {new}")
sys.exit(not (len(white) == 24 and len(student) - size == 25 and new == [" " * 8, "\n\n"] and before.count("ĠĠĠĠ") == 2 and "ĊĊ" in before))
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
grep '^seen' "$folder/seen"
