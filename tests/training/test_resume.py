"""A run that is killed with SIGKILL and resumed ends where the uninterrupted one does, to the last bit. Every run has processes
of its own, which a fork server starts, since most of a start goes to imports."""

import multiprocessing
import os
import random
import shutil
import signal
import socket
import time
from datetime import date
from pathlib import Path

import pytest
import resume_run
import torch
import toys
import transformers
from accelerate import Accelerator, skip_first_batches
from peft import CPTConfig, LoraConfig, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from resume_run import MOMENTS, Death, train
from safetensors.torch import load_file
from toys import SGD, fix_rollouts, prompts, student_model, student_tokenizer, teacher_model
from transformers import TrainerCallback

from trl_ctopd.rollouts.cache import CACHE
from trl_ctopd.training import resuming
from trl_ctopd.training.checkpoints import MANIFEST, RUN, is_whole, to_resume_from


KILLED = -signal.SIGKILL
pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resume_run"])
    multiprocessing.forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def start(forks):
    def start(folder: Path, processes: int = 1, resume=None, death: Death | None = None, **settings) -> list:
        """The processes of one run."""
        folder.mkdir(exist_ok=True)
        port = None
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        ranks = [
            forks.Process(target=train, args=(folder, rank, port, resume, death, settings)) for rank in range(processes)
        ]
        for rank in ranks:
            rank.start()
        return ranks

    return start


@pytest.fixture(scope="module")
def run(start):
    def run(folder: Path, *args, **kwargs) -> list[int]:
        """The exit code of each process of a run."""
        ranks = start(folder, *args, **kwargs)
        for rank in ranks:
            rank.join(timeout=900)
        return [rank.exitcode for rank in ranks]

    return run


def weights(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"weights_{rank}.pt")


def said(folder: Path, rank: int = 0) -> str:
    return (folder / f"said_{rank}.txt").read_text()


def same(folder: Path, other: Path, processes: int = 1):
    for rank in range(processes):
        torch.testing.assert_close(weights(folder, rank), weights(other, rank), rtol=0, atol=0)


REUSED = {"rollout_reuse": 2, "gradient_accumulation_steps": 2}


def test_killed_amid_a_save_and_amid_a_step_it_ends_with_the_weights_of_the_uninterrupted_run(run, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole, **REUSED) == [0]
    assert run(cut, death=Death(4, "optimizer.pt"), **REUSED) == [KILLED]
    assert not is_whole(cut / "run" / "checkpoint-4")
    assert run(cut, resume="True", death=Death(5, "on_substep_end"), **REUSED) == [KILLED]
    [line] = [line for line in said(cut).splitlines() if "half written" in line]
    assert line.endswith(
        f"checkpoint-4 is only half written, since its run ended while it saved: going on from {cut}/run/checkpoint-3."
    )
    assert (cut / "run" / "checkpoint-3" / "rollouts_0.pt").exists(), "completions with a use to come"
    assert run(cut, resume=True, **REUSED) == [0]
    assert "half written" not in said(cut)
    same(cut, whole)


