"""
A teacher's server with vLLM's completions protocol, correct except for one habit. It has no model: each token has a fixed
probability, whatever comes before it.

A habit is a function `(request, ids)`. It is called for each scoring request once `misbehaves` is set. It either answers the
request and returns True, or returns a function that changes the right answer's JSON, or returns None for the right answer.
`request.chosen(ids)` is True for one text in three, by the text alone. `request.first(ids)` is True for such a text the first
time it comes.
"""

import base64
import contextlib
import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


HANG = 3600.0  # seconds


class HabitServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, tokenizer, habit: Callable | None = None, key: str = "", misbehaves: bool = False, port: int = 0
    ):
        super().__init__(("127.0.0.1", port), _Handler)
        self.tokenizer, self.habit, self.key, self.misbehaves = tokenizer, habit, key, misbehaves
        generator = torch.Generator().manual_seed(0)
        self.log_probs = (3 * torch.randn(len(tokenizer), generator=generator)).log_softmax(-1)
        self.other = False  # True: another model
        self.seen: set = set()
        self.probes: set = set()  # requests at the start
        self.last: dict = {}
        self.connections: set = set()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, payload: dict) -> dict:
        ids = payload["prompt"]
        if isinstance(ids, str):
            ids = self.tokenizer.encode(ids, add_special_tokens=False)
        if payload["prompt_logprobs"] is None:
            draws = self.log_probs.exp().multinomial(payload["n"], True, generator=torch.Generator().manual_seed(0))
            return {"model": "teacher", "choices": [{"token_ids": [token]} for token in draws.tolist()]}
        values = self.log_probs.flip(0) if self.other else self.log_probs
        scores = [None, *({str(token): {"logprob": values[token].item()}} for token in ids[1:])]
        return {"model": "teacher", "choices": [{"prompt_logprobs": scores, "prompt_token_ids": ids}]}

    def close(self):
        """Closes the server like a killed process."""
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def chosen(self, ids: list[int]) -> bool:
        return zlib.crc32(repr(ids).encode()) % 3 == 0 and tuple(ids) not in self.probes

    def handle_error(self, *_):
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self):
        self.server.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def chosen(self, ids: list[int]) -> bool:
        return self.server.chosen(ids)

    def first(self, ids: list[int]) -> bool:
        text = tuple(ids)
        new = self.chosen(ids) and text not in self.server.seen
        self.server.seen.add(text)
        return new

    def do_GET(self):
        if self._knows_key():
            self.send(200, {"data": [{"id": "teacher", "root": "teacher", "max_model_len": 4096}]})

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._knows_key():
            return
        ids = payload["prompt"]
        wrong = None
        if not self.server.misbehaves and isinstance(ids, list):
            self.server.probes.add(tuple(ids))
            self.server.last = self.server.answer({"prompt": ids, "prompt_logprobs": 0})
        if self.server.misbehaves and self.server.habit is not None and isinstance(ids, list):
            wrong = self.server.habit(self, ids)
        if wrong is True:
            return
        answer = self.server.answer(payload)
        if wrong is not None:
            answer = json.loads(json.dumps(answer))
            answer = wrong(answer) or answer
        self.send(200, answer)

    def _knows_key(self) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {self.server.key}" or not self.server.key
        if not known:
            self.send(401, {"error": f"Unauthorized: {self.headers.get('Authorization')}"})
        return known

    def send(self, status: int, answer, headers: dict | None = None, length: int | None = None, end: bool = False):
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body) if length is None else length, **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        if end:
            self.hang_up()

    def hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def drip(self, parts, seconds: float = 0.2):
        """Sends byte by byte, until the other side has gone."""
        with contextlib.suppress(OSError):
            for part in parts:
                self.wfile.write(part)
                self.wfile.flush()
                time.sleep(seconds)
        self.close_connection = True

    def log_message(self, *_):
        pass


# Habits in place of an answer


def hangs(request, ids):
    time.sleep(HANG)


def hangs_at_first(request, ids):
    if request.first(ids):
        time.sleep(HANG)


def dies(request, ids):
    threading.Thread(target=request.server.close).start()
    request.hang_up()
    return True


def cuts_the_connection(request, ids):
    if request.first(ids):
        request.send(200, b'{"choices": [', length=1000, end=True)
        return True


def drips_its_body(request, ids):
    request.send(200, b"{", length=10**6)
    request.drip(b" " for _ in range(10**6))
    return True


def drips_its_headers(request, ids):
    request.drip([b"HTTP/1.1 200 OK\r\nX-A: ", *(b"a" for _ in range(10**6))])
    return True


