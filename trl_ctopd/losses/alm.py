"""ALM, approximate likelihood matching (arXiv 2503.20083): match each chunk's probability under both models.

Right on any text, since it compares likelihoods and samples nothing. The paper's binary KL shrinks with 1/τ; here it is
multiplied by τ, so that τ → ∞ is the paper's limit form and the scale is that of a KL in nats, next to which another
loss can stand in one optimizer step. A perfect student stays only where all chunks are one token on each side
(docs/fixed-point.md).
"""

from dataclasses import dataclass

import torch

from .base import Loss, Metrics, ScoredChunks


_FLOOR = (
    1e-6  # nats off every chunk log-prob, so that log(1 − p) exists; the paper's code takes it off after dividing by τ
)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 − exp(x)) for x < 0, accurate at both ends. Each branch is kept off the other's end, where its slope is
    NaN.
    """
    near, far = x.clamp(min=-0.6931), x.clamp(max=-0.6931)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32: half precision has no digits for 1 − p^{1/τ}."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class ALM(Loss):
    """
    loss = Σ_c τ · KL( Bernoulli(q_c^{1/τ}) ‖ Bernoulli(p_c^{1/τ}) ) / N, with log q_c = L_T and log p_c = L_S;
    for τ = ∞: a · ln(a / b) − a + b with a = −L_T, b = −L_S.

    A perfect student stays only where all chunks are one token on each side.

    Args:
        temperature (`float`, defaults to `100.0`): τ; `float("inf")` for the limit.
    """

    temperature: float = 100.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        teacher = batch.teacher_sum(_wide(batch.teacher_log_probs))
        used = torch.isfinite(teacher) & (batch.student_sum(torch.ones_like(batch.student_log_probs)) > 0)
        student = batch.student_sum(_wide(batch.student_log_probs)).clamp(max=0) - _FLOOR
        teacher = torch.where(used, teacher, torch.zeros_like(teacher)).clamp(max=0) - _FLOOR
        divergence = torch.where(used, self._divergence(teacher, student), torch.zeros_like(student))
        return divergence.sum() / num_items, {}

    def _divergence(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        if self.temperature == float("inf"):
            return teacher * (student / teacher).log() + teacher - student
        teacher, student = teacher / self.temperature, student / self.temperature
        agree = torch.exp(teacher) * (teacher - student)
        differ = -torch.expm1(teacher) * (_log1mexp(teacher) - _log1mexp(student))
        return self.temperature * (agree + differ)
