"""DPCA (arXiv 2606.09456): the reverse-KL policy gradient, its signal scaled chunk by chunk; and the same with closed chunks.

The paper compares a chunk's log-prob under the teacher with that of the same tokens under the student. These are two events:
a teacher that writes "5" has said that the number ends there, else it would have written "53"; a student that writes "5"
has not. So a student that equals its teacher is moved (docs/fixed-point.md). `event="closed"`, the default, compares like with
like: the chunk's tokens *and* that the last token of either side is closed at its end.

Decisions: advantages are detached and clipped to ±`advantage_clip`. A teacher's log-prob of -inf counts as -100 nats, so that
the clip decides; a chunk whose teacher budget is NaN takes no part and is counted. With closed chunks, the gap of one that the
student spelled otherwise than its tokenizer spells that text is at most 0.
Where the published code differs: it drops chunks of more than six tokens, divides by L_S without the limit at zero, and
masks everything after the first place where its aligner gets stuck; here none of that is needed.
"""

from dataclasses import dataclass, replace

import torch

from .base import Metrics, ScoredChunks
from .baseline import BASELINES, next_token_kl
from .credit import CREDITS, closing, floored, gaps, outer_positions, previous_gaps, shares, spread
from .policy_gradient import PolicyGradient, check_clip, clipped
from .prefix_credit import PREFIX_CREDITS, prefix_advantages


EVENTS = ("closed", "open")


