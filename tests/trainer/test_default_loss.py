"""`distillation_loss="auto"`: the exact reverse KL where a teacher tells whole distributions, else its sampled form."""

import contextlib
import logging

import pytest
from protocol_server import ProtocolServer
from toys import prompts, teacher_model, teacher_tokenizer

from trl_ctopd import CrossTokenizerGKDConfig
from trl_ctopd.losses import DPCA, ReverseKL
from trl_ctopd.teachers import servers


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setattr("trl_ctopd.teachers.panel.CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr(servers, "FIRST_PAUSE", 0.01)


def test_the_default_is_auto(tmp_path):
    assert CrossTokenizerGKDConfig(str(tmp_path)).distillation_loss == "auto"


def test_one_teacher_in_this_process_is_read_whole(build, caplog):
    with caplog.at_level(logging.INFO, logger="trl_ctopd"):
        trainer = build(distillation_loss="auto")
    assert isinstance(trainer.distillation_loss, ReverseKL) and trainer.args.distillation_loss == "reverse_kl"
    assert "distillation_loss='auto' is reverse_kl: the teacher is in this process" in caplog.text
    trainer.train()
    assert "reverse_kl/sampled_nats_per_token" in trainer.state.log_history[0]
    assert "distillation_loss" in trainer.args.to_dict() and trainer.args.to_dict()["distillation_loss"] == "reverse_kl"


@pytest.mark.parametrize("kwargs", [{}, {"advantage_clip": 5.0}, {"top_k": 4}, {"top_k": None}], ids=str)
def test_settings_that_reverse_kl_has_choose_no_other_loss(build, kwargs):
    loss = build(distillation_loss="auto", distillation_loss_kwargs=kwargs).distillation_loss
    assert isinstance(loss, ReverseKL) and all(getattr(loss, name) == value for name, value in kwargs.items())


def test_the_settings_that_were_given_stay_as_they_are(build, monkeypatch):
    """One config may be given to two trainers."""
    from trl_ctopd import trainer as module

    seen = []
    chosen = module.choice.with_loss
    monkeypatch.setattr(module.choice, "with_loss", lambda args, teacher: seen.append(args) or chosen(args, teacher))
    trainer = build(distillation_loss="auto")
    assert seen[0].distillation_loss == "auto" and trainer.args is not seen[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"event": "open"},
        {"event": "closed"},
        {"credit": "uniform"},
        {"baseline": "kl"},
        {"distillation_loss_kwargs": {"credit": "last"}},
        {"rollout_reuse": 2},
    ],
    ids=str,
)
def test_a_setting_of_dpcas_alone_chooses_it(build, caplog, settings):
    with caplog.at_level(logging.INFO, logger="trl_ctopd"):
        trainer = build(distillation_loss="auto", **settings)
    assert isinstance(trainer.distillation_loss, DPCA) and trainer.args.distillation_loss == "dpca"
    assert f"distillation_loss='auto' is dpca: {next(iter(settings))}=" in caplog.text


def test_servers_and_several_teachers_are_read_by_log_probs(build):
    teachers = {"one": teacher_model(), "two": teacher_model(seed=1)}
    rows = prompts(4).map(lambda row, n: {"teacher": ("one", "two")[n % 2]}, with_indices=True)
    own = {name: teacher_tokenizer() for name in teachers}
    several = build(teacher=teachers, teacher_processing_class=own, dataset=rows, distillation_loss="auto")
    assert isinstance(several.distillation_loss, DPCA)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ProtocolServer(teacher_model(), teacher_tokenizer()))
        for teacher in (server.url, [server.url]):
            assert isinstance(build(teacher=teacher, distillation_loss="auto").distillation_loss, DPCA)
