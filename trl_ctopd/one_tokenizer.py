"""Two models of one tokenizer: plain on-policy distillation.

The teacher reads the very ids that the student sampled, canonical or not, so every token is its own chunk and nothing
is masked. Only ids past the tokenizer (padding rows of an LM head), which the teacher may not even embed, take no part.
"""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from .align import TextAlignment
from .token_bytes import token_bytes


def is_one_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether every id stands for the same token on both sides."""
    return student.get_vocab() == teacher.get_vocab() and token_bytes(student) == token_bytes(teacher)


class OneTokenizer:
    """Takes the place of `TextAligner` where `is_one_tokenizer`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._rows = token_bytes(tokenizer)

    def __call__(self, completions: Sequence[Sequence[int]]) -> list[TextAlignment]:
        return [self._align(list(ids)) for ids in completions]

    def _align(self, ids: list[int]) -> TextAlignment:
        known = [token < len(self._rows) for token in ids]
        read = [token for token, is_known in zip(ids, known, strict=True) if is_known]
        numbers = iter(range(len(read)))
        spelled = [self._rows[token] for token in read]
        widths = np.array([len(row) for row in spelled], dtype=np.int64)
        ends = np.cumsum(widths)
        return TextAlignment(
            text=b"".join(spelled).decode(errors="replace"),
            student_ids=ids,
            teacher_ids=read,
            student_chunks=[next(numbers) if is_known else -1 for is_known in known],
            teacher_chunks=list(range(len(read))),
            student_widths=[
                len(self._rows[token]) if is_known else 0 for token, is_known in zip(ids, known, strict=True)
            ],
            num_chunks=len(read),
            masked=[],
            _spelled=b"".join(spelled),
            _spans=np.stack([ends - widths, ends], 1),
        )
