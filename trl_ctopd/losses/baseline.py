"""vOPD's baseline (arXiv 2605.07865): the expected advantage of a policy gradient's next token, taken off the sampled one.

For one tokenizer the advantage of token v at position t, log q_t(v) − log p_t(v), has expectation −KL(p_t ‖ q_t) under the student. It
rests on the text before alone, so log q_t − log p_t + KL(p_t ‖ q_t) has the same expected gradient. The paper reports less noise. By exact
sums on toys (`tests/losses/test_baseline.py`) it is little less on numbers, and more where both sides have one tokenizer: the mean is not
the baseline with the least noise. `reverse_kl`, which sums all outcomes, has far less than either.

On chunks (no paper has it): let o be what the student's next token spells where chunk c begins, p its distribution there, for closed
chunks given that the teacher's last token is left closed, and t the teacher's, told in student tokens as in BPM. Then

    K_c = Σ_o p(o) · clip(log p(o) − log t(o), ±advantage_clip)

is added to the chunk's gap. A closed chunk is one outcome of what the text before leaves open, so that the gradients of the log-probs of
all its outcomes, log L'_S(c), have expectation 0, and the expected gradient with credit "macro" or "remaining" is kept, if the next student
token decides where the teacher's tokenizer cuts before it. Whether an *open*
chunk begins or ends at a place depends on the tokens that follow, so there it is kept only where all chunks are one token on each side,
and a perfect student is driven away faster: on numbers, 3 times as fast as without.

Decisions: with `top_k` (what a server tells), all that none of the teacher's likeliest tokens stands for is one outcome. Tokens
that no teacher token stands for (markup of the student's template, the end of a turn that the teacher writes in several) are left out.
"""

import math

import torch

from .base import ScoredChunks
from .distributions import over_tiles
from .reverse_kl import going_on, likeliest_alone, places, told_by_server


BASELINES = ("kl",)
_COPIES = 8  # of a tile's logits that are alive at once
_SMALLEST = 1e-35  # of probabilities that are compared


@torch.no_grad()
def next_token_kl(
    batch: ScoredChunks, closed: bool, bound: float | None, top_k: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        batch: with the student's distributions, and the teacher's or its likeliest tokens.
        closed: whether chunks are closed ones.
        bound: in nats, on the difference for one outcome; `None` for none.
        top_k: how many of the teacher's likeliest tokens are known; `None` for all.

    Returns:
        K_c (B, C) in nats, and (B, C) where it is told. Raises `ValueError` for a batch without what it reads.
    """
    likeliest = batch.teacher_likeliest if batch.teacher is None else None
    if batch.student is None or (batch.teacher is None and (likeliest is None or top_k is None)):
        raise ValueError(
            "baseline='kl' reads the student's distributions and the teacher's, and the batch has none: set baseline_top_k for a teacher "
            "behind a server, and baseline=None for a batch of log-probs alone."
        )
    at, prefixes = places(batch), batch.vocabulary.prefixes
    at = type(at)(*(column[at.first & at.told] for column in at))
    per_row = (at.teacher_ids, at.written, at.head)
    if likeliest is not None:
        per_row += tuple(told.flatten(0, 1)[at.teacher] for told in likeliest)

    def divergence(log_p, *rows):
        if likeliest is None:
            log_q, teacher_ids, written, head = rows
            log_q, rest = likeliest_alone(log_q, top_k)
        else:
            teacher_ids, written, head, ids, values = rows
            log_q, rest = told_by_server(ids, values, top_k, len(prefixes.place))
        p = log_p.exp()
        if closed and not batch.vocabulary.is_one_tokenizer:
            p = _leaving_closed(batch, p, head)
        p = p.index_fill(1, batch.vocabulary.without_counterpart, 0)
        return (_kl(prefixes, p, log_q.exp(), rest, teacher_ids, written, bound),)

    student, teacher = (batch.student, at.student), None if likeliest is not None else (batch.teacher, at.teacher)
    [found] = over_tiles(divergence, max(1, batch.tile_tokens // _COPIES), student, teacher, *per_row)
    where = batch.chunks.row[at.chunk], batch.chunks.chunk[at.chunk]
    kl = batch.student_log_probs.new_zeros(batch.scorable.shape)
    return kl.index_put(where, found.to(kl.dtype)), torch.zeros_like(batch.scorable).index_put(
        where, torch.ones_like(at.first)
    )


def _leaving_closed(batch: ScoredChunks, p: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(n, V_S) the student's probabilities given that no token goes on in the teacher's token `head` (n,), -1 for none."""
    p = p.index_put(going_on(batch, head), p.new_zeros(()))
    return p / p.sum(1, keepdim=True).clamp(min=_SMALLEST)


def _kl(prefixes, p, q, rest, teacher_ids, written, bound) -> torch.Tensor:
    """(n,) K_c of the student's probabilities (n, V_S) and the teacher's (n, V_T) at places where `written` (n,) bytes of token
    `teacher_ids` (n,) are there already. `rest` (n,), if not all of the teacher's are known, is that of all untold outcomes."""
    possible = q * prefixes.going_on(teacher_ids, written)
    total = (possible.sum(1) + (0 if rest is None else rest)).clamp(min=_SMALLEST)
    outcome = torch.where(written[:, None] == 0, prefixes.first_outcome, prefixes.outcome[prefixes.entries(written)])
    size = len(prefixes.student_outcome) + 1
    t = q.new_zeros(len(q), size).scatter_add(1, outcome, possible / total[:, None]).to(p.dtype)
    by_outcome = prefixes.by_outcome(p)
    if rest is not None:
        untold = t == 0
        together = (by_outcome * untold).sum(1)
        t, by_outcome = (
            torch.cat([part.masked_fill(untold, 0), left[:, None].to(p.dtype)], 1)
            for part, left in ((t, rest / total), (by_outcome, together))
        )
    ratio = by_outcome.clamp(min=_SMALLEST).log() - t.clamp(min=_SMALLEST).log()
    bound = math.inf if bound is None else bound
    return (by_outcome * ratio.clamp(-bound, bound)).sum(1)
