"""Where a completion is spelled otherwise than its tokenizer spells the same text.

Each spelling of a text is scored with the teacher's whole budget, so that a rare one looks better than it is: its gap is high
because the student writes the text in another way most of the time. A loss on chunks bounds such gaps at 0.

Decisions
- A token is the tokenizer's own where it spells the same bytes, from the same place on, in the text's own encoding.
- Text between control tokens is encoded by itself: no token reaches over them.
- A text whose encoding spells other bytes (invalid UTF-8, a normaliser, a dummy prefix) is not judged.
- Nor is the end of a turn, nor what the student did not write.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..text.token_bytes import token_bytes


def other_spellings(
    rows: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    given: Sequence[Sequence[tuple[int, int]]] = (),
) -> list[np.ndarray]:
    """For each row of ids, (S,) True for the tokens that the tokenizer would not have made of its text. `given`: for each row, stretches that
    the student did not write."""
    table = token_bytes(tokenizer)
    spelled = [[table[token] if token < len(table) else b"" for token in row] for row in rows]
    found = [np.zeros(len(row), dtype=bool) for row in rows]
    runs = [(n, *run) for n, row in enumerate(spelled) for run in _runs(row, given[n] if given else ())]
    texts = [b"".join(spelled[n][start:stop]) for n, start, stop in runs]
    decoded = [text.decode("utf-8", errors="replace") for text in texts]
    encoded = [tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in decoded]
    for (n, start, stop), text, ids in zip(runs, texts, encoded, strict=True):
        own = [table[token] for token in ids]
        if b"".join(own) == text:
            canonical = {*_spans(own)}
            found[n][start:stop] = [span not in canonical for span in _spans(spelled[n][start:stop])]
    return found


def _runs(spelled: Sequence[bytes], given: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The stretches of tokens with text that follow one another, between control tokens and what was given."""
    is_text = np.array([bool(own) for own in spelled], dtype=bool)
    for start, stop in given:
        is_text[start:stop] = False
    edges = np.flatnonzero(np.diff(is_text, prepend=False, append=False))
    return [*zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)]


def _spans(spelled: Sequence[bytes]) -> list[tuple[int, int]]:
    """Where each token begins and ends, in bytes."""
    return list(pairwise(accumulate(map(len, spelled), initial=0)))
