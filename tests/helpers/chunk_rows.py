"""Random rows of chunks as tuples and as tensors, and budgets and shares by loops over dictionaries in Python floats."""

import math
import random
from collections import defaultdict

import torch


BAD = [math.nan, math.inf, -math.inf]

# A row is (student, teacher): tuples (log_prob, chunk, width) and (log_prob, chunk), chunk -1 for a token without part.


def random_log_prob(rng):
    """A few nats, and sometimes tens of them."""
    return -rng.expovariate(0.5) * rng.choice((1, 1, 1, 1, 15))


def random_row(rng, num_chunks):
    """Chunks of 1 to 5 tokens on each side, with tokens that take no part before, after and inside them."""
    student, teacher = [], []
    for chunk in range(num_chunks):
        for _ in range(rng.choice([1, 1, 2, 3, 5])):
            if rng.random() < 0.2:
                student.append((random_log_prob(rng), -1, rng.randrange(4)))
            student.append((random_log_prob(rng), chunk, rng.randrange(6)))
        for _ in range(rng.choice([1, 1, 2, 3, 5])):
            if rng.random() < 0.2:
                teacher.append((random_log_prob(rng), -1))
            teacher.append((random_log_prob(rng), chunk))
    if rng.random() < 0.5:
        student.append((-1.0, -1, 2))
    return student, teacher


def random_rows(seed, batch=6, one_to_one=False):
    """Rows of 0 to 7 chunks. The second row has none."""
    rng = random.Random(seed)
    rows = [random_row(rng, 0 if row == 1 else rng.randint(1, 7)) for row in range(batch)]
    if one_to_one:
        firsts = [({token[1]: token for token in side if token[1] >= 0} for side in row) for row in rows]
        rows = [tuple(list(side.values()) for side in row) for row in firsts]
    return rows


def padded(rows, column, fill, dtype, length=0):
    """One field of all tokens as a (B, L) tensor, padded with `fill`."""
    length = max([length, 1, *map(len, rows)])
    return torch.tensor([[t[column] for t in row] + [fill] * (length - len(row)) for row in rows], dtype=dtype)


def as_tensors(rows, dtype=torch.float64):
    """student_log_probs, teacher_log_probs, student_chunks, teacher_chunks, student_widths, num_chunks."""
    students, teachers = zip(*rows, strict=True)
    num_chunks = max([1, *(token[1] + 1 for row in students for token in row)])
    return (
        padded(students, 0, 0.0, dtype),
        padded(teachers, 0, 0.0, dtype),
        padded(students, 1, -1, torch.long),
        padded(teachers, 1, -1, torch.long),
        padded(students, 2, 0, torch.long),
        num_chunks,
    )


def by_chunk(tokens):
    """{chunk: [index of each of its tokens]}."""
    chunks = defaultdict(list)
    for index, token in enumerate(tokens):
        if token[1] >= 0:
            chunks[token[1]].append(index)
    return chunks


def reference_budgets(tokens):
    return {chunk: math.fsum(tokens[i][0] for i in inside) for chunk, inside in by_chunk(tokens).items()}


def reference_shares(credit, student):
    """One share for each token, one chunk after another."""
    result = [0.0] * len(student)
    for inside in by_chunk(student).values():
        if credit == "semantic":
            weights = [-student[i][0] for i in inside]
        elif credit == "byte_length":
            weights = [student[i][2] for i in inside]
        elif credit == "last":
            weights = [float(i == max(inside)) for i in inside]
        else:
            weights = [1.0] * len(inside)
        total = 1.0 if credit in ("macro", "previous") else math.fsum(weights)
        for i, weight in zip(inside, weights, strict=True):
            result[i] = weight / total if total else 1 / len(inside)
    return result
