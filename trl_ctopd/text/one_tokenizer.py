"""Alignment of two models that have the same tokenizer: plain on-policy distillation.

The teacher reads the ids that the student sampled, canonical or not. So every token is its own chunk, and nothing is
masked. Only ids past the tokenizer (padding rows of an LM head), for which the teacher may have no embedding, take no part.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from .aligner import AlignedTokens, TextAlignment
from .token_bytes import token_bytes, token_table


def is_one_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether every id stands for the same token on both sides."""
    return student.get_vocab() == teacher.get_vocab() and token_bytes(student) == token_bytes(teacher)


class OneTokenizer:
    """Replaces `TextAligner` where `is_one_tokenizer` is True."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._table = token_table(tokenizer)

    def __call__(self, completions: Sequence[Sequence[int]]) -> list[TextAlignment]:
        return [self._align(np.array(ids, dtype=np.int64)) for ids in completions]

    def _align(self, ids: np.ndarray) -> TextAlignment:
        spelled, widths = self._table.read(ids)
        known = ids < len(self._table.rows)
        read = np.arange(known.sum())
        ends = np.cumsum(widths[known])
        return TextAlignment(
            spelled.decode(errors="replace"),
            AlignedTokens(ids.tolist(), np.where(known, np.cumsum(known) - 1, -1), widths),
            AlignedTokens(ids[known].tolist(), read, widths[known]),
            num_chunks=len(read),
            masked=[],
            _spelled=spelled,
            _spans=np.stack([ends - widths[known], ends], 1),
            _tables=(self._table, self._table),
        )