@dataclass
class DPCA(PolicyGradient):
    """
    With open chunks

        loss = −Σ_i clip(A_i, ±advantage_clip) · exp(log p_i − sg(log p_i)) / N,  A_i = (L_T − L_S) · w_i,

    and PPO's clipped ratio in place of the exponential where completions are used again. With closed chunks, in which
    p_close(c) is the student's probability to leave the teacher's last token of chunk c closed at its end,

        loss = −Σ_c [Σ_{i∈c} clip(w_i G_c) log p_i + clip(G_c) (log p_close(c) − log p_close(c − 1))] / N,  clip at ±advantage_clip,

    G_c = L_T(c) − log q_close(c − 1) + log q_close(c) − [L_S(c) − log p_close(c − 1) + log p_close(c)]: the same gap for the whole
    text. q_close(c) is the teacher's probability to leave the student's last token closed (`ScoredChunks.teacher_close_log_probs`; 1
    where the batch does not have it).

    A perfect student stays where no later text parts what a token had joined, with closed chunks and whatever the credit: G_c is then 0.
    (Where later digits do, the trainer joins the chunks.) Without q_close it moves, too, where its tokens hold several of the teacher's.
    With open chunks it stays only where all chunks are one token on each side.

    Args:
        credit (`str`, *optional*): how a chunk's gap is shared among its student tokens, see
            [`~trl_ctopd.losses.credit.shares`]. `None`: `"macro"` for closed chunks, `"semantic"`, the paper's, for open
            ones. `"previous"`, for open ones alone: `"macro"`, and a chunk's first token, which is what closed the chunk
            before, answers for the gap of that one too: with log-probs alone, more noise, and less of the open chunks' drift.
            `"prefix"` and `"remaining"`: by what the teacher's distributions say of the beginning of a chunk, for a teacher in
            this process; see [`~trl_ctopd.losses.prefix_credit.prefix_advantages`]. `"remaining"` has the expectation of `"macro"`
            and less noise, `"prefix"` another expectation and the least noise near the teacher. With closed chunks a perfect
            student stays as it does with the others, but with `"prefix"` not where tokens of both sides overlap. With open ones it moves: on numbers, `"remaining"` has the drift of
            `"macro"`, and `"prefix"` .75 of it.
        advantage_clip (`float` or `None`, defaults to `10.0`): bound on |A_i|, or |w_i G_c| and |G_c|, in nats; `None` for no bound.
        event (`str`, *optional*): `"closed"`, which reads `ScoredChunks.close_log_probs`, or `"open"`, the paper's. `None`:
            `"closed"`, but `"open"` with credit `"previous"`, and on a batch of log-probs alone, as a loop of one's own may
            have; the trainer's batches have what closed chunks read.
        baseline (`str`, *optional*): `"kl"` adds to each gap what is expected of it where its chunk begins, against noise: see
            `losses/baseline.py` (vOPD, arXiv 2605.07865). It reads both models' distributions. With closed chunks and credit
            `"macro"` or `"remaining"` the expected gradient stays what it is; with another credit, or open chunks where tokens
            nest, it does not. A perfect student stays where it does without; where open chunks drive it away, it goes faster.
        baseline_top_k (`int`, *optional*): how many of the teacher's likeliest tokens the baseline reads, which a server tells
            too. `None`: all, for a teacher in this process.
        clip_ratio_low, clip_ratio_high: of [`PolicyGradient`].
    """

    credit: str | None = None
    advantage_clip: float | None = 10.0
    event: str | None = None
    baseline: str | None = None
    baseline_top_k: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self._open = None  # takes the place of this loss on a batch of log-probs alone
        if self.event is None and self.credit != "previous":
            self._open = replace(self, event="open")
        if self.event is None:
            self.event = "open" if self.credit == "previous" else "closed"
        if self.event not in EVENTS:
            raise ValueError(f"Unknown event {self.event!r}: choose one of {', '.join(EVENTS)}.")
        if self.credit is None:
            self.credit = "macro" if self.event == "closed" else "semantic"
        known = (*CREDITS, *PREFIX_CREDITS)
        if self.credit not in known:
            raise ValueError(f"Unknown credit {self.credit!r}: choose one of {', '.join(known)}.")
        if self.credit in PREFIX_CREDITS:
            self.signal, self.structures = "logits", ("prefixes",)
            self.reads_because = f" with credit={self.credit!r}"
        if self.baseline is not None and self.baseline not in BASELINES:
            raise ValueError(f"Unknown baseline {self.baseline!r}: choose one of {', '.join(BASELINES)}, or None.")
        if self.baseline_top_k is not None and (self.baseline is None or self.baseline_top_k < 1):
            raise ValueError(
                f"baseline_top_k={self.baseline_top_k} with baseline={self.baseline!r}: it is at least 1, and needs baseline='kl'."
            )
        if self.baseline is not None and self.credit not in PREFIX_CREDITS:
            self.signal, self.structures = "logits", ("prefixes",)
            self.reads_because = f" with baseline={self.baseline!r} and baseline_top_k={self.baseline_top_k}"
        if (self.credit, self.event) == ("previous", "closed"):
            raise ValueError(
                "credit='previous' hands on what a closed chunk accounts for itself: set event='open', or credit='macro'."
            )
        check_clip(self.advantage_clip)

    @property
    def likeliest(self) -> int | None:
        return None if self.credit in PREFIX_CREDITS else self.baseline_top_k

    def __call__(self, batch: ScoredChunks, num_items: torch.Tensor | int) -> tuple[torch.Tensor, Metrics]:
        if self._open is not None and batch.policy_close_log_probs is None:
            return self._open(batch, num_items)
        advantages, close, told = self._advantages(batch)
        advantages, cut = clipped(advantages, self.advantage_clip)
        if self.event == "open":
            value, metrics = self.surrogate(batch, advantages, cut, num_items)
            return value, {**metrics, **told}
        value, metrics = self.surrogate(batch, advantages, cut, num_items, close)
        metrics |= told
        _, after = closing(batch.close_log_probs.detach(), batch.student_chunks, batch.num_chunks)
        return value, {**metrics, "closing/nats_per_chunk": (-after.sum(), (batch.student_tokens > 0).sum())}

    @torch.no_grad()
    def advantages(self, batch: ScoredChunks) -> tuple[torch.Tensor, torch.Tensor]:
        """A_i of shape (B, S), 0 where a token takes no part, and where the clip took hold (B, S)."""
        return clipped(self._advantages(batch)[0], self.advantage_clip)

    @torch.no_grad()
    def _advantages(self, batch: ScoredChunks) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        """(B, S) of the tokens before the clip, (B, S) of log p_close at each position, clipped, and the metrics of what was read."""
        plain, metrics = self._gaps(batch), {}
        gap = plain
        if self.baseline is not None:
            kl, told = next_token_kl(batch, self.event == "closed", self.advantage_clip, self.baseline_top_k)
            gap, chunks = plain + kl, batch.scorable.sum()
            metrics = {"baseline/nats_per_chunk": (kl.sum(), chunks), "baseline/told_fraction": (told.sum(), chunks)}
        ended = gap
        if self.credit in PREFIX_CREDITS:
            close = batch.policy_close_log_probs if self.event == "closed" else None
            (tokens, ended), unknown = prefix_advantages(self.credit, batch, gap, close)
            metrics["credit/without_prefix_fraction"] = (unknown.sum(), (batch.student_tokens > 0).sum())
        else:
            sides = batch.student_chunks, batch.student_widths, batch.num_chunks
            tokens = spread(gap, batch.student_chunks) * shares(self.credit, batch.policy_log_probs, *sides)
        if self.credit == "previous":
            tokens = tokens + previous_gaps(plain, batch.student_chunks, batch.num_chunks)
        if self.event == "closed" and (other := batch.spelled_otherwise) is not None:
            # each spelling is scored with the teacher's budget for all of them
            tokens = torch.where(spread(other, batch.student_chunks), tokens.clamp(max=0), tokens)
            gap, ended = (torch.where(other, part.clamp(max=0), part) for part in (gap, ended))
        return tokens, self._at_closings(batch, gap, ended), metrics

    def _gaps(self, batch: ScoredChunks) -> torch.Tensor:
        """(B, C) without bounds."""
        close, teacher_close = None, None
        if self.event == "closed":
            close, teacher_close = batch.policy_close_log_probs, batch.teacher_close_log_probs
            if close is None:
                raise ValueError(
                    "DPCA's closed chunks read `ScoredChunks.close_log_probs`, and the batch has none: the trainer gives them; "
                    "in a loop of your own see docs/fixed-point.md, or set event='open'."
                )
        teacher = floored(batch.teacher_log_probs)
        sides = batch.student_chunks, batch.teacher_chunks
        gap, _ = gaps(batch.policy_log_probs, teacher, *sides, batch.num_chunks, close, teacher_close)
        return gap.masked_fill(batch.without_gap, 0)

    def _at_closings(self, batch: ScoredChunks, begun: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        """(B, S) what log p_close gets at each position: `ended` (B, C) of the chunk that ends there, less `begun` of the one that begins
        there, each clipped."""
        begun, ended = (clipped(part, self.advantage_clip)[0] for part in (begun, ended))
        first, last = outer_positions(batch.student_chunks, batch.num_chunks)
        length = batch.student_chunks.shape[1]
        ends = torch.where(last < 0, length + 1, last + 1)
        begins = torch.where(last < 0, length + 1, first)
        found = begun.new_zeros(len(begun), length + 2).scatter_add(1, ends, ended).scatter_add(1, begins, -begun)
        return found[:, :length]
