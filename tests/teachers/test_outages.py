"""A server that is gone, silent or slow: when a run ends, with what words, and that it ends."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_remote import assert_right, connect, scores, short_pauses, texts  # noqa: F401  the last but one is a fixture
from toys import teacher_tokenizer

from benchmarks.faults.server import HABITS, HabitServer
from trl_ctopd.teachers.servers import Servers, TeacherServerError


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def serve():
    """`serve(...)`: a server with a habit that it takes up when told to (`misbehaves`), closed after the test."""
    with contextlib.ExitStack() as stack:

        def started(habit=None, **options) -> HabitServer:
            server = HabitServer(teacher_tokenizer(), habit, **options)
            stack.callback(server.close)
            return server

        yield started


def connected(*servers: HabitServer, **options):
    """A teacher at these servers, which misbehave from now on."""
    teacher = connect(*(server.url for server in servers), **options)
    for server in servers:
        server.misbehaves = True
    return teacher


def right(server: HabitServer) -> list[torch.Tensor]:
    return [server.log_probs[completion] for completion in texts()[1]]


def hang(request, ids):
    time.sleep(3600)


# An end, in time


def test_failures_are_counted_for_the_server_and_not_for_each_of_its_requests(serve):
    server = serve()
    teacher = connected(server, retries=3)
    server.close()
    refused = []
    send = teacher._servers.send

    def counting(*arguments):
        refused.append(arguments)
        return send(*arguments)

    teacher._servers.send = counting
    with pytest.raises(TeacherServerError, match="after 4 tries in"):
        scores(teacher, rows=32)
    assert len(refused) <= 32 + 3, "all that were under way, and then one at a time for the server"


def test_a_silent_server_ends_the_run_once_patience_is_over_whatever_tries_are_left(serve):
    teacher = connected(serve(hang), retries=1000, timeout=0.3, patience=1.0)
    tries, send = [], teacher._servers.send
    teacher._servers.send = lambda *asked: (tries.append(asked), send(*asked))[1]
    with pytest.raises(
        TeacherServerError, match=r"did not answer for 1 s; the last: .*ReadTimeout.*teacher_server_patience"
    ):
        scores(teacher)
    assert 1 < len(tries) < 1000, "its tries were not used up"


def test_a_server_that_was_given_up_is_tried_again_in_the_next_step(serve):
    server = serve(HABITS["500, always"])
    teacher = connected(server, retries=1)
    with pytest.raises(TeacherServerError):
        scores(teacher)
    server.misbehaves = False
    assert_right(scores(teacher), right(server))


def test_late_failures_of_a_step_that_was_given_up_do_not_give_up_the_next(serve):
    held, under_way = threading.Event(), []
    late = [prompt + completion for prompt, completion in zip(*texts(), strict=True)][6:]

    def habit(request, ids):
        if ids in late:
            under_way.append(ids)
            held.wait(600)
        while len(under_way) < len(late):  # nothing fails before
            time.sleep(0.001)
        request.send(500, {"error": "as ordered"})
        return True

    server = serve(habit)
    teacher = connected(server, retries=1, timeout=600)
    with pytest.raises(TeacherServerError):
        scores(teacher)
    begin = teacher._servers.begin
    let_rest, resting = teacher._servers._let_rest, []

    def beginning():
        server.misbehaves = False
        begin()
        teacher._servers._let_rest = lambda *asked, **more: (resting.append(asked), let_rest(*asked, **more))
        held.set()  # the last requests of the first step fail now
        while teacher._servers.servers[0].in_flight:
            time.sleep(0.001)

    teacher._servers.begin = beginning
    assert_right(scores(teacher), right(server))
    assert held.is_set() and not resting


def test_a_text_that_fails_alone_is_left_out_and_the_run_goes_on(serve):
    bad = texts()[0][2] + texts()[1][2]
    server = serve(lambda request, ids: HABITS["500, always"](request, ids) if ids == bad else None)
    teacher = connected(server, retries=2)
    found = teacher.start(*texts())
    rows = [found.row(row) for row in range(8)]
    assert rows[2].isnan().all() and found.failed(2)
    expected = right(server)
    assert_right(rows[:2] + rows[3:], expected[:2] + expected[3:])


def test_a_silent_server_beside_a_live_one_costs_one_timeout_and_not_one_a_step(serve):
    silent, live = serve(hang), serve()
    teacher = connected(silent, live, timeout=1.0)
    assert_right(scores(teacher), right(live))
    asked, send = [], teacher._servers.send

    def counting(server, *rest):
        asked.append((server.url, threading.current_thread().name == "teacher_who"))
        return send(server, *rest)

    teacher._servers.send = counting
    for _ in range(5):
        time.sleep(0.15)  # its rest is over
        assert_right(scores(teacher), right(live))
    assert asked.count((live.url, False)) == 5 * 9, "every text went to the live one, and the probe that ends a step"
    assert {beside for url, beside in asked if url == silent.url} == {True}, (
        "the other was asked who it is, beside the work"
    )


INTERRUPTED = """
import signal, sys, threading, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path[:0] = {paths!r}
from benchmarks.faults.server import HabitServer
from toys import student_model, student_tokenizer, teacher_tokenizer, prompts
from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer

