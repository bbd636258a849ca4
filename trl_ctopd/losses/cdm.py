"""CDM, contextual dynamic mapping (arXiv 2502.11104): dynamic time warping between the two token sequences, weighted by
the models' entropies, then at each pair of positions a map between the likeliest tokens, by edit distance.

Decisions. The warping path is held to the synchronized boundaries, so it runs within each chunk; a chunk of one token on
each side is one pair. A student token with several partners is compared with each, at equal parts. An exact partner is
one with the same bytes, and their probabilities are those of all ids that spell them; the distance of two others is Levenshtein's over their lengths' sum, spaces left out. Tokens of
more than 32 bytes have exact partners only. Each direction of the map (the teacher's likeliest tokens, the student's) is a
KL of its own, over the tokens that have a partner, times the teacher's probability of them: what it thinks of the rest
cannot be told, and a sliver renormalised would be noise. The loss is the mean of both.
Where the published code differs: it warps whole texts with decoded strings, averages the logits of a token's partners,
renormalises the tokens that have a partner and no more, and writes both directions into one list, in which a pair that
both name counts twice.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..vocabulary import SPELLED_BYTES, VocabularyPair
from .base import ChunkTable, Loss, Metrics, ScoredChunks
from .distributions import Distributions, over_tiles
from .divergences import kl
from .edit_distance import edit_distances


@dataclass
class CDM(Loss):
    """
    loss = Σ_{(i, j)} Σ_L q_j(L) · KL(q̄_j ‖ p̄_i | L) / (2 · |J_i| · N), with L the tokens that have a partner among the
    teacher's top_k at j and among the student's top_k at i, q̄ and p̄ renormalised over L, and J_i the teacher tokens on
    student token i's part of the path.

    Args:
        top_k (`int`, defaults to `100`): tokens that are given a partner, on each side.
        threshold (`float`, defaults to `0.1`): the distance below which two tokens that spell different bytes may be
            partners; 0: exact partners only.
        cross_entropy_weight (`float`, defaults to `0.0`): of −Σ_i log p_i, which the paper adds on its reference texts;
            on text of the student's own it teaches nothing.
    """

    signal: ClassVar[str] = "logits"
    copies: ClassVar[int] = 4
    structures: ClassVar[tuple[str, ...]] = ("shared", "spellings")

    top_k: int = 100
    threshold: float = 0.1
    cross_entropy_weight: float = 0.0

    def __post_init__(self):
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}.")

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        vocabulary, shared = batch.vocabulary, batch.vocabulary.shared
        tile = self.tile(batch)
        student, teacher = _path(batch, tile)
        partners = torch.bincount(student, minlength=batch.student_ids.numel())
        kept = min(self.top_k, vocabulary.student_size, vocabulary.teacher_size)

        def divergence(log_p, log_q):
            students, teachers = log_p.detach().topk(kept).indices, log_q.topk(kept).indices
            student_class, teacher_class = shared.student_class[students], shared.teacher_class[teachers]
            closest_student, closest_teacher = self._closest(
                vocabulary, students, teachers, student_class < 0, teacher_class < 0
            )
            shared_p, shared_q = shared.student_log_probs(log_p), shared.teacher_log_probs(log_q)
            value, mapped = 0, 0
            for student_ids, teacher_ids, outcome in (
                (closest_student, teachers, teacher_class),
                (students, closest_teacher, student_class),
            ):
                exact = outcome >= 0
                p, q = (
                    torch.where(exact, own.gather(1, outcome.clamp(min=0)), full.gather(1, ids.clamp(min=0)))
                    for own, full, ids in ((shared_p, log_p, student_ids), (shared_q, log_q, teacher_ids))
                )
                found = exact | ((student_ids >= 0) & (teacher_ids >= 0))
                mass = (q.exp() * found).sum(1)
                none = ~found.any(1, keepdim=True)  # a row without partners: any finite numbers, and no loss
                q, p = (side.masked_fill(~found & ~none, -torch.inf).log_softmax(1) for side in (q, p))
                value = value + mass * kl(q, p).masked_fill(none[:, 0], 0) / 2
                mapped = mapped + mass / 2
            return value, mapped

        values, mapped = over_tiles(divergence, tile, (batch.student, student), (batch.teacher, teacher))
        compared = (partners > 0).sum()
        metrics = {"cdm/mapped_mass": (mapped.sum(), torch.tensor(len(mapped)))}
        value = (values / partners[student]).sum() + self.cross_entropy_weight * batch.cross_entropy()
        return value / num_items, {"loss/compared_fraction": (compared, batch.scored_tokens), **metrics}

    def _closest(
        self,
        vocabulary: VocabularyPair,
        students: torch.Tensor,
        teachers: torch.Tensor,
        student_free: torch.Tensor,
        teacher_free: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        For each teacher token the closest of the free student tokens, and for each student token the closest of the free
        teacher tokens; -1 where none is closer than the threshold. All tensors (n, k).
        """
        spelled = vocabulary.spellings
        free = student_free[:, :, None] & teacher_free[:, None, :]
        a, b = spelled.student_length[students][:, :, None], spelled.teacher_length[teachers][:, None, :]
        free &= (a >= 0) & (b >= 0) & ((a - b).abs() <= self.threshold * (a + b))  # the least that the distance can be
        row, i, j = free.nonzero(as_tuple=True)
        far = torch.full(free.shape, torch.inf, dtype=torch.float64, device=free.device)
        distance = far.index_put((row, i, j), _distances(vocabulary, students[row, i], teachers[row, j]))
        distance = distance.masked_fill(distance >= self.threshold, torch.inf)
        closest = []
        for dimension, ids in ((1, students), (2, teachers)):
            least, place = distance.min(dimension)
            closest.append(ids.gather(1, place).masked_fill(least.isinf(), -1))
        return closest[0], closest[1]


