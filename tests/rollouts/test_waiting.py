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


def test_an_interrupt_that_arrives_in_another_thread_ends_a_wait_for_a_result():
    """It wakes no lock that the main thread waits for, and neither does one that arrives just before that wait."""
    future = Future()
    threads = [
        threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT)),
        threading.Timer(60, lambda: future.set_result(None)),  # lest the test wait for ever
    ]
    for thread in threads:
        thread.start()
    with pytest.raises(KeyboardInterrupt):
        result_of(future)
    threads[1].cancel()
    assert not future.done()


def test_an_interrupt_that_arrives_in_another_thread_ends_a_wait_for_an_event():
    event = threading.Event()
    threads = [
        threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT)),
        threading.Timer(60, event.set),
    ]
    for thread in threads:
        thread.start()
    with pytest.raises(KeyboardInterrupt):
        wait_for(event)
    threads[1].cancel()
    assert not event.is_set()


def test_a_result_or_an_error_that_comes_later_is_that_of_the_future():
    future, failing = Future(), Future()
    threading.Timer(0.1, future.set_result, [5]).start()
    assert result_of(future) == 5
    threading.Timer(0.1, failing.set_exception, [TimeoutError("its own")]).start()
    with pytest.raises(TimeoutError, match="its own"):
        result_of(failing)
