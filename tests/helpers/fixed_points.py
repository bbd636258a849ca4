"""Worlds in which a student has its teacher's distribution of texts, in another tokenization. All texts can be listed."""

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace

import torch

from trl_ctopd.losses import ScoredChunks


STOP = "$"


def cut(text: str, tokens: set[str]) -> tuple[str, ...]:
    """Greedily from the left, the longest token first."""
    found = []
    while text:
        token = next(text[:n] for n in range(len(text), 0, -1) if text[:n] in tokens)
        found.append(token)
        text = text[len(token) :]
    return tuple(found)


@dataclass(frozen=True)
class Shape:
    """Two vocabularies. Each cuts a text greedily, and contains the prefixes of its tokens."""

    student: frozenset[str]
    teacher: frozenset[str]
    letters: str
    longest: int = 3


def words(letters: str, longest: int) -> frozenset[str]:
    return frozenset("".join(w) for n in range(1, longest + 1) for w in itertools.product(letters, repeat=n))


SHAPES = {
    "1:1": Shape(frozenset("abc"), frozenset("abc"), "abc"),
    "m:1": Shape(frozenset("abc"), frozenset(("a", "b", "c", "ab", "abc", "ca")), "abc"),
    "m:1, digits": Shape(frozenset("01"), words("01", 3), "01", 5),
    "1:n": Shape(frozenset(("a", "b", "c", "ab", "abc", "ca")), frozenset("abc"), "abc"),
    "m:n": Shape(frozenset(("a", "b", "c", "bc")), frozenset(("a", "b", "c", "ab", "ca")), "abc"),
}


