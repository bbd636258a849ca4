"""What makes the gradient steadier, through the trainer: credits by the beginnings of chunks, and a baseline."""

import contextlib

import pytest
import torch
from protocol_server import ProtocolServer
from toys import SGD, fix_rollouts, step_of, teacher_model, teacher_tokenizer

from trl_ctopd.losses.prefix_credit import PREFIX_CREDITS


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("trl_ctopd.teachers.panel.CACHE_DIR", tmp_path / "cache")


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            ProtocolServer(teacher_model(**SHARP), teacher_tokenizer(), **options)
        )


SHARP = {
    "initializer_range": 0.3,
    "vocab_size": len(teacher_tokenizer()),
}  # no padding rows, of which a server says nothing
IN_ORDER = {"train_sampling_strategy": "sequential", **SGD}


@pytest.mark.parametrize("credit", PREFIX_CREDITS)
def test_a_credit_by_the_beginnings_of_chunks_trains_and_says_what_has_none(build, credit):
    trainer = fix_rollouts(build(credit=credit, **IN_ORDER))
    step = step_of(trainer)
    assert 0 <= trainer.state.log_history[0]["credit/without_prefix_fraction"] < 1
    plain = step_of(fix_rollouts(build(**IN_ORDER)))
    assert (step - plain).abs().max() > 1e-3 * plain.abs().max()


SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "logit_tile_tokens": 16}


def test_micro_batches_and_tiles_give_the_whole_batchs_step(build):
    settings = {"credit": "remaining", **IN_ORDER}
    whole = step_of(fix_rollouts(build(per_device_train_batch_size=8, **settings)))
    torch.testing.assert_close(step_of(fix_rollouts(build(**SPLIT, **settings))), whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("credit", PREFIX_CREDITS)
def test_a_teacher_behind_a_server_is_refused_with_the_setting_that_asks_for_more(build, credit, serve):
    with pytest.raises(
        ValueError, match=f"dpca with credit='{credit}' needs the teacher's logits.*a single teacher in this"
    ):
        build(credit=credit, teacher=serve().url)


@pytest.mark.parametrize("event", ["closed", "open"])
def test_a_baseline_trains_in_whole_and_in_parts_and_says_what_it_adds(build, event):
    settings = {"event": event, "baseline": "kl", **IN_ORDER}
    trainer = fix_rollouts(build(per_device_train_batch_size=8, **settings))
    whole = step_of(trainer)
    log = trainer.state.log_history[0]
    assert log["baseline/nats_per_chunk"] > 0 and log["baseline/told_fraction"] > 0.5
    torch.testing.assert_close(step_of(fix_rollouts(build(**SPLIT, **settings))), whole, rtol=1e-3, atol=1e-6)
    plain = step_of(fix_rollouts(build(per_device_train_batch_size=8, event=event, **IN_ORDER)))
    assert (whole - plain).abs().max() > 1e-3 * plain.abs().max()


def test_a_servers_likeliest_tokens_give_the_step_with_a_baseline_of_the_same_teacher_in_this_process(build, serve):
    settings = {"baseline": "kl", "baseline_top_k": 20, "per_device_train_batch_size": 8, **IN_ORDER}
    remote, local = (
        step_of(fix_rollouts(build(teacher=teacher, **settings))) for teacher in (serve().url, teacher_model(**SHARP))
    )
    torch.testing.assert_close(remote, local, rtol=1e-3, atol=1e-5)
    with pytest.raises(
        ValueError, match="with baseline='kl' and baseline_top_k=None needs the teacher's logits.*`baseline_top_k`"
    ):
        build(teacher=serve().url, baseline="kl")


def test_a_baseline_of_another_loss_is_refused(build):
    with pytest.raises(ValueError, match="baseline='kl' has no effect on distillation_loss='alm'.*dpca"):
        build(distillation_loss="alm", baseline="kl")
    with pytest.raises(ValueError, match="Unknown baseline 'mean': choose one of kl"):
        build(baseline="mean")


@pytest.mark.parametrize("given", [False, True])
def test_gvpo_trains_on_own_and_on_the_teachers_completions_and_compares_those_of_a_prompt(build, monkeypatch, given):
    own = {"off_policy_loss": "gvpo", "lmbda": 0.0, "seq_kd": True} if given else {"distillation_loss": "gvpo"}
    trainer = build(num_generations=3, gradient_accumulation_steps=2, length_grouped=False, **own)
    batches, loss = [], "off_policy_loss" if given else "distillation_loss"
    trained = getattr(trainer, loss)
    call = type(trained).__call__
    monkeypatch.setattr(type(trained), "__call__", lambda self, *given: batches.append(given[0]) or call(self, *given))
    assert step_of(trainer).abs().max() > 0
    log = trainer.state.log_history[0]
    assert log["gvpo/alone_fraction"] == 0 and log["gvpo/log_ratio_std"] > 0 and "closing/unclosed_fraction" in log
    for batch in batches:
        assert batch.close_log_probs.any() and batch.teacher_close_log_probs is not None
        assert batch.prompts.unique(return_counts=True)[1].tolist() == [3, 3, 3, 3]
        first = (batch.student_chunks >= 0).int().argmax(1).min()
        begun = [
            (number, tuple(ids))
            for number, ids in zip(batch.prompts.tolist(), batch.student_ids[:, :first].tolist(), strict=True)
        ]
        assert len({*begun}) == 4, "completions of one number begin with one prompt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "GVPO compares .* num_generations=1 makes one: set it to 2 or more"),
        ({"num_generations": 2, "lmbda": 0.5}, "lmbda=0.5 the dataset gives one: set seq_kd=True"),
        (
            {"num_generations": 2, "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps=2 deals.*length_grouped=False",
        ),
    ],
)
def test_gvpo_without_completions_to_compare_is_refused_with_the_way_out(build, settings, message):
    with pytest.raises(ValueError, match=message):
        build(distillation_loss="gvpo", **settings)