def only_ever_continues(request, ids):
    request.drip((b"HTTP/1.1 100 Continue\r\n\r\n" for _ in range(10**6)), 0.01)
    return True


def never_stops_sending(request, ids):
    with contextlib.suppress(OSError):
        request.send(200, b'{"choices": "', length=1 << 40)
        while True:
            request.wfile.write(b"a" * (1 << 20))
    request.close_connection = True
    return True


def _status(status: int, headers: dict | None = None, when=None, text=None):
    def habit(request, ids):
        if when is None or when(request, ids):
            told = {"error": "as ordered"} if text is None else text(request)
            request.send(status, told, headers)
            return True

    return habit


def _first(request, ids):
    return request.first(ids)


def _chosen(request, ids):
    return request.chosen(ids)


def sends_broken_gzip(request, ids):
    if request.first(ids):
        body = gzip.compress(json.dumps(request.server.answer({"prompt": ids, "prompt_logprobs": 0})).encode())
        request.send(200, body[: len(body) // 2] + b"\0" * 20, {"Content-Encoding": "gzip"})
        return True


def nests_its_json(request, ids):
    if request.first(ids):
        request.send(200, b"[" * 200_000)
        return True


def shows_a_page(request, ids):
    request.send(200, b"<html><title>Log in</title></html>", {"Content-Type": "text/html"})
    return True


def echoes_the_key_with_a_success(request, ids):
    key = request.server.key
    request.send(
        200, {"error": {"message": f"no quota for {key}, {base64.b64encode(key.encode()).decode()}", "code": 429}}
    )
    return True


# Errors in an answer


def _last_score(change):
    """One text in three has another last score."""

    def habit(request, ids):
        if request.chosen(ids):

            def wrong(answer):
                score = next(iter(answer["choices"][0]["prompt_logprobs"][-1].values()))
                change(score)

            return wrong

    return habit


def _to(value):
    return lambda score: score.update(logprob=value)


def _scores(change):
    def habit(request, ids):
        if request.chosen(ids):

            def wrong(answer):
                choice = answer["choices"][0]
                choice["prompt_logprobs"] = change(choice["prompt_logprobs"])

            return wrong

    return habit


def _shifted(scores):
    return [None, *({str(int(key) + 1): value for key, value in entry.items()} for entry in scores[1:])]


def answers_the_text_before(request, ids):
    """Like a server that mixes up its requests."""
    server = request.server
    before, server.last = server.last, server.answer({"prompt": ids, "prompt_logprobs": 0})
    if request.chosen(ids):
        return lambda answer: before


def takes_another_models_name(request, ids):
    if request.chosen(ids):
        return lambda answer: answer.update(model="another")


def has_another_model(request, ids):
    request.server.other = True


def _key_in_the_message(request):
    return {"error": {"message": f"bad key {request.headers.get('Authorization')}", "key": request.server.key}}


HABITS = {
    "dies": dies,
    "takes requests and never answers": hangs,
    "does not answer one text in three, at first": hangs_at_first,
    "cuts the connection amid one answer in three": cuts_the_connection,
    "sends its answer a byte at a time": drips_its_body,
    "sends its headers a byte at a time": drips_its_headers,
    "says 100 Continue for ever": only_ever_continues,
    "never stops sending": never_stops_sending,
    "500, always": _status(500),
    "503, come again in 50 minutes": _status(503, {"Retry-After": "3000"}),
    "429 for one text in three, at first": _status(429, {"Retry-After": "0.05"}, _first),
    "500 for one text in three, always": _status(500, when=_chosen),
    "401 from now on, and shows the key": _status(401, text=_key_in_the_message),
    "429 with the key in a success": echoes_the_key_with_a_success,
    "sends on to another address": _status(307, {"Location": "http://127.0.0.1:9/v1/completions"}),
    "shows a page to log in": shows_a_page,
    "broken gzip for one text in three, at first": sends_broken_gzip,
    "JSON nested 200,000 deep, at first": nests_its_json,
    "an error as a success for one text in three": _status(
        200, when=_chosen, text=lambda request: {"error": "too long"}
    ),
    "NaN": _last_score(_to(float("nan"))),
    "a log-prob above 0": _last_score(_to(0.5)),
    "a log-prob as text": _last_score(_to("-1.5")),
    "one score too few": _scores(lambda scores: scores[:-1]),
    "each score at its neighbour's id": _scores(_shifted),
    "the answer to another text": answers_the_text_before,
    "another model's name": takes_another_models_name,
    "another model from now on": has_another_model,
}
