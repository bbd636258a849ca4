#!/usr/bin/env bash
# transformers 4.57.3, 5.23.0
#
# `tokenizer.batch_decode(ids)` of one text's ids, a flat list or a tensor with one dimension, is a list with a string for each token in transformers
# 4. In 5 it is a list with one string, the whole text, so that `zip` with log-probs, rewards or masks leaves all tokens but the first out. No error,
# no warning. `batch_decode(ids[:, None])` gives a string for each token in both.
#
# Seen: "one two three" as three tokens with the log-probs -1, -2 and -3. Under 4.57.3 the pairs are ('one', -1), (' two', -2), (' three', -3), under
# 5.23.0 there is one, ('one two three', -1), and the sum of the log-probs is -1 in the place of -6.
#
# Why it matters: the texts of single tokens are what two tokenizers are aligned by, and what a token's score is shown beside. With the same
# code, after an upgrade, a text has one piece, with the score of its first token.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/before"
"$folder/before/bin/pip" install -qq --no-compile transformers==4.57.3
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile transformers==5.23.0
cat > "$folder/look.py" <<'PY'
import sys

import numpy
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = ["one", "Ġtwo", "Ġthree"]
tokens = ["<unk>", *words, *sorted(pre_tokenizers.ByteLevel.alphabet())]
merges = []
for word in words:
    for end in range(1, len(word)):
        merges.append((word[:end], word[end]))
        if word[: end + 1] not in tokens:
            tokens.append(word[: end + 1])
own = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, list(dict.fromkeys(merges))))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")

ids, log_probs = tokenizer.encode("one two three", add_special_tokens=False), [-1.0, -2.0, -3.0]
assert len(ids) == 3
pairs = list(zip(tokenizer.batch_decode(ids), log_probs))
total = sum(log_prob for _, log_prob in pairs)
print(f"seen: transformers {transformers.__version__}: {pairs}, together {total}")
apart = ["one", " two", " three"]
of_array = tokenizer.batch_decode(numpy.array(ids))
each = tokenizer.batch_decode(numpy.array(ids)[:, None])
expected = apart if sys.argv[1] == "before" else ["one two three"]
sys.exit(not ([text for text, _ in pairs] == of_array == expected and each == apart))
PY
for name in before venv; do
    "$folder/$name/bin/python" "$folder/look.py" "$name" 2> "$folder/warnings" || { cat "$folder/warnings"; exit 1; }
done