def _distances(vocabulary: VocabularyPair, students: torch.Tensor, teachers: torch.Tensor) -> torch.Tensor:
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


def _path(batch: ScoredChunks, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,) student and (P,) teacher positions that the warping path pairs, chunk by chunk."""
    chunks = batch.chunks
    single = chunks.where(chunks.one_to_one)
    several = chunks.where(~chunks.one_to_one)
    student, teacher = _grid(several, batch)
    cost = _costs(batch, student, teacher, tile)
    row, i, j = _warp(cost, several.student_tokens, several.teacher_tokens)
    return (
        torch.cat([single.student_first, student[row, i]]),
        torch.cat([single.teacher_first, teacher[row, j]]),
    )


def _grid(chunks: ChunkTable, batch: ScoredChunks) -> tuple[torch.Tensor, torch.Tensor]:
    """(G, M) and (G, K) the positions of each chunk's tokens on both sides, -1 where it has fewer."""
    grids = []
    for side, first, counts in (
        (batch.student_chunks, chunks.student_first, chunks.student_tokens),
        (batch.teacher_chunks, chunks.teacher_first, chunks.teacher_tokens),
    ):
        inside = (side >= 0).flatten()
        order = inside.nonzero()[:, 0]  # the tokens that take part, and each position's place among them
        place = inside.cumsum(0) - 1
        steps = torch.arange(int(counts.max()) if len(counts) else 1, device=side.device)
        tokens = (place[first][:, None] + steps).clamp(max=max(0, len(order) - 1))
        grids.append(order[tokens].masked_fill(steps >= counts[:, None], -1) if len(order) else tokens)
    return grids[0], grids[1]


@torch.no_grad()
def _costs(batch: ScoredChunks, student: torch.Tensor, teacher: torch.Tensor, tile: int) -> torch.Tensor:
    """(G, M, K) what it costs to pair two tokens, in float64."""
    student_weight = _relative_entropy(batch.student, student, batch.vocabulary.student_size, tile)
    teacher_weight = _relative_entropy(batch.teacher, teacher, batch.vocabulary.teacher_size, tile)
    grid, i, j = ((student >= 0)[:, :, None] & (teacher >= 0)[:, None, :]).nonzero(as_tuple=True)
    students, teachers = batch.student_ids.flatten()[student[grid, i]], batch.teacher_ids.flatten()[teacher[grid, j]]
    distance = _distances(batch.vocabulary, students, teachers)
    no_text = batch.vocabulary.student_widths[students] + batch.vocabulary.teacher_widths[teachers] == 0
    cost = student_weight.new_zeros(*student.shape, teacher.shape[1])
    return (
        cost.index_put((grid, i, j), distance.masked_fill(no_text, 0))
        * student_weight[..., None]
        * teacher_weight[:, None]
    )


def _relative_entropy(side: Distributions, positions: torch.Tensor, size: int, tile: int) -> torch.Tensor:
    """Entropies at `positions` over that of the uniform distribution, in float64; 0 where a position is -1."""
    at = positions[positions >= 0]
    (entropy,) = over_tiles(lambda log_p: (-(log_p.exp() * log_p).sum(-1),), tile, (side, at), None)
    weights = torch.zeros(positions.shape, dtype=torch.float64, device=positions.device)
    return weights.masked_scatter(positions >= 0, entropy.double() / torch.tensor(size).double().log())


def _warp(
    cost: torch.Tensor, student_tokens: torch.Tensor, teacher_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Dynamic time warping of all grids at once, one diagonal after the other.

    Args:
        cost (`torch.Tensor` of shape (G, M, K)), student_tokens, teacher_tokens (`torch.LongTensor` of shape (G,)): the
            part of each grid that counts.

    Returns:
        (P,) grid, (P,) row and (P,) column of the cells on the paths. Of equal ways back, the diagonal comes first, then
        the row before.
    """
    grids, rows, columns = cost.shape
    total = cost.new_full((grids, rows + 1, columns + 1), torch.inf)
    total[:, 0, 0] = 0
    for diagonal in range(rows + columns - 1):
        i = torch.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1), device=cost.device)
        j = diagonal - i
        before = torch.minimum(torch.minimum(total[:, i, j], total[:, i, j + 1]), total[:, i + 1, j])
        total[:, i + 1, j + 1] = cost[:, i, j] + before
    grid = torch.arange(grids, device=cost.device)
    i, j = student_tokens - 1, teacher_tokens - 1
    path = []
    for _ in range(rows + columns - 1):
        on = (i >= 0) & (j >= 0)
        path.append((grid[on], i[on], j[on]))
        i, j = i.clamp(min=0), j.clamp(min=0)
        diagonal, up, left = total[grid, i, j], total[grid, i, j + 1], total[grid, i + 1, j]
        straight = (diagonal <= up) & (diagonal <= left)
        upward = ~straight & (up <= left)
        i, j = torch.where(straight | upward, i - 1, i), torch.where(upward, j, j - 1)
        i, j = i.masked_fill(~on, -1), j.masked_fill(~on, -1)
    return tuple(torch.cat(column) for column in zip(*path, strict=True))
