"""The logged figures, against sums in Python floats, and the meter that adds them up."""

import math
from dataclasses import replace

import pytest
import torch
from chunk_rows import BAD, as_tensors, by_chunk, random_rows, reference_budgets
from toys import prompts
from transformers import TrainerCallback

from trl_ctopd.losses import DPCA, ScoredChunks
from trl_ctopd.training.metrics import Meter, chunk_metrics


class OneProcess:
    """What the meter asks of an `Accelerator`: a device, and a sum over processes."""

    device = torch.device("cpu")

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return tensor


class TwoProcesses(OneProcess):
    """The other process holds `other`."""

    def __init__(self, other):
        self.other = other

    def reduce(self, tensor, reduction):
        return super().reduce(tensor, reduction) + torch.tensor(self.other)


def figures(batch, entropy=None):
    """As they are logged."""
    meter = Meter()
    meter.add(chunk_metrics(batch, torch.zeros_like(batch.student_log_probs) if entropy is None else entropy))
    return meter.read(OneProcess())


def reference(rows, entropy):
    """Row by row and chunk by chunk; a chunk whose teacher budget is not finite is only counted."""
    ours = theirs = 0.0
    width = tokens = chunks = one_to_one = teacher_tokens = neutral = 0
    nats = unscored = impossible = 0.0
    for row, (student, teacher) in enumerate(rows):
        unscored += not any(map(math.isfinite, reference_budgets(teacher).values()))
        student_budgets, teacher_budgets = reference_budgets(student), reference_budgets(teacher)
        read = by_chunk(teacher)
        for chunk, inside in by_chunk(student).items():
            tokens, teacher_tokens, chunks = tokens + len(inside), teacher_tokens + len(read[chunk]), chunks + 1
            impossible += any(teacher[j][0] == -math.inf for j in read[chunk])
            one_to_one += len(inside) == len(read[chunk]) == 1
            nats += math.fsum(entropy[row][i] for i in inside)
            if math.isfinite(teacher_budgets[chunk]):
                ours, theirs = ours - student_budgets[chunk], theirs - teacher_budgets[chunk]
                width += sum(student[i][2] for i in inside)
            else:
                neutral += 1
    return {
        "alignment/neutralised_fraction": neutral / chunks,
        "alignment/one_to_one_fraction": one_to_one / tokens,
        "alignment/student_tokens_per_chunk": tokens / chunks,
        "alignment/teacher_tokens_per_chunk": teacher_tokens / chunks,
        "alignment/unscored_fraction": unscored / len(rows),
        "entropy": nats / tokens,
        "gap/nats_per_byte": (theirs - ours) / width,
        "student/nats_per_byte": ours / width,
        "teacher/impossible_fraction": impossible / chunks,
        "teacher/nats_per_byte": theirs / width,
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bad", [-1.0, *BAD])
def test_every_figure_equals_a_loop_over_chunks(seed, bad):
    rows = random_rows(seed)
    for row in rows[::2]:
        row[1][0] = (bad, row[1][0][1])
    batch = ScoredChunks(*as_tensors(rows))
    entropy = torch.rand(batch.student_log_probs.shape, generator=torch.Generator().manual_seed(seed))
    found, expected = figures(batch, entropy), reference(rows, entropy.tolist())
    assert list(found) == sorted(expected)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_worked_example():
    """Two chunks of text, `ab` and `c`, and the turn's end: 3 bytes. A masked token stands between them."""
    student = [(-1.0, 0, 1), (-2.0, 0, 1), (-9.0, -1, 4), (-0.5, 1, 1), (-0.25, 2, 0)]
    teacher = [(-2.5, 0), (-7.0, -1), (-0.1, 1), (-0.05, 2), (-0.1, 2)]
    found = figures(ScoredChunks(*as_tensors([(student, teacher)])), torch.tensor([[1.0, 2.0, 50.0, 3.0, 4.0]]))
    assert found == pytest.approx(
        {
            "gap/nats_per_byte": -1.0 / 3,  # log p − log q = −3.75 + 2.75: the student finds its text less likely
            "student/nats_per_byte": 3.75 / 3,
            "teacher/nats_per_byte": 2.75 / 3,
            "alignment/one_to_one_fraction": 1 / 4,
            "alignment/student_tokens_per_chunk": 4 / 3,
            "alignment/teacher_tokens_per_chunk": 4 / 3,
            "alignment/neutralised_fraction": 0.0,
            "alignment/unscored_fraction": 0.0,
            "teacher/impossible_fraction": 0.0,
            "entropy": 10 / 4,
        },
        rel=1e-6,
    )


def test_tokens_that_are_spelled_otherwise_are_counted_and_so_are_their_chunks():
    student = [(-1.0, 0, 1), (-2.0, 0, 1), (-0.5, 1, 1), (-0.25, 2, 0)]
    batch = ScoredChunks(*as_tensors([(student, [(-2.5, 0), (-0.1, 1), (-0.05, 2)])]))
    assert not any(name.startswith("spelling/") for name in figures(batch))
    found = figures(replace(batch, other_spelling=torch.tensor([[True, True, False, False]])))
    assert (found["spelling/other_fraction"], found["spelling/chunks_fraction"]) == pytest.approx((2 / 4, 1 / 3))


def test_the_gap_is_the_students_surplus_and_dpcas_loss_over_the_same_text():
    batch = ScoredChunks(*as_tensors(random_rows(2)))
    found = figures(batch)
    gap = found["gap/nats_per_byte"]
    assert gap == pytest.approx(found["teacher/nats_per_byte"] - found["student/nats_per_byte"], rel=1e-5)
    loss, _ = DPCA("uniform", None, event="open")(batch, batch.student_widths[batch.student_chunks >= 0].sum())
    assert gap == pytest.approx(loss.item(), rel=1e-5)


def test_a_gap_above_zero_means_that_the_teacher_finds_the_text_less_likely():
    found = figures(ScoredChunks(*as_tensors([([(-1.0, 0, 2)], [(-4.0, 0)])])))
    assert found["gap/nats_per_byte"] == 1.5


def test_figures_of_micro_batches_add_up_to_the_whole_batchs():
    rows = random_rows(6)
    meter = Meter()
    for row in rows:
        batch = ScoredChunks(*as_tensors([row]))
        meter.add(chunk_metrics(batch, torch.ones_like(batch.student_log_probs)))
    whole = ScoredChunks(*as_tensors(rows))
    assert meter.read(OneProcess()) == pytest.approx(figures(whole, torch.ones_like(whole.student_log_probs)), rel=1e-5)


def test_nothing_scored_logs_that_and_nothing_else():
    assert figures(ScoredChunks(*as_tensors([([(-1.0, -1, 1)], [(-2.0, -1)])]))) == {"alignment/unscored_fraction": 1}


def test_a_chunk_with_no_bytes_still_counts_its_nats():
    """The turn's end is part of what the student pays, over the bytes of the text."""
    row = [(-1.0, 0, 2), (-3.0, 1, 0)], [(-1.0, 0), (-2.0, 1)]
    assert figures(ScoredChunks(*as_tensors([row])))["student/nats_per_byte"] == 2.0


def test_what_closing_costs_under_the_teacher_is_logged_a_chunk_of_those_that_count():
    rows = random_rows(6)
    plain = ScoredChunks(*as_tensors(rows))
    close = -torch.rand(plain.teacher_log_probs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nats = counted = 0
    for row, (_, teacher) in enumerate(rows):
        budgets = reference_budgets(teacher)
        for chunk, inside in by_chunk(teacher).items():
            if math.isfinite(budgets[chunk]):
                counted += 1
                nats -= close[row, inside[-1] + 1].item() if inside[-1] + 1 < close.shape[1] else 0
    found = figures(replace(plain, teacher_close_log_probs=close))
    assert counted > 5
    assert found.pop("closing/teacher_nats_per_chunk") == pytest.approx(nats / counted, rel=1e-5)
    assert found == figures(plain), "and nowhere where the teacher does not tell it"


def test_the_gap_counts_no_chunk_of_which_nothing_tells_how_it_closes():
    rows = [([(-1.0, 0, 2), (-3.0, 1, 4)], [(-2.0, 0), (-7.0, 1)]), ([(-2.0, 0, 3)], [(-2.5, 0)])]
    plain = ScoredChunks(*as_tensors(rows))
    found = figures(replace(plain, unclosed=torch.tensor([1, -1])))
    assert found["gap/nats_per_byte"] == pytest.approx(((2 - 1) + (2.5 - 2)) / (2 + 3))
    assert found["student/nats_per_byte"] == pytest.approx((1 + 2) / (2 + 3))
    assert found["alignment/neutralised_fraction"] == 0


def test_figures_carry_no_gradient():
    batch = ScoredChunks(*as_tensors(random_rows(0)))
    batch = replace(batch, student_log_probs=batch.student_log_probs.requires_grad_())
    pairs = chunk_metrics(batch, batch.student_log_probs * 2).values()
    assert not any(torch.as_tensor(part).requires_grad for pair in pairs for part in pair)


def test_a_meter_reads_sum_over_weight_and_starts_anew():
    meter = Meter()
    meter.add({"loss": (torch.tensor(3.0), 2), "seconds": (1.5, 1)})
    meter.add({"loss": (5, torch.tensor(2)), "seconds": (0.5, 0)})
    assert meter.read(OneProcess()) == {"loss": 2.0, "seconds": 2.0}
    assert meter.read(OneProcess()) == {}
    meter.add({"loss": (1, 1)})
    assert meter.read(OneProcess()) == {"loss": 1.0}


def test_a_meter_weighs_processes_by_their_counts_whatever_order_the_names_came_in():
    meter = Meter()
    meter.add({"b": (30.0, 3)})
    meter.add({"a": (1.0, 1)})
    assert meter.read(TwoProcesses([[5.0, 2.0], [10.0, 1.0]])) == {"a": 2.0, "b": 10.0}


def test_a_phase_that_one_process_alone_had_is_a_mean_over_the_steps_of_all():
    meter = Meter()
    meter.add({"seconds/compilation": (3.0, 1), "seconds/step": (10.0, 2)})
    found = meter.read(TwoProcesses([[0.0, 0.0], [20.0, 4.0]]))
    assert found == {"seconds/compilation": 0.5, "seconds/step": 5.0}


def test_a_figure_without_weight_is_left_out():
    meter = Meter()
    meter.add({"empty": (0.0, 0), "full": (0.0, 1)})
    assert meter.read(OneProcess()) == {"full": 0.0} and meter.without_weight == {"empty"}
    assert meter.read(OneProcess()) == {} and not meter.without_weight


def of_evaluation(trainer) -> dict[str, float]:
    return {name: value for name, value in trainer.evaluate().items() if "/" in name and "second" not in name}


def test_figures_of_an_interrupted_evaluation_or_of_a_prediction_are_in_no_later_ones(build, monkeypatch):
    rows = prompts(8)
    trainer = build(eval_dataset=rows)
    expected = of_evaluation(trainer)
    score, calls = trainer.compute_loss, []

    def interrupted(*args, **kwargs):
        calls.append(score(*args, **kwargs))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(trainer, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(rows.select([0, 3, 0, 3, 0, 3, 0, 3]))
    assert of_evaluation(trainer) == expected
    trainer.predict(rows.select([1, 1, 1]))
    assert of_evaluation(trainer) == expected


def test_figures_of_interrupted_training_are_in_no_later_ones(build):
    trainer = build(max_steps=2, logging_steps=2, learning_rate=0.0)

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Interrupt)
    trainer.train()
    lengths = trainer.state.log_history[0]["completions/mean_length"]
    fresh = build(max_steps=2, logging_steps=2, learning_rate=0.0)
    fresh.train()
    assert lengths == fresh.state.log_history[0]["completions/mean_length"]


def test_an_evaluation_at_the_end_takes_no_figures_of_training_away(build):
    """Those of the steps since the last log come with the run's own last entry."""
    last = []
    for evaluated in ({}, {"eval_dataset": prompts(4), "eval_strategy": "steps", "eval_steps": 3}):
        trainer = build(max_steps=3, logging_steps=2, **evaluated)
        trainer.train()
        last.append(trainer.state.log_history[-1])
    assert "train_runtime" in last[0] and "gap/nats_per_byte" in last[0]
    assert last[1]["gap/nats_per_byte"] == last[0]["gap/nats_per_byte"]
    assert not any(name.startswith("eval_") for name in last[1])


def test_what_a_chunks_end_costs_the_teacher_is_a_mean_over_the_rows_that_tell_it():
    """However rows of one teacher and of a blend, which tells none, share micro-batches."""
    chunks = torch.tensor([[0, 1, 2], [0, 1, 2]])
    zeros = torch.zeros(2, 3)
    close = torch.tensor([[0.0, -0.5, -1.5], [0.0, 0.0, 0.0]])
    batch = ScoredChunks(
        zeros - 1, zeros - 1, chunks, chunks, torch.ones_like(chunks), 3, teacher_close_log_probs=close
    )
    told = torch.tensor([True, False])
    for rows, expected in ((told, 3), (None, 6)):
        total, count = chunk_metrics(batch, zeros, closings_told=rows)["closing/teacher_nats_per_chunk"]
        assert (total.item(), count.item()) == (2.0, expected)


def test_padding_rows_are_no_texts_of_which_nothing_is_scored():
    some, nothing = ([(-1.0, 0, 1)], [(-2.0, 0)]), ([(-1.0, -1, 1)], [(-2.0, -1)])
    batch = ScoredChunks(*as_tensors([some, nothing, nothing]))
    found = chunk_metrics(batch, torch.zeros(3, 1), torch.tensor([False, False, True]))
    assert tuple(map(int, found["alignment/unscored_fraction"])) == (1, 2)
