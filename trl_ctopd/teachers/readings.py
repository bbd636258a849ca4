"""The teachers' scores of a step's rollouts, found or still on their way."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..losses import Metrics
from ..rollouts.blending import mixed
from ..rollouts.closing import folded, student_ends
from ..rollouts.pairing import Rollout, pad_scores
from ..text.continuations import Continuations
from .local import LocalScores
from .remote import RemoteScores


class Readings:
    """
    The teachers' scores of a step's rollouts by row, and hidden states where requested.

    Args:
        some_remote: whether some teacher is at a server, which may fail to score a row.
        some_late: whether some scores may still be on their way, from a server or from a teacher that reads in a thread of its own.
    """

    def __init__(self, device: torch.device, some_remote: bool, some_late: bool):
        self._device, self.some_remote, self._some_late = device, some_remote, some_late
        self.scores: dict[int, tuple[RemoteScores | LocalScores, int]] = {}
        # the texts of which it was asked how the student's tokens close
        self.closing: dict[int, tuple[Rollout, Continuations | None]] = {}
        self.mixtures: dict[int, tuple[Rollout, range]] = {}  # and the numbers of its parts' texts
        self.padding_rows: set[int] = set()
        self.reference: Readings | None = None  # the reference teacher's

    def log_probs(self, rows: Sequence[int], length: int) -> "torch.Tensor | Awaited":
        """(len(rows), `length`) log-probs of these rows, 0 past their ends; or an [`Awaited`], if they may be on their way."""
        if not self._some_late:
            return pad_scores([self.row(row) for row in rows], length)
        return Awaited(self, list(rows), length)

    def close_log_probs(self, rows: Sequence[int], length: int) -> "torch.Tensor | Awaited | None":
        """(len(rows), `length`) log-probs that the teacher leaves the student's token before it closed, 0 where it does not tell it;
        or an [`Awaited`], if they may be on their way. None where none of these rows was asked for it."""
        if not any(self.tells_closings(rows)):
            return None
        return AwaitedClosings(self, list(rows), length) if self._some_late else self.closings(rows, length)

    def tells_closings(self, rows: Sequence[int]) -> list[bool]:
        """Which of `rows` have closings of their own: those of a mixture are in its log-probs."""
        return [row in self.closing for row in rows]

    def hidden(self, rows: Sequence[int], length: int) -> "torch.Tensor | Awaited | None":
        """(len(rows), `length`, H) hidden states that the only teacher's logits are computed from, which was asked for them, 0 past their
        ends, on the CPU; or an [`Awaited`], if they may be on their way. None where that teacher is at a server."""
        if self.some_remote:
            return None
        return AwaitedHidden(self, list(rows), length) if self._some_late else self.hidden_states(rows, length)

    def hidden_states(self, rows: Sequence[int], length: int) -> torch.Tensor:
        """`hidden`, which are waited for."""
        found = [self.scores[row] for row in rows]
        return pad_scores([scores.hidden(place) for scores, place in found], length)

    def closings(self, rows: Sequence[int], length: int) -> torch.Tensor:
        """`close_log_probs`, which are waited for. Those of a mixture are in its log-probs."""
        return pad_scores([self._close(row) for row in rows], length)

    def _close(self, row: int) -> torch.Tensor:
        """(T,) of one row or of one teacher's text in a mixture; empty where it is not told."""
        nothing = torch.zeros(0, device=self._device)
        if row not in self.closing or row not in self.scores:
            return nothing
        scores, place = self.scores[row]
        if isinstance(scores, LocalScores):
            return scores.close(place).to(self._device)
        likeliest = scores.likeliest(place)
        if likeliest is None:
            return nothing
        return closing_of(*likeliest, scores.row(place), *self.closing[row]).to(self._device)

    def row(self, row: int) -> torch.Tensor:
        """(T,) log-probs of one row, which are waited for."""
        if row in self.mixtures:
            rollout, texts = self.mixtures[row]
            own = [self._folded(text) for text in texts]
            return mixed(rollout, own) if texts else torch.zeros(0, device=self._device)
        scores, place = self.scores[row]
        return scores.row(place).to(self._device)

    def _folded(self, text: int) -> torch.Tensor:
        """(T,) of one teacher's text in a mixture, with how the student's tokens close in it."""
        own, close = self.row(text), self._close(text)
        if not len(close):
            return own
        view, _ = self.closing[text]
        return folded(own, close, view.teacher_chunks, view.num_chunks)

    def likeliest(self, rows: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Waits for the (len(rows), `length`, k) ids and log-probs of the most likely tokens from servers, -inf past a row's end.
        None where no loss reads them."""
        scores = [self.scores[row] for row in rows if row in self.scores]
        found = [own.likeliest(place) for own, place in scores]
        if len(found) < len(rows) or any(own is None for own in found):
            return None
        ids, values = (pad_scores(list(side), length).to(self._device) for side in zip(*found, strict=True))
        lengths = torch.tensor([len(own) for own, _ in found], device=self._device)
        past = torch.arange(length, device=self._device) >= lengths[:, None]
        return ids, values.masked_fill(past[..., None], -torch.inf)

    def failed(self, rows: Sequence[int]) -> tuple[int, int]:
        """For `rows` that have been waited for: how many of them no server could score, and how many there are. Padding rows do
        not count."""
        failed = 0
        for row in rows:
            _, texts = self.mixtures.get(row, (None, [row]))
            places = [self.scores[text] for text in texts if text in self.scores]
            failed += any([scores.failed(place) for scores, place in places])
        return failed, len(set(rows) - self.padding_rows)


class Awaited:
    """A micro-batch's log-probs that a teacher may still be computing."""

    def __init__(self, readings: Readings, rows: list[int], length: int):
        self._readings, self._rows, self._length = readings, rows, length

    @cached_property
    def log_probs(self) -> torch.Tensor:
        """Waits for the log-probs (B, T); NaN in rows that could not be scored. Raises `TeacherServerError`."""
        return pad_scores([self._readings.row(row) for row in self._rows], self._length)

    @cached_property
    def likeliest(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`Readings.likeliest` of these rows."""
        return self._readings.likeliest(self._rows, self._length)

    @property
    def metrics(self) -> Metrics:
        return {"teacher/failed_fraction": self._readings.failed(self._rows)} if self._readings.some_remote else {}


class AwaitedClosings(Awaited):
    """Those of how the teacher leaves the student's tokens closed."""

    @cached_property
    def log_probs(self) -> torch.Tensor:
        return self._readings.closings(self._rows, self._length)


class AwaitedHidden(Awaited):
    """The hidden states that the teacher's logits are computed from, in the place of log-probs."""

    @cached_property
    def log_probs(self) -> torch.Tensor:
        return self._readings.hidden_states(self._rows, self._length)


def closing_of(
    ids: torch.Tensor, values: torch.Tensor, own: torch.Tensor, view: Rollout, table: Continuations | None
) -> torch.Tensor:
    """
    (T,) log-probs that the teacher leaves the student's tokens closed, as far as its likeliest tokens tell.

    Args:
        ids, values (T, k): of the likeliest tokens at each place of `view.teacher_ids`, and their log-probs.
        own (T,): log-probs of the tokens that are there. Each closes what lies before it, so no closing is less likely.
    """
    going_on = np.zeros(ids.shape, dtype=bool)
    if table is not None and table.reverse is not None:
        for place, token in enumerate(student_ends(view)[:-1].tolist()):
            if token >= 0:
                going_on[place] = np.isin(ids[place], table.reverse.of(token))
    going_on &= ids.numpy() != np.array(view.teacher_ids, dtype=np.int64).reshape(-1, 1)
    opened = (values.exp() * torch.from_numpy(going_on)).sum(1).clamp(max=1)
    return torch.maximum((-opened).log1p(), own)


def arrived(part: Any) -> Any:
    """`part`; of what a teacher may still be computing its log-probs, which are waited for."""
    return part.log_probs if isinstance(part, Awaited) else part


def settled(batch: dict) -> dict:
    """`batch` with all log-probs in place. Waits for those that teachers are still computing."""
    return {name: arrived(part) for name, part in batch.items()}
