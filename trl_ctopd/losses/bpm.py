"""BPM, byte-prefix marginalisation (arXiv 2607.22334): the teacher's next-token distribution, told in student tokens.

Each teacher token w stands for the longest student token that its bytes begin with, φ(w); what the teacher gives to a
student token is the mass of all w that stand for it, and what stands for none is one outcome more. A student that is
in the middle of a teacher token is compared with what the teacher leaves possible given the bytes already written.

Decisions.
- The teacher's distribution at the token that covers the student's next byte is conditioned on tokens that begin with
  the bytes already written and go on after them.
- All ids that spell the same bytes are one outcome, all stop ids another: the end of a turn is bridged where both sides
  have one; where the teacher writes it in several tokens it has no single outcome, and that row is left out.
- Rows in which the student wrote whitespace alone are left out by default (the paper's own finding on code).
- The dummy prefix of a SentencePiece teacher is a byte already written; where only the student has one, the first token
  is left out.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from ..text.vocabulary import Prefixes
from .base import Loss, Metrics, ScoredChunks
from .distributions import over_tiles
from .divergences import generalized_jsd


class Rows(NamedTuple):
    """Where each student token stands, all of shape (n,): its position and that of the teacher token that covers its
    first byte, counted through the rows of the batch one after the other; that token's id; and how many of its bytes
    are written already."""

    student: torch.Tensor
    teacher: torch.Tensor
    teacher_ids: torch.Tensor
    written: torch.Tensor

    def where(self, keep: torch.Tensor) -> "Rows":
        return Rows(*(column[keep] for column in self))


def standing_rows(batch: ScoredChunks, mask_whitespace: bool) -> Rows:
    """The student tokens that have a teacher distribution to be compared with."""
    vocabulary, chunks = batch.vocabulary, batch.chunks
    by_chunk = torch.full_like(batch.scorable, -1, dtype=torch.long)
    by_chunk[chunks.row, chunks.chunk] = torch.arange(len(chunks.row), device=by_chunk.device)
    inside = batch.student_chunks >= 0
    row, position = inside.nonzero(as_tuple=True)
    chunk = by_chunk[row, batch.student_chunks[row, position]]
    row, position, chunk = (column[chunk >= 0] for column in (row, position, chunk))

    student_ids = batch.student_ids[row, position]
    student_start = _starts(vocabulary.student_widths[batch.student_ids], inside)
    teacher_start = _starts(vocabulary.teacher_widths[batch.teacher_ids], batch.teacher_chunks >= 0)
    excess = batch.prefix_excess[chunks.row, chunks.chunk][chunk]
    first, last = chunks.teacher_first[chunk], chunks.teacher_last[chunk]
    chunk_start = student_start.flatten()[chunks.student_first[chunk]]
    offset = student_start[row, position] - chunk_start + excess  # in the teacher's bytes of the chunk
    at = teacher_start.flatten()[first] + offset  # in the teacher's bytes of the text
    # the last teacher token that starts at or before that byte
    queries = torch.full_like(student_start, -1)
    queries[row, position] = at
    found = torch.searchsorted(teacher_start, queries, right=True)[row, position] - 1
    found = torch.clamp(found + row * teacher_start.shape[1], first, last)
    end_of_turn = batch.student_bytes[chunks.row, chunks.chunk][chunk] == 0
    found = torch.where(end_of_turn, first, found)
    teacher_ids = batch.teacher_ids.flatten()[found]
    written = at - teacher_start.flatten()[found]

    keep = (offset >= 0) & (written >= 0) & (end_of_turn | (written < vocabulary.teacher_widths[teacher_ids]))
    keep &= ~end_of_turn | ((chunks.teacher_tokens[chunk] == 1) & vocabulary.bridged)
    if mask_whitespace:
        keep &= ~vocabulary.student_whitespace[student_ids]
    return Rows(position + row * inside.shape[1], found, teacher_ids, written).where(keep)


def _starts(widths: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """(B, L) bytes of the tokens that take part, before each token."""
    widths = widths.masked_fill(~inside, 0)
    return widths.cumsum(1) - widths


def compared_rows(batch: ScoredChunks, rows: Rows) -> Metrics:
    """The share of the scored student tokens that are compared."""
    return {"loss/compared_fraction": (torch.tensor(len(rows.student)), batch.scored_tokens)}


def possible(prefixes: Prefixes, log_q: torch.Tensor, teacher_ids: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
    """(n, V_T) the teacher's probabilities given the bytes already written."""
    return log_q.masked_fill(~prefixes.going_on(teacher_ids, written), -torch.inf).softmax(-1)


def outcome_divergence(
    prefixes: Prefixes,
    beta: float,
    log_p: torch.Tensor,
    log_q: torch.Tensor,
    teacher_ids: torch.Tensor,
    written: torch.Tensor,
) -> torch.Tensor:
    """(n,) JSD_β over the student's outcomes, of its own probabilities and of what the teacher's stand for."""
    p, q = log_p.exp(), possible(prefixes, log_q, teacher_ids, written)
    outcome = prefixes.outcome[prefixes.entries(written)]
    outcome = torch.where(written[:, None] == 0, prefixes.first_outcome, outcome)
    empty = p.new_zeros(len(p), p.shape[1] + 1)
    return generalized_jsd(
        empty.index_add(1, prefixes.student_outcome, p), empty.scatter_add(1, outcome, q.to(p.dtype)), beta
    )


@dataclass
class BPM(Loss):
    """
    loss = Σ_i JSD_β(p_i, t_i) / N over student tokens, t(u) = Σ_{w: φ(w) = u} q(w).

    A perfect student stays only where all chunks are one token on each side.

    Args:
        beta (`float`, defaults to `0.5`): of the generalized Jensen-Shannon divergence; 0 = forward KL. Below 1: the
            reverse KL is infinite wherever no teacher token stands for a student token.
        mask_whitespace (`bool`, defaults to `True`): leave out student tokens of whitespace alone.
    """

    signal: ClassVar[str] = "logits"
    copies: ClassVar[int] = 9
    policy: ClassVar[str] = "on"
    structures: ClassVar[tuple[str, ...]] = ("prefixes",)

    beta: float = 0.5
    mask_whitespace: bool = True

    def __post_init__(self):
        if not 0 <= self.beta < 1:
            raise ValueError(f"bpm's beta must be at least 0 and below 1, got {self.beta}.")

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        rows = standing_rows(batch, self.mask_whitespace)
        prefixes = batch.vocabulary.prefixes

        def divergence(*rows):
            return (outcome_divergence(prefixes, self.beta, *rows),)

        student, teacher = (batch.student, rows.student), (batch.teacher, rows.teacher)
        (values,) = over_tiles(divergence, self.tile(batch), student, teacher, rows.teacher_ids, rows.written)
        return values.sum() / num_items, compared_rows(batch, rows)
