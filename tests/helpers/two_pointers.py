"""The slow, readable reference of the alignment: two pointers that walk one boundary at a time."""

from itertools import pairwise


Token = tuple[int, int]  # its bytes start:end
Text = tuple[list[Token], list[Token], int, list[Token]]  # student tokens, teacher tokens, bytes, masked stretches


def two_pointers(student: list[Token], teacher: list[Token], length: int, masked: list[Token]):
    """Chunks as byte intervals, and the chunk number of each token on both sides."""
    inside = {at for start, end in masked for at in range(start + 1, end)}
    ours, theirs = (
        sorted({0, length, *(at for token in side for at in token)} - inside) for side in (student, teacher)
    )
    shared, i, j = [], 0, 0
    while i < len(ours) and j < len(theirs):
        if ours[i] == theirs[j]:
            shared.append(ours[i])
        i, j = i + (ours[i] <= theirs[j]), j + (theirs[j] <= ours[i])
    chunks = [
        (start, end) for start, end in pairwise(shared) if not any(low < end and start < high for low, high in masked)
    ]

    chunk_of = {at: n for n, (start, end) in enumerate(chunks) for at in range(start, end)}
    return chunks, *([chunk_of.get(start, -1) for start, _ in side] for side in (student, teacher))
