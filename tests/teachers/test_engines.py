"""Teachers at servers of several kinds: which one a server is, and what becomes of its answers, good and bad."""

import logging
import re

import numpy as np
import pytest
import torch
from test_remote import SHARP, assert_right, connect, right, run, scores, serve, short_pauses, texts  # noqa: F401  fixtures
from tokenizers.processors import TemplateProcessing
from toys import SGD, fix_rollouts, teacher_model, teacher_tokenizer

from trl_ctopd.teachers.servers import TeacherServerError


KINDS = {"vllm": "vLLM's completions", "sglang": "SGLang's `/generate`", "echo": "`echo` and `logprobs`, as Fireworks"}
OTHERS = [kind for kind in KINDS if kind != "vllm"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_servers_kind_is_found_by_asking_it_and_named_in_the_log(serve, right, kind, caplog):  # noqa: F811
    caplog.set_level(logging.INFO)
    server = serve(protocol=kind, owner="someone")
    assert_right(scores(connect(server.url)), right)
    assert f"{server.url} is asked for scores by" in caplog.text and KINDS[kind] in caplog.text


@pytest.mark.parametrize("kind", OTHERS)
def test_text_is_read_with_the_special_tokens_that_the_engine_adds_and_completions_without(serve, right, kind):  # noqa: F811
    def with_start():
        tokenizer = teacher_tokenizer()
        start = ("<|user|>", tokenizer.convert_tokens_to_ids("<|user|>"))
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[start])
        return tokenizer

    server = serve(protocol=kind, tokenizer=with_start())
    assert_right(scores(connect(server.url, tokenizer=with_start())), right)
    with pytest.raises(ValueError, match="other token ids than .*: from token 0 on"):
        connect(server.url)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("short", "scores for .* tokens"),
        ("shift", "token 1 was .*, and the answer scores"),
        ("nan", "log-prob (nan|None)"),
        ("positive", "log-prob 0.5"),
        ("400", "400: as ordered"),
    ],
)
def test_a_row_whose_answer_is_wrong_is_left_out_and_the_others_are_not(serve, right, kind, fault, reason, caplog):  # noqa: F811
    server = serve(protocol=kind)
    teacher = connect(server.url)
    bad = texts()[0][2] + texts()[1][2]
    server.fault_from_now_on(lambda n, payload: fault if payload["prompt"] == bad else None)
    found = teacher.start(*texts())
    rows = [found.row(row) for row in range(8)]
    assert rows[2].isnan().all() and [found.failed(row) for row in range(8)] == [row == 2 for row in range(8)]
    assert_right(rows[:2] + rows[3:], right[:2] + right[3:])
    assert any(re.search(reason, message) for message in caplog.messages)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("fault", ["429", "500", "drop", "truncate"])
def test_a_failure_that_passes_changes_no_score(serve, right, kind, fault):  # noqa: F811
    server = serve(protocol=kind)
    teacher = connect(server.url)
    server.fault_from_now_on([fault, None, fault])
    assert_right(scores(teacher), right)


@pytest.mark.parametrize("kind", OTHERS)
def test_scores_that_are_no_raw_log_probs_are_refused(serve, kind):  # noqa: F811
    with pytest.raises(ValueError, match="change with the sampling temperature"):
        connect(serve(protocol=kind, scores="processed_logprobs").url)
    with pytest.raises(ValueError, match="above 0"):
        connect(serve(protocol=kind, scores="raw_logits").url)
    with pytest.raises(ValueError, match="do not agree with what it samples: by them"):
        connect(serve(teacher_model(initializer_range=1.0), protocol=kind, shift=-0.7).url)


@pytest.mark.parametrize("kind", OTHERS)
def test_another_model_is_an_error_before_the_step_ends(serve, kind):  # noqa: F811
    server = serve(protocol=kind)
    teacher = connect(server.url)
    server.model = teacher_model(seed=7, **SHARP).eval()
    with pytest.raises(TeacherServerError, match="another model than at the start"):
        scores(teacher)


