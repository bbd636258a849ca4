"""Sequence-level distillation: cross-entropy on completions the student did not write (Kim & Rush, 1606.07947).

With `seq_kd=True` the teacher writes the completions, otherwise they are the dataset's references.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import Loss, Metrics, ScoredChunks


@dataclass
class SFT(Loss):
    """
    loss = −Σ_i log p_i / N over the scored student tokens.

    A perfect student stays where whole texts are scored. It moves where what is left out depends on what was drawn.
    """

    signal: ClassVar[str] = "none"
    policy: ClassVar[str] = "off"

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        return batch.cross_entropy() / num_items, {}
