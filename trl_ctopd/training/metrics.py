"""What is logged: every figure is a sum over a weight, so that it can be added up over micro-batches and processes."""

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object

from ..losses import Metrics, ScoredChunks
from ..losses.credit import closing, gaps


logger = get_logger(__name__)

_MUCH_MASKED = 0.2  # the real tokenizers' own share on random text is under 0.03


def warn_of_much_masked(figures: dict[str, float]):
    """Where little of the text takes part, the other figures say little too."""
    if figures.get("alignment/masked_fraction", 0) > _MUCH_MASKED:
        logger.warning(
            f"{figures['alignment/masked_fraction']:.0%} of the student's tokens take no part (why: masked_bytes/* "
            "and alignment/teacher_context_exceeded_fraction). "
            "Masked text costs the student nothing, and the gap says nothing of it: look at the completions "
            "(log_completions=True), and lower the learning rate if the share grows."
        )


def is_unmeasured(metric: str | None, unmeasured: set[str]) -> bool:
    """Whether the evaluation had nothing of which `metric_for_best_model` is a figure, with a warning: no byte was compared, for example."""
    found = metric is not None and f"eval_{metric.removeprefix('eval_')}" in unmeasured
    if found:
        logger.warning(
            f"metric_for_best_model={metric!r}: this evaluation has no such figure, since there was nothing to measure (answers without text, or all of "
            "it masked). It is not the best."
        )
    return found


@torch.no_grad()
def chunk_metrics(
    batch: ScoredChunks,
    entropy: torch.Tensor,
    padding_rows: torch.Tensor | None = None,
    closings_told: torch.Tensor | None = None,
    on_policy: bool = True,
) -> Metrics:
    """
    The figures every method shares. Log-probs of the turn's end count, its zero bytes do not; neutralised chunks, and those of
    `ScoredChunks.unclosed`, count in neither.

    Args:
        batch (`ScoredChunks`): the micro-batch.
        entropy (`torch.Tensor` of shape (B, S)): of the student's next-token distribution, in nats.
        padding_rows (`torch.BoolTensor` of shape (B,), *optional*): True for padding rows, which count nowhere.
        closings_told (`torch.BoolTensor` of shape (B,), *optional*): True for rows whose `teacher_close_log_probs` are told; `None`: for all.
        on_policy (`bool`, defaults to `True`): whether the student wrote the text. If not, the names of the gap, of the two models' nats
            and of the entropy begin with `given/`.

    Returns:
        `gap/nats_per_byte`: student minus teacher log-prob of the text, the sampled reverse KL a byte; the two models'
        own nats a byte; token and chunk counts of the alignment, and the texts of which nothing is scored; what a chunk's
        end costs under the teacher, where that is known, in nats; entropy in nats a token.
    """
    student = batch.student_log_probs.detach()
    gap, neutral = gaps(student, batch.teacher_log_probs, batch.student_chunks, batch.teacher_chunks, batch.num_chunks)
    gap, left_out = gap.masked_fill(batch.without_gap, 0), neutral | batch.without_gap
    m, k = batch.student_tokens, batch.teacher_tokens
    student_nats = -batch.student_sum(student).masked_fill(left_out, 0).sum()
    num_bytes = batch.student_sum(batch.student_widths).masked_fill(left_out, 0).sum()
    chunks = (m > 0).sum()
    scored = batch.student_chunks >= 0
    unscored = ~batch.scorable.any(1)
    impossible = batch.teacher_sum((batch.teacher_log_probs == -torch.inf).long()) > 0
    spelled = {}
    if (other := batch.spelled_otherwise) is not None:
        spelled = {
            "spelling/other_fraction": (batch.other_spelling.sum(), scored.sum()),
            "spelling/chunks_fraction": (other.sum(), chunks),
        }
    closed = {}
    if batch.teacher_close_log_probs is not None:
        _, after = closing(batch.teacher_close_log_probs, batch.teacher_chunks, batch.num_chunks)
        counted = (m > 0) & ~left_out
        if closings_told is not None:
            counted &= closings_told.to(counted.device)[:, None]
        closed = {"closing/teacher_nats_per_chunk": (-after.masked_fill(~counted, 0).sum(), counted.sum())}
    rows = torch.ones_like(unscored) if padding_rows is None else ~padding_rows
    whose = "" if on_policy else "given/"
    return {
        f"{whose}gap/nats_per_byte": (-gap.sum(), num_bytes),
        f"{whose}student/nats_per_byte": (student_nats, num_bytes),
        f"{whose}teacher/nats_per_byte": (student_nats - gap.sum(), num_bytes),
        f"{whose}entropy": ((entropy * scored).sum(), scored.sum()),
        "alignment/one_to_one_fraction": (((m == 1) & (k == 1)).sum(), scored.sum()),
        "alignment/student_tokens_per_chunk": (m.sum(), chunks),
        "alignment/teacher_tokens_per_chunk": (k.sum(), chunks),
        "alignment/neutralised_fraction": (neutral.sum(), chunks),
        "alignment/unscored_fraction": ((unscored & rows).sum(), rows.sum()),
        "teacher/impossible_fraction": (impossible.sum(), chunks),
        **spelled,
        **closed,
    }


