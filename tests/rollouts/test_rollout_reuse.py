"""Completions used for several optimizer steps, and dealt to micro-batches by length."""

from collections import Counter

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from datasets import IterableDataset
from toys import SGD, fix_rollouts, prompts, step_of, student_model, weights

from trl_ctopd.losses import DPCA, ScoredChunks, StrictSampled
from trl_ctopd.rollouts.pairing import grouped_by_length
from trl_ctopd.rollouts.prompts import RepeatedWindows


# --- the order of prompts


def test_windows_come_several_times_over_and_every_row_in_one_of_them():
    order = list(RepeatedWindows(12, 4, 3, seed=0))
    windows = [order[start : start + 4] for start in range(0, 36, 4)]
    assert [windows[n : n + 3] for n in (0, 3, 6)] == [[windows[n]] * 3 for n in (0, 3, 6)]
    assert Counter(order) == dict.fromkeys(range(12), 3)
    assert order[::12] != [0, 4, 8], "shuffled"


def test_the_order_depends_on_seed_and_epoch_alone_and_a_rest_is_left_out():
    sampler = RepeatedWindows(11, 4, 2, seed=0)
    first = list(sampler)
    assert len(first) == len(sampler) == 16
    assert list(sampler) == first == list(RepeatedWindows(11, 4, 2, seed=0))
    sampler.set_epoch(1)
    assert list(sampler) != first != list(RepeatedWindows(11, 4, 2, seed=1))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_run_reads_the_rest_of_its_epochs_own_order(build, monkeypatch, processes):
    trainer = build(dataset=prompts(24), rollout_reuse=2, per_device_train_batch_size=2)
    monkeypatch.setattr(Accelerator, "num_processes", processes)

    def read(loader, epoch):
        loader.set_epoch(epoch)
        return [batch["prompts"] for batch in loader]

    loader = trainer.get_train_dataloader()
    first, second = read(loader, 0), read(loader, 1)
    assert len(first) == 24 // processes and first[5:] != second[5:]
    assert read(skip_first_batches(trainer.get_train_dataloader(), 5), 1) == second[5:]


def test_too_few_prompts_for_one_step_are_refused(build):
    with pytest.raises(ValueError, match="prompts of an optimizer step, 8 of them, and the train dataset has 6"):
        build(dataset=prompts(6), rollout_reuse=2, gradient_accumulation_steps=2)


def test_a_stream_of_prompts_cannot_be_used_again(build):
    stream = IterableDataset.from_generator(lambda: iter(prompts(8)))
    with pytest.raises(ValueError, match="rollout_reuse=2.*the train dataset has no length"):
        build(dataset=stream, rollout_reuse=2)


# --- steps


def watched(trainer) -> tuple[list, list]:
    """The prompts of each call to write, and the number of texts of each call to the teacher."""
    written, read = [], []
    write, score = trainer.rollouts.write, trainer.teacher.scores
    trainer.rollouts.write = lambda model, given, step: (
        written.append([p.student_ids for p in given]) or write(model, given, step)
    )
    trainer.teacher.scores = lambda *asked: read.append(len(asked[0])) or score(*asked)
    return written, read


def test_every_window_is_written_and_scored_once_for_several_steps_and_epochs_count_on(build):
    trainer = build(
        dataset=prompts(17), rollout_reuse=3, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=2
    )
    written, read = watched(trainer)
    trainer.train()
    assert trainer.state.global_step == 2 * 2 * 3, "epochs, windows, uses"
    assert read == [8] * 4
    assert [len(own) for own in written] == [8] * 4
    assert written[0] != written[2], "another order"


def test_the_first_use_is_the_step_without_reuse(build):
    order = {"dataset": prompts(8), "per_device_train_batch_size": 8, "distillation_loss": "dpca", **SGD}
    once, again = (step_of(fix_rollouts(build(rollout_reuse=uses, **order))) for uses in (1, 2))
    torch.testing.assert_close(again, once, rtol=1e-5, atol=1e-7)


