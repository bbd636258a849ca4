"""Completions written one step ahead (`async_rollouts=1`), beside a slow simulation in which nothing happens at the same time."""

import copy
import inspect
import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import ahead_run
import pytest
import torch
from accelerate.utils import DistributedType
from datasets import IterableDataset
from fixed_points import SHAPES, World
from launched import check_finished
from peft import LoraConfig
from strategies_run import save_models
from test_vllm_writing import Engine
from toys import SGD, prompts, student_model, student_tokenizer, weights
from transformers import TrainerCallback
from trl.generation.vllm_client import VLLMClient
from writing_late import write_late

from trl_ctopd.losses import DPCA, StrictSampled
from trl_ctopd.models.forwards import base_model
from trl_ctopd.rollouts import ahead, student_copy
from trl_ctopd.rollouts import vllm as vllm_writing
from trl_ctopd.rollouts.ahead import Ahead, Windows
from trl_ctopd.rollouts.source import RolloutSource
from trl_ctopd.rollouts.student_copy import check_copied


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs" / "cpu"
AHEAD = {"async_rollouts": 1, "generation_device": "cpu"}
# 11 rows are three steps an epoch, of which the last one is shorter; dropout shows whether anything else draws in its thread
RUN = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 5,
    "disable_dropout": False,
    "max_new_tokens": 6,
    "event": "open",  # builds no tables
}
LORA = {"peft_config": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2)}


def lengths(completion_ids, **_) -> list[float]:
    """A reward."""
    return [float(len(ids)) for ids in completion_ids]


@pytest.fixture
def run(build):
    """A trainer of five steps; keyword arguments as of `build`."""

    def run(**settings):
        given = {"model": student_model(attention_dropout=0.2), "dataset": prompts(11), **RUN, **settings}
        return build(**given)

    return run


def trained(trainer, **kwargs) -> torch.Tensor:
    trainer.train(**kwargs)
    return weights(trainer)


def asked_of(trainer) -> list:
    """The prompts of each step, once it has its text, each with whether it is a padding row."""
    seen, take = [], trainer.rollouts.ahead.take

    def watched(model, asked, step, tell):
        seen.append([(prompt.student_ids, prompt.is_padding) for prompt in asked])
        return take(model, asked, step, tell)

    trainer.rollouts.ahead.take = watched
    return seen


def at_work() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rollouts ahead"]


# --- the same run, with nothing at the same time


@pytest.mark.parametrize(
    "settings",
    [{}, {**LORA, "lmbda": 0.5, "num_generations": 2, "reward_funcs": lengths}],
    ids=["whole", "adapter, given text and rewards"],
)
def test_a_run_is_the_one_that_writes_each_text_with_the_weights_of_the_step_before(run, settings):
    ahead = trained(run(**AHEAD, eval_dataset=prompts(3), eval_strategy="steps", eval_steps=2, **settings))
    assert torch.equal(ahead, trained(write_late(run(**settings))))


