"""The servers of one teacher: shares requests among them, and retries with pauses.

Decisions
- A request goes to the server with the fewest in flight. After a failure that may pass (a dropped or refused connection, no
  complete answer in time, 408, 425, 429, any 5xx, an answer that is not JSON) that server rests: as long as its `Retry-After`
  says, or else twice as long as the last time. The request goes to another server, or waits.
- A server that was down is checked (`confirm`) before it gets work again. So is one that refused the model or the key. That
  runs beside the work and delays nobody.
- Failures are counted by server, not by request, since all requests wait for the same servers. Where every server has failed
  too often in a row, or none has answered for `patience` seconds, all requests end with an error. A request that fails
  while others are answered is at fault itself.
- The API key is only in the header of the connections. No message and no attribute holds it.

Left out: streaming, HTTP/2, redirects.
"""

import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx2

from ..redact import is_secret_name, redact
from .transport import client, deadline, proxy_for


logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds; jittered by a third, so that processes do not return at the same time
_IDLE = 4.0  # seconds that an unused connection is kept: vLLM closes it after 5
_PASSING = (408, 425, 429)
_UNFIT = (401, 403, 404, 405, 407, 501)
_SHOWN = 300  # characters of an answer in a message
_LARGEST = 1 << 28  # bytes of an answer; those of a million tokens are 1 << 27


class TeacherServerError(RuntimeError):
    """No server of the teacher answers, or none gives valid answers."""


class RequestRefusedError(Exception):
    """The server rejects this request (a 4xx that is not about model, key or load). Repeating it would not help."""


class FailedTryError(Exception):
    """This server did not answer. `unfit`: waiting will not help."""

    def __init__(self, message: str, pause: float | None = None, status: int | None = None, unfit: bool = False):
        super().__init__(message)
        self.pause, self.status, self.unfit = pause, status, unfit


@dataclass(eq=False)
class Server:
    """One address, and its state. `rests_until` is in seconds of `time.monotonic`."""

    url: str
    proxy: str | None = None
    in_flight: int = 0
    rests_until: float = 0.0
    failures: int = 0  # in a row
    failure: str = ""  # the last one
    suspect: bool = False  # has to be checked before it gets work
    asked: bool = False  # a check is running
    unfit: bool = False  # for a reason that waiting does not remove
    answered: int = 0  # requests
    engine: object = None  # its kind, once known


