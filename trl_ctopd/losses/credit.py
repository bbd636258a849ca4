"""Credit: a chunk's teacher/student budget in, one advantage per student token out (DPCA, arXiv 2606.09456).

Chunk c holds the student tokens i with log-probs log p_i and the teacher tokens j with log-probs log q_j. Its budgets
are L_S = Σ log p_i and L_T = Σ log q_j, in nats. The paper's target keeps the student's own shape and spends the
teacher's budget, log q̂_i = (L_T / L_S) · log p_i, so the advantage is

    A_i = log q̂_i − log p_i = (L_T − L_S) · w_i,    w_i = log p_i / L_S,    Σ_{i∈c} w_i = 1.

Written as gap × share, every other way to hand out the gap is the same line with another w (`CREDITS`).

L_T is the log-prob that the chunk's last teacher token *ends* where it does, and L_S says nothing of that. `closing` makes it say
so: with p_close(c) the student's probability that what it writes after chunk c leaves that boundary where it is,

    L'_S(c) = L_S(c) − log p_close(c − 1) + log p_close(c),

which telescopes to L_S of the text, so that only the chunks' parts of the gap change. L_S in turn says that the student's last token
ends there, and L_T says nothing of that: L'_T is the same with the teacher's probability to leave that boundary where it is.

Shapes: B sequences, S student tokens, T teacher tokens, C chunks a sequence at most. `chunks` tensors hold each token's
chunk number in its own sequence, -1 where the token takes no part. Nothing here carries gradient.
"""

import torch


CREDITS = ("semantic", "uniform", "byte_length", "last", "macro", "previous")
FLOOR = -100.0  # nats, in place of a teacher's log-prob of -inf: a disagreement that a clip bounds, and no silence


