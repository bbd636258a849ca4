"""A small server of vLLM's completions protocol over a transformers model: real sockets, and faults on demand.

It knows what a teacher's client needs of `vllm serve`: `GET /v1/models`, `POST /v1/completions` with `prompt` (text or token
ids), `prompt_logprobs`, `add_special_tokens`, `return_token_ids`, `n` and an API key. It writes one token.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


STATUS_FAULTS = {
    "429": (429, {"Retry-After": "0.01"}), "500": (500, {}), "503": (503, {}), "400": (400, {}), "401": (401, {}),
}  # fmt: skip


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # connections that come at the same time


class ProtocolServer:
    """
    Serves `model` from the moment it is built until `close`, on `port` or one of its own choice.

    `fault(n, payload)` names what goes wrong with the n-th scoring request (counted from 0), or None: a key of
    `STATUS_FAULTS`, "drop" (the connection, unanswered), "break" (it, half-way through the answer), "truncate" (the JSON),
    "short" (one score too few), "shift" (each id is its neighbour's), "nan", "positive", "zero" (a probability), "delay".
    A list names those of the first requests. `shift` is added to every log-prob.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        port: int = 0,
        name: str = "toy",
        root: str | None = None,
        max_model_len: int | None = 256,
        api_key: str | None = None,
        scores: str = "raw_logprobs",
        shift: float = 0.0,
        tells_ids: bool = True,
        others: Iterable[str] = (),
        fault: Callable[[int, dict], str | None] | list[str | None] | None = None,
        delay: float = 0.2,
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.name, self.root, self.max_model_len = name, root or name, max_model_len
        self.api_key, self.scores, self.others, self.delay = api_key, scores, tuple(others), delay
        self.shift, self.tells_ids = shift, tells_ids
        self.requests: list[dict] = []  # the payloads
        self.connections = 0
        self.most_in_flight = self._in_flight = 0
        self._compute, self._count = threading.Lock(), threading.Lock()
        self.fault_from_now_on(fault)
        self._http = _HTTPServer(("127.0.0.1", port), self._handler())
        self._open: set = set()
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def port(self) -> int:
        return self._http.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault_from_now_on(self, fault: Callable[[int, dict], str | None] | list[str | None] | None):
        """`fault` of the requests to come, counted anew."""
        if isinstance(fault, list):
            plan = dict(enumerate(fault))
            self._fault = lambda number, payload: plan.get(number)
        else:
            self._fault = fault or (lambda number, payload: None)
        self._numbered = len(self.requests)

    def close(self):
        """Gone as a killed process is: its port is free, its connections are cut."""
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._open):
            _cut(connection)

    def __enter__(self) -> "ProtocolServer":
        return self

    def __exit__(self, *_):
        self.close()

    @torch.no_grad()
    def answer(self, payload: dict) -> dict:
        prompt = payload["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer.encode(prompt, add_special_tokens=payload.get("add_special_tokens", True))
        with self._compute:
            *logits, last = self.model(input_ids=torch.tensor([prompt])).logits[0].float()
        if payload["prompt_logprobs"] is None:
            return self._written(last, payload)
        logits = torch.stack(logits)
        if self.scores == "processed_logprobs":
            logits = logits / payload.get("temperature", 1.0)
        values = logits if self.scores == "raw_logits" else logits.log_softmax(-1) + self.shift
        entries = [None]
        for row, token in zip(values, prompt[1:], strict=True):
            top = row.topk(payload["prompt_logprobs"]).indices.tolist()
            entries.append({str(i): {"logprob": row[i].item(), "rank": 1} for i in dict.fromkeys([token, *top])})
        choice = {"index": 0, "text": "", "prompt_logprobs": entries}
        if payload.get("return_token_ids"):
            choice["prompt_token_ids"] = prompt
        return {"object": "text_completion", "model": self.name, "choices": [choice]}

    def _written(self, logits: torch.Tensor, payload: dict) -> dict:
        draws = torch.Generator().manual_seed(0)
        probabilities = (logits / payload["temperature"]).softmax(-1)
        ids = probabilities.multinomial(payload["n"], replacement=True, generator=draws).tolist()
        choices = [
            {"index": n, "text": "", "token_ids": [token] if self.tells_ids else None} for n, token in enumerate(ids)
        ]
        return {"object": "text_completion", "model": self.name, "choices": choices}

    def _handler(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                self.wfile = self.connection.makefile("wb", 1 << 16)  # one packet an answer
                server.connections += 1
                server._open.add(self.connection)

            def finish(self):
                server._open.discard(self.connection)
                super().finish()

            def do_GET(self):
                names = [server.name, *server.others]
                cards = [{"id": n, "root": server.root, "max_model_len": server.max_model_len} for n in names]
                self._send(200, json.dumps({"object": "list", "data": cards})) if self._knows_key() else None

            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._count:
                    server.requests.append(payload)
                    fault = server._fault(len(server.requests) - 1 - server._numbered, payload)
                    server._in_flight += 1
                    server.most_in_flight = max(server.most_in_flight, server._in_flight)
                try:
                    if self._knows_key():
                        self._answer(payload, fault)
                finally:
                    with server._count:
                        server._in_flight -= 1

            def _answer(self, payload, fault):
                if payload["model"] not in (server.name, *server.others):
                    self._send(404, json.dumps({"error": f"The model `{payload['model']}` does not exist."}))
                elif len(payload["prompt"]) + payload["max_tokens"] > (server.max_model_len or 10**9):
                    self._send(400, json.dumps({"error": "This model's maximum context length is exceeded."}))
                elif fault in STATUS_FAULTS:
                    status, headers = STATUS_FAULTS[fault]
                    self._send(status, f"as ordered: {fault}", headers)
                elif fault == "drop":
                    self._hang_up()
                else:
                    if fault == "delay":
                        time.sleep(server.delay)
                    answer = server.answer(payload)
                    if payload["prompt_logprobs"] is not None:
                        _spoil(answer["choices"][0]["prompt_logprobs"], fault)
                    text = json.dumps(answer)
                    if fault == "break":
                        self._send(200, text, cut=True)
                        self._hang_up()
                    else:
                        self._send(200, text[: len(text) // 2] if fault == "truncate" else text)

            def _knows_key(self) -> bool:
                known = server.api_key is None or self.headers.get("Authorization") == f"Bearer {server.api_key}"
                if not known:
                    self._send(401, json.dumps({"error": f"Unauthorized: {self.headers.get('Authorization')}"}))
                return known

            def _send(self, status, text, headers=None, cut=False):
                body = text.encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(body), **(headers or {})}.items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if cut else body)
                self.wfile.flush()

            def _hang_up(self):
                self.close_connection = True
                _cut(self.connection)

            def log_message(self, *_):
                pass

        return Handler


def _cut(connection: socket.socket):
    with contextlib.suppress(OSError):  # the other side may have been first
        connection.shutdown(socket.SHUT_RDWR)


def _spoil(entries: list, fault: str | None):
    last = entries[-1]
    score = next(iter(last.values()))
    if fault == "short":
        entries.pop()
    elif fault == "shift":
        entries[1:] = [{str(int(key) + 1): value for key, value in entry.items()} for entry in entries[1:]]
    elif fault == "nan":
        score["logprob"] = float("nan")
    elif fault == "positive":
        score["logprob"] = 0.5
    elif fault == "zero":
        score["logprob"] = -9999.0
