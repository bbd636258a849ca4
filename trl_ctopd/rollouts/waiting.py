"""Waiting for other threads in a way that Ctrl-C ends.

A signal that arrives just before the main thread begins to wait for a lock, or in another thread, is noticed when that wait ends (CPython
3.11): without a limit perhaps never. So the wait begins anew every second.
"""

import threading
from concurrent.futures import Future, wait
from typing import TypeVar


T = TypeVar("T")
_SECONDS = 1.0


def result_of(future: Future[T]) -> T:
    """`future.result()`."""
    while not future.done():
        wait([future], timeout=_SECONDS)
    return future.result()


def wait_for(event: threading.Event):
    """`event.wait()`."""
    while not event.wait(_SECONDS):
        pass
