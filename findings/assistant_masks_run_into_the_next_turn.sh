#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3
#
# `apply_chat_template(..., return_assistant_tokens_mask=True)` looks for the tokens of an answer's first and last character. If the last one has
# no token, all that follows is taken for the answer, the user's next turns too; if the first has none, this answer and all later ones are left
# out: a character without a token is held to be one that was cut off on the right. No error, no warning.
# - A tokenizer that drops white space (T5's and XLM-R's kind of Unigram, WordPiece) gives a line break none, at an answer's end or start.
# - truncation_side="left", which keeps the end of a conversation, cuts an answer's first character off, and takes all later answers out of the mask.
#
# Seen, of "user one / answer / user two / answer", marked by a template whose {% generation %} holds the content: with an answer "yes\n" and
# WordPiece the mask holds "is it so", the second question, and the markup about it; with "\nyes" it is empty. A byte-level tokenizer marks both
# answers; cut on the left within the first answer it marks nothing, though the second answer is there whole.
#
# Why it matters: SFT with assistant_only_loss reads this mask, and distillation that takes its answers from given conversations may too. With one text
# and two tokenizers, the student's mask and the teacher's then hold other parts of it. Strip answers before they are put into a template, and cut on
# the left after masking.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cat > "$folder/look.py" <<'PY'
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

MARKS = ["<user>", "<assistant>", "<end>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
)


def word_piece():
    words = ["<unk>", "what", "is", "it", "so", "yes", "no"]
    own = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer, own.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return own


def unigram():
    words = ["<unk>", *(f"\u2581{word}" for word in ("what", "is", "it", "so", "yes", "no"))]
    own = Tokenizer(models.Unigram([(word, -1.0) for word in words], 0, False))
    own.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    own.decoder = decoders.Metaspace()
    return own


def byte_level():
    own = Tokenizer(models.BPE({letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return own


def marked(kind, answer, **settings):
    own = kind()
    own.add_special_tokens(MARKS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, chat_template=TEMPLATE, truncation_side="left")
    turns = ("user", "what is it"), ("assistant", answer), ("user", "is it so"), ("assistant", "no")
    messages = [{"role": role, "content": content} for role, content in turns]
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **settings)
    kept = [token for token, mark in zip(found["input_ids"], found["assistant_masks"]) if mark]
    return tokenizer.decode(kept), tokenizer.decode(found["input_ids"])


holds = True
for kind in (word_piece, unigram):
    plain, ended, begun = (marked(kind, answer)[0] for answer in ("yes", "yes\n", "\nyes"))
    print(f"seen: {kind.__name__}: of 'yes' and 'no' {plain!r}; of 'yes\\n' and 'no' {ended!r}; of '\\nyes' and 'no' {begun!r}")
    holds &= plain == "yes no" and "is it so" in ended and "<user>" in ended and begun == ""
whole, ended, begun = (marked(byte_level, answer)[0] for answer in ("yes", "yes\n", "\nyes"))
print(f"seen: byte_level: of 'yes' and 'no' {whole!r}; of 'yes\\n' and 'no' {ended!r}; of '\\nyes' and 'no' {begun!r}")
holds &= [whole, ended, begun] == ["yesno", "yes\nno", "\nyesno"]
for length in (20, 17):
    kept, text = marked(byte_level, "yes", truncation=True, max_length=length)
    print(f"seen: byte_level, cut on the left to {length} tokens, {text!r}: {kept!r}")
    holds &= text.endswith("<assistant>no<end>") and kept == ("yesno" if length == 20 else "")
sys.exit(not holds)
PY
"$folder/venv/bin/python" "$folder/look.py" 2> "$folder/warnings" > "$folder/seen" || { cat "$folder/warnings" "$folder/seen"; exit 1; }
cat "$folder/seen"
