"""KAT (arXiv 2606.09471): a rollout ends where the student has for long agreed with the teacher, since little is to be learned there.

    d_i            a token's share of its chunk's divergence
    z_t            mean of d over the last `window` tokens up to t
    cut            where z stays below a threshold for `patience` tokens, back to the start of the first of these windows
    threshold      the `quantile` of the lowest z of each of the last `memory` rollouts

The paper has one tokenizer and reads KL(p_t ‖ q_t) at every token. Here a chunk's log-probs are enough: with gap = L_T − L_S,

    d_c = e^gap − 1 − gap ≥ 0, whose expectation over the student's chunks is the reverse KL plus (mass of the teacher − 1),

spread evenly over the chunk's student tokens.

Decisions: the gap is capped at `GAP_CAP`, else one chunk decides for its whole window; a teacher's −inf counts as `FLOOR`, as in
dpca. A rollout that was cut goes into the memory
like all others: a quantile needs ranks alone, and a cut rollout's lowest z is below the threshold with or without its end. If cut
rollouts were left out, the threshold would rise with every cut.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .credit import FLOOR


GAP_CAP = 5.0  # nats


def divergences(
    student_log_probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    student_chunks: torch.Tensor,
    teacher_chunks: torch.Tensor,
) -> torch.Tensor:
    """
    d_i of one completion's tokens.

    Args:
        student_log_probs (`torch.Tensor` of shape (S,)), teacher_log_probs (`torch.Tensor` of shape (T,)): in nats.
        student_chunks (`torch.LongTensor` of shape (S,)), teacher_chunks (`torch.LongTensor` of shape (T,)): chunk of each, -1
            for no part.

    Returns:
        (S,) in nats, at least 0; NaN for tokens that take no part, and in chunks without tokens on both sides or with a log-prob
        that is NaN.
    """
    count = 1 + max([-1, *student_chunks.tolist(), *teacher_chunks.tolist()])
    sums, tokens = [], []
    for values, chunks in ((student_log_probs, student_chunks), (teacher_log_probs, teacher_chunks)):
        inside = chunks >= 0
        own = torch.zeros(count, dtype=torch.float64)
        sums.append(own.index_add(0, chunks[inside], values[inside].double()))
        tokens.append(own.index_add(0, chunks[inside], torch.ones(int(inside.sum()), dtype=torch.float64)))
    gap = (sums[1] - sums[0]).clamp(FLOOR, GAP_CAP)
    per_token = ((gap.expm1() - gap) / tokens[0]).masked_fill((tokens[0] == 0) | (tokens[1] == 0), torch.nan)
    found = torch.full(student_chunks.shape, torch.nan, dtype=torch.float64)
    inside = student_chunks >= 0
    found[inside] = per_token[student_chunks[inside]]
    return found


@dataclass
class KAT:
    """
    The paper's rule and its settings.

    Args:
        window (`int`): tokens of a window.
        patience (`int`): windows in a row, each one token further, that are below the threshold where a rollout ends.
        quantile (`float`): of the rollouts' lowest windows, 1 − η in the paper. If no rollout were cut, so large a share of them
            would have a window below the threshold.
        memory (`int`): rollouts whose lowest windows are kept.
        warmup_steps (`int`), warmup_rollouts (`int`): optimizer steps, and rollouts in the memory, before any is cut.
        exempt (`int`): tokens at the beginning of a rollout in which no window begins. The paper has such a zone, of a length that
            depends on the student.
    """

    window: int = 64
    patience: int = 4
    quantile: float = 0.7
    memory: int = 4096
    warmup_steps: int = 50
    warmup_rollouts: int = 512
    exempt: int = 0

    def __post_init__(self):
        for name, least in (
            ("window", 1),
            ("patience", 1),
            ("memory", 1),
            ("warmup_steps", 0),
            ("warmup_rollouts", 1),
            ("exempt", 0),
        ):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"KAT's {name} must be a whole number of at least {least}, got {value!r}.")
        if not 0 < self.quantile < 1:
            raise ValueError(f"KAT's quantile must be between 0 and 1, got {self.quantile!r}.")
        if self.warmup_rollouts > self.memory:
            raise ValueError(
                f"KAT's warmup_rollouts={self.warmup_rollouts} is more than its memory={self.memory} holds: no rollout would be cut."
            )
        self.lowest: deque[float] = deque(maxlen=self.memory)

    def means(self, divergence: torch.Tensor) -> torch.Tensor:
        """z of every window: (n,) divergences of the tokens that take part in, (n − window + 1,) out, none of a shorter text. The
        first `exempt` windows are left out."""
        if len(divergence) < self.window:
            return divergence[:0]
        return divergence.unfold(0, self.window, 1).mean(1)[self.exempt :]

    def cut(self, means: torch.Tensor, threshold: float | None) -> int | None:
        """How many of the tokens are kept: those before the first of `patience` low windows in a row. `None`: all of them."""
        if threshold is None:
            return None
        run = 0
        for place, low in enumerate((means < threshold).tolist()):
            run = run + 1 if low else 0
            if run == self.patience:
                return self.exempt + place - self.patience + 1
        return None

    def threshold(self, step: int) -> float | None:
        """Of optimizer step `step`, counted from 0; `None` while no rollout is cut."""
        if step < self.warmup_steps or len(self.lowest) < self.warmup_rollouts:
            return None
        return torch.tensor(list(self.lowest), dtype=torch.float64).quantile(self.quantile).item()

    def remember(self, lowest: Iterable[float]):
        """Takes in the lowest window of each rollout that has one, the oldest first."""
        self.lowest.extend(lowest)
