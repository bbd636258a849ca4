"""Two tokenizers that have little in common, trained in a second on the demo's own text.

| | teacher | student |
|---|---|---|
| family | byte-level BPE, as Qwen and Llama-3 | Unigram with byte fallback, as SentencePiece trains it |
| a space | is part of the next word, `Ġfour` | is `▁`, and no dummy prefix is put before a text |
| numbers | two digits a token, from the right | one digit a token |
| `€` and `→` | one token each | three byte tokens each: its training text had none |
| a turn | ChatML: `<|im_start|>user … <|im_end|>` | as Phi-3: `<|user|> … <|end|>` |

Decisions:
- Both know the names of the nine digits as whole words and build the other number words from pieces, each in its own way:
  `Ġt w enty` against `▁twent y`. For this, the student's training text has ordinals and words such as `threefold`.
- Neither is trained on the children's words. Like any misspelling, these are built from pieces.
"""

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from . import task
from .from_nothing import CHATML, PHI, SPECIAL, byte_level_bpe, unigram, with_template


IRREGULAR_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}


def build_teacher_tokenizer(amounts: list[int]) -> PreTrainedTokenizerFast:
    pairs = " ".join(f"{pair:02d}" for pair in range(100))
    frequent = [f"{pairs} x {' '.join(task.ONES[1:])}"] * 3000  # so frequent that each becomes one token
    texts = frequent + [f"{task.question(amount)}\n{task.answer(amount)}" for amount in amounts]
    words = r"\p{N}{1,2}(?=(?:\p{N}{2})*(?!\p{N}))| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
    return with_template(byte_level_bpe(texts, 427, SPECIAL[CHATML], words), CHATML)


def build_student_tokenizer(amounts: list[int]) -> PreTrainedTokenizerFast:
    folds = " ".join(f"{one} {one}fold {one}some" for one in task.ONES[1:])
    texts = [
        f"Write {amount // 100}.{amount % 100:02d} in words. {amount // 100} euros + {amount % 100} cents: "
        f"{task.amount_in_words(amount)}, {_ordinal(task.in_words(amount // 100))} euro cent hundreds word writes {folds}"
        for amount in amounts
    ]
    special = ["<s>", "<|user|>", "<|assistant|>", "<|end|>", "<pad>"]
    before = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split("-", "isolated")]
    return with_template(unigram(texts, 116, special, before, max_piece_length=7), PHI, unk_token="<unk>")


def _ordinal(words: str) -> str:
    head, last = words[: words.rfind(" ") + 1], words[words.rfind(" ") + 1 :]
    head, last = head + last[: last.rfind("-") + 1], last[last.rfind("-") + 1 :]
    regular = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    return head + IRREGULAR_ORDINALS.get(last, regular)
