"""CompassOPD (arXiv 2609.10154): the difference of two teachers as the signal, held to the student's start.

    A_i = Δ_i − α · (log p_i − log p_ref,i),     Δ_c = L_T(c) − L_R(c)

L_T is the teacher's log-prob of chunk c, L_R that of a weak model R of its family (the reference teacher), in the same tokens; p_ref is
the student as it was at the start. What the teacher's family writes anyway cancels, and so does the event that its tokens end at a
place. The student is led to p* ∝ p_ref · exp(Δ/α), not to the teacher.

A perfect student of the teacher does not stay. p* stays where all chunks are one token on each side; where tokens nest, Δ is credited to
student tokens that come too early or too late, and p* moves as well (`tests/losses/test_compass.py`).

Decisions: the paper gives every student token of a chunk the mean of Δ over the chunk's teacher tokens (`share="mean"`), so that a chunk
of m student tokens and n of the teacher's counts m/n times. `share="even"`, not in the paper, gives each Δ_c/m, which keeps the chunk's
sum. A log-prob of -inf counts as -100 nats; a chunk of which a log-prob is NaN takes no part and is counted.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Metrics, ScoredChunks
from .credit import floored, spread
from .policy_gradient import PolicyGradient, check_clip, clipped


COMPASS_SHARES = ("mean", "even")


@dataclass
class Compass(PolicyGradient):
    """
    loss = −Σ_i clip(A_i, ±advantage_clip) · exp(log p_i − sg(log p_i)) / N, with the A_i above.

    Args:
        alpha (`float`, defaults to `0.5`): how strongly the student is held to its start. The paper's; 1 is near, 0 worse.
        share (`str`, defaults to `"mean"`): `"mean"` or `"even"`.
        advantage_clip (`float` or `None`, defaults to `10.0`): bound on |A_i| in nats; `None` for no bound.
        clip_ratio_low, clip_ratio_high: of [`PolicyGradient`].
    """

    reads_more: ClassVar[bool] = True
    reads_start: ClassVar[bool] = True  # `ScoredChunks.reference_log_probs`

    alpha: float = 0.5
    share: str = "mean"
    advantage_clip: float | None = 10.0

    def __post_init__(self):
        super().__post_init__()
        check_clip(self.advantage_clip)
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be a weight of at least 0, got {self.alpha}.")
        if self.share not in COMPASS_SHARES:
            raise ValueError(f"Unknown share {self.share!r}: choose one of {', '.join(COMPASS_SHARES)}.")

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        if batch.reference_teacher_log_probs is None or batch.reference_log_probs is None:
            raise ValueError(
                "CompassOPD reads `ScoredChunks.reference_teacher_log_probs` and `reference_log_probs`, and the batch has not both: the "
                "trainer gives them with `reference_teacher`."
            )
        advantages, used, difference = self._advantages(batch)
        advantages, cut = clipped(advantages, self.advantage_clip)
        value, metrics = self.surrogate(batch, advantages, cut, num_items)
        chunks = batch.student_tokens > 0
        return value, {
            **metrics,
            "compass/difference_nats_per_chunk": (difference.sum(), used.sum()),
            "compass/neutralised_fraction": ((chunks & ~used).sum(), chunks.sum()),
        }

    @torch.no_grad()
    def _advantages(self, batch: ScoredChunks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, S) before the clip; (B, C) the chunks that take part, and Δ of them."""
        sides = (batch.teacher_log_probs, batch.reference_teacher_log_probs)
        theirs, reference = (batch.teacher_sum(floored(side)) for side in sides)
        used = (
            torch.isfinite(theirs) & torch.isfinite(reference) & (batch.student_tokens > 0) & (batch.teacher_tokens > 0)
        )
        difference = (theirs - reference).masked_fill(~used, 0)
        parts = batch.teacher_tokens if self.share == "mean" else batch.student_tokens
        moved = batch.policy_log_probs - batch.reference_log_probs
        advantages = spread(difference / parts.clamp(min=1), batch.student_chunks) - self.alpha * moved
        return advantages * spread(used, batch.student_chunks), used, difference