def test_a_weight_that_is_frozen_after_a_step_is_written_with_as_that_step_left_it(run):
    class Freeze(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.get_input_embeddings().requires_grad_(state.global_step < 2)

    ahead = trained(run(**AHEAD, callbacks=[Freeze()]))
    assert torch.equal(ahead, trained(write_late(run(callbacks=[Freeze()]))))


def test_which_thread_is_faster_changes_nothing(run, monkeypatch):
    settings = {
        **AHEAD,
        "max_steps": 3,
        "gradient_checkpointing": True,
    }  # which puts the process's random numbers back and forth
    quick, write = trained(run(**settings)), student_copy.write_with_copy
    monkeypatch.setattr(student_copy, "write_with_copy", lambda *args: (time.sleep(0.1), write(*args))[1])
    slow = run(**settings)
    assert torch.equal(trained(slow), quick)
    logs = slow.state.log_history[:3]
    assert [log["sampling/staleness"] for log in logs] == [0, 1, 1]
    assert logs[0]["seconds/generation"] >= 0.1, "the first text is waited for"
    for log in logs[1:]:
        assert log["seconds/generation"] + log["sampling/seconds_hidden"] >= 0.1


def test_as_many_texts_are_written_as_steps_are_learned(run, monkeypatch):
    calls, write = [], student_copy.write_with_copy
    monkeypatch.setattr(student_copy, "write_with_copy", lambda *args: (calls.append(len(args[1])), write(*args))[1])
    run(**AHEAD).train()
    assert calls == [4, 4, 3, 4, 4]


@pytest.mark.parametrize("rows", [5, 2])
def test_a_stream_is_written_ahead_throughout_though_its_passes_end_amid_a_step(run, rows):
    trainer = run(**AHEAD, dataset=prompts(rows).to_iterable_dataset(), logging_steps=1)
    trainer.train()
    found = [entry["sampling/staleness"] for entry in trainer.state.log_history if "sampling/staleness" in entry]
    assert found == [0, 1, 1, 1, 1]


# --- the ratio


def test_time_for_which_a_text_is_waited_for_is_not_hidden(monkeypatch):
    class Writes:
        def begin(self, model, prompts, step, taken):
            return lambda cancelled: None, lambda result: []

    clocks, told = (
        {True: iter([0.0, 3.0]), False: iter([0.0, 5.0])},
        {},
    )  # of who waits for the text, and of who writes it
    clock = SimpleNamespace(perf_counter=lambda: next(clocks[threading.current_thread() is threading.main_thread()]))
    monkeypatch.setattr(ahead, "time", clock)
    Ahead(Writes(), None).take(None, [], 0, told.update)
    assert told["sampling/seconds_hidden"] == (2.0, 1)


def in_float64(trainer) -> torch.nn.Module:
    """The student as it is now."""
    copied = copy.deepcopy(trainer.model).double()
    del base_model(copied).forward  # what scores tokens is bound to the original
    return copied.eval()


@pytest.mark.parametrize("settings", [{}, LORA], ids=["whole", "adapter"])
def test_each_token_counts_by_its_ratio_to_the_older_student_up_to_the_bound(run, settings):
    trainer = run(**AHEAD, max_steps=2, disable_dropout=True, vllm_importance_sampling_clip_max=1.01, **settings)
    students, found, score = [], [], trainer._scorer

    def scored(model, inputs, *args):
        batch, *others = score(model, inputs, *args)
        students.append(in_float64(trainer))
        found.append((inputs["input_ids"], batch))
        return batch, *others

    trainer._scorer = scored
    trainer.train()
    older, _, now, _ = students  # two micro-batches a step
    bounded = []
    for ids, batch in found[2:]:
        p, q = (m(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] for m in (now, older))
        ratio, takes_part = (p - q).exp().detach(), batch.student_chunks >= 0
        weight = batch.importance.double()[takes_part]
        torch.testing.assert_close(weight, ratio.clamp(max=1.01)[takes_part], rtol=1e-4, atol=1e-5)
        bounded.append((ratio > 1.01)[takes_part])
    bounded = torch.cat(bounded)
    assert 0 < bounded.sum() < len(bounded)
    assert trainer.state.log_history[1]["sampling/truncated_fraction"] == pytest.approx(bounded.double().mean().item())


@pytest.mark.parametrize("loss", [StrictSampled(None), DPCA("macro", None, "closed")], ids=["strict_sampled", "dpca"])
def test_weighted_text_of_an_older_student_teaches_after_each_prefix_what_the_students_own_would(loss):
    """In expectation, one token a chunk. How often a prefix is met is the older student's; what is learned there is not."""
    world = World(SHAPES["1:1"])
    noise = torch.Generator().manual_seed(0)
    now, older = (
        world.logits + torch.randn(world.logits.shape, generator=noise, dtype=torch.float64) for _ in range(2)
    )
    own = world.expected_gradient(loss, now) / world.reached(now)[:, None]
    other = world.expected_gradient(loss, now, writer=older) / world.reached(older)[:, None]
    torch.testing.assert_close(other, own, rtol=1e-8, atol=1e-10)
    assert own.abs().max() > 1e-2 and not torch.allclose(world.reached(now), world.reached(older))


def test_a_perfect_student_stays_though_the_text_is_that_of_the_student_before(build):
    """The student becomes its teacher while the text of its last step is under way."""
    teacher = student_model(seed=1)

    class Become(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                model.load_state_dict(teacher.state_dict())

    trainer = build(
        teacher=teacher,
        teacher_processing_class=student_tokenizer(),
        callbacks=[Become()],
        **SGD,
        **AHEAD,
        **{"max_steps": 2},
    )
    reached = trained(trainer)
    log = trainer.state.log_history[1]
    assert log["sampling/staleness"] == 1 and log["sampling/log_prob_difference"] > 0.05
    perfect = torch.cat([parameter.flatten() for parameter in teacher.parameters()])
    torch.testing.assert_close(reached, perfect, rtol=0, atol=1e-5)


# --- a resume


def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_run(run, tmp_path):
    """From the end of an epoch; test_resume.py kills runs elsewhere."""
    settings = {**LORA, "save_strategy": "steps", "save_steps": 3}
    whole = trained(run(**AHEAD, **settings))
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert (checkpoint / "ahead_0.pt").exists()
    resumed = run(**AHEAD, output_dir=str(tmp_path / "resumed"), **settings)
    assert torch.equal(trained(resumed, resume_from_checkpoint=str(checkpoint)), whole)
    assert resumed.state.log_history[3]["sampling/staleness"] == 1
    assert not (tmp_path / "run" / "checkpoint-5" / "ahead_0.pt").exists()


def test_a_run_resumed_with_other_prompts_drops_the_text_that_is_of_the_old_ones_and_says_so(run, tmp_path, caplog):
    run(**AHEAD, max_steps=2, save_strategy="steps", save_steps=1).train()
    resumed = run(**AHEAD, max_steps=2, dataset=prompts(12))
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert "keeps completions for step 1 that are of other prompts than step 1 now has" in caplog.text
    assert resumed.state.log_history[1]["sampling/staleness"] == 0


# --- errors and ends


class Fails(Exception):
    pass


@pytest.fixture
def failing(monkeypatch):
    """`failing(n)`: writing fails at the n-th text."""

    def failing(at: int):
        calls, write = [], student_copy.write_with_copy

        def fail(*args):
            calls.append(args)
            if len(calls) == at:
                raise Fails("the device is gone")
            return write(*args)

        monkeypatch.setattr(student_copy, "write_with_copy", fail)

    return failing


def test_an_error_while_text_is_written_ahead_reaches_the_caller_as_itself(run, failing, caplog, tmp_path):
    failing(3)
    trainer = run(**AHEAD, save_strategy="steps", save_steps=1)
    with pytest.raises(Fails, match="the device is gone"), caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 2 and not at_work()
    assert "checkpoint-2 keeps no completions for step 2, since writing them failed (Fails)" in caplog.text
    kept = [(tmp_path / "run" / f"checkpoint-{step}" / "ahead_0.pt").exists() for step in (1, 2)]
    assert kept == [True, False]


class At(TrainerCallback):
    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None  # once
            self.act(control)


def interrupt(control):
    raise KeyboardInterrupt


def test_an_interrupt_ends_the_text_under_way_at_its_next_token(run):
    trainer = run(**AHEAD, callbacks=[At(1, interrupt)], max_new_tokens=100, max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for thread in at_work():
        thread.join(600)
    assert trainer.rollouts.ahead._job.written is None
    trainer.train()
    assert trainer.state.global_step == 2, "and the trainer can begin anew"


def stop_epoch(control):
    control.should_epoch_stop = True


def stop_training(control):
    control.should_training_stop = True


def test_an_epoch_that_a_callback_ends_takes_its_text_with_it(run):
    trainer = run(**AHEAD, callbacks=[At(1, stop_epoch)], train_sampling_strategy="sequential", max_steps=6)
    seen = asked_of(trainer)
    trainer.train()
    assert seen[1] == seen[0] and seen[2] != seen[0], "the second epoch begins with the first rows"
    assert [log["sampling/staleness"] for log in trainer.state.log_history[:3]] == [0, 0, 1]
    assert not at_work()


def test_a_run_that_a_callback_ends_leaves_no_thread_at_work(run):
    trainer = run(**AHEAD, callbacks=[At(2, stop_training)])
    trainer.train()
    assert trainer.state.global_step == 2 and not at_work()


# --- the prompts of the next step


class Plain:
    """A loader of numbers, as Accelerate's: its iterators do nothing before they are asked."""

    def __init__(self, rows: int, shuffled: bool = True):
        self.rows, self.shuffled, self.epoch, self.begun = rows, shuffled, 0, []

    def __len__(self):
        return self.rows

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        self.begun.append(self.epoch)
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for row in order if self.shuffled else range(self.rows):
            yield {"prompts": [row]}


def windows_of(loader, epochs: int, count: int, ahead: bool, calls: int = 5) -> list:
    """What Trainer gets from an epoch to the next: at most `calls` steps in each."""
    windows, found = Windows(list), []
    for epoch in range(epochs):
        windows.begin_epoch(loader, epoch)
        loader.set_epoch(epoch)
        given = iter(loader)
        for _ in range(calls):
            found.append(windows.take(given, count))
            if ahead and found[-1]:
                windows.peek(given, count)
    return found


@pytest.mark.parametrize("rows", [1, 4, 6, 7])
def test_windows_are_the_same_whether_read_when_they_are_due_or_before(rows):
    one, other = Plain(rows), Plain(rows)
    assert windows_of(one, 3, 2, ahead=True) == windows_of(other, 3, 2, ahead=False)
    assert one.begun == [0, 1, 2, 3] and other.begun == [0, 1, 2], "each epoch is begun once"


@pytest.mark.parametrize(
    "dataset",
    [prompts(11), IterableDataset.from_generator(lambda: iter(prompts(11)))],
    ids=["dataset", "stream, which is read over and over"],
)
def test_each_step_has_the_prompts_that_it_would_have_without(run, dataset):
    trainer = run(**AHEAD, dataset=dataset, max_new_tokens=1)
    ahead = asked_of(trainer)
    trainer.train()
    trainer, due = run(dataset=dataset), []

    def write(model, asked, step):
        due.append([(prompt.student_ids, prompt.is_padding) for prompt in asked])
        return [([5], None) for _ in asked]

    trainer.rollouts.write = write
    trainer.train()
    assert ahead == due and len(due) == 5


# --- a server


class Server(Engine):
    """Answers as vLLM's server does, in the shapes that TRL's client returns, with the weights that it was last given."""

    def sync_weights(self):
        super().sync_weights()
        self.given = [parameter.detach().clone() for parameter in self.settings["model"].parameters()]

    def generate(self, *args, **kwargs):
        if "images" in kwargs:  # TRL's own call, which training in the main thread makes
            return super().generate(*args, **kwargs)
        call = inspect.signature(VLLMClient.generate).bind(self, *args, **kwargs).arguments
        self.threads.append(threading.current_thread().name)
        self.asked.append(call)
        self.wait()
        model = student_model()
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), self.given, strict=True):
                parameter.copy_(value)
            tokenizer, completions, scores = self.settings["processing_class"], [], []
            for prompt in call["prompts"]:
                ids = tokenizer.encode(f"{len(prompt)} is the sum")[:6] + [tokenizer.eos_token_id, 7]
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                completions.append(ids)
                scores.append([[logits[n, token].item()] for n, token in enumerate(ids)])
        return {"prompt_ids": call["prompts"], "completion_ids": completions, "logprobs": scores}


@pytest.fixture
def served(run, monkeypatch):
    """A trainer whose student a server writes for, and the server."""

    def served(wait=lambda: None, **settings):
        monkeypatch.setattr(Server, "threads", [], raising=False)
        monkeypatch.setattr(Server, "asked", [], raising=False)
        monkeypatch.setattr(Server, "wait", staticmethod(wait), raising=False)
        monkeypatch.setattr(vllm_writing, "VLLMGeneration", Server)
        for name, value in {
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }.items():
            monkeypatch.setattr(Server, name, value, raising=False)
        for name, value in {"max_completion_length": 8, "logprobs": 0, "generation_kwargs": {}}.items():
            monkeypatch.setattr(Server, name, value, raising=False)
        trainer = run(
            **{"async_rollouts": 1, "use_vllm": True, "vllm_mode": "server", "model": student_model(), **settings}
        )
        return trainer, trainer.rollouts.write._engine

    return served


def test_a_server_gets_each_steps_weights_once_and_writes_the_next_steps_text_in_another_thread(served):
    trainer, server = served(max_steps=4, eval_dataset=prompts(2), eval_strategy="steps", eval_steps=2)
    before = []

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            before.append(weights(trainer).clone())

    trainer.add_callback(Keep())
    trainer.train()
    assert [len(call["prompts"]) for call in server.asked] == [4, 4, 3, 4]
    assert server.threads == ["rollouts ahead"] * 4
    assert all(torch.equal(own, other) for own, other in zip(server.synced[:3], before[:3], strict=True))
    assert len(server.synced) == 4, (
        "W_0, W_1, W_2 (which the evaluation after it shares), and W_4 for the last evaluation"
    )
    logs = [log for log in trainer.state.log_history if "sampling/staleness" in log]
    assert [log["sampling/staleness"] for log in logs] == [0, 1, 1, 1]
    assert logs[0]["sampling/log_prob_difference"] < 1e-5 < 1e-3 < logs[2]["sampling/log_prob_difference"]
    assert logs[0]["completions/truncated_fraction"] == 0


def test_an_interrupt_does_not_wait_for_a_server_that_never_answers(served):
    answers, calls = threading.Event(), []

    def wait():
        calls.append(None)
        if len(calls) == 3:
            answers.wait()

    trainer, _ = served(wait, callbacks=[At(2, interrupt)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    [thread] = at_work()
    assert thread.daemon, "so that the process can end"
    answers.set()
    thread.join(600)


def test_where_another_process_failed_the_error_says_so(served, monkeypatch):
    trainer, _ = served()
    monkeypatch.setattr(vllm_writing, "broadcast_object_list", lambda objects: [None])
    with pytest.raises(RuntimeError, match="Another process failed while it wrote the completions of step 0 ahead"):
        trainer.train()


# --- several processes


@pytest.mark.slow  # under DDP it is resumed in test_resume.py
def test_under_zero2_the_copy_of_each_process_writes_as_its_student_was_a_step_before(tmp_path):
    save_models(tmp_path)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    script = CONFIGS / "on_cpu.py", Path(ahead_run.__file__), tmp_path
    done = subprocess.run([*command, CONFIGS / "zero2.yaml", *script], capture_output=True, text=True, timeout=900)
    results = [tmp_path / f"{rank}.json" for rank in (0, 1)]
    check_finished(done, results)
    for path in results:
        for name, found in json.loads(path.read_text()).items():
            assert found["strategy"] == "DEEPSPEED"
            assert found["handed_over"] == [0, 0, 0], name
            assert found["from_late"] == 0 and found["from_start"] > 1e-3, name


# --- what is refused


@pytest.mark.parametrize(
    ("named", "reason"),
    [
        ({"is_quantized": True}, "the student is quantized"),
        ({"hf_device_map": {"model": "cpu", "lm_head": "disk"}}, "the student is spread over 2 devices"),
    ],
)
def test_a_student_of_which_no_copy_can_write_is_refused(run, named, reason):
    model, args = student_model(), run(**AHEAD).args
    check_copied(model, args, SimpleNamespace(distributed_type=DistributedType.NO))
    for name, value in named.items():
        setattr(model, name, value)
    with pytest.raises(ValueError, match=f"{reason}.*Set async_rollouts=0, or let a server write"):
        check_copied(model, args, SimpleNamespace(distributed_type=DistributedType.NO))


def test_a_sharded_student_and_tools_are_refused(run):
    trainer = run(**AHEAD)
    with pytest.raises(ValueError, match="sharded over processes"):
        check_copied(trainer.model, trainer.args, SimpleNamespace(distributed_type=DistributedType.FSDP))
    own = trainer.rollouts
    with pytest.raises(ValueError, match="does not go with tools.*Set async_rollouts=0"):
        RolloutSource(trainer.args, trainer.accelerator, None, None, own.write, None, tools=object(), ahead=own.ahead)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"async_rollouts": 2}, r"async_rollouts must be 0 \(off\) or 1 .*, got 2"),
        ({"async_rollouts": -1}, "got -1"),
        ({"generation_device": None}, "name a second GPU.*generation_device='cuda:1'"),
        ({"async_rollouts": 0}, r"generation_device=\['cpu'\] has no effect with async_rollouts=0"),
        ({"generation_device": "cuda:99"}, "generation_device='cuda:99' cannot be used"),
        ({"generation_device": None, "use_vllm": True}, "vllm_mode='colocate'.*Set vllm_mode='server'"),
        ({"use_vllm": True, "vllm_mode": "server"}, r"generation_device=\['cpu'\] has no effect with use_vllm=True"),
        ({"lmbda": 0.0}, "no effect with lmbda=0.0"),
        ({"rollout_reuse": 2}, "does not go with rollout_reuse=2"),
        ({"early_stop": "growing", "early_stop_kwargs": {"start": 2}}, "does not go with early_stop='growing'"),
        ({"generation_backend": "transformers_continuous"}, "generation_backend='transformers_continuous'"),
        ({"torch_compile": True}, "Set torch_compile=False, or let a server write"),
        ({"top_p": 0.9, "min_p": 0.1}, "top_p=0.9, min_p=0.1 shapes them too"),
        (
            {"distillation_loss": "strict_topk"},
            "async_rollouts=1 trains on completions of a student that has been updated",
        ),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_way_out(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(**{**AHEAD, **settings})
