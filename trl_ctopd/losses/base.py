"""What every loss is given and what it declares: the one call behind which all methods stand."""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from ..credit import chunk_sum


Metrics = dict[str, tuple[torch.Tensor, torch.Tensor]]  # name -> (sum, weight); the logged figure is sum / weight


@dataclass
class ScoredChunks:
    """
    A micro-batch of completions, written down once and scored by both models.

    Args:
        student_log_probs (`torch.Tensor` of shape (B, S)): log-prob of each student token in nats, with gradient.
        teacher_log_probs (`torch.Tensor` of shape (B, T)): log-prob of each teacher token in nats, without.
        student_chunks (`torch.LongTensor` of shape (B, S)): chunk of each student token in its row, -1 for no part.
        teacher_chunks (`torch.LongTensor` of shape (B, T)): chunk of each teacher token in its row, -1 for no part.
        student_widths (`torch.LongTensor` of shape (B, S)): bytes of text each student token spells.
        num_chunks (`int`): C, at least 1 and more than any chunk number.
    """

    student_log_probs: torch.Tensor
    teacher_log_probs: torch.Tensor
    student_chunks: torch.Tensor
    teacher_chunks: torch.Tensor
    student_widths: torch.Tensor
    num_chunks: int

    def student_sum(self, values: torch.Tensor) -> torch.Tensor:
        """(B, S) in, sums over each chunk (B, C) out."""
        return chunk_sum(values, self.student_chunks, self.num_chunks)

    def teacher_sum(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T) in, sums over each chunk (B, C) out."""
        return chunk_sum(values, self.teacher_chunks, self.num_chunks)


@dataclass
class Loss:
    """
    Base of the losses: a dataclass of the method's own knobs, called with a scored micro-batch.

    `signal` says what the teacher must deliver a token: `"logprobs"` (of the token it read), `"none"`. `policy` says on
    whose text the loss is right: `"on"` (text the student wrote), `"off"` (text it did not), `"both"`.
    """

    signal: ClassVar[str] = "logprobs"
    policy: ClassVar[str] = "both"

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        """
        Args:
            batch (`ScoredChunks`): the micro-batch.
            num_items (`torch.Tensor` or `int`): N, the scored student tokens of the whole optimizer step.

        Returns:
            The loss (scalar, a sum over the micro-batch divided by N) and the method's own metrics.
        """
        raise TypeError(f"{type(self).__name__} does not define __call__")

    @classmethod
    def build(cls, name: str, kwargs: dict) -> "Loss":
        """The loss with its knobs set; an unknown key is an error that lists the known ones."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            raise ValueError(
                f"{name!r} has no setting {', '.join(map(repr, unknown))}: it takes {', '.join(known) or 'none'}."
            )
        return cls(**kwargs)
