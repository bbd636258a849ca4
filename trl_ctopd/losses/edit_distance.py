"""Edit distances of many pairs of tokens at once."""

import torch

from ..text.vocabulary import SPELLED_BYTES, VocabularyPair


def edit_distances(a: torch.Tensor, a_length: torch.Tensor, b: torch.Tensor, b_length: torch.Tensor) -> torch.Tensor:
    """
    The least number of bytes to insert, delete or replace.

    Args:
        a, b (`torch.Tensor` of shape (P, L)): bytes, padded.
        a_length, b_length (`torch.LongTensor` of shape (P,)): how many of them count, L at most.

    Returns:
        `torch.LongTensor` of shape (P,).
    """
    column = torch.arange(b.shape[1] + 1, device=b.device)
    line = column.expand(len(b), -1)  # of the usual table: the distances of b's beginnings from a's first i bytes
    found = b_length.clone()
    for i in range(1, a.shape[1] + 1):
        replaced = line[:, :-1] + (b != a[:, i - 1 : i])
        best = torch.cat([line.new_full((len(b), 1), i), torch.minimum(replaced, line[:, 1:] + 1)], dim=1)
        line = (best - column).cummin(1).values + column  # and a byte inserted after any other cell of the line
        found = torch.where(a_length == i, line.gather(1, b_length[:, None])[:, 0], found)
    return found


def spelling_distances(vocabulary: VocabularyPair, students: torch.Tensor, teachers: torch.Tensor) -> torch.Tensor:
    """(P,) normalised edit distances of student and teacher tokens (P,), in float64; 1 where there is no text."""
    spelled = vocabulary.spellings
    a, b = spelled.student_length[students], spelled.teacher_length[teachers]
    strings = spelled.student[students], spelled.teacher[teachers]
    edits = edit_distances(strings[0], a.clamp(0, SPELLED_BYTES), strings[1], b.clamp(0, SPELLED_BYTES))
    distance = edits / (a + b).clamp(min=1).double()
    alike = vocabulary.shared.student_class[students] == vocabulary.shared.teacher_class[teachers]
    alike &= vocabulary.shared.student_class[students] >= 0
    distance = torch.where((a > SPELLED_BYTES) | (b > SPELLED_BYTES), 1 - alike.double(), distance)
    return distance.masked_fill((a < 0) | (b < 0), 1)