class World:
    """
    All texts of at most `longest` letters, with random probabilities, and the end of the turn. Student and teacher have the same
    distribution over texts, each over its own tokens.

    Attributes:
        logits (P, V): the student's logits at every prefix, for this distribution.
        batch: every text as the batch for a loss, for that student.
    """

    def __init__(self, shape: Shape, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.texts = sorted(words(shape.letters, shape.longest))
        law = dict(
            zip(self.texts, torch.randn(len(self.texts), generator=generator).double().softmax(0).tolist(), strict=True)
        )
        self.law = torch.tensor([law[text] for text in self.texts], dtype=torch.float64)
        students, teachers = (
            {text: (*cut(text, tokens), STOP) for text in self.texts} for tokens in (shape.student, shape.teacher)
        )
        own, theirs = self._masses(students, law), self._masses(teachers, law)
        tokens = sorted({token for ids in students.values() for token in ids})
        prefixes = sorted({ids[:i] for ids in students.values() for i in range(len(ids))})
        self.logits = torch.full((len(prefixes), len(tokens)), -1e3, dtype=torch.float64)
        for row, prefix in enumerate(prefixes):
            for column, token in enumerate(tokens):
                if mass := own[*prefix, token]:
                    self.logits[row, column] = math.log(mass / own[prefix])

        length = max(map(len, students.values()))
        rows, columns, chunks, widths, goes_on = [], [], [], [], []
        teacher_scores, teacher_chunks, teacher_close = [], [], []
        for text in self.texts:
            ids, read = students[text], teachers[text]
            ends = [set(itertools.accumulate(map(len, side[:-1]))) for side in (ids, read)]
            shared = sorted(ends[0] & ends[1])
            number = [sum(end < at for end in shared) for at in itertools.accumulate(map(len, ids[:-1]))] + [
                len(shared)
            ]
            pad = length - len(ids)
            chunks.append(number + [-1] * pad)
            widths.append([len(token) for token in ids[:-1]] + [0] * (pad + 1))
            rows.append([prefixes.index(ids[:i]) for i in range(len(ids))] + [0] * pad)
            columns.append([tokens.index(token) for token in ids] + [0] * pad)
            goes_on.append([])
            for i in range(length):
                before = "".join(ids[:i])
                row = torch.zeros(len(tokens), dtype=torch.bool)
                if 0 < i < len(ids) and len(before) in shared:
                    for column, token in enumerate(tokens):
                        joined = cut(before + token, shape.teacher) if token != STOP else ()
                        row[column] = token != STOP and joined[: len(cut(before, shape.teacher))] != cut(
                            before, shape.teacher
                        )
                goes_on[-1].append(row)
            number = [sum(end < at for end in shared) for at in itertools.accumulate(map(len, read[:-1]))] + [
                len(shared)
            ]
            teacher_chunks.append(number)
            teacher_close.append([0.0] * len(read))
            for i in range(1, len(read)):
                before = "".join(read[:i])
                if len(before) in shared:
                    kept = cut(before, shape.student)
                    left = sum(
                        theirs[*read[:i], token]
                        for token in {*shape.teacher, STOP}
                        if token == STOP or cut(before + token, shape.student)[: len(kept)] == kept
                    )
                    teacher_close[-1][i] = math.log(left / theirs[read[:i]])
            teacher_scores.append([math.log(theirs[read[: i + 1]] / theirs[read[:i]]) for i in range(len(read))])
        self._rows, self._columns = torch.tensor(rows), torch.tensor(columns)
        self._goes_on = torch.stack([torch.stack(row) for row in goes_on])
        widest = max(map(len, teacher_chunks))
        self._fixed = {
            "teacher_log_probs": torch.tensor(
                [own + [0.0] * (widest - len(own)) for own in teacher_scores], dtype=torch.float64
            ),
            "teacher_close_log_probs": torch.tensor(
                [own + [0.0] * (widest - len(own)) for own in teacher_close], dtype=torch.float64
            ),
            "student_chunks": torch.tensor(chunks),
            "teacher_chunks": torch.tensor([own + [-1] * (widest - len(own)) for own in teacher_chunks]),
            "student_widths": torch.tensor(widths),
            "num_chunks": length,
        }
        self.batch = self.scored(self.logits)

    def reached(self, logits: torch.Tensor) -> torch.Tensor:
        """(P,) the probability that a text of this policy has each prefix."""
        batch = self.scored(logits)
        p = batch.student_log_probs.sum(1).exp()[:, None] * (batch.student_chunks >= 0)
        return torch.zeros(len(logits), dtype=p.dtype).index_put_((self._rows,), p, accumulate=True)

    @staticmethod
    def _masses(cuts: dict[str, tuple[str, ...]], law: dict[str, float]) -> Counter:
        """The probability of every prefix."""
        masses: Counter = Counter()
        for text, ids in cuts.items():
            for i in range(len(ids) + 1):
                masses[ids[:i]] += law[text]
        return masses

    def scored(self, logits: torch.Tensor) -> ScoredChunks:
        log_probs = logits.log_softmax(-1)[self._rows]
        own = log_probs.gather(2, self._columns[..., None])[..., 0].masked_fill(self._fixed["student_chunks"] < 0, 0)
        close = log_probs.masked_fill(self._goes_on, -torch.inf).logsumexp(-1)
        close = close.masked_fill(~self._goes_on.any(-1), 0)
        return ScoredChunks(student_log_probs=own, close_log_probs=close, **self._fixed)

    def expected_gradient(
        self, loss, logits: torch.Tensor | None = None, writer: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(P, V) Σ_y p(y) · the loss's gradient at y. `writer` (P, V): the logits of another policy, which draws y in the student's
        place; each token is weighted by the ratio of the two."""
        logits = (self.logits if logits is None else logits).clone().requires_grad_()
        batch = self.scored(logits)
        p = batch.student_log_probs.detach().sum(1).exp()
        if writer is not None:
            drawn = self.scored(writer).student_log_probs
            batch.importance, p = (batch.student_log_probs.detach() - drawn).exp(), drawn.sum(1).exp()
        leaves = [part.detach().requires_grad_() for part in (batch.student_log_probs, batch.close_log_probs)]
        value, _ = loss(replace(batch, student_log_probs=leaves[0], close_log_probs=leaves[1]), 1)
        slopes = torch.autograd.grad(value, leaves, allow_unused=True)
        surrogate = torch.zeros((), dtype=torch.float64)
        for slope, part in zip(slopes, (batch.student_log_probs, batch.close_log_probs), strict=True):
            if slope is not None:
                surrogate = surrogate + (p[:, None] * slope * part).sum()
        return torch.autograd.grad(surrogate, logits)[0]
