"""What makes the gradient steadier, through the trainer: credits by the beginnings of chunks."""

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
        yield lambda **options: stack.enter_context(ProtocolServer(teacher_model(), teacher_tokenizer(), **options))


IN_ORDER = {"train_sampling_strategy": "sequential", **SGD}


@pytest.mark.parametrize("credit", PREFIX_CREDITS)
def test_a_credit_by_the_beginnings_of_chunks_trains_and_says_what_has_none(build, credit):
    trainer = fix_rollouts(build(credit=credit, **IN_ORDER))
    step = step_of(trainer)
    assert 0 <= trainer.state.log_history[0]["credit/without_prefix_fraction"] < 1
    plain = step_of(fix_rollouts(build(**IN_ORDER)))
    assert (step - plain).abs().max() > 1e-3 * plain.abs().max()


def test_micro_batches_and_tiles_give_the_whole_batchs_step(build):
    settings = {"credit": "remaining", **IN_ORDER}
    whole = step_of(fix_rollouts(build(per_device_train_batch_size=8, **settings)))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "logit_tile_tokens": 16}
    torch.testing.assert_close(step_of(fix_rollouts(build(**split, **settings))), whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("credit", PREFIX_CREDITS)
def test_a_teacher_behind_a_server_is_refused_with_the_setting_that_asks_for_more(build, credit, serve):
    with pytest.raises(
        ValueError, match=f"DPCA with credit='{credit}' needs the teacher's logits.*a single teacher in this"
    ):
        build(credit=credit, teacher=serve().url)
