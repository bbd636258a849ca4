#!/usr/bin/env bash
# tokenizers 0.23.3
#
# Of the trainers of `tokenizers` only BpeTrainer learns the same vocabulary in every process, and only while its alphabet is not
# limited. BpeTrainer with `limit_alphabet`, WordPieceTrainer and UnigramTrainer count in hash maps whose order is drawn anew in
# each process: the same corpus, one thread and no random numbers of one's own, and ids and pieces differ from run to run.
#
# Seen: one vocabulary in six processes for BpeTrainer, six for each of the other three (fewer than six would be luck).
#
# Why it matters: a tokenizer that is trained where it is used (in a test, in a notebook, by each rank of a distributed run) is
# another one each time. Ids of a saved model then mean other text, ranks disagree about a batch, and what depends on which tokens
# two tokenizers share is a matter of chance. Train once and save, or train plain BPE with an explicit alphabet.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq tokenizers==0.23.3
cat > "$folder/train.py" <<'PY'
import hashlib
import json
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog, 1234567890 times; the dog doesn't care.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Où est l'élève naïf ?",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "def add(a, b):\n    return a + b  # 12 + 30 = 42",
]
CASES = {
    "BpeTrainer": (models.BPE(), trainers.BpeTrainer(vocab_size=300, show_progress=False)),
    "BpeTrainer, limit_alphabet": (models.BPE(), trainers.BpeTrainer(vocab_size=300, limit_alphabet=60, show_progress=False)),
    "WordPieceTrainer": (models.WordPiece(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)),
    "UnigramTrainer": (models.Unigram(), trainers.UnigramTrainer(vocab_size=200, show_progress=False)),
}
model, trainer = CASES[sys.argv[1]]
tokenizer = Tokenizer(model)
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.train_from_iterator(TEXTS * 3, trainer)
vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
print(hashlib.sha256(vocabulary.encode()).hexdigest()[:8])
PY
failed=0
for name in "BpeTrainer" "BpeTrainer, limit_alphabet" "WordPieceTrainer" "UnigramTrainer"; do
    found=$(for _ in 1 2 3 4 5 6; do RAYON_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONHASHSEED=0 \
        "$folder/venv/bin/python" "$folder/train.py" "$name" 2>/dev/null; done | sort -u | wc -l)
    echo "$name: $found vocabularies in 6 processes"
    if [ "$name" = BpeTrainer ]; then [ "$found" = 1 ] || failed=1; else [ "$found" -gt 1 ] || failed=1; fi
done
exit $failed
