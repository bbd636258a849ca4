"""Pairs of tokenizers that cut the same text differently, trained in a second on text of the task.

| pair | student | teacher |
|---|---|---|
| `digits` | byte-level BPE, one digit a token | byte-level BPE, two digits a token |
| `families` | Unigram with byte fallback, as SentencePiece trains it | byte-level BPE |
| `sizes` | byte-level BPE with few merges: letters of other scripts are two or three tokens | with many: words of all scripts are one |
| `lengths` | byte-level BPE without merges: every byte is a token | merges over spaces, so that phrases are one token |
| `coarse` | as `lengths`'s teacher: phrases | one digit a token, few merges |

Decisions:
- The student's chat template is that of Phi-3, with a BOS; the teacher's is ChatML. Only with the same tokenizer, where the
  teacher is another model on the student's own, is the template the same too.
"""

import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from demo.toy_tokenizers import CHATML, PHI


SPECIAL = {
    CHATML: ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    PHI: ["<pad>", "<s>", "<|user|>", "<|assistant|>", "<|end|>"],
}
WORDS = r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
ONE_DIGIT, TWO_DIGITS, PHRASES = rf"\p{{N}}|{WORDS}", rf"\p{{N}}{{1,2}}|{WORDS}", r"[^.=,:]+[.=,:]?|[.=,:]"

PAIRS = {
    "digits": (("bpe", ONE_DIGIT, 290), ("bpe", TWO_DIGITS, 500)),
    "families": (("unigram", None, 60), ("bpe", TWO_DIGITS, 420)),
    "sizes": (("bpe", ONE_DIGIT, 310), ("bpe", TWO_DIGITS, 1000)),
    "lengths": (("bpe", ONE_DIGIT, 0), ("bpe", PHRASES, 420)),
    "coarse": (("bpe", PHRASES, 420), ("bpe", ONE_DIGIT, 290)),
}


def build(pair: str, texts: list[str]) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Student's and teacher's tokenizer."""
    sides = zip(PAIRS[pair], (PHI, CHATML), strict=True)
    return tuple(
        _unigram(texts, size) if kind == "unigram" else _byte_level(texts, pattern, size, template)
        for (kind, pattern, size), template in sides
    )


def _byte_level(texts: list[str], pattern: str, size: int, template: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=SPECIAL[template],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer, template)


def _unigram(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """`size` counts learned pieces; the 256 byte tokens, which the library's trainer does not add, come before them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Metaspace(prepend_scheme="never")]
    )
    control = ["<unk>", *SPECIAL[PHI]]
    trainer = trainers.UnigramTrainer(
        vocab_size=size + len(control),
        max_piece_length=4,
        unk_token="<unk>",
        special_tokens=control,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # ordered anew in every process by the trainer, the later digits of the scores too
    pieces = [(piece, round(score, 2)) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    byte_tokens = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    learned = sorted(pieces[len(control) :])
    tokenizer.model = models.Unigram(pieces[: len(control)] + byte_tokens + learned, unk_id=0, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrapped(tokenizer, PHI, unk_token="<unk>")


def _wrapped(tokenizer: Tokenizer, template: str, **special: str) -> PreTrainedTokenizerFast:
    if template == CHATML:
        special |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    else:
        special |= {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<pad>"}
        special["additional_special_tokens"] = ["<|user|>", "<|assistant|>"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, padding_side="left", **special)
