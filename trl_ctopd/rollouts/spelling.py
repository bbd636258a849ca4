"""Where a completion is spelled otherwise than its tokenizer spells the same text.

Each spelling of a text is scored with the teacher's whole budget, so that a rare one looks better than it is: its gap is high
because the student writes the text in another way most of the time. A loss on chunks bounds such gaps at 0.

Decisions
- A token is the tokenizer's own where it spells the same bytes, from the same place on, in the text's own encoding.
- A text whose encoding spells other bytes (invalid UTF-8, a normaliser, a dummy prefix) is not judged.
- Nor is the end of a turn, nor what the student did not write.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..text.token_bytes import token_bytes


def other_spellings(rows: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """For each row of ids, (S,) True for the tokens that the tokenizer would not have made of its text."""
    table = token_bytes(tokenizer)
    spelled = [[table[token] if token < len(table) else b"" for token in row] for row in rows]
    texts = [b"".join(row) for row in spelled]
    decoded = [text.decode("utf-8", errors="replace") for text in texts]
    encoded = [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in decoded]
    found = []
    for row, text, ids in zip(spelled, texts, encoded, strict=True):
        own = [table[token] for token in ids]
        other = np.zeros(len(row), dtype=bool)
        if b"".join(own) == text:
            canonical = set(_spans(own))
            other[:] = [end > start and (start, end) not in canonical for start, end in _spans(row)]
        found.append(other)
    return found


def _spans(spelled: Sequence[bytes]) -> list[tuple[int, int]]:
    """Where each token begins and ends, in bytes."""
    return list(pairwise(accumulate(map(len, spelled), initial=0)))
