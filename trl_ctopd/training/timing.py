"""Where a step's time goes.

Decisions: wall clock on the host. A phase counts its own time, without that of phases nested in it. The timer never synchronises with a
GPU: work that one phase queues counts in the phase that waits for it, and the sum over phases stays right.
"""

import time
from contextlib import contextmanager

from transformers import TrainerCallback

from .metrics import Meter


UNAVOIDABLE = ("generation", "compilation", "teacher", "teacher_wait", "student", "optimizer")


class PhaseTimer(TrainerCallback):
    """
    Times the phases of a step; as a callback it also times the optimizer and ends a training step by itself.

    Adds to `meter`, each a mean a step: `seconds/<phase>`, `seconds/step`, and `compute_overhead`, the share of the step
    outside of generation, compilation, the teacher's forward passes or the wait for its server, the student's forward and backward
    passes and its update.
    """

    def __init__(self, meter: Meter):
        self._meter = meter
        self._seconds: dict[str, float] = {}
        self._phases: list[str] = []
        self._since = self._begin = 0.0

    def begin(self):
        """A step begins, whatever came before."""
        self._phases.clear()
        self._seconds = dict.fromkeys(self._seconds, 0.0)  # a phase that is not in every step is 0 in the others
        self._begin = self._since = time.perf_counter()

    def end(self):
        """The step is over."""
        total = time.perf_counter() - self._begin
        rest = total - sum(self._seconds.get(name, 0) for name in UNAVOIDABLE)
        self._meter.add({f"seconds/{name}": (seconds, 1) for name, seconds in self._seconds.items()})
        self._meter.add({"seconds/step": (total, 1), "compute_overhead": (rest, total)})

    @contextmanager
    def __call__(self, phase: str):
        """The time within is `phase`'s."""
        self._enter(phase)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, phase: str):
        self._charge()
        self._phases.append(phase)

    def _leave(self):
        self._charge()
        self._phases.pop()

    def _charge(self):
        """The time since the last change goes to the innermost phase, or to none."""
        now = time.perf_counter()
        if self._phases:
            self._seconds[self._phases[-1]] = self._seconds.get(self._phases[-1], 0.0) + now - self._since
        self._since = now

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._enter("optimizer")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._leave()

    def on_step_end(self, args, state, control, **kwargs):
        self.end()
