"""GVPO for distillation (arXiv 2609.21432): the log-ratio of whole completions is to be the same for all completions of a prompt.

    D(y) = f(y) · (log p(y) − log q(y)),    f(y) = |y|^−length_power,    loss = variance of D within a prompt's completions

Whole texts are compared, so no chunk is scored by another event than the teacher's, and neither the alignment within a text nor
a share of credit matters. Of a text that is cut off or masked in part, p and q are of the closed chunks that are left (docs/fixed-point.md): of a
whole text their closings cancel, and the log-ratio is that of its tokens. The optimum is that of the reverse KL for text of any writer, so it is valid as an `off_policy_loss` too; on the
student's own text and with f = 1, the expected gradient is that of the sequence-level reverse KL. The noise of a whole text's log-ratio
goes to all of its tokens.

Decisions: half the sample variance times the number of completions, so that the expected gradient on own text is that of Σ_y KL, which is
also the scale of `dpca`. Only chunks that both sides score count on either side (masked text, −inf as −100 nats). |y| are the scored
student tokens. A prompt with fewer than two scored completions in the micro-batch tells nothing and is counted: its completions have to
be in one micro-batch. The paper has one tokenizer.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .base import Loss, Metrics, ScoredChunks
from .credit import floored, gaps


@dataclass
class GVPO(Loss):
    """
    loss = ½ Σ_g n_g · Σ_{y∈g} (D(y) − mean_g D)² / (n_g − 1) / N over prompts g with n_g ≥ 2 completions.

    A perfect student stays where whole texts are scored: D is 0 for each. With what closed chunks read (`ScoredChunks.close_log_probs`,
    `teacher_close_log_probs`), D is 0 too for texts that are cut off, where no later text parts what a token had joined, and for those masked in
    part, but where the markup is masked that tells a thought from an answer.

    Args:
        length_power (`float`, defaults to `0.0`): a of f(y) = |y|^−a; above 0 long texts count less, and the expected gradient on the
            student's own text is no longer the reverse KL's.
    """

    reads_more: ClassVar[bool] = True
    compares_completions: ClassVar[bool] = True
    event: ClassVar[str] = "closed"

    length_power: float = 0.0

    def __post_init__(self):
        if not 0 <= self.length_power < float("inf"):
            raise ValueError(f"gvpo's length_power must be at least 0, got {self.length_power}.")

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        batch = replace(batch, teacher_log_probs=floored(batch.teacher_log_probs))
        scores = batch.student_log_probs, batch.teacher_log_probs, batch.student_chunks, batch.teacher_chunks
        closings = batch.close_log_probs, batch.teacher_close_log_probs
        compared = batch.scorable & ~batch.without_gap
        ratio = -gaps(*scores, batch.num_chunks, *closings)[0].masked_fill(~compared, 0).sum(1)
        lengths = (batch.student_tokens * compared).sum(1)
        ratio = ratio * lengths.clamp(min=1).to(ratio.dtype) ** -self.length_power

        rows, used = len(ratio), lengths > 0
        prompt = torch.zeros(rows, dtype=torch.long, device=ratio.device) if batch.prompts is None else batch.prompts
        prompt = prompt.unique(return_inverse=True)[1]
        per_prompt = lambda values: values.new_zeros(rows).index_add(0, prompt, values * used)  # noqa: E731
        count = per_prompt(torch.ones_like(ratio))
        mean = per_prompt(ratio) / count.clamp(min=1)
        spread = per_prompt((ratio - mean[prompt]).square())
        value = 0.5 * (count * spread / (count - 1).clamp(min=1)).sum()
        alone = (used & (count[prompt] < 2)).sum()
        return value / num_items, {
            "gvpo/log_ratio_std": ((spread / (count - 1).clamp(min=1)).detach().sqrt().sum(), (count > 1).sum()),
            "gvpo/alone_fraction": (alone, used.sum()),
        }
