"""Dynamic time warping between two tokenizations of a text, held to the boundaries that both have: it runs within each
chunk, in all chunks at once.
"""

import torch

from .base import ChunkTable, ScoredChunks
from .distributions import Distributions, over_tiles
from .edit_distance import spelling_distances


def warping_path(batch: ScoredChunks, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    (P,) student and (P,) teacher positions that the path pairs. A chunk with one token on either side has one way only;
    the others go through in classes of like size, so that a long one makes no other larger.
    """
    chunks = batch.chunks
    shorter, longer = torch.aminmax(torch.stack([chunks.student_tokens, chunks.teacher_tokens]), dim=0)
    pairs = [_all_pairs(chunks.where(shorter == 1), batch)]
    size_class = torch.where(shorter == 1, 0, longer.double().log2().ceil().long())
    for size in size_class.unique().tolist():
        if size:
            pairs.append(_warped_pairs(chunks.where(size_class == size), batch, tile))
    student, teacher = (torch.cat(column) for column in zip(*pairs, strict=True))
    return student, teacher


def _all_pairs(chunks: ChunkTable, batch: ScoredChunks) -> tuple[torch.Tensor, torch.Tensor]:
    """Each chunk's tokens, all with all."""
    student, teacher = _grid(chunks, batch)
    row, i, j = ((student >= 0)[:, :, None] & (teacher >= 0)[:, None, :]).nonzero(as_tuple=True)
    return student[row, i], teacher[row, j]


def _warped_pairs(chunks: ChunkTable, batch: ScoredChunks, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    student, teacher = _grid(chunks, batch)
    row, i, j = _warp(_costs(batch, student, teacher, tile), chunks.student_tokens, chunks.teacher_tokens)
    return student[row, i], teacher[row, j]


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
    distance = spelling_distances(batch.vocabulary, students, teachers)
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
        path.append(torch.stack([grid, i, j]))
        at_i, at_j = i.clamp(min=0), j.clamp(min=0)
        diagonal, up, left = total[grid, at_i, at_j], total[grid, at_i, at_j + 1], total[grid, at_i + 1, at_j]
        straight = (diagonal <= up) & (diagonal <= left)
        upward = ~straight & (up <= left)
        done = (i < 0) | (j < 0)
        i, j = torch.where(straight | upward, i - 1, i), torch.where(upward, j, j - 1)
        i, j = i.masked_fill(done, -1), j.masked_fill(done, -1)
    cells = torch.stack(path, dim=1).flatten(1)  # (3, steps * G)
    return tuple(cells[:, (cells[1] >= 0) & (cells[2] >= 0)])
