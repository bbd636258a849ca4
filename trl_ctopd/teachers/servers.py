"""The servers of one teacher: requests shared among them, with pauses and further tries where they fail.

Decisions
- A request goes to the server with the fewest in flight. A failure that may pass (a dropped or refused connection, a
  time-out, 408, 425, 429, any 5xx, an answer that is no JSON) lets that server rest, for as long as its `Retry-After`
  says or else twice as long as the last time, and the request goes to another one, or waits.
- A server that was gone is asked who it is (`confirm`) before it gets work again; so is one that refused the model or the
  key. Where none but such are left, that is an error at once.
- The API key stands in the header of the connections, and nowhere else: no message and no attribute holds it.

Left out: streaming, HTTP/2, redirects.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx2


logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds; a third more or less by chance, so that processes don't return as one
_IDLE = 4.0  # seconds that an unused connection is kept: vLLM cuts it after 5
_PASSING = (408, 425, 429)
_UNFIT = (401, 403, 404)
_SHOWN = 300  # characters of an answer in a message


class TeacherServerError(RuntimeError):
    """No server of the teacher answers, or none as it should."""


class RequestRefusedError(Exception):
    """The server takes this request for wrong (a 4xx that is no matter of model, key or load): to repeat it is no use."""


class _Failure(Exception):
    """This server did not answer; `unfit` where time alone won't mend it."""

    def __init__(self, message: str, pause: float | None = None, busy: bool = False, unfit: bool = False):
        super().__init__(message)
        self.pause, self.busy, self.unfit = pause, busy, unfit


@dataclass(eq=False)
class Server:
    """One address, and what is known of it. `rests_until` is in seconds of `time.monotonic`."""

    url: str
    in_flight: int = 0
    rests_until: float = 0.0
    failures: int = 0  # in a row
    suspect: bool = False  # to be asked who it is before it gets work
    unfit: str = ""  # why no work of this run is for it
    answered: int = 0  # requests