def hangs(request, ids):
    print("waiting", flush=True)
    time.sleep(3600)

server = HabitServer(teacher_tokenizer(), hangs)
args = CrossTokenizerGKDConfig({out!r}, use_cpu=True, bf16=False, report_to=[], max_new_tokens=8, max_steps=5,
    per_device_train_batch_size=4, save_strategy="no")
trainer = CrossTokenizerGKDTrainer(student_model(), server.url, args, prompts(), processing_class=student_tokenizer(),
    teacher_processing_class=teacher_tokenizer())
server.misbehaves = True
if {error!r}:
    trainer._score = lambda *args: 1 / 0
trainer.train()
"""


@pytest.mark.parametrize("error", [False, True])
def test_a_run_that_is_interrupted_or_fails_while_a_server_hangs_ends(tmp_path, error):
    paths = [str(ROOT), str(ROOT / "tests" / "helpers")]
    code = INTERRUPTED.format(paths=paths, out=str(tmp_path / "run"), error=error)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    while "waiting" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    if not error:
        process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=600)  # the server would be silent for an hour
    assert process.returncode != 0
    assert ("ZeroDivisionError" if error else "KeyboardInterrupt") in told


# Answers that never end, or are none


@pytest.mark.parametrize(
    "habit",
    ["sends its answer a byte at a time", "sends its headers a byte at a time", "says 100 Continue for ever"],
)
def test_an_answer_that_drips_in_is_given_up_at_the_timeout(serve, habit):
    teacher = connected(serve(HABITS[habit]), timeout=1.0, retries=0)
    with pytest.raises(
        TeacherServerError, match="ReadTimeout"
    ):  # packets come sooner than that, and the answer never ends
        scores(teacher, rows=1)


def test_an_answer_without_end_is_given_up(serve, monkeypatch):
    monkeypatch.setattr("trl_ctopd.teachers.servers._LARGEST", 1 << 22)
    teacher = connected(serve(HABITS["never stops sending"]), retries=0)
    with pytest.raises(TeacherServerError, match="an answer of more than 4 MiB"):
        scores(teacher, rows=1)


@pytest.mark.parametrize("habit", ["broken gzip for one text in three, at first", "JSON nested 200,000 deep, at first"])
def test_an_answer_that_cannot_be_read_is_asked_for_again(serve, habit):
    server = serve(HABITS[habit])
    teacher = connected(server)
    server.chosen = lambda ids: True
    assert_right(scores(teacher), right(server))


def test_an_error_that_comes_as_a_success_is_told(serve):
    error = {"error": {"message": "out of quota"}}
    teacher = connected(serve(lambda request, ids: request.send(200, error) or True))
    with pytest.raises(TeacherServerError, match="out of quota"):
        scores(teacher)


def test_a_server_that_sends_on_to_another_address_is_told_apart(serve):
    teacher = connected(serve(HABITS["sends on to another address"]))
    with pytest.raises(
        TeacherServerError, match="307: it sends on to http://127.0.0.1:9/v1/completions: give the address"
    ):
        scores(teacher)


# Addresses, proxies and keys


@pytest.mark.parametrize("url", ["HTTP://127.0.0.1:{}", " http://127.0.0.1:{}", "http://127.0.0.1:{}/v1/ "])
def test_an_address_is_one_however_it_is_written(serve, url):
    server = serve()
    assert_right(scores(connect(url.format(server.port))), right(server))


@pytest.mark.parametrize("name", ["localhost:8000", "10.0.0.1:8000/v1", "[::1]:8000", " gpu-box.lab:80"])
def test_an_address_without_its_scheme_is_not_taken_for_a_models_name(build, name):
    with pytest.raises(
        ValueError,
        match=rf"is not the name of a model. If it is a server, write http://{name.strip()[:5]}".replace("[", r"\["),
    ):
        build(teacher=name)


@pytest.mark.parametrize("url", ["http://host:port", "http://", "http://ho st:1"])
def test_an_address_that_cannot_be_read_is_refused(url):
    with pytest.raises(ValueError, match="not the address of a server: it should read http://host:port"):
        Servers([url])


def test_a_refused_connection_names_the_proxy_without_its_password(serve, monkeypatch):
    gone = serve()
    gone.close()
    monkeypatch.setenv("http_proxy", f"http://me:sesame@127.0.0.1:{gone.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(
        TeacherServerError, match=rf"proxy http://…@127.0.0.1:{gone.port}, which the environment names; NO_PROXY"
    ) as error:
        connect("http://teacher.lab:8000", retries=0)
    assert "sesame" not in str(error.value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert connect(serve().url).name == "teacher"


def test_a_keys_trailing_line_end_is_none_of_it(serve, monkeypatch):
    monkeypatch.setenv("TOY_KEY", "sesame\n")
    server = serve(key="sesame")
    assert_right(scores(connect(server.url, api_key_env="TOY_KEY")), right(server))


@pytest.mark.parametrize("key", ["ses\nAME", "ses“AME", "ses\x01AME"])
def test_a_key_with_characters_that_none_has_is_refused_without_being_shown(monkeypatch, key):
    monkeypatch.setenv("TOY_KEY", key)
    with pytest.raises(ValueError, match="variable TOY_KEY holds characters that no API key has") as error:
        Servers(["http://host:1"], api_key_env="TOY_KEY")
    assert "AME" not in str(error.value)


@pytest.mark.parametrize("given", ["sk-abcdefgh12345678", "Sesame0penNow", "hf_abcdefghijklmnop"])
def test_a_key_in_the_place_of_its_variables_name_is_refused_without_being_shown(monkeypatch, given):
    with pytest.raises(ValueError, match="the name of an environment variable.*not the key") as error:
        Servers(["http://host:1"], api_key_env=given)
    assert given not in str(error.value)


def test_a_variable_that_is_not_set_is_named():
    with pytest.raises(ValueError, match="'NO_SUCH_API_KEY' is not one that is set"):
        Servers(["http://host:1"], api_key_env="NO_SUCH_API_KEY")


def test_a_query_in_the_address_is_refused_without_being_shown():
    with pytest.raises(ValueError, match="holds more than a path.*teacher_server_api_key_env") as error:
        Servers(["http://host:8000/v1?api_key=sesame"])
    assert "sesame" not in str(error.value)


def test_a_key_that_a_server_gives_back_is_in_no_message(serve, monkeypatch, caplog):
    monkeypatch.setenv("TOY_KEY", "sesame")
    error = {"error": "Basic c2VzYW1l, sesame, Bearer sesame"}
    teacher = connected(
        serve(lambda request, ids: request.send(400, error) or True, key="sesame"), api_key_env="TOY_KEY"
    )
    with pytest.raises(TeacherServerError) as raised:
        scores(teacher)
    assert "400" in str(raised.value)
    assert not any(part in str(raised.value) + caplog.text for part in ("sesame", "c2VzYW1l"))
