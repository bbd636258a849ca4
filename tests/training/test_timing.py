"""Where a step's time is charged, on a clock of our own."""

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import fix_rollouts

from trl_ctopd.training import timing
from trl_ctopd.training.metrics import Meter
from trl_ctopd.training.timing import PhaseTimer


class Clock:
    """Stands still unless told."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class OneProcess:
    device = "cpu"

    def reduce(self, tensor, reduction):
        return tensor


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def spend(clock, timer, phase, before=0, within=None, after=0):
    with timer(phase):
        clock.now += before
        if within:
            spend(clock, timer, **within)
        clock.now += after


def test_a_phase_is_charged_without_the_phases_within_it_and_the_rest_is_overhead(clock):
    meter = Meter()
    timer = PhaseTimer(meter)
    timer.begin()
    spend(clock, timer, "generation", before=8)
    clock.now += 1  # collating
    spend(clock, timer, "student", before=4, within={"phase": "loss", "before": 2}, after=3)
    timer.on_pre_optimizer_step(None, None, None)
    clock.now += 2
    timer.on_optimizer_step(None, None, None)
    timer.on_step_end(None, None, None)
    assert meter.read(OneProcess()) == pytest.approx(
        {
            "seconds/generation": 8,
            "seconds/student": 7,
            "seconds/loss": 2,
            "seconds/optimizer": 2,
            "seconds/step": 20,
            "compute_overhead": 3 / 20,
        }
    )


@pytest.mark.parametrize("spent", [(6, 0), (0, 6), (0, 0, 9)])
def test_a_phase_that_is_not_in_every_step_is_a_mean_over_all_of_them(clock, spent):
    meter = Meter()
    timer = PhaseTimer(meter)
    for seconds in spent:
        timer.begin()
        if seconds:
            spend(clock, timer, "generation", before=seconds)
        spend(clock, timer, "student", before=2)
        timer.end()
    figures = meter.read(OneProcess())
    assert (figures["seconds/generation"], figures["seconds/student"], figures["seconds/step"]) == (3, 2, 5)


def test_time_between_steps_is_nobodys(clock):
    meter = Meter()
    timer = PhaseTimer(meter)
    for _ in range(2):
        timer.begin()
        spend(clock, timer, "teacher", before=3)
        timer.end()
        clock.now += 50  # saving, evaluating
    figures = meter.read(OneProcess())
    assert figures["seconds/step"] == figures["seconds/teacher"] == 3
    assert figures["compute_overhead"] == 0


def test_a_phase_that_raises_is_over(clock):
    timer = PhaseTimer(Meter())
    timer.begin()
    with pytest.raises(KeyError), timer("generation"):
        raise KeyError
    spend(clock, timer, "teacher", before=1)
    assert timer._phases == []


def test_a_whole_step_is_its_phases_and_little_more(build):
    trainer = build(max_steps=2)
    trainer.train()
    log = trainer.state.log_history[1]
    phases = ("generation", "alignment", "teacher", "student", "loss", "optimizer")
    parts = [log[f"seconds/{name}"] for name in phases]
    assert all(part > 0 for part in parts)
    assert sum(parts) < log["seconds/step"]
    unavoidable = sum(log[f"seconds/{name}"] for name in phases if name not in ("alignment", "loss"))
    assert log["compute_overhead"] == pytest.approx(1 - unavoidable / log["seconds/step"], abs=1e-4)


class Waits(TorchDispatchMode):
    """The operations within that make the host wait for a GPU: values read, and shapes that depend on values. The one that
    transformers makes for a causal mask is its own."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split(".")[0] in self.NAMES:
            where = [frame.filename for frame in traceback.extract_stack()]
            if not any(name.endswith("masking_utils.py") for name in where):
                self.seen.append((function.name(), [name for name in where if "trl_ctopd" in name][-1:]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", ["dpca", "strict_sampled", "alm", "sft"])
def test_nothing_waits_for_the_device_from_the_forward_pass_to_the_gradient(build, loss):
    trainer = fix_rollouts(build(distillation_loss=loss, lmbda=0.0 if loss == "sft" else 1.0))
    [batch] = trainer._roll_out(
        trainer.model, [trainer.data_collator(list(trainer.train_dataset)[:4])["prompts"]], "train"
    )
    trainer.model.train()
    with Waits() as waits:
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(40)).backward()
    assert waits.seen == []


def test_an_update_that_was_interrupted_is_charged_nothing_in_the_next_run(clock):
    meter = Meter()
    timer = PhaseTimer(meter)
    timer.begin()
    timer.on_pre_optimizer_step(None, None, None)  # and an error before its end
    timer.begin()
    clock.now += 5
    spend(clock, timer, "student", before=3)
    timer.end()
    found = meter.read(OneProcess())
    assert (found["seconds/student"], found["seconds/step"]) == (3, 8) and not found.get("seconds/optimizer")
    assert found["compute_overhead"] == 5 / 8