class Servers:
    """
    Args:
        urls: where the teacher is served, `http://host:port` each.
        api_key_env: name of the environment variable that holds the API key; without it, none is sent.
        timeout: seconds a try may take.
        retries: tries after the first, pauses between them.
        concurrency: requests in flight at the same time.

    Raises `ValueError` for an address that is none.
    """

    def __init__(
        self,
        urls: Sequence[str],
        api_key_env: str = "TEACHER_SERVER_API_KEY",
        timeout: float = 120.0,
        retries: int = 8,
        concurrency: int = 32,
    ):
        self.servers = [Server(_checked(url)) for url in dict.fromkeys(urls)]
        self.confirm: Callable[[Server], None] = lambda server: None
        self.concurrency = concurrency
        self._retries = retries
        self._key_env = api_key_env
        self._change = threading.Condition()
        key = os.environ.get(api_key_env)
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency, keepalive_expiry=_IDLE),
        )

    def each(self, check: Callable[[Server], None]):
        """
        `check` at every server; one that does not answer is left out, and asked again when it gets work. Where none does,
        all are tried again. `check` calls `send`.

        Raises `TeacherServerError` where none answers after the last try.
        """
        for _ in range(1 + self._retries):
            there, failures = [], []
            for server in self.servers:
                try:
                    check(server)
                except _Failure as failure:
                    failures.append(failure)
                    self._let_rest(server, failure, suspect=True)
                else:
                    there.append(server)
            if there:
                return
            if all(failure.unfit for failure in failures):
                break
            time.sleep(max(0.0, min(server.rests_until for server in self.servers) - time.monotonic()))
        raise TeacherServerError(f"The teacher's server does not answer: {'; '.join(map(str, failures))}")

    def recheck(self, server: Server):
        """`confirm` for a server that has answered; one that is gone by now is asked when it gets work again."""
        if server.suspect:
            return
        try:
            self.confirm(server)
        except _Failure as failure:
            self._let_rest(server, failure, suspect=True)

    def post(self, path: str, payload: dict) -> tuple[dict, Server]:
        """
        The JSON answer, and the server that gave it.

        Raises:
            TeacherServerError: after the last try, or where no server is left that knows model and key.
            RequestRefusedError: where the request itself is at fault.
        """
        failure = None
        for _ in range(1 + self._retries):
            server = self._take()
            try:
                if server.suspect:
                    self._ask_who(server)
                answer = self.send(server, "POST", path, payload)
            except _Failure as error:
                failure = error
                self._let_rest(server, error)
            else:
                server.failures, server.answered = 0, server.answered + 1
                return answer, server
            finally:
                self._give_back(server)
        raise TeacherServerError(
            f"The teacher's server did not answer after {1 + self._retries} tries; the last: {failure}. Completions and "
            "weights of this step are not used: start the server again and resume from the last checkpoint "
            "(`resume_from_checkpoint=True`), or let it be tried for longer (`teacher_server_retries`)."
        ) from failure

    def send(self, server: Server, method: str, path: str, payload: dict | None = None) -> dict:
        """One try at one server."""
        place = f"{method} {server.url}{path}"
        try:
            response = self._http.request(method, server.url + path, json=payload)
        except httpx2.TransportError as error:
            raise _Failure(f"{place}: {type(error).__name__}: {error}") from error
        status = response.status_code
        if status == 200:
            try:
                answer = response.json()
            except ValueError:
                answer = None
            if not isinstance(answer, dict):
                raise _Failure(f"{place}: an answer that is no JSON object: {self._shown(response.text)}")
            return answer
        message = f"{place}: {status}: {self._shown(response.text)}"
        if status in _PASSING or status >= 500:
            raise _Failure(message, _retry_after(response), busy=status == 429)
        if status in _UNFIT:
            hint = f" The API key comes from the environment variable {self._key_env}." if status != 404 else ""
            raise _Failure(message + hint, unfit=True)
        raise RequestRefusedError(message)

    def _ask_who(self, server: Server):
        try:
            self.confirm(server)
        except (RequestRefusedError, TeacherServerError) as error:
            raise _Failure(str(error), unfit=True) from error
        server.suspect, server.unfit, server.failures = False, "", 0
        logger.warning(f"The teacher's server {server.url} answers again and takes part.")

    def _take(self) -> Server:
        """The least busy of those that do not rest; waits for one. Whoever gets a suspect one has it alone."""
        with self._change:
            while True:
                if all(server.unfit for server in self.servers):
                    raise TeacherServerError("; ".join(server.unfit for server in self.servers))
                now = time.monotonic()
                ready = [
                    server
                    for server in self.servers
                    if server.rests_until <= now and not (server.suspect and server.in_flight)
                ]
                if ready:
                    server = min(ready, key=lambda server: (not server.suspect, server.in_flight))
                    server.in_flight += 1
                    return server
                resting = [server.rests_until - now for server in self.servers if server.rests_until > now]
                self._change.wait(min(resting, default=None))

    def _give_back(self, server: Server):
        with self._change:
            server.in_flight -= 1
            self._change.notify_all()

    def _let_rest(self, server: Server, failure: _Failure, suspect: bool = False):
        with self._change:
            now = time.monotonic()
            server.unfit = str(failure) if failure.unfit else ""
            if server.rests_until > now:
                return  # with others that were under way
            pause = min(FIRST_PAUSE * 2**server.failures, LONGEST_PAUSE) * random.uniform(0.67, 1.33)
            pause = LONGEST_PAUSE if failure.unfit else pause if failure.pause is None else failure.pause
            server.rests_until = now + pause
            server.failures += 1
            server.suspect |= suspect or not failure.busy
        logger.warning(f"The teacher's server {server.url} rests for {pause:.1f} s: {failure}")

    def _shown(self, text: str) -> str:
        key = os.environ.get(self._key_env)
        text = text.replace(key, "***") if key else text
        return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def is_url(text: object) -> bool:
    return isinstance(text, str) and text.startswith(("http://", "https://"))


def _checked(url: str) -> str:
    if not is_url(url):
        raise ValueError(f"{url!r} is no address of a server: it should read http://host:port.")
    parts = httpx2.URL(url)
    if parts.userinfo:
        raise ValueError(
            f"The address of the teacher's server {parts.host} holds a password, which would be saved with the settings: put "
            "the key into the environment variable that `teacher_server_api_key_env` names."
        )
    return url.rstrip("/").removesuffix("/v1")


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds, from a number of them or a date; None where there is neither."""
    value = response.headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if seconds < 3600 else None
