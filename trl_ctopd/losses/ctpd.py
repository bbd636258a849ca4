"""CTPD, cross-tokenizer preference distillation (arXiv 2601.11865): DPO on chunks, with the teacher as the reference.

    r(y) = Σ_{c∈y} w_c (l(c) − L_T(c)),     loss = −log σ(β (r(chosen) − r(rejected)))

l(c) is the student's log-prob of chunk c, L_T(c) the teacher's. Only l has a gradient, so that a completion enters as the sum of
w_c(i) log p_i over the student's tokens i and one number, Σ_c w_c L_T(c): DPO with a weight a token. `trl_ctopd.preference`
trains with it.

Decisions: sums, no length norm, as in the paper. Its public code differs in what it weighs and where it cuts; the paper is
followed.
"""

from collections.abc import Sequence

import torch


def chunk_weights(
    positive: torch.Tensor,
    negative: torch.Tensor,
    mu: float,
    low: float = -0.5,
    high: float = 1.5,
    scale: float = 1.0,
) -> torch.Tensor:
    """
    w_c = scale · exp(mu · clamp(l⁺(c) − l⁻(c), low, high)) (C,): how much each chunk counts.

    Args:
        positive, negative (`torch.Tensor` of shape (C,)): each chunk's log-prob in nats under a teacher that has learned the
            preference, and under one that has learned the opposite.
        mu (`float`): 1 in the paper for chosen completions, −1 for rejected ones.
        low, high (`float`): bounds in nats.
        scale (`float`): k of the paper.
    """
    return scale * torch.exp(mu * (positive - negative).clamp(low, high))


def chunk_sums(values: torch.Tensor, chunks: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """(L,) of one completion's tokens in, sums over each chunk (C,) out; tokens of chunk −1 take no part."""
    inside = chunks >= 0
    return values.new_zeros(num_chunks).index_add(0, chunks[inside], values[inside])


def columns(
    student_chunks: Sequence[int], teacher_log_probs: torch.Tensor, teacher_chunks: Sequence[int], weights: torch.Tensor
) -> tuple[list[float], float]:
    """
    What one completion enters the loss with.

    Args:
        student_chunks: S numbers, the chunk of each student token, −1 for no part.
        teacher_log_probs (`torch.Tensor` of shape (T,)): of the teacher's tokens, in nats.
        teacher_chunks: T numbers, the chunk of each.
        weights (`torch.Tensor` of shape (C,)): w_c.

    Returns:
        The S weights of the student's tokens, and Σ_c w_c L_T(c). A chunk that one side has no token of, or whose teacher
        log-probs or weight are not finite, takes part in neither.
    """
    student, teacher = torch.as_tensor(student_chunks), torch.as_tensor(teacher_chunks)
    log_probs = chunk_sums(teacher_log_probs.double(), teacher, len(weights))
    ones = [chunk_sums(torch.ones(len(side)), side, len(weights)) for side in (student, teacher)]
    used = (ones[0] > 0) & (ones[1] > 0) & torch.isfinite(log_probs) & torch.isfinite(weights)
    weights = weights.double().masked_fill(~used, 0)
    reference = (weights * log_probs.masked_fill(~used, 0)).sum().item()
    return torch.where(student >= 0, weights[student.clamp(min=0)] if len(weights) else 0.0, 0.0).tolist(), reference
