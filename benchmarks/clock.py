"""The benchmarks' clock: wall and processor seconds, the phases of a step, and peak memory.

Processor time is reported beside wall time, since other work on the machine does not count in it.
"""

import ctypes
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Spent:
    """The time that a stretch of work took; filled in at its end."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of this process only


@contextmanager
def stopwatch() -> Iterator[Spent]:
    spent, wall, cpu = Spent(), time.perf_counter(), time.process_time()
    try:
        yield spent
    finally:
        spent.seconds, spent.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu


@dataclass
class Step(Spent):
    """The cost of one optimizer step. `tokens` are sums over the step and include prompts, except for `written`."""

    phases: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    peak_mib: float | None = None  # on a GPU all that is allocated, on the CPU resident memory above that at the start


class Clock:
    """Starts and stops a `Step`, and assigns the time in between to phases. Time inside a nested phase counts only for it."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        self._phase: str | None = None
        self.step = Step()

    def start(self) -> None:
        self.step, self._phase = Step(phases=defaultdict(float), tokens=defaultdict(int)), None
        self._resident = start_of_peak(self._cuda)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self.step.seconds = time.perf_counter() - self._wall
        self.step.cpu_seconds = time.process_time() - self._cpu
        self.step.peak_mib = peak_mib(self._cuda, self._resident)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._phase is not None:
            yield
            return
        self._phase, start = name, time.perf_counter()
        try:
            yield
        finally:
            self._phase = None
            self.step.phases[name] += time.perf_counter() - start

    def watch(
        self, owner: Any, method: str, phase: str, count: Callable[[tuple, dict, Any], dict] | None = None
    ) -> None:
        """From now on, `owner.method` is a phase. `count` of its arguments and result is added to the step's tokens."""
        original = getattr(owner, method)

        @functools.wraps(original)  # `generate` validates its arguments against a forward's signature
        def watched(*args, **kwargs):
            outermost = self._phase is None
            with self.phase(phase):
                result = original(*args, **kwargs)
            if outermost and count is not None:
                for name, number in count(args, kwargs, result).items():
                    self.step.tokens[name] += number
            return result

        setattr(owner, method, watched)


def start_of_peak(cuda: bool) -> float | None:
    """Resets the peak of memory use. Returns the current use in MiB, `None` where it cannot be measured."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return 0.0
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # Linux: freed memory is returned,
        Path("/proc/self/clear_refs").write_text("5")  # and the peak is reset
    except OSError:
        return None
    return resident("VmRSS")


def peak_mib(cuda: bool, before: float | None) -> float | None:
    if cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    return None if before is None else resident("VmHWM") - before


def resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def peak_bytes(step: Callable[[], None]) -> int:
    """The peak memory of `step` in bytes, above that at its start."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    total = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak
