"""X-Token (arXiv 2605.21699), its P-KL: the student's distribution, projected onto the teacher's vocabulary, against the
teacher's, both averaged over a chunk.

Decisions: W comes from the tokenizers alone: a shared token falls on its partner, another on the first four tokens that
the teacher writes it with, `.9 * .1^i` each. Both sides are compared on the teacher tokens that W reaches, in
proportion to the mass that the teacher has there.
Where the published code differs: it takes the 8,192 teacher tokens that are likeliest anywhere in the micro-batch, so
that a text's loss depends on its neighbours, and averages the teacher's log-probs; here all tokens, and probabilities on
both sides. Its second pass over W (the teacher's tokens written by the student) and learning W are left out.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss, Metrics, ScoredChunks
from .distributions import over_tiles


_FLOOR = 1e-12


@dataclass
class XToken(Loss):
    """
    loss = Σ_c Q_c · KL(q̂_c ‖ Wᵀ p̂_c) / N, with p̂_c and q̂_c the means of the chunk's next-token distributions, both
    renormalised over the teacher tokens that W reaches, and Q_c the mass that q̂_c has there.

    A tile holds whole chunks, so the longest one is the least tile.

    A perfect student stays only where all chunks are one token on each side.

    Args:
        cross_entropy_weight (`float`, defaults to `0.0`): of −Σ_i log p_i, which the paper adds on its reference texts;
            on text of the student's own it teaches nothing.
    """

    signal: ClassVar[str] = "logits"
    copies: ClassVar[int] = 8
    structures: ClassVar[tuple[str, ...]] = ("projection",)

    cross_entropy_weight: float = 0.0

    def __post_init__(self):
        self.check_weights("cross_entropy_weight")

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        chunks = batch.comparable_chunks
        number = torch.arange(len(chunks.row), device=chunks.row.device)
        sizes = _tiles_of_whole_chunks(chunks.student_tokens, chunks.teacher_tokens, self.tile(batch))
        student_positions, student_numbers = _positions(batch, batch.student_chunks)
        teacher_positions, teacher_numbers = _positions(batch, batch.teacher_chunks)
        projection = batch.vocabulary.projection
        transposed = torch.sparse_coo_tensor(
            torch.stack([projection.teacher, projection.student]),
            projection.weight.to(torch.promote_types(batch.student.hidden.dtype, torch.float32)),
            (batch.vocabulary.teacher_size, batch.vocabulary.student_size),
            check_invariants=False,
        ).coalesce()
        reached = torch.zeros(batch.vocabulary.teacher_size, dtype=torch.bool, device=number.device)
        reached[projection.teacher] = True

        def divergence(log_p, log_q, student_numbers, teacher_numbers, number, student_tokens, teacher_tokens):
            p = _mean(log_p.exp(), student_numbers, number, student_tokens)
            q = _mean(log_q.exp(), teacher_numbers, number, teacher_tokens)
            q = torch.zeros_like(q).index_add(1, projection.teacher_first, q) * reached
            r = torch.sparse.mm(transposed, p.T.to(transposed.dtype)).T.to(p.dtype)
            kept, tiny = q.sum(-1), torch.finfo(p.dtype).tiny
            q = q / kept[:, None].clamp(min=tiny)
            r = (r / r.sum(-1, keepdim=True).clamp(min=tiny)).clamp(min=_FLOOR)
            return kept * (torch.xlogy(q, q).sum(-1) - (q * r.log()).sum(-1)), kept

        student, teacher = (batch.student, student_positions), (batch.teacher, teacher_positions)
        of_tokens, of_chunks = (
            (student_numbers, teacher_numbers),
            (number, chunks.student_tokens, chunks.teacher_tokens),
        )
        values, kept = over_tiles(divergence, sizes, student, teacher, *of_tokens, *of_chunks)
        metrics = {"xtoken/reached_mass": (kept.sum(), torch.tensor(len(kept)))}
        value = values.sum() + self.cross_entropy_weight * batch.cross_entropy()
        return value / num_items, {**batch.compared(chunks), **metrics}


def _tiles_of_whole_chunks(student_tokens: torch.Tensor, teacher_tokens: torch.Tensor, tile: int) -> list[list[int]]:
    """The sizes of the tiles of student tokens, teacher tokens, both again, and three times of chunks."""
    longer = torch.maximum(student_tokens, teacher_tokens)
    tiles = (longer.cumsum(0) - longer) // tile
    _, of_chunk = torch.unique_consecutive(tiles, return_inverse=True)
    count = int(of_chunk.max()) + 1 if len(of_chunk) else 1
    tokens = [torch.bincount(of_chunk, part, count).long().tolist() for part in (student_tokens, teacher_tokens)]
    return [*tokens, *tokens, *[torch.bincount(of_chunk, minlength=count).tolist()] * 3]


def _positions(batch: ScoredChunks, side: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,) positions of the comparable chunks' tokens on one side, chunk by chunk, and (P,) which chunk."""
    chunks = batch.comparable_chunks
    numbers = torch.full((len(side), batch.num_chunks + 1), -1, device=side.device)
    numbers[chunks.row, chunks.chunk] = torch.arange(len(chunks.row), device=side.device)
    numbers = numbers.gather(1, torch.where(side < 0, batch.num_chunks, side)).flatten()  # no part: the last column
    found, order = numbers.sort(stable=True)
    return order[found >= 0], found[found >= 0]


def _mean(values: torch.Tensor, numbers: torch.Tensor, number: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(n, V) to (chunks, V): the mean over each chunk; `number` lists the chunks, sorted, `tokens` how many each has."""
    slot = torch.searchsorted(number, numbers)
    return values.new_zeros(len(number), values.shape[1]).index_add(0, slot, values) / tokens[:, None]