class Servers:
    """
    The servers of one teacher.

    Args:
        urls: addresses of the servers, `http://host:port` each.
        api_key_env: name of the environment variable that holds the API key. Without that variable, no key is sent.
        timeout: seconds that one try may take, up to the end of the answer.
        retries: failures in a row, after the first, that every server may have.
        concurrency: requests in flight at the same time.
        patience: seconds without an answer from any server, while requests wait.

    Raises `ValueError` for an address or a key that is not valid.
    """

    def __init__(
        self,
        urls: Sequence[str],
        api_key_env: str = "TEACHER_SERVER_API_KEY",
        timeout: float = 120.0,
        retries: int = 8,
        concurrency: int = 32,
        patience: float = 600.0,
    ):
        self.servers = [Server(url, proxy_for(url)) for url in dict.fromkeys(map(_checked, urls))]
        self.confirm: Callable[[Server], None] = lambda server: None
        self.concurrency = concurrency
        self._timeout, self._retries, self._patience = timeout, retries, patience
        self._key_env = api_key_env
        self._change = threading.Condition()
        self._open = 0  # requests
        self._quiet_since = 0.0  # time of the last answer, or of the first request since then
        self._answers = 0  # in this step
        self._given_up = ""  # the reason
        self._revivals = 0  # steps begun after one that was given up
        key = _key(api_key_env)
        self._clients = {proxy: client(proxy, concurrency, _IDLE) for proxy in {own.proxy for own in self.servers}}
        for own in self._clients.values():
            own.headers.update({"Authorization": f"Bearer {key}"} if key else {})

    def each(self, check: Callable[[Server], None]):
        """
        Runs `check` at every server. A server that does not answer is left out, and checked later, before it gets work. Where
        none answers, all are tried again. `check` calls `send`.

        Raises `TeacherServerError` where none answers after the last try.
        """
        with self._requests():
            for _ in range(1 + self._retries):
                there, failures = [], []
                for server in self.servers:
                    if server.suspect and not all(other.suspect for other in self.servers):
                        continue
                    try:
                        check(server)
                    except FailedTryError as failure:
                        failures.append(failure)
                        self._let_rest(server, failure, suspect=True)
                    else:
                        server.suspect = False
                        there.append(server)
                if there:
                    return
                rest = min(server.rests_until for server in self.servers) - time.monotonic()
                if all(failure.unfit for failure in failures) or rest > self._patience_left():
                    break
                time.sleep(max(0.0, rest))
        raise TeacherServerError(f"The teacher's server does not answer: {'; '.join(map(str, failures))}")

    def begin(self):
        """Begins a step: servers that were given up are tried again."""
        with self._change:
            self._answers = 0
            if self._given_up:
                self._given_up = ""
                self._revivals += 1
                for server in self.servers:
                    server.failures, server.rests_until = 0, 0.0

    def recheck(self, server: Server):
        """Runs `confirm` for a server that has answered. One that is down by now is checked before it gets work again."""
        if server.suspect:
            return
        try:
            self.confirm(server)
        except FailedTryError as failure:
            self._let_rest(server, failure, suspect=True)

    def post(self, request: Callable[[Server], tuple[str, dict]]) -> tuple[dict, Server]:
        """
        The JSON answer and the server that gave it. `request` returns the path and the payload for a server.

        Raises:
            TeacherServerError: every server has failed too often in a row, or none answers for too long, or none is left
                that knows model and key.
            RequestRefusedError: the request itself is at fault.
        """
        with self._requests():
            return self._post(request)

    @contextmanager
    def _requests(self) -> Iterator[None]:
        """Counts an open request, and starts the time without answers if it is the first."""
        with self._change:
            if not self._open:
                self._quiet_since = time.monotonic()
            self._open += 1
        try:
            yield
        finally:
            with self._change:
                self._open -= 1

    def _post(self, request: Callable[[Server], tuple[str, dict]]) -> tuple[dict, Server]:
        tries, revivals = 0, self._revivals
        while True:
            server = self._take()
            try:
                answer = self.send(server, "POST", *request(server))
            except FailedTryError as failure:
                with self._change:
                    if revivals != self._revivals:  # it says nothing of how the server is now
                        raise TeacherServerError(str(failure)) from failure
                    self._let_rest(server, failure)
                tries += 1
                if tries > self._retries and not self._answers:
                    with self._change:
                        self._give_up(self._ended(f"after {tries} tries", str(failure)))
                if tries > self._retries:
                    raise RequestRefusedError(
                        f"it failed {tries} times, while others were answered; the last: {failure}"
                    ) from failure
            except RequestRefusedError:
                self._has_answered(server)
                raise
            else:
                self._has_answered(server)
                return answer, server
            finally:
                self._give_back(server)

    def send(
        self, server: Server, method: str, path: str, payload: dict | None = None, kind: type = dict
    ) -> dict | list:
        """One try at one server. The answer is a JSON object, or of another `kind`."""
        place = f"{method} {server.url}{path}"
        try:
            status, headers, body = self._request(server, method, path, payload)
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise FailedTryError(self._with_proxy(f"{place}: {type(error).__name__}: {error}", server)) from None
        text = body.decode("utf-8", "replace")
        if 300 <= status < 400:
            raise FailedTryError(
                self._with_proxy(
                    f"{place}: {status}: it sends on to {headers.get('Location')}: give the address itself", server
                ),
                unfit=True,
            )
        if status < 300:
            answer = _json(body)
            if not isinstance(answer, dict | kind):
                raise FailedTryError(
                    self._with_proxy(f"{place}: an answer that is not a JSON object: {_cut(text)}", server)
                )
            error = answer.get("error") if isinstance(answer, dict) else None
            if not error or answer.get("choices"):
                return answer
            status, text = _status_of(answer, error), json_text(error)
        message = self._with_proxy(f"{place}: {status}: {_cut(text)}", server)
        if status in _PASSING or (status >= 500 and status not in _UNFIT):
            raise FailedTryError(message, _retry_after(headers), status)
        if status in _UNFIT:
            hint = f" The API key comes from the environment variable {self._key_env}." if status in (401, 403) else ""
            raise FailedTryError(message + hint, status=status, unfit=True)
        raise RequestRefusedError(message)

    def _request(self, server: Server, method: str, path: str, payload: dict | None):
        """Returns status, headers and body."""
        body = bytearray()
        with (
            deadline(self._time_for_a_try()),
            self._clients[server.proxy].stream(method, server.url + path, json=payload) as response,
        ):
            for part in response.iter_bytes():
                body += part
                if len(body) > _LARGEST:
                    raise httpx2.ReadError(f"an answer of more than {_LARGEST >> 20} MiB")
        return response.status_code, response.headers, bytes(body)

    def _time_for_a_try(self) -> float:
        return min(self._timeout, max(self._patience_left(), 0.1)) if self._open else self._timeout

    def _patience_left(self) -> float:
        return self._quiet_since + self._patience - time.monotonic()

    def _recheck(self, server: Server):
        revivals = self._revivals
        try:
            self.confirm(server)
        except FailedTryError as failure:
            with self._change:
                if revivals == self._revivals:
                    self._let_rest(server, failure, suspect=True)
        except Exception as error:
            self._let_rest(server, FailedTryError(str(error), unfit=True))
        else:
            with self._change:
                server.suspect, server.unfit, server.failures = False, False, 0
            logger.warning(f"The teacher's server {server.url} answers again and takes part.")
        finally:
            with self._change:
                server.asked = False
                self._change.notify_all()

    def _take(self) -> Server:
        """The least busy server that does not rest. Waits for one. Suspect servers are checked meanwhile."""
        with self._change:
            while True:
                self._give_up_if_due()
                now = time.monotonic()
                rested = [server for server in self.servers if server.rests_until <= now]
                for server in rested:
                    if server.suspect and not server.asked:
                        server.asked = True
                        threading.Thread(target=self._recheck, args=(server,), name="teacher_who", daemon=True).start()
                if ready := [server for server in rested if not server.suspect]:
                    server = min(ready, key=lambda server: server.in_flight)
                    server.in_flight += 1
                    return server
                waits = [server.rests_until - now for server in self.servers if server.rests_until > now]
                self._change.wait(max(0.01, min([*waits, self._patience_left()])))

    def _give_up_if_due(self):
        """Raises `TeacherServerError` in every open request."""
        if self._given_up:
            self._give_up(self._given_up)
        seconds = time.monotonic() - self._quiet_since
        last = "; ".join(dict.fromkeys(server.failure for server in self.servers if server.failure))
        if all(server.unfit for server in self.servers):
            self._give_up(last)
        if all(server.unfit or server.failures > self._retries for server in self.servers):
            self._give_up(self._ended(f"after {1 + self._retries} tries in {seconds:.0f} s", last))
        if seconds > self._patience:
            self._give_up(self._ended(f"for {seconds:.0f} s", last or "it took every request and was silent"))

    def _give_up(self, reason: str):
        self._given_up = reason
        self._change.notify_all()
        raise TeacherServerError(reason)

    def _ended(self, how: str, last: str) -> str:
        return (
            f"The teacher's server did not answer {how}; the last: {last}. Completions and "
            "weights of this step are not used: start the server again and resume from the last checkpoint "
            "(`resume_from_checkpoint=True`), or let it be tried for longer (`teacher_server_retries`, "
            "`teacher_server_patience`)."
        )

    def _has_answered(self, server: Server):
        with self._change:
            self._quiet_since = time.monotonic()
            self._answers += 1
            server.failures, server.failure, server.answered = 0, "", server.answered + 1

    def _give_back(self, server: Server):
        with self._change:
            server.in_flight -= 1
            self._change.notify_all()

    def _let_rest(self, server: Server, failure: FailedTryError, suspect: bool = False):
        with self._change:
            now = time.monotonic()
            server.unfit, server.failure = failure.unfit, str(failure)
            server.suspect |= suspect or failure.status != 429
            if server.rests_until > now:
                return  # it already rests, because of another request that was in flight
            pause = min(FIRST_PAUSE * 2**server.failures, LONGEST_PAUSE) * random.uniform(0.67, 1.33)
            pause = LONGEST_PAUSE if failure.unfit else pause if failure.pause is None else failure.pause
            server.rests_until = now + pause
            server.failures += 1
        logger.warning(f"The teacher's server {server.url} rests for {pause:.1f} s: {failure}")

    def _with_proxy(self, message: str, server: Server) -> str:
        """The message without secrets, and with the proxy that the request went through."""
        if server.proxy is not None:
            message += (
                f" (by way of the proxy {server.proxy}, which the environment names; NO_PROXY holds the hosts to reach "
                "without it)"
            )
        return redact(message, os.environ.get(self._key_env, ""))