class Kept:
    """The loss, which keeps what it is given."""

    event = "closed"

    def __init__(self, loss, batches):
        self.loss, self.batches = loss, batches

    def __call__(self, batch, num_items):
        self.batches.append(batch)
        return self.loss(batch, num_items)


def test_later_uses_keep_the_advantages_and_weigh_by_the_ratio(build):
    trainer = fix_rollouts(build(rollout_reuse=3, gradient_accumulation_steps=2, max_steps=3, learning_rate=3e-2))
    batches = []
    loss = trainer.distillation_loss
    kept = Kept(loss, batches)
    trainer.distillation_loss = trainer.off_policy_loss = kept
    trainer.train()
    assert [batch.old_log_probs is None for batch in batches] == [True] * 2 + [False] * 4
    for use in (batches[2:4], batches[4:6]):
        for first, later in zip(batches[:2], use, strict=True):
            assert torch.equal(later.old_log_probs, first.student_log_probs.detach())
            assert torch.equal(later.old_close_log_probs, first.close_log_probs.detach())
            assert (first.close_log_probs < 0).any()
            assert torch.equal(later.teacher_log_probs, first.teacher_log_probs)
            assert not torch.allclose(later.student_log_probs, first.student_log_probs, atol=1e-3)
            torch.testing.assert_close(loss.advantages(later)[0], loss.advantages(first)[0])
    log = trainer.state.log_history
    assert "ratio/clipped_fraction" not in log[0]
    assert log[2]["ratio/clipped_fraction"] > 0