def test_two_processes_one_of_them_killed_amid_a_save(run, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(whole, 2) == [0, 0]
    other, killed = run(cut, 2, death=Death(3, "rng_state_1.pth", rank=1))
    assert killed == KILLED
    assert other not in (0, None), "it ends with an error, not with a hang"
    assert not is_whole(cut / "run" / "checkpoint-3"), "what marks a whole one waits for every process"
    assert run(cut, 2, resume=True) == [0, 0]
    assert "going on from" in said(cut) and "going on from" not in said(cut, 1)
    same(cut, whole, 2)


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    """The folder of the run with these settings that nothing ended."""
    done = {}

    def uninterrupted(processes: int = 1, **settings) -> Path:
        key = (processes, *sorted(settings.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("whole")
            assert run(folder, processes, **settings) == [0] * processes
            done[key] = folder
        return done[key]

    return uninterrupted


AHEAD = {"async_rollouts": 1, "generation_device": "cpu", "gradient_accumulation_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("where", ["on_pre_optimizer_step", "optimizer.pt", "ahead_0.pt"])
def test_killed_while_the_next_text_is_written_ahead_it_goes_on(run, uninterrupted, tmp_path, processes, where):
    codes = run(tmp_path, processes, death=Death(4, where), **AHEAD)
    assert codes[0] == KILLED and 0 not in codes
    assert run(tmp_path, processes, resume=True, **AHEAD) == [0] * processes
    assert (tmp_path / "run" / "checkpoint-3" / f"ahead_{processes - 1}.pt").exists()
    same(tmp_path, uninterrupted(processes, **AHEAD), processes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", [*MOMENTS, "model.safetensors", "optimizer.pt", "rng_state.pth", "rollouts_0.pt", "trainer_state.json"]
)
def test_killed_anywhere_it_goes_on(run, uninterrupted, tmp_path, where):
    assert run(tmp_path, death=Death(3, where), save_total_limit=1, **REUSED) == [KILLED]
    assert run(tmp_path, resume=True, save_total_limit=1, **REUSED) == [0]
    same(tmp_path, uninterrupted(**REUSED))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["adapter_model.safetensors", "optimizer.pt", "on_optimizer_step"])
def test_an_adapter_killed_anywhere_goes_on(run, uninterrupted, tmp_path, where):
    assert run(tmp_path, death=Death(5, where), save_steps=2 if where in MOMENTS else 1, lora=True) == [KILLED]
    assert run(tmp_path, resume=True, lora=True) == [0]
    same(tmp_path, uninterrupted(lora=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "rank"),
    [("model.safetensors", 0), ("rng_state_1.pth", 1), ("trainer_state.json", 0), ("on_step_begin", 1), ("on_save", 0)],
)
def test_two_processes_with_completions_to_come_killed_anywhere_go_on(run, uninterrupted, tmp_path, where, rank):
    codes = run(tmp_path, 2, death=Death(3, where, rank), **REUSED)
    assert codes[rank] == KILLED and codes[1 - rank] not in (0, None)
    assert run(tmp_path, 2, resume=True, **REUSED) == [0, 0]
    same(tmp_path, uninterrupted(2, **REUSED), 2)


@pytest.mark.slow
def test_two_processes_go_on_with_new_completions_amid_a_later_epoch(run, uninterrupted, tmp_path):
    settings = {"rollout_reuse": 2, "per_device_train_batch_size": 1, "max_steps": 15, "save_steps": 14}  # 10 an epoch
    codes = run(tmp_path, 2, death=Death(15, "on_step_begin"), **settings)
    assert codes[0] == KILLED
    assert run(tmp_path, 2, resume=True, **settings) == [0, 0]
    same(tmp_path, uninterrupted(2, **settings), 2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_again_and_again_at_random_times_it_ends_with_the_same_weights(
    start, uninterrupted, tmp_path, processes
):
    draw, kills = random.Random(processes), 0
    settings = {**REUSED, "max_steps": 12}
    while True:
        ranks = start(
            tmp_path,
            processes,
            resume=bool(list(tmp_path.glob("run/*/trainer_state.json"))),
            save_total_limit=2,
            **settings,
        )
        before, seen, wanted = set(tmp_path.glob("run/checkpoint-*")), set(), draw.randint(1, 3)
        while ranks[0].is_alive() and len(seen) < wanted:  # it goes on, on a slow machine and on a fast one
            seen |= set(tmp_path.glob("run/checkpoint-*")) - before
            time.sleep(0.001)
        victim = draw.choice(ranks)
        victim.join(timeout=draw.uniform(0, 0.1))
        killed = victim.is_alive()
        victim.kill()
        for rank in ranks:
            rank.join(timeout=900)
        if not killed:
            break
        kills += 1
    assert [rank.exitcode for rank in ranks] == [0] * processes, said(tmp_path)
    assert kills > 1
    same(tmp_path, uninterrupted(processes, **settings), processes)


@pytest.mark.parametrize("shards", [None, 1, 2], ids=["dataset", "stream", "stream in two shards"])
@pytest.mark.parametrize(
    ("processes", "process", "expected"), [(1, 0, [5, 5, 3]), (2, 0, [5, 3]), (2, 1, [5, 0]), (4, 2, [3])]
)
def test_rows_that_fill_a_batch_up_are_known_amid_a_resumed_epoch_too(
    build, monkeypatch, shards, processes, process, expected
):
    rows = prompts(13) if shards is None else prompts(13).to_iterable_dataset(num_shards=shards)
    trainer = build(dataset=rows, eval_dataset=rows, per_device_train_batch_size=5, per_device_eval_batch_size=5)
    monkeypatch.setattr(Accelerator, "num_processes", processes)
    monkeypatch.setattr(Accelerator, "process_index", process)
    loader = trainer.get_train_dataloader()
    for skipped, rest in ((0, loader), (1, skip_first_batches(loader, 1)), (0, trainer.get_eval_dataloader())):
        marked = [trainer.rollouts.mark_padding_rows(batch["prompts"]) for batch in rest]
        assert [sum(not row.is_padding for row in rows) for rows in marked] == expected[skipped:]


def test_rows_that_fill_up_a_stream_are_known_where_processes_of_their_own_read_its_shards(build, monkeypatch):
    stream = prompts(7).to_iterable_dataset(num_shards=2)  # of four rows and three
    trainer = build(dataset=stream, per_device_train_batch_size=1, dataloader_num_workers=2)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    found = []
    for process in (0, 1):
        monkeypatch.setattr(Accelerator, "process_index", process)
        found += [row for batch in trainer.get_train_dataloader() for row in batch["prompts"]]
    assert sorted(row.student_ids for row in found if not row.is_padding) == sorted(
        row["prompt_ids"] for row in trainer.train_dataset
    )
    assert sum(row.is_padding for row in found) == 1


# --- which checkpoint


class Interrupted(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            raise KeyboardInterrupt


def weights_of(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def saved(run: Path, step: int, text: str | None = '{"global_step": 1}\n') -> str:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").touch()
    (folder / MANIFEST).write_text('{"lineage": [["one", null]], "settings": {}, "files": {"optimizer.pt": 0}}')
    if text is not None:
        (folder / "trainer_state.json").write_text(text)
    return str(folder)


@pytest.mark.parametrize("asked", [True, "True", "true"])
def test_the_last_whole_checkpoint_is_gone_on_from(tmp_path, asked, caplog):
    saved(tmp_path, 9)
    whole = saved(tmp_path, 10)
    assert to_resume_from(asked, str(tmp_path)) == whole
    assert not caplog.text
    (tmp_path / "checkpoint-12-of-mine").mkdir()
    for step, text in enumerate((None, "", '{"global_step"', '{"global_step": 1'), start=11):
        half = saved(tmp_path, step, text)
        caplog.clear()
        assert to_resume_from(asked, str(tmp_path)) == whole
        [line] = caplog.messages
        assert f"{half} is only half written" in line and line.endswith(f"going on from {whole}.")


@pytest.mark.parametrize("asked", [None, False, "False"])
def test_a_run_that_is_not_resumed_looks_at_no_checkpoint(tmp_path, asked):
    assert to_resume_from(asked, str(tmp_path / "nowhere")) is None


def test_a_half_written_checkpoint_of_the_users_choice_is_refused_by_the_name_of_the_last_whole_one(build, tmp_path):
    whole, half = saved(tmp_path / "run", 2), saved(tmp_path / "run", 3, None)
    with pytest.raises(ValueError, match=f"{half} is no whole checkpoint.*The last whole one beside it is {whole}"):
        build().train(resume_from_checkpoint=half)
    with pytest.raises(ValueError, match="nowhere is no whole checkpoint.*There is no whole one beside it"):
        build().train(resume_from_checkpoint=str(tmp_path / "other" / "nowhere"))


def test_no_whole_checkpoint_is_an_error_that_says_how_to_start(build, tmp_path):
    with pytest.raises(ValueError, match="run has no whole checkpoint that every process can read. To start"):
        build().train(resume_from_checkpoint=True)
    saved(tmp_path / "run", 2, "{")
    with pytest.raises(ValueError, match=r"only half-written ones \(steps 2\).*leave resume_from_checkpoint out"):
        build().train(resume_from_checkpoint="True")


def test_what_an_earlier_run_left_is_gone_before_a_checkpoint_takes_its_place(build, tmp_path):
    left = Path(saved(tmp_path / "run", 1))
    trainer = build(save_strategy="steps", save_steps=1)
    save_model, seen = trainer.save_model, []
    trainer.save_model = lambda *args, **kwargs: seen.append(left.exists()) or save_model(*args, **kwargs)
    trainer.train()
    assert seen == [False]
    assert is_whole(left)


# --- what a checkpoint lacks, whose it is, and what has changed since


@pytest.fixture(scope="module")
def trained(build_in, tmp_path_factory):
    """The folder of a run of three steps, each with a checkpoint; between two uses of its completions."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = build_in(folder)(**SAVED)
    trainer.train()
    return folder / "run"


SAVED = {
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 3,
    "rollout_reuse": 2,
    "gradient_accumulation_steps": 2,
}
PARTS = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rollouts_0.pt", "model.safetensors"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("harm", ["missing", "emptied", "cut short"])
def test_a_checkpoint_without_one_of_its_parts_is_told_by_it_and_the_one_before_is_gone_on_from(
    trained, tmp_path, caplog, part, harm
):
    shutil.copytree(trained, tmp_path / "run")
    last, before = tmp_path / "run" / "checkpoint-3", tmp_path / "run" / "checkpoint-2"
    file = last / part
    if harm == "missing":
        file.unlink()
    else:
        os.truncate(file, 0 if harm == "emptied" else file.stat().st_size - 1)
    assert not is_whole(last)
    assert to_resume_from(True, str(tmp_path / "run")) == str(before)
    assert f"checkpoint-3 is not whole (missing, or cut short: {part}): going on from {before}." in caplog.text
    with pytest.raises(ValueError, match=f"checkpoint-3 is no whole.*cut short: {part}. The last whole one.*-2"):
        to_resume_from(str(last), str(tmp_path / "run"))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_has_changed_since_it_was_saved_is_told_with_its_checkpoint(build, trained, tmp_path, part):
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-3" / part
    file.write_bytes(b"\x07" * file.stat().st_size)
    with pytest.raises(ValueError, match="checkpoint-3 cannot be read.*it has changed since"):
        build(**{**SAVED, "max_steps": 4}).train(resume_from_checkpoint=True)


def test_a_checkpoint_is_on_the_disk_before_it_is_marked_as_whole_and_before_older_ones_go(
    build, tmp_path, monkeypatch
):
    seen = []
    sync, rotate = os.fsync, transformers.trainer.rotate_checkpoints
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(os.readlink(f"/proc/self/fd/{handle}")) or sync(handle))
    monkeypatch.setattr(
        transformers.trainer, "rotate_checkpoints", lambda **kwargs: seen.append("rotate") or rotate(**kwargs)
    )
    build(**{**SAVED, "max_steps": 1}).train()
    folder = str(tmp_path / "run" / "checkpoint-1")
    seen = seen[seen.index(f"{folder}/config.json") :] if f"{folder}/config.json" in seen else seen
    mark = seen.index(f"{folder}/trainer_state.json")
    assert {f"{folder}/{part}" for part in [*PARTS, MANIFEST]} <= set(seen[:mark])
    assert seen[mark + 1 :][:3] == [folder, str(tmp_path / "run"), "rotate"]


def test_a_run_goes_on_from_no_checkpoint_of_another_one_that_was_begun_in_its_folder(build, trained, tmp_path, caplog):
    shutil.copytree(trained, tmp_path / "run")
    settings = {**SAVED, "learning_rate": 1e-3}
    with pytest.raises(KeyboardInterrupt):
        build(**settings, callbacks=[Interrupted(1)]).train()
    with pytest.raises(
        ValueError, match="that began last in .* has no whole checkpoint yet, and .*checkpoint-3 is of another"
    ):
        build(**settings).train(resume_from_checkpoint=True)
    with pytest.raises(KeyboardInterrupt):
        build(**{**settings, "save_steps": 2}, callbacks=[Interrupted(3)]).train()
    assert to_resume_from(True, str(tmp_path / "run")) == str(tmp_path / "run" / "checkpoint-2")
    assert "checkpoint-3 is of another run, which was begun in this folder before: going on from" in caplog.text
    resumed = build(**{**settings, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=True)
    fresh = build(**{**settings, "save_strategy": "no"})
    fresh.train()
    torch.testing.assert_close(weights_of(resumed), weights_of(fresh), rtol=0, atol=0)


def test_a_run_that_goes_on_from_an_earlier_checkpoint_leaves_the_later_ones_behind(build, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with pytest.raises(KeyboardInterrupt):
        build(**SAVED, callbacks=[Interrupted(2)]).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert to_resume_from(True, str(run)) == str(run / "checkpoint-1"), "the steps after it were of the run before"
    build(**{**SAVED, "max_steps": 2}).train(resume_from_checkpoint=True)
    assert to_resume_from(True, str(run)) == str(run / "checkpoint-2")
    assert is_whole(run / "checkpoint-3")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"distillation_loss": "alm"}, "distillation_loss (then 'dpca', now 'alm')"),
        ({"seed": 7}, "seed (then 42, now 7)"),
        ({"temperature": 0.5}, "temperature (then 1.0, now 0.5)"),
        ({"teacher": teacher_model(9)}, "teacher (then "),
        ({"dataset": prompts(15)}, "train_dataset (then '16 rows"),
    ],
)
def test_a_resume_under_other_circumstances_says_what_has_changed(build, trained, caplog, changed, said):
    settings = {**SAVED, "max_steps": 4, "save_strategy": "no", "output_dir": str(trained)}
    if "distillation_loss" in changed:
        settings |= {"rollout_reuse": 2}
    build(**{**settings, **changed}).train(resume_from_checkpoint=True)
    [line] = [line for line in caplog.messages if "with other settings than it was saved with" in line]
    assert said in line and "max_steps (then 3, now 4)" in line
    assert "output_dir" not in line and line.count("(then") == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lora_alpha": 64}, "peft_config.lora_alpha (then 8, now 64)"),
        ({"use_rslora": True}, "peft_config.use_rslora (then False, now True)"),
        ({"model": 9}, "frozen_weights (then "),
        ({}, None),
    ],
    ids=["alpha", "rsLoRA", "another base model", "nothing"],
)
def test_a_resume_with_another_adapter_or_base_model_says_so(build, tmp_path, caplog, changed, said):
    def run(model=3, resume=None, **adapter):
        peft_config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **adapter})
        settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "output_dir": str(tmp_path / "run")}
        build(model=student_model(model), peft_config=peft_config, **settings).train(resume_from_checkpoint=resume)

    run()
    caplog.clear()
    run(**changed, resume=str(tmp_path / "run" / "checkpoint-1"))
    found = [line for line in caplog.messages if "with other settings than it was saved with" in line]
    assert found == [] if said is None else said in found[0] and found[0].count("(then") == 1


def rates_of(trainer) -> dict[int, float]:
    return {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}


def test_a_resumed_run_keeps_the_learning_rate_of_its_checkpoint_and_says_so(build, trained, caplog):
    rates = []
    for own in ({}, {"learning_rate": 7e-4, "weight_decay": 0.5}):
        trainer = build(**{**SAVED, "max_steps": 6, "save_strategy": "no", "output_dir": str(trained), **own})
        trainer.train(resume_from_checkpoint=True)
        rates.append(rates_of(trainer))
        assert trainer.optimizer.param_groups[0]["weight_decay"] == 0
        assert ("learning_rate, weight_decay: the checkpoint's stays in force" in caplog.text) == bool(own)
    assert rates[0] == rates[1]


def test_a_run_that_is_resumed_for_more_steps_has_the_rates_of_a_longer_run_from_its_first_step_on(build, trained):
    settings = {**SAVED, "max_steps": 6, "save_strategy": "no"}
    resumed, whole = build(**{**settings, "output_dir": str(trained)}), build(**settings)
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert [rates_of(resumed)[step] for step in (4, 5, 6)] == [rates_of(whole)[step] for step in (4, 5, 6)]
    assert rates_of(whole)[4] > 0


LINEAR = {"lr_scheduler_type": "linear"}
PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "eval_dataset": prompts(2),
    "eval_strategy": "steps",
    "eval_steps": 1,
}


@pytest.mark.parametrize(
    ("first", "then", "said", "steps"),
    [
        (LINEAR, PLATEAU, "schedule (then torch.optim.lr_scheduler.LambdaLR, now ", 4),
        (PLATEAU, LINEAR, "schedule (then torch.optim.lr_scheduler.ReduceLROnPlateau, now ", 4),
        ({"optim": "sgd"}, {"optim": "adamw_torch"}, "optimizer (then torch.optim.sgd.SGD, now ", 2),
        ({"optim": "adamw_torch"}, {"optim": "sgd"}, "optimizer (then torch.optim.adamw.AdamW, now ", None),
        (
            {"optim": "adafactor"},
            {"optim": "adamw_torch"},
            "optimizer (then transformers.optimization.Adafactor, now ",
            2,
        ),
        ({"optim": "adamw_torch"}, {"optim": "adafactor"}, "optimizer (then torch.optim.adamw.AdamW, now ", 2),
        (
            PLATEAU,
            {"optim": "sgd"},
            "optimizer (then torch.optim.adamw.AdamW, now torch.optim.sgd.SGD) and schedule (",
            None,
        ),
        ({"optim": "adamw_torch"}, {"optim": "adamw_torch_fused"}, "", 4),
    ],
)
def test_with_another_optimizer_or_kind_of_schedule_a_resumed_run_has_the_rates_of_its_own_settings(
    build, tmp_path, caplog, first, then, said, steps
):
    settings = {"max_steps": 4, "save_strategy": "no", "learning_rate": 1e-3}
    build(**{**settings, **first, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}).train()
    whole, resumed = build(**settings, **then), build(**{**settings, "weight_decay": 0.5}, **then)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert [rates_of(resumed)[step] for step in (3, 4)] == [rates_of(whole)[step] for step in (3, 4)]
    taken = {int(own["step"]) for own in resumed.optimizer.state.values() if "step" in own}
    assert taken == ({steps} if steps else set())
    assert said in caplog.text
    anew = "optimizer" in said
    assert ("weight_decay: the checkpoint's stays in force" in caplog.text) == (not anew)
    assert resumed.optimizer.param_groups[0]["weight_decay"] == (0.5 if anew else 0)


def test_a_resume_under_the_same_circumstances_says_nothing(build, trained, caplog):
    build(**SAVED, output_dir=str(trained), logging_steps=3).train(resume_from_checkpoint=True)
    assert "saved with" not in caplog.text


@pytest.mark.parametrize(("shuffled", "rows"), [(False, 11), (True, 9)])
def test_a_stream_is_resumed_in_the_pass_in_which_it_was(build, tmp_path, shuffled, rows):
    """Four rows a step: passes end after steps 3 and 6, the last step of each with three rows, or one, in a single micro-batch."""

    def stream():
        found = prompts(rows).to_iterable_dataset(num_shards=2)
        return found.shuffle(seed=3, buffer_size=4) if shuffled else found

    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
    }
    whole = build(dataset=stream(), **settings, save_strategy="steps", save_steps=1)
    whole.train()
    for step in (2, 3, 4, 6, 7):
        resumed = build(dataset=stream(), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        torch.testing.assert_close(toys.weights(resumed), toys.weights(whole), rtol=0, atol=0)
        assert resumed.state.epoch == whole.state.epoch


@pytest.mark.parametrize("steps", [3, 2])
def test_a_run_that_has_taken_its_steps_takes_no_more_when_it_is_started_again(build, trained, caplog, steps):
    ended = build(**{**SAVED, "max_steps": steps}, output_dir=str(trained))
    ended.train(resume_from_checkpoint=str(trained / "checkpoint-3"))
    assert ended.state.global_step == 3
    saved = load_file(trained / "checkpoint-3" / "model.safetensors")
    own = ended.model.state_dict()
    torch.testing.assert_close({name: own[name] for name in saved}, saved, rtol=0, atol=0)
    assert f"Nothing is left to train: the checkpoint has taken 3 steps, and the run has {steps}." in caplog.text


def test_a_run_of_epochs_that_is_resumed_with_more_rows_a_step_says_that_nothing_is_left(build, caplog):
    settings = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch", "dataset": prompts(4)}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    build(**settings).train()
    more = build(**{**settings, "num_train_epochs": 4, "gradient_accumulation_steps": 2})
    more.train(resume_from_checkpoint=True)
    assert "the checkpoint has taken 8 steps, and the run's 4 epochs have 8" in caplog.text
    more.train(resume_from_checkpoint=False)
    assert caplog.text.count("Nothing is left to train") == 1


LOADERS = {
    "processes that stay": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    "torch's own order": {"accelerator_config": {"use_seedable_sampler": False}},
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("step", [2, 4])
def test_with_any_data_loader_a_run_that_is_resumed_in_any_epoch_ends_with_the_same_weights(tmp_path, loader, step):
    settings = {"max_steps": 8, "per_device_train_batch_size": 4, "save_total_limit": None, **loader}
    whole = resume_run.build(tmp_path / "whole", **settings)
    whole.train()
    assert whole.state.epoch > 2, "the first epoch is followed by others, in the second of which is step 4"
    late = resume_run.build(tmp_path / "late", **settings)
    late.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    torch.testing.assert_close(toys.weights(late), toys.weights(whole), rtol=0, atol=0)


ENCODED = {
    "P-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8),
    "P-tuning by an LSTM": lambda: PromptEncoderConfig(
        num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8, encoder_reparameterization_type="LSTM"
    ),
    "a projected prefix": lambda: PrefixTuningConfig(
        num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8, prefix_projection=True
    ),
    "a prompt of examples": lambda: CPTConfig(
        cpt_token_ids=[5, 6, 7], cpt_mask=[1] * 3, cpt_tokens_type_mask=[1, 2, 3], task_type="CAUSAL_LM"
    ),
}


def adapters(*active: str, frozen: str = "") -> torch.nn.Module:
    """Three adapters, all of which add something, with those `active` switched on."""
    torch.manual_seed(5)
    model = get_peft_model(student_model(), ADDING)
    model.add_adapter("first", ADDING)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(list(active))
    for name, own in model.named_parameters():
        own.requires_grad_(own.requires_grad and not (frozen and frozen in name))
    return model


ADDING = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
ACTIVE = [("first",), ("second",), ("default", "second"), ("second", "first")]


@pytest.mark.parametrize("active", ACTIVE, ids="+".join)
def test_adapters_of_any_name_are_resumed_and_are_those_of_the_best_checkpoint(build, tmp_path, active):
    """PEFT saves those that are not called "default" in folders of their own. The weights that were frozen stay so."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1}
    whole = build(**settings, model=adapters(*active, frozen="lora_A"))
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = build(**{**settings, "save_strategy": "no"}, model=adapters(*active, frozen="lora_A"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for trainer in (whole, resumed):
        assert trainer.model.active_adapters == list(active)
        assert not any(own.requires_grad for name, own in trainer.model.named_parameters() if ".lora_A." in name)
    torch.testing.assert_close(toys.weights(resumed), toys.weights(whole), rtol=0, atol=0)
    last = toys.weights(whole).clone()
    whole.state.best_model_checkpoint = str(checkpoint)
    whole._load_best_model()
    assert not torch.equal(toys.weights(whole), last)
    own = dict(whole.model.named_parameters())
    for name in whole.model.peft_config:
        folder = checkpoint / ("" if name == "default" else name)
        for key, value in load_file(folder / "adapter_model.safetensors").items():
            torch.testing.assert_close(own[key.replace(".weight", f".{name}.weight")], value, rtol=0, atol=0)
    assert whole.model.active_adapters == list(active)


def test_an_adapter_in_half_precision_is_resumed_in_it(build, tmp_path):
    """As TRL makes that of a quantized student. What of it is frozen stays so."""
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}

    def student():
        torch.manual_seed(5)
        model = get_peft_model(student_model().to(torch.bfloat16), ADDING, autocast_adapter_dtype=False)
        for name, own in model.named_parameters():
            own.requires_grad_("lora_B" in name)
        return model

    whole = build(**settings, model=student())
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = build(**{**settings, "save_strategy": "no"}, model=student())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for trainer in (whole, resumed):
        learned = {name: own for name, own in trainer.model.named_parameters() if own.requires_grad}
        assert all("lora_B" in name and own.dtype == torch.bfloat16 for name, own in learned.items()) and learned
    torch.testing.assert_close(toys.weights(resumed), toys.weights(whole), rtol=0, atol=0)
    whole.state.best_model_checkpoint = str(checkpoint)
    whole._load_best_model()
    assert {own.dtype for own in whole.model.parameters()} == {torch.bfloat16}


def test_a_checkpoint_without_an_adapter_that_is_on_is_refused_with_the_way_out(build, tmp_path):
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    build(**settings, model=adapters("first")).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    shutil.rmtree(checkpoint / "second")
    trainer = build(model=adapters("first", "second"))
    with pytest.raises(ValueError, match="checkpoint-1 has no adapter named 'second'.*set_adapter"):
        trainer._load_from_checkpoint(str(checkpoint))


@pytest.mark.skipif(CACHE == "cache", reason="with this transformers, virtual tokens are refused")
@pytest.mark.parametrize("kind", ENCODED)
def test_what_makes_virtual_tokens_is_resumed_and_is_that_of_the_best_checkpoint(build, tmp_path, kind):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1}
    whole = build(**settings, peft_config=ENCODED[kind]())
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = build(**{**settings, "save_strategy": "no"}, peft_config=ENCODED[kind]())
    resumed.train(resume_from_checkpoint=str(checkpoint))
    # as saving does: CPT shortens its weights whenever it makes the tokens
    resumed.model.get_prompt_embedding_to_save("default")
    torch.testing.assert_close(toys.weights(resumed), toys.weights(whole), rtol=0, atol=0)
    whole.state.best_model_checkpoint = str(checkpoint)
    whole._load_best_model()
    tokens = load_file(checkpoint / "adapter_model.safetensors")["prompt_embeddings"]
    torch.testing.assert_close(whole.model.get_prompt_embedding_to_save("default"), tokens, rtol=0, atol=0)


@pytest.mark.skipif(CACHE == "cache", reason="with this transformers, virtual tokens are refused")
def test_a_checkpoint_without_what_makes_its_virtual_tokens_is_refused(build, tmp_path):
    trainer = build(peft_config=ENCODED["P-tuning"]())
    checkpoint = saved(tmp_path, 1)
    trainer.save_model(checkpoint)
    with pytest.raises(ValueError, match="checkpoint-1 has no prompt_encoder.pt.*PromptEncoder that makes them"):
        trainer.train(resume_from_checkpoint=checkpoint)


class Calendar(date):
    now = date(2024, 2, 29)

    @classmethod
    def today(cls):
        return cls.now


def test_a_run_that_is_resumed_on_another_day_goes_on_with_the_prompts_of_the_day_it_began(
    build, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(resuming, "date", Calendar)
    dated = student_tokenizer()
    dated.chat_template = dated.chat_template.replace("assistant\n", 'assistant on {{ strftime_now("%d of %m") }}\n')
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "processing_class": dated, **SGD}
    settings |= {"eval_dataset": {"few": prompts(3)}}
    whole = fix_rollouts(build(**settings, output_dir=str(tmp_path / "whole")))
    whole.train()
    Calendar.now = date(2024, 3, 1)
    late = fix_rollouts(build(**settings, output_dir=str(tmp_path / "late")))
    assert "29 of 02" in dated.decode(whole.train_dataset[0]["prompt_ids"])
    assert "01 of 03" in dated.decode(late.train_dataset[0]["prompt_ids"])
    late.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert (
        late.train_dataset[:] == whole.train_dataset[:] and late.eval_dataset["few"][:] == whole.eval_dataset["few"][:]
    )
    torch.testing.assert_close(toys.weights(late), toys.weights(whole), rtol=0, atol=0)
    assert "began on 2024-02-29, so its prompts go on to say 2024-02-29 and not 2024-03-01" in caplog.text
    assert "saved with" not in caplog.text


def test_a_checkpoint_of_weights_alone_says_that_the_optimizer_begins_anew(build, tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    build(**settings).train()
    assert not (tmp_path / "run" / RUN).read_text().startswith("null")
    build(**settings, max_steps=2).train(resume_from_checkpoint=True)
    assert "checkpoint-1 has no state of the optimizer (save_only_model?): the optimizer" in caplog.text
