"""Ctrl-C ends a wait for another thread, wherever the signal arrives."""

import signal
import threading
from concurrent.futures import Future

import pytest

from trl_ctopd.rollouts.waiting import result_of, wait_for


@pytest.fixture(autouse=True)
def interrupts():
    """A shell's background jobs ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


FUTURE, EVENT = Future(), threading.Event()


@pytest.mark.parametrize(
    ("wait", "awaited", "come", "has_come"),
    [
        (result_of, FUTURE, lambda: FUTURE.set_result(None), FUTURE.done),
        (wait_for, EVENT, EVENT.set, EVENT.is_set),
    ],
    ids=["a result", "an event"],
)
def test_an_interrupt_that_arrives_in_another_thread_ends_a_wait(wait, awaited, come, has_come):
    """It wakes no lock that the main thread waits for, and neither does one that arrives just before that wait."""
    rescue = threading.Timer(60, come)  # lest the test wait for ever
    rescue.start()
    threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        wait(awaited)
    rescue.cancel()
    assert not has_come()


def test_a_result_or_an_error_that_comes_later_is_that_of_the_future():
    future, failing = Future(), Future()
    threading.Timer(0.1, future.set_result, [5]).start()
    assert result_of(future) == 5
    threading.Timer(0.1, failing.set_exception, [TimeoutError("its own")]).start()
    with pytest.raises(TimeoutError, match="its own"):
        result_of(failing)