def test_evaluating_amid_a_window_knows_nothing_of_it(build):
    def figures(reuse):
        evaluated = {"eval_dataset": prompts(4), "eval_strategy": "steps", "eval_steps": 1}
        trainer = build(rollout_reuse=reuse, max_steps=2, distillation_loss="dpca", **evaluated)
        trainer.train()
        [first, *_] = (log for log in trainer.state.log_history if "eval_loss" in log)
        return {name: first[name] for name in first if name.startswith("eval_") and "/" in name and "sec" not in name}

    assert figures(2) == pytest.approx(figures(1), rel=1e-6)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_resumed_amid_a_window_ends_where_the_uninterrupted_one_does(build, tmp_path, step):
    settings = {"max_steps": 6, "rollout_reuse": 3, "dataset": prompts(9), "gradient_accumulation_steps": 2}
    whole = build(**settings, save_strategy="steps", save_steps=1, per_device_train_batch_size=2)
    whole.train()
    resumed = build(**settings, per_device_train_batch_size=2)
    written, _ = watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert len(written) == 1, "only the second window"
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_completions_kept_under_the_older_name_of_padding_rows_are_used(build, tmp_path):
    settings = {"max_steps": 2, "rollout_reuse": 2, "dataset": prompts(4)}
    whole = build(**settings, save_strategy="steps", save_steps=1)
    whole.train()
    file = tmp_path / "run" / "checkpoint-1" / "rollouts_0.pt"
    layout, [batch], log_probs = torch.load(file)
    batch["filler"] = batch.pop("padding_rows")
    torch.save((layout, [batch], log_probs), file)
    resumed = build(**settings)
    written, _ = watched(resumed)
    resumed.train(resume_from_checkpoint=str(file.parent))
    assert not written
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_completions_of_another_layout_are_left_and_said_so(build, tmp_path, caplog):
    settings = {"max_steps": 2, "rollout_reuse": 2, "dataset": prompts(8)}
    build(
        **settings, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1
    ).train()
    assert [path.parent.name for path in (tmp_path / "run").glob("*/rollouts_0.pt")] == ["checkpoint-1"], (
        "not once used up"
    )
    resumed = build(**settings, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    written, _ = watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert [len(own) for own in written] == [4]
    assert "keeps completions that were made with other settings" in caplog.text


def test_completions_that_were_kept_for_another_loss_are_left(build, tmp_path, caplog):
    """They hold what that loss read."""
    settings = {"max_steps": 2, "rollout_reuse": 2, "dataset": prompts(8)}
    build(**settings, distillation_loss="strict_sampled", save_strategy="steps", save_steps=1).train()
    resumed = build(**settings, credit="remaining")
    written, _ = watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert len(written) == 1
    assert "keeps completions that were made with other settings" in caplog.text


def test_figures_of_the_students_own_text_come_from_the_first_use_alone(build):
    trainer = build(rollout_reuse=2, max_steps=4, log_completions=True)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert ["gap/nats_per_byte" in entry for entry in log] == [True, False] * 2
    assert [entry["seconds/generation"] > 0 for entry in log] == [True, False] * 2
    assert len(log[0]) > len(log[1])


@pytest.mark.parametrize("loss", ["simct", "bpm", "strict_topk", "escd"])
def test_a_loss_that_needs_the_students_own_text_of_today_refuses(build, loss):
    with pytest.raises(ValueError, match=f"rollout_reuse=2.*'{loss}'.*choose one of dpca, strict_sampled, alm"):
        build(rollout_reuse=2, distillation_loss=loss)


def test_bounds_without_reuse_have_no_effect_and_are_refused(build):
    with pytest.raises(ValueError, match="clip_ratio_low=0.1 has no effect with rollout_reuse=1"):
        build(clip_ratio_low=0.1)
    with pytest.raises(ValueError, match="clip_ratio_low must be above 0.*1.5 and 0.28"):
        build(clip_ratio_low=1.5, rollout_reuse=2)
    with pytest.raises(ValueError, match="clip_ratio_high=0.5 has no effect with rollout_reuse=2 and lmbda=0.0"):
        build(rollout_reuse=2, lmbda=0.0, distillation_loss_kwargs={"clip_ratio_high": 0.5})
    assert build(clip_ratio_low=0.1, rollout_reuse=2).distillation_loss.clip_ratio_low == 0.1


# --- the clipped ratio, against PPO's definition by cases


def random_batch(seed: int) -> ScoredChunks:
    generator = torch.Generator().manual_seed(seed)
    chunks = torch.tensor([[0, 0, 1, 2, -1, 3], [0, 1, 1, 1, 2, -1]])
    teacher = torch.tensor([[0, 1, 1, 2, 3], [0, 1, 2, 2, -1]])
    log_probs, old = (-3 * torch.rand(2, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    scores = -4 * torch.rand(2, 5, generator=generator, dtype=torch.float64)
    widths = torch.ones_like(chunks)
    return ScoredChunks(log_probs.requires_grad_(), scores, chunks, teacher, widths, 4, old_log_probs=old)


@pytest.mark.parametrize("seed", [0, 2, 3, 5, 6])  # of which each has a ratio out of bounds
@pytest.mark.parametrize(
    "loss", [DPCA(clip_ratio_low=0.3, clip_ratio_high=0.5, event="open"), DPCA("macro", 0.7, "open"), StrictSampled()]
)
def test_value_and_gradient_are_ppos_by_cases(loss, seed):
    batch = random_batch(seed)
    value, metrics = loss(batch, 7)
    [gradient] = torch.autograd.grad(value, batch.student_log_probs)
    # the advantages are those of the old policy, whatever the new one says
    old = ScoredChunks(
        batch.old_log_probs.clone().requires_grad_(), batch.teacher_log_probs, batch.student_chunks,
        batch.teacher_chunks, batch.student_widths, 4,
    )  # fmt: skip
    [minus_advantages] = torch.autograd.grad(loss(old, 1)[0], old.student_log_probs)
    expected, slope, outside = 0.0, torch.zeros_like(gradient), 0
    for row in range(2):
        for i in range(6):
            a = -minus_advantages[row, i].item()
            ratio = (batch.student_log_probs[row, i] - batch.old_log_probs[row, i]).exp().item()
            low, high = 1 - loss.clip_ratio_low, 1 + loss.clip_ratio_high
            if (a > 0 and ratio > high) or (a < 0 and ratio < low):
                expected -= a * (high if a > 0 else low) / 7
                outside += 1
            else:
                expected -= a * ratio / 7
                slope[row, i] = -a * ratio / 7
    assert outside
    assert value.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-15)
    assert metrics["ratio/clipped_fraction"][0].item() == outside


# --- micro-batches by length


def test_rows_are_dealt_by_length_and_batches_keep_their_sizes():
    assert grouped_by_length([5, 1, 9, 3, 7], [[0, 1], [2, 3], [4]]) == [[2, 4], [0, 3], [1]]
    assert grouped_by_length([], []) == []
    assert grouped_by_length([2, 2, 2], [[1], [0, 2]]) == [[1], [0, 2]], "in order where lengths are equal"


def test_rows_of_one_group_are_dealt_one_after_another_the_group_of_the_longest_first():
    lengths, groups = [5, 1, 9, 3, 7, 9], ["a", "b", "a", "c", "b", "c"]
    assert grouped_by_length(lengths, [[0, 1], [2, 3], [4, 5]], groups) == [[2, 0], [5, 3], [4, 1]]


@pytest.mark.parametrize(
    "settings", [{}, {"lmbda": 0.5, "seed": 1}, {"distillation_loss": "gold", "lmbda": 0.5, "seed": 1}]
)
def test_length_grouping_changes_the_padding_and_not_the_gradient(build, settings):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, **SGD, **settings}

    def run(grouped):
        trainer = fix_rollouts(build(length_grouped=grouped, **options))
        shapes, flags = [], []
        roll_out = trainer._roll_out

        def watched(*args):
            batches = roll_out(*args)
            shapes.extend(batch["input_ids"].numel() for batch in batches)
            flags.extend(batch["on_policy"] for batch in batches)
            return batches

        trainer._roll_out = watched
        return step_of(trainer), shapes, flags

    [plain, loose, flags], [grouped, tight, same_flags] = run(False), run(True)
    torch.testing.assert_close(grouped, plain, rtol=1e-5, atol=1e-6)
    assert plain.abs().max() > 1e-3
    assert sum(tight) < sum(loose)
    assert flags == same_flags
    assert settings == {} or set(flags) == {True, False}


def test_the_completions_shown_are_of_all_lengths(build, capsys):
    trainer = build(
        log_completions=True, num_completions_to_print=4, gradient_accumulation_steps=4, model=student_model()
    )
    shown = []
    keep = trainer._samples.keep
    trainer._samples.keep = lambda *args: keep(*args) or shown.append(len(trainer._samples))
    trainer.train()
    assert shown == [1, 2, 3, 4]
    assert "nats/byte" in capsys.readouterr().out


@pytest.mark.parametrize(("order", "which"), [({}, "others in each epoch"), (["sequential"], "the last ones")])
def test_rows_that_fill_no_window_are_told_of(build, caplog, order, which):
    settings = {"train_sampling_strategy": order[0]} if order else {}
    build(dataset=prompts(11), rollout_reuse=2, **settings)
    assert f"The train dataset has 11 rows, so that 3 are left out of each epoch: {which}" in caplog.text
    caplog.clear()
    build(dataset=prompts(8), rollout_reuse=2)
    assert "left out of each epoch" not in caplog.text


def test_completions_of_another_number_for_each_prompt_are_left(build, tmp_path, caplog):
    settings = {"max_steps": 2, "rollout_reuse": 2, "dataset": prompts(8)}
    build(**settings, num_generations=1, save_strategy="steps", save_steps=1).train()
    resumed = build(**settings, num_generations=2)
    written, _ = watched(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert len(written) == 1
    assert "keeps completions that were made with other settings" in caplog.text


def test_completions_that_were_too_many_for_the_memory_are_left(build, tmp_path):
    """`auto_find_batch_size` begins a resumed run anew with smaller micro-batches, and the kept ones would not fit again."""
    settings = {"max_steps": 2, "rollout_reuse": 2, "dataset": prompts(8), "auto_find_batch_size": True}
    build(**settings, save_strategy="steps", save_steps=1).train()
    resumed = build(**settings)
    step, taken = resumed.training_step, []

    def training_step(model, inputs, *args):
        taken.append(len(inputs["input_ids"]))
        if taken[-1] > 3:
            raise RuntimeError("CUDA out of memory. ")
        return step(model, inputs, *args)

    resumed.training_step = training_step
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert taken == [4, 3]
