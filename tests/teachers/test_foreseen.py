"""A server is asked for a text once that is known, while others are still being written."""

import threading

import pytest
import torch
from test_remote import connect, serve, short_pauses, texts  # noqa: F401  two are fixtures
from toys import SGD, weights

from trl_ctopd.rollouts import generation
from trl_ctopd.teachers.panel import Panel
from trl_ctopd.teachers.servers import TeacherServerError


# each of four texts is written by a call of its own
ONE_BY_ONE = {"generation_batch_size": 1, "event": "open", **SGD}


def scored(server) -> int:
    """How many texts the server was asked for; a probe has a text that no completion has."""
    return sum(payload.get("prompt_logprobs") is not None for payload in server.requests)


@pytest.fixture
def last_waits(monkeypatch):
    """`last_waits(server, n)`: the fourth text is not written before the server was asked for n."""

    def last_waits(server, asked: int):
        calls, begun, write, before = [], threading.Event(), generation._generate, scored(server)
        fault = server._fault

        def arrive(number, payload):
            if scored(server) - before >= asked:
                begun.set()
            return fault(number, payload)

        def waiting(*args, **kwargs):
            calls.append(args)
            assert len(calls) != 4 or begun.wait(600), "not asked while others are written"
            return write(*args, **kwargs)

        server._fault = arrive
        monkeypatch.setattr(generation, "_generate", waiting)

    return last_waits


def test_a_server_scores_texts_while_others_are_written_and_nothing_else_changes(build, serve, last_waits, monkeypatch):  # noqa: F811
    server = serve()
    trainer = build(teacher=server.url, **ONE_BY_ONE)
    last_waits(server, 3)
    before = scored(server)
    trainer.train()
    asked = scored(server) - before
    monkeypatch.undo()
    monkeypatch.setattr(Panel, "foresee", lambda self: None)
    other = build(teacher=server.url, **ONE_BY_ONE)
    before = scored(server)
    other.train()
    assert torch.equal(weights(trainer), weights(other))
    assert asked == scored(server) - before, "no text is asked for twice"


def test_a_text_that_is_refused_while_others_are_written_costs_its_row_alone(build, serve, last_waits):  # noqa: F811
    server = serve()
    trainer = build(teacher=server.url, **ONE_BY_ONE)
    server.fault_from_now_on(["400"])
    last_waits(server, 3)
    trainer.train()
    assert trainer.state.log_history[0]["teacher/failed_fraction"] == 0.25


def test_a_server_that_is_gone_while_texts_are_written_ends_the_run_with_its_own_error(build, serve):  # noqa: F811
    server = serve()
    trainer = build(teacher=server.url, teacher_server_retries=1, **ONE_BY_ONE)
    server.close()
    with pytest.raises(TeacherServerError, match="after 2 tries"):
        trainer.train()


def test_an_error_while_others_are_written_takes_back_what_is_not_yet_asked(build, serve, monkeypatch):  # noqa: F811
    server = serve()
    trainer = build(teacher=server.url, teacher_server_concurrency=1, **ONE_BY_ONE)
    calls, write, seen, foresee = [], generation._generate, [], trainer.panel.foresee

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(*args, **kwargs)

    monkeypatch.setattr(generation, "_generate", failing)
    monkeypatch.setattr(trainer.panel, "foresee", lambda: seen.append(foresee()) or seen[-1])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    [futures] = [own._futures for own in seen[0].texts.values()]
    assert len(futures) == 3
    for [future] in futures.values():
        assert future.cancelled() or future.result(600)


def test_what_was_foreseen_is_taken_once_for_each_time_and_the_rest_is_left(serve):  # noqa: F811
    server = serve()
    teacher, (prompts, completions) = connect(server.url), texts(2)
    before, foreseen = scored(server), teacher.foresee()
    for _ in range(2):
        foreseen.add(prompts[0], completions[0], ())
    foreseen.add([5], [6], ())  # belongs to no row in the end
    found = teacher.start([prompts[0]] * 3 + [prompts[1]], [completions[0]] * 3 + [completions[1]], None, foreseen)
    rows = [found.row(row) for row in range(4)]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2]) and len(rows[3]) == len(completions[1])
    probe = 1
    assert scored(server) - before - probe in (4, 5), "the text of no row may be on its way"
