"""A completion with both models' log-probs: each chunk's gap, and the credit that a loss gives to each student token.

The credit of a student token is minus the derivative of the loss by the token's log-prob, with N = 1. For `dpca` that is
the advantage A_i itself; for any other loss on log-probs it has the same meaning. Nothing is computed here that the losses
do not compute.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...losses import DPCA, LOSSES, ScoredChunks, loss_name
from ...losses.credit import gaps, shares
from ...rollouts.pairing import Rollout
from ...text.aligner import AlignedTokens, TextAlignment
from ...text.altered_text import MaskedStretch
from .shown import Shown


@dataclass(frozen=True, eq=False)
class ScoredRollout(Shown):
    """
    A completion with both models' log-probs and each student token's credit.

    Attributes:
        alignment (`TextAlignment`): the completion. If the turn's end is scored, it is a last chunk without bytes.
        student_log_probs (S,), teacher_log_probs (T,): of its tokens, in nats.
        student_budget, teacher_budget, gap (C,): each chunk's L_S, L_T and L_T − L_S, in nats; 0 in a chunk that is `neutral`
            (C,): one whose teacher log-probs are not finite.
        advantages (S,): each student token's credit, 0 where it takes no part. Above 0, the token becomes more likely.
        shares (S,): its share w_i of the gap, for a loss that shares gaps (`dpca`); else None.
        nats_per_byte: student minus teacher log-prob of the text, a byte; None if no byte of the text is scored.
        method: name of the loss that gave the credit.
        prompt: what the student answers, if it is to be shown.
    """

    alignment: TextAlignment
    student_log_probs: np.ndarray
    teacher_log_probs: np.ndarray
    student_budget: np.ndarray
    teacher_budget: np.ndarray
    gap: np.ndarray
    neutral: np.ndarray
    advantages: np.ndarray
    shares: np.ndarray | None
    nats_per_byte: float | None
    method: str
    prompt: str | None = None

    @classmethod
    def from_log_probs(
        cls,
        alignment: TextAlignment,
        student_log_probs: Sequence[float],
        teacher_log_probs: Sequence[float],
        credit: str = "semantic",
        advantage_clip: float | None = None,
        prompt: str | None = None,
        loss: Callable | None = None,
        close_log_probs: Sequence[float] | None = None,
        teacher_close_log_probs: Sequence[float] | None = None,
    ) -> "ScoredRollout":
        """
        Scores an alignment with given log-probs.

        Args:
            alignment: the completion; use `with_turn_end` if its end is scored.
            student_log_probs: one for each of `alignment.student_ids`, in nats; any value where a token takes no part.
            teacher_log_probs: one for each of `alignment.teacher_ids`.
            credit, advantage_clip: of [`~trl_ctopd.losses.DPCA`], if `loss` is None.
            prompt: shown above the completion.
            loss: a loss on log-probs from [`~trl_ctopd.losses.build_loss`], or a function of your own.
            close_log_probs: one for each of `alignment.student_ids`, as in `ScoredChunks`. Without them, a loss of closed
                chunks is shown as that of open chunks, and `method` says so.
            teacher_close_log_probs: one for each of `alignment.teacher_ids`, likewise.

        Raises:
            ValueError: the numbers of tokens and log-probs differ, a scored student log-prob is not finite, or the loss does
                not depend on the student's log-probs.
        """
        loss = DPCA(credit=credit, advantage_clip=advantage_clip, event="open") if loss is None else loss
        method = _method(loss)
        if isinstance(loss, DPCA) and loss.event == "closed" and close_log_probs is None:
            loss, method = replace(loss, event="open"), f"{method} of open chunks"
        for side, given, tokens in (
            ("student", student_log_probs, alignment.student_ids),
            ("teacher", teacher_log_probs, alignment.teacher_ids),
        ):
            if len(given) != len(tokens):
                raise ValueError(
                    f"{len(given)} {side} log-probs for {len(tokens)} {side} tokens: give one for each of "
                    f"alignment.{side}_ids (with_turn_end adds the end of the turn to an alignment)."
                )
        own, chunks = _row(student_log_probs, torch.double), _row(alignment.student.chunks, torch.long)
        taking_part = chunks >= 0
        if not torch.isfinite(own[taking_part]).all():
            raise ValueError(f"A scored student log-prob is not finite: {own[taking_part].tolist()}.")
        batch = ScoredChunks(
            student_log_probs=own.masked_fill(~taking_part, 0).requires_grad_(),
            teacher_log_probs=_row(teacher_log_probs, torch.double),
            student_chunks=chunks,
            teacher_chunks=_row(alignment.teacher.chunks, torch.long),
            student_widths=_row(alignment.student.widths, torch.long),
            num_chunks=max(1, alignment.num_chunks),
            student_ids=_row(alignment.student_ids, torch.long),
            teacher_ids=_row(alignment.teacher_ids, torch.long),
            close_log_probs=None if close_log_probs is None else _row(close_log_probs, torch.double),
            teacher_close_log_probs=None
            if teacher_close_log_probs is None
            else _row(teacher_close_log_probs, torch.double),
        )
        log_probs = batch.student_log_probs.detach()
        gap, neutral = gaps(
            log_probs, batch.teacher_log_probs, batch.student_chunks, batch.teacher_chunks, batch.num_chunks
        )
        num_bytes = batch.student_sum(batch.student_widths).masked_fill(neutral, 0).sum().item()
        own_shares = None
        if isinstance(loss, DPCA) and loss.signal == "logprobs":
            own_shares = shares(loss.credit, log_probs, batch.student_chunks, batch.student_widths, batch.num_chunks)
        real = slice(alignment.num_chunks)
        return cls(
            alignment=alignment,
            student_log_probs=own[0].numpy(),
            teacher_log_probs=batch.teacher_log_probs[0].numpy(),
            student_budget=batch.student_sum(log_probs)[0, real].numpy(),
            teacher_budget=batch.teacher_sum(batch.teacher_log_probs)[0, real].numpy(),
            gap=gap[0, real].numpy(),
            neutral=neutral[0, real].numpy(),
            advantages=_credit(loss, batch)[0].numpy(),
            shares=None if own_shares is None else own_shares[0].numpy(),
            nats_per_byte=-gap.sum().item() / num_bytes if num_bytes else None,
            method=method,
            prompt=prompt,
        )

    @classmethod
    def from_batch(
        cls,
        rollout: Rollout,
        batch: ScoredChunks,
        row: int,
        loss: Callable | None = None,
        prompt: str | None = None,
    ) -> "ScoredRollout":
        """
        Shows a row of the trainer's scored micro-batch.

        Args:
            rollout: what `rollouts.pair` returned for that row; calling it again with the same ids gives the same.
            batch: as the loss gets it. Chunks of `rollout` that it leaves out are shown as not compared. Student positions are those of prompt and completion without the first token.
            row: index of the row.
            loss, prompt: as in `from_log_probs`.
        """
        first = len(rollout.prompt.student_ids) - 1
        own, theirs = slice(first, first + len(rollout.student_ids)), slice(len(rollout.teacher_ids))
        close, teacher_close = batch.close_log_probs, batch.teacher_close_log_probs
        chunks, _ = batch.compared_chunks
        return cls.from_log_probs(
            as_compared(alignment_of(rollout), chunks[row, own].tolist()),
            batch.student_log_probs[row, own].tolist(),
            batch.teacher_log_probs[row, theirs].tolist(),
            prompt=prompt,
            loss=loss,
            close_log_probs=None if close is None else close[row, own].tolist(),
            teacher_close_log_probs=None if teacher_close is None else teacher_close[row, theirs].tolist(),
        )


def alignment_of(rollout: Rollout) -> TextAlignment:
    """The rollout's alignment as it is scored: with the turn end, and without any chunk where the teacher cannot or is not to read it."""
    content, end = rollout.alignment, len(rollout.alignment._spelled)
    ends = rollout.num_chunks - content.num_chunks
    if rollout.unread or ends < 0:
        reason = "teacher_context" if rollout.unread else "left_out"  # by a gate, as a whole
        spans, masked = content._spans[:0], [MaskedStretch(0, end, reason)] * (end > 0)
    else:
        spans, masked = np.concatenate([content._spans, np.full((ends, 2), end)]), content.masked
    teacher_widths = np.zeros(len(rollout.teacher_ids), dtype=np.int64)
    read = content.teacher.widths[: len(rollout.teacher_ids)]
    teacher_widths[: len(read)] = read
    return replace(
        content,
        student=AlignedTokens(rollout.student_ids, rollout.student_chunks, rollout.student_widths),
        teacher=AlignedTokens(rollout.teacher_ids, rollout.teacher_chunks, teacher_widths),
        num_chunks=rollout.num_chunks,
        masked=masked,
        _spans=spans,
        from_tools=(content.from_tools[0], content.from_tools[1] if rollout.teacher_ids else 0),
    )