def chunk_sum(values: torch.Tensor, chunks: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """
    Sum of `values` over each chunk: `[[v[c == k].sum() for k in range(C)] for v, c in zip(values, chunks)]`.

    Args:
        values (`torch.Tensor` of shape (B, L)): one number a token.
        chunks (`torch.LongTensor` of shape (B, L)): chunk of each token, -1 for none.
        num_chunks (`int`): C.

    Returns:
        `torch.Tensor` of shape (B, C), in the dtype of `values`.
    """
    inside = torch.where(chunks >= 0, values, torch.zeros_like(values))
    return inside.new_zeros(values.shape[0], num_chunks).scatter_add(1, chunks.clamp(min=0), inside)


def spread(per_chunk: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
    """Each token's chunk value: (B, C) and `chunks` (B, L) in, (B, L) out, 0 where a token takes no part."""
    return per_chunk.gather(1, chunks.clamp(min=0)).masked_fill(chunks < 0, 0)


def outer_positions(chunks: torch.Tensor, num_chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, C) positions of each chunk's first and last token in `chunks` (B, L); L and -1 for a chunk without tokens."""
    rows, length = chunks.shape
    position, slot = torch.arange(length, device=chunks.device).expand_as(chunks), chunks.clamp(min=0)
    first, last = (
        position.new_full((rows, num_chunks), outside).scatter_reduce(
            1, slot, position.masked_fill(chunks < 0, outside), reduce
        )
        for reduce, outside in (("amin", length), ("amax", -1))
    )
    return first, last


def closing(close_log_probs: torch.Tensor, chunks: torch.Tensor, num_chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    log p_close before and after each chunk: the naive equivalent for one chunk is `close[first]` and `close[last + 1]`.

    Args:
        close_log_probs (`torch.Tensor` of shape (B, S)): log p_close of the teacher's token that ends where each student
            token begins, under the distribution that the student token is drawn from; 0 where there is none. Or (B, T), of the
            student's token that ends where each of the teacher's begins, under the teacher's distribution.
        chunks (`torch.LongTensor` of the same shape), num_chunks (`int`).

    Returns:
        two `torch.Tensor` of shape (B, C), 0 for chunks without tokens and past the end of a row.
    """
    first, last = outer_positions(chunks, num_chunks)
    padded = torch.nn.functional.pad(close_log_probs, (0, 1))
    none = last < 0
    before = padded.gather(1, first).masked_fill(none, 0)
    after = padded.gather(1, (last + 1).clamp(max=chunks.shape[1])).masked_fill(none, 0)
    return before, after


def previous_gaps(gap: torch.Tensor, chunks: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """(B, S) at each chunk's first token, the gap of the chunk that ends right before it; 0 elsewhere."""
    first, last = outer_positions(chunks, num_chunks)
    length = chunks.shape[1]
    ended = gap.new_zeros(len(gap), length + 2)
    ended = ended.scatter_add(1, torch.where(last < 0, length + 1, last + 1), gap)  # by the position after its end
    position = torch.arange(length, device=chunks.device).expand_as(chunks)
    begins = (chunks >= 0) & (position == first.gather(1, chunks.clamp(min=0)))
    return ended[:, :length].masked_fill(~begins, 0)


def shares(
    credit: str,
    log_probs: torch.Tensor,
    chunks: torch.Tensor,
    widths: torch.Tensor,
    num_chunks: int,
) -> torch.Tensor:
    """
    The part w_i of its chunk's gap that each student token answers for.

    Args:
        credit (`str`):
            `"semantic"`: log p_i / L_S, the paper's; a chunk the student is certain of (L_S = 0) is shared evenly.
            `"uniform"`: 1/m for a chunk of m student tokens. `"byte_length"`: by the bytes a token spells (evenly where
            none does, as at a turn end). `"last"`: all to the chunk's last token. `"macro"`: w_i = 1, the chunk as one
            action: unclipped, and where later text moves no boundary, its expectation is the gradient of the reverse KL
            of each chunk given the text before it. Later chunks' gaps are not credited to it. `"previous"`: as `"macro"`;
            the gap of the chunk before, for which a chunk's first token answers too, is `previous_gaps`.
        log_probs (`torch.Tensor` of shape (B, S)): student log-probs in nats, detached.
        chunks (`torch.LongTensor` of shape (B, S)): chunk of each student token, -1 for none.
        widths (`torch.LongTensor` of shape (B, S)): bytes of text each student token spells.
        num_chunks (`int`): C.

    Returns:
        `torch.Tensor` of shape (B, S): shares that sum to 1 over each chunk (`"macro"`, `"previous"`: that are 1), 0 where a
        token takes no part.

    Raises:
        ValueError: for an unknown `credit`, naming the known ones.
    """
    taking_part = (chunks >= 0).to(log_probs.dtype)
    if credit in ("macro", "previous"):
        return taking_part
    if credit == "semantic":
        weights = (-log_probs).clamp(min=0)  # rounding can leave a log-prob at +1e-7
    elif credit == "uniform":
        weights = taking_part
    elif credit == "byte_length":
        weights = widths.to(log_probs.dtype)
    elif credit == "last":
        _, last = outer_positions(chunks, num_chunks)
        position = torch.arange(chunks.shape[1], device=chunks.device).expand_as(chunks)
        weights = ((chunks >= 0) & (position == spread(last, chunks))).to(log_probs.dtype)
    else:
        raise ValueError(f"Unknown credit {credit!r}: choose one of {', '.join(CREDITS)}.")
    total = spread(chunk_sum(weights, chunks, num_chunks), chunks)
    size = spread(chunk_sum(taking_part, chunks, num_chunks), chunks)
    return torch.where(
        total > 0, weights / total.clamp(min=torch.finfo(total.dtype).tiny), taking_part / size.clamp(min=1)
    )


def gaps(
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    student_chunks: torch.Tensor,
    teacher_chunks: torch.Tensor,
    num_chunks: int,
    close_log_probs: torch.Tensor | None = None,
    teacher_close_log_probs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Each chunk's gap L_T − L_S in nats, with the chunks neutralised whose teacher log-probs are NaN or infinite.

    Args:
        student_log_probs (`torch.Tensor` of shape (B, S)), teacher_log_probs (`torch.Tensor` of shape (B, T)): in nats.
        student_chunks (`torch.LongTensor` of shape (B, S)), teacher_chunks (`torch.LongTensor` of shape (B, T)).
        num_chunks (`int`): C.
        close_log_probs (`torch.Tensor` of shape (B, S), *optional*): as for `closing`; with them L'_S takes the place of L_S.
        teacher_close_log_probs (`torch.Tensor` of shape (B, T), *optional*): the same of the teacher; with them L'_T takes the
            place of L_T.

    Returns:
        `gap` (`torch.Tensor` of shape (B, C)), 0 in neutralised chunks, and `neutral` (`torch.BoolTensor` of shape
        (B, C)), True where the teacher's budget was not finite.
    """
    student_budget = chunk_sum(student_log_probs, student_chunks, num_chunks)
    if close_log_probs is not None:
        before, after = closing(close_log_probs, student_chunks, num_chunks)
        student_budget = student_budget - before + after
    teacher_budget = chunk_sum(teacher_log_probs, teacher_chunks, num_chunks)
    if teacher_close_log_probs is not None:
        before, after = closing(teacher_close_log_probs, teacher_chunks, num_chunks)
        teacher_budget = teacher_budget - before + after
    neutral = ~torch.isfinite(teacher_budget)
    return (teacher_budget - student_budget).masked_fill(neutral, 0), neutral


def floored(teacher_log_probs: torch.Tensor) -> torch.Tensor:
    """With `FLOOR` in place of -inf; what is NaN or +inf stays."""
    return torch.where(teacher_log_probs == -torch.inf, FLOOR, teacher_log_probs)
