"""Two tokenizers that share next to nothing, trained in a second on text of the demo's own.

| | teacher | student |
|---|---|---|
| family | byte-level BPE, as Qwen and Llama-3 | Unigram with byte fallback, as SentencePiece trains it |
| a space | is part of the next word, `Ġfour` | is `▁`, and no dummy prefix is put before a text |
| numbers | two digits a token, from the right | one digit a token |
| `€` and `→` | one token each | three byte tokens each: its training text had none |
| a turn | ChatML: `<|im_start|>user … <|im_end|>` | as Phi-3: `<|user|> … <|end|>` |

Decisions:
- Both know the names of the nine digits as whole words and put the rest together from pieces, each in its own way:
  `Ġt w enty` against `▁twent y`. The student's text has ordinals for that, and words such as `threefold`.
- Neither is trained on the childish words: like any misspelling, they have to be put together from pieces.
"""

import json

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from . import task


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

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

    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\p{N}{1,2}(?=(?:\p{N}{2})*(?!\p{N}))| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=427,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        padding_side="left",
    )


def build_student_tokenizer(amounts: list[int]) -> PreTrainedTokenizerFast:
    folds = " ".join(f"{one} {one}fold {one}some" for one in task.ONES[1:])
    texts = [
        f"Write {amount // 100}.{amount % 100:02d} in words. {amount // 100} euros + {amount % 100} cents: "
        f"{task.amount_in_words(amount)}, {_ordinal(task.in_words(amount // 100))} euro cent hundreds word writes {folds}"
        for amount in amounts
    ]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split("-", "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )
    control = ["<unk>", "<s>", "<|user|>", "<|assistant|>", "<|end|>", "<pad>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=116, max_piece_length=7, unk_token="<unk>", special_tokens=control, show_progress=False
        ),
    )
    # The trainer of `tokenizers` can't add the 256 byte tokens that SentencePiece's own does, so they're put in here.
    # It orders the pieces anew in every process, and the later digits of their scores vary.
    pieces = [(piece, round(score, 2)) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    byte_tokens = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    learned = sorted(pieces[len(control) :])
    tokenizer.model = models.Unigram(pieces[: len(control)] + byte_tokens + learned, unk_id=0, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=PHI,
        padding_side="left",
    )


def _ordinal(words: str) -> str:
    head, last = words[: words.rfind(" ") + 1], words[words.rfind(" ") + 1 :]
    head, last = head + last[: last.rfind("-") + 1], last[last.rfind("-") + 1 :]
    regular = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    return head + IRREGULAR_ORDINALS.get(last, regular)