def is_url(text: object) -> bool:
    return isinstance(text, str) and re.match(r"\s*https?://", text, re.IGNORECASE) is not None


def is_url_without_scheme(text: str) -> bool:
    """Whether it is `host:port`, which is no model's name."""
    return re.fullmatch(r"\s*(?:[\w.-]+|\[[\da-fA-F:.]+\]):\d{1,5}(?:/[^\s:]*)?\s*", text) is not None


def _checked(url: str) -> str:
    example = "it should read http://host:port"
    if not is_url(url):
        raise ValueError(f"{redact(url)!r} is not the address of a server: {example}.")
    try:
        parts = httpx2.URL(url.strip())
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise ValueError(f"{redact(url)!r} is not the address of a server: {example} ({error}).") from None
    if not parts.host or re.search(r"\s", url.strip()):
        raise ValueError(f"{redact(url)!r} is not the address of a server: {example}.")
    for there, what in ((parts.userinfo, "a password"), (parts.query or parts.fragment, "more than a path")):
        if there:
            raise ValueError(
                f"The address of the teacher's server {parts.host} holds {what}, which would be saved with the settings: put "
                "the key into the environment variable that `teacher_server_api_key_env` names."
            )
    return str(parts).rstrip("/").removesuffix("/v1")


def _key(variable: str) -> str | None:
    """The value of that environment variable, without the newline at its end that a file leaves."""
    if variable not in os.environ:
        if variable == "TEACHER_SERVER_API_KEY":
            return None
        shown = repr(variable) if is_secret_name(variable) and redact(variable) == variable else "what it is"
        raise ValueError(
            f"`teacher_server_api_key_env` is the name of an environment variable, and {shown} is not one that is set: export "
            "the key under a name, and give that name, not the key."
        )
    key = os.environ[variable].strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"The environment variable {variable} holds characters that no API key has (a newline, a quotation mark of a "
            "text editor): set it to the key alone."
        )
    return key or None


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def json_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _status_of(answer: dict, error: object) -> int:
    """The status of an error that came with status 200: its own, or else one that blames the request."""
    for code in (error.get("code") if isinstance(error, dict) else None, answer.get("code"), answer.get("status")):
        if isinstance(code, int) and 400 <= code < 600:
            return code
    return 400


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds, from a number or a date; None where there is neither."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds < 3600 else None