def test_a_server_of_answers_without_a_models_name_is_asked_for_it(serve):  # noqa: F811
    server = serve(protocol="sglang")
    teacher = connect(server.url)
    server.name = "another"
    server.others = ("a third",)
    with pytest.raises(TeacherServerError, match="serves 'another', 'a third': name one"):
        scores(teacher)


def test_servers_of_unlike_kinds_share_the_work_of_one_model(serve, right):  # noqa: F811
    servers = [serve(protocol=kind, fault=lambda n, payload: "delay", delay=0.05) for kind in KINDS]
    teacher = connect(*(server.url for server in servers))
    before = [len(server.requests) for server in servers]
    assert_right(scores(teacher), right)
    assert all(len(server.requests) > first for server, first in zip(servers, before, strict=True))


def test_a_server_that_was_gone_at_the_start_is_asked_for_its_kind_when_it_comes(serve, right):  # noqa: F811
    gone, there = serve(protocol="sglang"), serve()
    gone.close()
    teacher = connect(gone.url, there.url)
    again = serve(protocol="sglang", port=gone.port)
    for _ in range(60):
        assert_right(scores(teacher), right)
        if len(again.requests) > 2:
            break
    assert len(again.requests) > 2


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("llamacpp", "llama.cpp's server"),
        ("tensorrt_llm", "TensorRT-LLM"),
        ("library", "Ollama"),
        ("x", "none of these kinds"),
    ],
)
def test_an_engine_that_scores_only_what_it_writes_is_refused_by_name_with_what_would_do(serve, owner, name):  # noqa: F811
    with pytest.raises(
        ValueError, match=f"it is {name}.* What can: vLLM .*SGLang.*Fireworks.*serve the model with one"
    ):
        connect(serve(protocol="none", owner=owner).url)


def test_echoed_tokens_without_ids_are_refused(serve):  # noqa: F811
    with pytest.raises(ValueError, match="without `logprobs.token_ids`"):
        connect(serve(protocol="echo", tells_ids=False).url)


def test_a_model_that_a_server_does_not_list_is_taken_where_it_is_named_apart(serve, right):  # noqa: F811
    from trl_ctopd.teachers.remote import RemoteTeacher
    from trl_ctopd.teachers.servers import Servers

    server = serve(others=["accounts/lab/deployments/x"], root="here")
    teacher = RemoteTeacher(Servers([server.url]), "toy", unlisted=True)
    teacher.check(teacher_tokenizer())
    assert_right(scores(teacher), right)
    with pytest.raises(ValueError, match="does not exist"):
        RemoteTeacher(Servers([server.url], retries=0), "not there", unlisted=True).check(teacher_tokenizer())


@pytest.mark.parametrize("kind", OTHERS)
def test_training_with_the_teacher_behind_a_server_is_training_with_it_here(build, serve, kind, monkeypatch):  # noqa: F811
    """Of a server that tells no likeliest tokens, with a teacher that is not asked how the student's tokens close."""
    monkeypatch.setattr("trl_ctopd.teachers.panel.CLOSING_TOKENS", len(teacher_tokenizer()))
    trainer, step = run(build, serve(protocol=kind).url, distillation_loss="dpca")
    if kind == "echo":
        nothing = np.zeros(0, dtype=np.int64)
        monkeypatch.setattr("trl_ctopd.teachers.panel.teacher_going_on", lambda view, table: (nothing, nothing))
    _, expected = run(build, teacher_model(**SHARP), distillation_loss="dpca")
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)
    assert trainer.state.log_history[0]["teacher/failed_fraction"] == 0


def test_a_row_that_fails_is_masked_and_counted_and_training_goes_on(build, serve):  # noqa: F811
    server = serve(protocol="sglang")
    trainer = fix_rollouts(build(teacher=server.url, per_device_train_batch_size=8, **SGD))
    server.fault_from_now_on(["nan", None, "shift"])
    trainer.train()
    assert trainer.state.log_history[0]["teacher/failed_fraction"] == 2 / 8