def as_compared(alignment: TextAlignment, student_chunks: Sequence[int]) -> TextAlignment:
    """`alignment` with the chunks that a run compared. `student_chunks` (S,): the run's, in which those of `alignment` are joined
    or, with -1, left out."""
    own, kept = alignment.student.chunks, np.asarray(student_chunks, dtype=np.int64)
    inside = (own >= 0) & (kept >= 0)
    names, numbers = np.unique(kept[inside], return_inverse=True)
    number = np.full(alignment.num_chunks + 1, -1)  # of each of its chunks; the last is for tokens without one
    number[own[inside]] = numbers
    compared, spans = number[:-1] >= 0, alignment._spans
    left_out = [MaskedStretch(start, end, "left_out") for start, end in spans[~compared].tolist() if start < end]
    first = np.flatnonzero(np.diff(number[:-1][compared], prepend=-1))
    starts, ends = spans[compared].T
    return replace(
        alignment,
        student=replace(alignment.student, chunks=number[own]),
        teacher=replace(alignment.teacher, chunks=number[alignment.teacher.chunks]),
        num_chunks=len(names),
        masked=sorted([*alignment.masked, *left_out], key=lambda stretch: stretch.start),
        _spans=np.stack([np.minimum.reduceat(starts, first), np.maximum.reduceat(ends, first)], axis=1),
    )


