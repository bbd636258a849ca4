"""MultiLevelOT (arXiv 2412.14528): optimal transport between vocabularies, token by token and over the whole text.

Each side keeps the `top_k` tokens that are likeliest over the text, in that order; then the r-th of one side is matched
with the r-th of the other: by absolute difference, by a logarithmic cost, and, between all tokens of the text at once, by
a Sinkhorn distance with the absolute difference as cost. Tokens are paired by position.

Decisions. The logarithmic cost is the KL of the kept tokens, renormalised: its gradient is that of the paper's cross-
entropy, and it is 0 where both agree. The Sinkhorn distance is debiased for the same reason (Feydy et al., 1810.08278),
its plan is taken as given, and it speaks for each student token of the text. The stop tokens of a side are one outcome.
Where the published code differs: it ranks over the micro-batch, so that a text's loss depends on its neighbours; it
calls the cross-entropy with its arguments swapped; it takes a softmax of what are probabilities already; it scales the
logits by their standard deviation and the Sinkhorn term by .001. Its cross-entropy is a knob.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.utils.checkpoint import checkpoint

from .base import Loss, Metrics, ScoredChunks
from .credit import spread
from .distributions import Distributions, over_tiles
from .divergences import kl, with_one_end


_PLAN_COPIES = (
    16  # tensors of the size of a block of the transport plan that are alive at once, beside one for each token kept
)


@dataclass
class MultiLevelOT(Loss):
    """
    loss = Σ_texts (Σ_i Σ_r |p_i(r) − q_i(r)| + log_weight · Σ_i KL(q̄_i ‖ p̄_i) + sinkhorn_weight · S · OT_ε(p, q)) / N,
    with p_i(r) the i-th token's probability of the text's r-th likeliest token.

    A perfect student stays only where all chunks are one token on each side.

    Args:
        top_k (`int`, defaults to `50`): tokens kept on each side.
        log_weight (`float`, defaults to `0.1`), sinkhorn_weight (`float`, defaults to `0.1`): of the other two terms.
        epsilon (`float`, defaults to `0.1`): entropic regularisation of the transport.
        iterations (`int`, defaults to `20`): of Sinkhorn's algorithm.
        cross_entropy_weight (`float`, defaults to `0.0`): of −Σ_i log p_i, which the paper adds on its reference texts;
            on text of the student's own it teaches nothing.
    """

    signal: ClassVar[str] = "logits"
    copies: ClassVar[int] = 3

    top_k: int = 50
    log_weight: float = 0.1
    sinkhorn_weight: float = 0.1
    epsilon: float = 0.1
    iterations: int = 20
    cross_entropy_weight: float = 0.0

    def __post_init__(self):
        for name in ("top_k", "iterations", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"multi_level_ot's {name} must be positive, got {getattr(self, name)}.")
        self.check_weights("log_weight", "sinkhorn_weight", "cross_entropy_weight")

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        vocabulary = batch.vocabulary
        ours, theirs = vocabulary.student_stops, vocabulary.teacher_stops
        sizes = (vocabulary.student_size, ours), (vocabulary.teacher_size, theirs)
        kept = min(self.top_k, *(size - max(0, len(stops) - 1) for size, stops in sizes))
        tile = self.tile(batch)
        student, student_mask = _ranked(batch.student, ours, spread(batch.scorable, batch.student_chunks), kept, tile)
        with torch.no_grad():
            inside = spread(batch.scorable, batch.teacher_chunks)
            teacher, teacher_mask = _ranked(batch.teacher, theirs, inside, kept, tile)
        length = min(student.shape[1], teacher.shape[1])
        paired = student_mask[:, :length] & teacher_mask[:, :length]
        log_p, log_q = student[:, :length][paired], teacher[:, :length][paired]
        absolute = (log_p.exp() - log_q.exp()).abs().sum()
        logarithmic = kl(log_q.log_softmax(-1), log_p.log_softmax(-1)).sum()

        present = student_mask.any(1) & teacher_mask.any(1)
        p, q = student[present].exp(), teacher[present].exp()
        p_mask, q_mask = student_mask[present], teacher_mask[present]
        budget = batch.tile_tokens * (vocabulary.student_size + vocabulary.teacher_size) // (_PLAN_COPIES + kept)
        rows = max(1, budget // max(1, p_mask.numel(), q_mask.numel()))
        distance = self._transport(p, q, p_mask, q_mask, rows)
        bias = self._transport(p, p, p_mask, p_mask, rows) + self._transport(q, q, q_mask, q_mask, rows)
        sequence = ((distance - bias / 2) * p_mask.sum(1)).sum()

        value = absolute + self.log_weight * logarithmic + self.sinkhorn_weight * sequence
        value = value + self.cross_entropy_weight * batch.cross_entropy()
        return value / num_items, {"loss/compared_fraction": (paired.sum(), batch.scored_tokens)}

    def _transport(self, x, y, x_mask, y_mask, rows: int) -> torch.Tensor:
        """
        (b,) the cost Σ P C of the entropic plan between the points x (b, S, K) and y (b, T, K), uniformly weighted where
        the masks are True; `rows` of the plan at a time. Both potentials move halfway in each iteration, so that equal
        sets have a symmetric plan.
        """
        log_x, log_y = (
            torch.where(mask, -mask.sum(1, keepdim=True).log(), -torch.inf).to(x.dtype) for mask in (x_mask, y_mask)
        )
        f, g = torch.zeros_like(log_x), torch.zeros_like(log_y)
        with torch.no_grad():
            for _ in range(self.iterations):
                new_f, new_g = [], torch.full_like(g, -torch.inf)
                for part, f_part, log_part in zip(*(t.split(rows, 1) for t in (x, f, log_x)), strict=True):
                    reward = -torch.cdist(part, y, p=1) / self.epsilon
                    new_f.append(-self.epsilon * (reward + (g / self.epsilon + log_y)[:, None]).logsumexp(2))
                    columns = (reward + (f_part / self.epsilon + log_part)[..., None]).logsumexp(1)
                    new_g = torch.logaddexp(new_g, columns)
                f, g = (f + torch.cat(new_f, 1)) / 2, (g - self.epsilon * new_g) / 2

        def cost(part, y, f_part, log_part):
            cost = torch.cdist(part, y, p=1)
            plan = (f_part[..., None] + g[:, None] - cost.detach()) / self.epsilon
            return ((plan + log_part[..., None] + log_y[:, None]).exp() * cost).sum((1, 2))

        parts = zip(*(t.split(rows, 1) for t in (x, f, log_x)), strict=True)
        costs = [
            checkpoint(cost, part, y, f_part, w, use_reentrant=False, preserve_rng_state=False)
            for part, f_part, w in parts
        ]
        return torch.stack(costs).sum(0)


def _ranked(
    side: Distributions, stops: list[int], inside: torch.Tensor, kept: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probs (B, n, `kept`) of each text's likeliest tokens at its n positions `inside`, left-justified, and where there
    are any (B, n).
    """
    row, _ = inside.nonzero(as_tuple=True)
    positions = inside.flatten().nonzero()[:, 0]
    rank = (inside.cumsum(1) - 1)[inside]
    totals = []

    def add(log_probs, row):
        log_probs = with_one_end(log_probs, stops)
        if not totals:
            totals.append(log_probs.new_zeros(len(inside), log_probs.shape[1]))
        totals[0].index_add_(0, row, log_probs.exp())
        return (row,)

    with torch.no_grad():
        over_tiles(add, tile, (side, positions), None, row)
    columns = totals[0].topk(kept).indices  # (B, kept), by falling probability
    (found,) = over_tiles(
        lambda log_probs, row: (with_one_end(log_probs, stops).gather(1, columns[row]),),
        tile,
        (side, positions),
        None,
        row,
    )
    mask = torch.arange(max(1, int(inside.sum(1).max())), device=inside.device) < inside.sum(1, keepdim=True)
    padded = found.new_zeros(*mask.shape, kept).index_put((row, rank), found)
    return padded, mask
