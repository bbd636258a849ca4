"""Pairs of tokenizers that cut the same text differently, each trained in a second on text of the task.

| pair | student | teacher |
|---|---|---|
| `digits` | byte-level BPE, one digit a token | byte-level BPE, two digits a token |
| `families` | Unigram with byte fallback, as SentencePiece trains it | byte-level BPE |
| `sizes` | byte-level BPE with few merges: letters of other scripts are two or three tokens | with many: words of all scripts are one |
| `lengths` | byte-level BPE without merges: every byte is a token | merges over spaces, so that phrases are one token |
| `threes` | byte-level BPE, one digit a token | byte-level BPE, digits by threes from the left, as Llama 3 and DeepSeek-V3 cut them |
| `coarse` | as `lengths`'s teacher: phrases | one digit a token, few merges |

Decisions:
- The student's chat template is that of Phi-3, with a BOS; the teacher's is ChatML. If the teacher is another model with the
  student's own tokenizer, it has the student's template too.
"""

import sys
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from demo.from_nothing import CHATML, PHI, SPECIAL, byte_level_bpe, unigram, with_template


WORDS = r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"
ONE_DIGIT, TWO_DIGITS, THREE_DIGITS = (rf"\p{{N}}{digits}|{WORDS}" for digits in ("", "{1,2}", "{1,3}"))
PHRASES = r"[^.=,:]+[.=,:]?|[.=,:]"

PAIRS = {
    "digits": (("bpe", ONE_DIGIT, 290), ("bpe", TWO_DIGITS, 500)),
    "families": (("unigram", None, 60), ("bpe", TWO_DIGITS, 420)),
    "sizes": (("bpe", ONE_DIGIT, 310), ("bpe", TWO_DIGITS, 1000)),
    "lengths": (("bpe", ONE_DIGIT, 0), ("bpe", PHRASES, 420)),
    "threes": (("bpe", ONE_DIGIT, 290), ("bpe", THREE_DIGITS, 1400)),
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
    return with_template(byte_level_bpe(texts, size, SPECIAL[template], pattern), template)


def _unigram(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """`size`: the number of learned pieces."""
    size += 1 + len(SPECIAL[PHI])
    before = [pre_tokenizers.Digits(individual_digits=True)]
    return with_template(unigram(texts, size, SPECIAL[PHI], before, max_piece_length=4), PHI, unk_token="<unk>")
