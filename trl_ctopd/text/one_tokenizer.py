"""Alignment of two models that have the same tokenizer: plain on-policy distillation.

The teacher reads the ids that the student sampled, canonical or not. So every token is its own chunk, and nothing is
masked but the strings that are to be. Ids past the tokenizer (padding rows of an LM head), for which the teacher may have no embedding,
take no part.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from .aligner import AlignedTokens, TextAlignment, occurrences
from .token_bytes import token_bytes, token_table


def is_one_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether every id stands for the same token on both sides."""
    if len(student) != len(teacher):  # copying two vocabularies of 150,000 rows takes a tenth of a second
        return False
    return student.get_vocab() == teacher.get_vocab() and token_bytes(student) == token_bytes(teacher)


class OneTokenizer:
    """Replaces `TextAligner` where `is_one_tokenizer` is True. `masked_strings`: as there; a control token of such a name is masked too."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, masked_strings: Sequence[str] = ()):
        self._table = token_table(tokenizer)
        self._markup = [string.encode() for string in masked_strings]
        self._controls = [
            i for i, name in self._table.names.items() if name in masked_strings and i in self._table.special
        ]

    def __call__(self, completions: Sequence[Sequence[int]], *continues: Sequence[bool] | None) -> list[TextAlignment]:
        """`continues` as for `TextAligner`, and without effect: no text is encoded."""
        return [self._align(np.array(ids, dtype=np.int64)) for ids in completions]

    def _align(self, ids: np.ndarray) -> TextAlignment:
        spelled, widths = self._table.read(ids)
        known = ids < len(self._table.rows)
        ends = np.cumsum(widths)
        masked = occurrences(self._markup, [spelled])
        taking_part = known & ~np.isin(ids, self._controls)
        for stretch in masked:
            taking_part &= (ends <= stretch.start) | (ends - widths >= stretch.end)
        chunks = np.where(taking_part, np.cumsum(taking_part) - 1, -1)
        begin, end = (side[taking_part] for side in (ends - widths, ends))
        return TextAlignment(
            spelled.decode(errors="replace"),
            AlignedTokens(ids.tolist(), chunks, widths),
            AlignedTokens(ids[known].tolist(), chunks[known], widths[known]),
            num_chunks=int(taking_part.sum()),
            masked=sorted(masked, key=lambda stretch: (stretch.start, stretch.end)),
            _spelled=spelled,
            _spans=np.stack([begin, end], 1),
            _tables=(self._table, self._table),
        )