class Meter:
    """
    Adds up metrics where they are, on the device or on the host, and brings them together over processes only when they are read.

    Attributes:
        without_weight: the figures that the last `read` left out, since nothing was measured.
    """

    def __init__(self):
        self.without_weight: set[str] = set()
        self._numbers: dict[str, list[float]] = {}
        self._tensors: dict[tuple[str, ...], torch.Tensor] = {}  # of the metrics that came together, (K, 2)

    def clear(self):
        """Forgets what nobody has read: an evaluation that was interrupted, figures of a prediction."""
        self._numbers.clear()
        self._tensors.clear()

    def add(self, metrics: Metrics | dict[str, tuple[float, float]]):
        for name, pair in metrics.items():
            if not (isinstance(pair, tuple) and len(pair) == 2):
                raise TypeError(f"Metric {name!r} must be a pair (sum, weight), got {pair!r}.")
        tensors = {name: pair for name, pair in metrics.items() if any(isinstance(part, torch.Tensor) for part in pair)}
        for name in metrics.keys() - tensors.keys():
            total, weight = metrics[name]
            known = self._numbers.setdefault(name, [0.0, 0.0])
            known[0], known[1] = known[0] + total, known[1] + weight
        if tensors:
            parts = [torch.as_tensor(part).detach().float() for pair in tensors.values() for part in pair]
            device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
            found = torch.stack([part.to(device) for part in parts]).view(-1, 2)
            names = tuple(tensors)
            self._tensors[names] = found + self._tensors[names] if names in self._tensors else found

    def read(self, accelerator) -> dict[str, float]:
        """All figures over all processes, in the order of their names; the meter starts anew. Every process must call
        it; one that has nothing to say of a figure takes no part in it. A figure without weight is left out. The time of a phase,
        `seconds/*`, is a mean over the steps of `seconds/step`, whether these had the phase or not."""
        found = [pair for names, pairs in self._tensors.items() for pair in zip(names, pairs, strict=True)]
        found += [(name, torch.tensor(pair, dtype=torch.float32)) for name, pair in self._numbers.items()]
        sums: dict[str, torch.Tensor] = {}
        for name, pair in found:
            sums[name] = sums.get(name, 0) + pair.to(accelerator.device)
        self.clear()
        self.without_weight = set()
        names = sorted(set(gather_object(list(sums))))
        if not names:
            return {}
        nothing = torch.zeros(2, device=accelerator.device)
        own = torch.stack([sums.get(name, nothing) for name in names])
        totals = dict(zip(names, accelerator.reduce(own, reduction="sum").tolist(), strict=True))
        if "seconds/step" in totals:  # a phase may be in some steps and on some processes alone
            steps = totals["seconds/step"][1]
            totals.update({name: (total, steps) for name, (total, _) in totals.items() if name.startswith("seconds/")})
        self.without_weight = {name for name, (_, weight) in totals.items() if weight <= 0}
        return {name: total / weight for name, (total, weight) in totals.items() if weight > 0}
