"""Distances between distributions, one number a row. Zeros are allowed: 0 · log 0 = 0, with a gradient of 0."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch.nn.functional import pad


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) = Σ p (log p − log q) of log-probs (n, V), in nats; -inf where p has nothing."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)


def generalized_jsd(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """
    β KL(q ‖ m) + (1 − β) KL(p ‖ m) of probabilities (n, V), with m = (1 − β) p + β q; the forward KL(q ‖ p) at β = 0,
    the reverse KL(p ‖ q) at β = 1 (GKD, arXiv 2306.13649, with p the student).
    """
    if beta == 0:
        return _kl(q, p)
    if beta == 1:
        return _kl(p, q)
    mixture = (1 - beta) * p + beta * q
    return beta * _kl(q, mixture) + (1 - beta) * _kl(p, mixture)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    tiny = torch.finfo(p.dtype).tiny
    return (p * (p.clamp(min=tiny).log() - q.clamp(min=tiny).log())).sum(-1)


def with_one_end(log_probs: torch.Tensor, stops: Sequence[int]) -> torch.Tensor:
    """Log-probs (n, V) with a turn's end as one outcome: of several `stops`, which are in order, none has a column, and all together have
    the last."""
    if len(stops) < 2:
        return log_probs
    others = [log_probs[:, before + 1 : stop] for before, stop in pairwise([-1, *stops, log_probs.shape[1]])]
    return torch.cat([*others, log_probs[:, stops].logsumexp(-1, keepdim=True)], 1)


def sorted_l1(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Σ |sort(p) − sort(q)|, in descending order, the shorter padded with zeros: the Wasserstein distance of two
    vocabularies of which nothing is known (ULD, arXiv 2402.12030)."""
    width = max(p.shape[-1], q.shape[-1])
    p, q = (pad(x.sort(-1, descending=True).values, (0, width - x.shape[-1])) for x in (p, q))
    return (p - q).abs().sum(-1)
