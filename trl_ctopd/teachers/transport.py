"""HTTP requests with a deadline for the whole request. httpx's own timeouts begin again with every packet.

A server that sends one byte now and then would keep such a request open for ever. So the sockets here read and write only for
what is left until `deadline`, name look-ups excepted. The threads that wait for answers are daemons, unlike those of
`ThreadPoolExecutor`, so they do not keep the process alive.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from urllib.request import getproxies_environment, proxy_bypass_environment

import httpcore2
import httpx2

from ..rollouts.waiting import result_of


_mine = threading.local()  # the deadline of this thread's request, in seconds of `time.monotonic`


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Requests of this thread in the block end after so many seconds, with `httpx2.TimeoutException`."""
    _mine.ends = time.monotonic() + seconds
    try:
        yield
    finally:
        _mine.ends = None


def client(proxy: str | None, keepalive: int, idle: float) -> httpx2.Client:
    """A client with at most `keepalive` unused connections, each kept `idle` seconds; through `proxy`, if given."""
    return httpx2.Client(transport=_Transport(proxy, keepalive, idle), timeout=None, trust_env=False)


def proxy_for(url: str) -> str | None:
    """The proxy for this address from the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY)."""
    parts, proxies = httpx2.URL(url), getproxies_environment()
    found = proxies.get(parts.scheme) or proxies.get("all")
    host = parts.host if parts.port is None else f"{parts.host}:{parts.port}"
    if not found or proxy_bypass_environment(host, proxies):
        return None
    return found if "://" in found else f"http://{found}"


class _Transport(httpx2.BaseTransport):
    def __init__(self, proxy: str | None, keepalive: int, idle: float):
        options = {
            "ssl_context": httpx2.create_ssl_context(),
            "max_connections": None,
            "max_keepalive_connections": keepalive,
            "keepalive_expiry": idle,
            "network_backend": _Backend(),
        }
        if proxy is None:
            self._pool = httpcore2.ConnectionPool(**options)
            return
        url = httpx2.Proxy(proxy)
        kind = httpcore2.SOCKSProxy if url.url.scheme.startswith("socks") else httpcore2.HTTPProxy
        self._pool = kind(proxy_url=_plain(url.url), proxy_auth=url.raw_auth, **options)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        with _as_httpx():
            response = self._pool.handle_request(
                httpcore2.Request(
                    method=request.method,
                    url=_plain(request.url),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        return httpx2.Response(
            response.status, headers=response.headers, stream=_Body(response.stream), extensions=response.extensions
        )

    def close(self):
        self._pool.close()


class _Body(httpx2.SyncByteStream):
    def __init__(self, stream: Iterable[bytes]):
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        with _as_httpx():
            yield from self._stream

    def close(self):
        if hasattr(self._stream, "close"):
            self._stream.close()


@contextmanager
def _as_httpx() -> Iterator[None]:
    """Turns httpcore's errors into httpx's."""
    try:
        yield
    except (
        httpcore2.TimeoutException,
        httpcore2.NetworkError,
        httpcore2.ProtocolError,
        httpcore2.ProxyError,
        httpcore2.UnsupportedProtocol,
    ) as error:
        raise getattr(httpx2, type(error).__name__, httpx2.TransportError)(str(error)) from error


def _plain(url: httpx2.URL) -> httpcore2.URL:
    return httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)


def _left(kind: type[Exception], timeout: float | None) -> float | None:
    ends = getattr(_mine, "ends", None)
    if ends is None:
        return timeout
    left = ends - time.monotonic()
    if left <= 0:
        raise kind("no whole answer in time")
    return left if timeout is None else min(left, timeout)


class _Stream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream):
        self._stream = stream

    def read(self, max_bytes, timeout=None):
        return self._stream.read(max_bytes, _left(httpcore2.ReadTimeout, timeout))

    def write(self, buffer, timeout=None):
        self._stream.write(buffer, _left(httpcore2.WriteTimeout, timeout))

    def close(self):
        self._stream.close()

    def start_tls(self, ssl_context, server_hostname=None, timeout=None):
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, _left(httpcore2.ConnectTimeout, timeout)))

    def get_extra_info(self, info):
        return self._stream.get_extra_info(info)


class _Backend(httpcore2.NetworkBackend):
    LONGEST_CONNECT = 10.0  # seconds

    def __init__(self):
        self._backend = httpcore2.SyncBackend()

    def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        timeout = min(_left(httpcore2.ConnectTimeout, timeout) or self.LONGEST_CONNECT, self.LONGEST_CONNECT)
        return _Stream(self._backend.connect_tcp(host, port, timeout, local_address, socket_options))


class DaemonPool:
    """At most `size` daemon threads, which end with the process whatever they wait for."""

    def __init__(self, size: int, name: str):
        self._size, self._name, self._threads = size, name, 0
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        weakref.finalize(self, _end, self._tasks, size)

    def submit(self, task: Callable, *arguments) -> Future:
        future = Future()
        self._tasks.put((future, task, arguments))
        if not self._idle.acquire(blocking=False) and self._threads < self._size:
            self._threads += 1
            name = f"{self._name}_{self._threads}"
            threading.Thread(target=_work, args=(self._tasks, self._idle), name=name, daemon=True).start()
        return future

    def map(self, task: Callable, items: Iterable) -> list:
        return [result_of(future) for future in [self.submit(task, item) for item in items]]


def _work(tasks: queue.SimpleQueue, idle: threading.Semaphore):
    while (work := tasks.get()) is not None:
        future, task, arguments = work
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(task(*arguments))
            except BaseException as error:
                future.set_exception(error)
        del future, task, arguments, work
        idle.release()


def _end(tasks: queue.SimpleQueue, threads: int):
    for _ in range(threads):
        tasks.put(None)