def with_turn_end(alignment: TextAlignment, student_id: int, teacher_ids: Sequence[int]) -> TextAlignment:
    """`alignment` with the end of the turn added: a chunk without bytes, of the student's stop token and of what the teacher's
    template writes there."""
    if not teacher_ids:
        raise ValueError("teacher_ids is empty: a turn end without tokens would cost the teacher nothing.")
    end, chunk = len(alignment._spelled), alignment.num_chunks
    student, teacher = (
        AlignedTokens(
            [*side.ids, *ids],
            np.append(side.chunks, [chunk] * len(ids)),
            np.append(side.widths, [0] * len(ids)),
        )
        for side, ids in ((alignment.student, [student_id]), (alignment.teacher, teacher_ids))
    )
    spans = np.concatenate([alignment._spans, [[end, end]]])
    return replace(alignment, student=student, teacher=teacher, num_chunks=chunk + 1, _spans=spans)


def _row(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values), dtype=dtype)[None].clone()


def _method(loss: Callable) -> str:
    name = next((name for name, kind in LOSSES.items() if type(loss) is kind), loss_name(loss))
    return f"{name}, {loss.credit} credit" if isinstance(loss, DPCA) else name


def _credit(loss: Callable, batch: ScoredChunks) -> torch.Tensor:
    """(1, S) −∂loss/∂log p_i with N = 1."""
    if getattr(loss, "signal", "logprobs") == "logits":
        raise ValueError(f"{loss_name(loss)} reads whole distributions: the credit of a token is not a single number.")
    if getattr(loss, "reads_more", False):
        raise ValueError(
            f"{loss_name(loss)} reads more than the two models' log-probs of one text: the credit of its tokens cannot be shown alone."
        )
    with torch.enable_grad():
        value, _ = loss(batch, 1)
    if not value.requires_grad:
        raise ValueError(f"{loss_name(loss)} does not depend on the student's log-probs, so no token has a credit.")
    [slope] = torch.autograd.grad(value, batch.student_log_probs)
    return -slope.detach()
