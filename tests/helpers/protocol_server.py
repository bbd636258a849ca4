"""A small server over a transformers model that imitates one of several engines: with real sockets, and faults on demand.

It supports what a teacher's client needs of each, by their public documentation:
- `vllm serve`: `POST /v1/completions` with `prompt` (text or token ids), `prompt_logprobs`, `add_special_tokens`,
  `return_token_ids`, `n`;
- SGLang: `POST /generate` with `text` or `input_ids`, `sampling_params`, `return_logprob`, `logprob_start_len`,
  `top_logprobs_num`
  (https://docs.sglang.io); its `/v1/completions` knows no `prompt_logprobs`;
- Fireworks: `POST /v1/completions` with `prompt`, `echo`, `logprobs`, `max_tokens` from 0 on (https://docs.fireworks.ai);
- "none": an engine that scores only what it generates.

All have `GET /v1/models` and an API key. They generate one token, or none.
"""

import contextlib
import json
import math
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
    Serves `model` from its creation until `close`, on `port` or on a free one.

    `fault(n, payload)` names the fault of the n-th scoring request (counted from 0), or None: a key of `STATUS_FAULTS`, "drop"
    (the connection, without an answer), "break" (the connection, in the middle of the answer), "truncate" (the JSON), "short" (one
    score too few), "shift" (each id is its neighbour's), "nan", "positive", "zero" (a probability), "delay". A list has the faults
    of the first requests. `shift` is added to every log-prob. `owner`: its `owned_by`.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        port: int = 0,
        protocol: str = "vllm",
        owner: str = "vllm",
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
        self.protocol, self.owner = protocol, owner
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
        """Sets `fault` for the requests to come, counted from 0 again."""
        if isinstance(fault, list):
            plan = dict(enumerate(fault))
            self._fault = lambda number, payload: plan.get(number)
        else:
            self._fault = fault or (lambda number, payload: None)
        self._numbered = len(self.requests)

    def close(self):
        """Closes the server like a killed process: its port is free, its connections are cut."""
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
            told = dict.fromkeys([token, *top])
            entries.append({str(i): {"logprob": row[i].item(), "rank": 1, "likeliest": i in top} for i in told})
        choice = {"index": 0, "text": "", "prompt_logprobs": entries}
        if payload.get("return_token_ids"):
            choice["prompt_token_ids"] = prompt
        return {"object": "text_completion", "model": self.name, "choices": [choice]}

    def understood(self, path: str, payload: dict) -> dict:
        """The request, in vLLM's form."""
        if self.protocol == "vllm":
            return payload
        if path == "/generate":
            sampling = payload["sampling_params"]
            assert "logprob_start_len" not in payload or payload["return_logprob"]
            return {
                "model": self.name,
                "prompt": payload["input_ids"] if "input_ids" in payload else payload["text"],
                "prompt_logprobs": payload.get("top_logprobs_num", 0)
                if payload.get("logprob_start_len") == 0
                else None,
                "return_token_ids": True,
                "max_tokens": sampling["max_new_tokens"],
                "temperature": sampling["temperature"],
                "n": sampling.get("n", 1),
            }
        echoed = self.protocol == "echo" and payload.get("echo")
        payload = {"n": 1, "temperature": 1.0, **payload}
        payload.pop("add_special_tokens", None)
        return {**payload, "prompt_logprobs": 0 if echoed else None, "return_token_ids": True}

    def told(self, path: str, asked: dict, answer: dict) -> dict | list:
        """The answer, in the form of this engine."""
        choices = answer["choices"]
        if self.protocol == "vllm":
            return answer
        if path == "/generate":
            answers = [self._told_by_sglang(choice) for choice in choices]
            return answers[0] if asked["sampling_params"].get("n", 1) == 1 else answers
        told = []
        for choice in choices:
            ids, values = _ids_and_values(choice)
            logprobs = {"tokens": list(map(str, ids)), "token_logprobs": values, "text_offset": [0] * len(ids)}
            own = {"token_ids": ids} if self.tells_ids else {}
            shown = None if self.protocol != "echo" or not asked.get("logprobs") else {**logprobs, **own}
            told.append({"index": choice["index"], "text": "", "logprobs": shown})
        return {**answer, "choices": told}

    def _told_by_sglang(self, choice: dict) -> dict:
        ids, values = _ids_and_values(choice)
        # orjson writes values that are not finite as null
        triples = [[None if v is None or math.isnan(v) else v, i, None] for i, v in zip(ids, values, strict=True)]
        scored = "prompt_logprobs" in choice
        meta = {"prompt_tokens": len(ids), "input_token_logprobs" if scored else "output_token_logprobs": triples}
        if scored and any(len(entry) > 1 for entry in choice["prompt_logprobs"][1:]):
            # only the most likely ones, without the token that was sent if it is not one of them
            meta["input_top_logprobs"] = [None] + [
                [[score["logprob"], int(token), None] for token, score in entry.items() if score["likeliest"]]
                for entry in choice["prompt_logprobs"][1:]
            ]
        return {"text": "", "meta_info": meta}

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
                self.wfile = self.connection.makefile("wb", 1 << 16)  # one packet for each answer
                server.connections += 1
                server._open.add(self.connection)

            def finish(self):
                server._open.discard(self.connection)
                super().finish()

            def do_GET(self):
                names = [server.name, *server.others]
                if not self.path.endswith("/v1/models"):
                    return self._send(404, json.dumps({"detail": "Not Found"}))
                own = {"owned_by": server.owner, "root": server.root, "max_model_len": server.max_model_len}
                cards = [{"id": n, **own} for n in names]
                self._send(200, json.dumps({"object": "list", "data": cards})) if self._knows_key() else None

            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                known = {"/v1/completions", *(["/generate"] if server.protocol == "sglang" else [])}
                if self.path not in known:
                    return self._send(404, json.dumps({"detail": "Not Found"}))
                asked = payload
                payload = server.understood(self.path, payload)
                with server._count:
                    server.requests.append(payload)
                    fault = server._fault(len(server.requests) - 1 - server._numbered, payload)
                    server._in_flight += 1
                    server.most_in_flight = max(server.most_in_flight, server._in_flight)
                try:
                    if self._knows_key():
                        self._answer(payload, fault, asked)
                finally:
                    with server._count:
                        server._in_flight -= 1

            def _answer(self, payload, fault, asked):
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
                    text = json.dumps(server.told(self.path, asked, answer))
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


def _ids_and_values(choice: dict) -> tuple[list[int], list[float | None]]:
    """For a scored prompt, or for the generated token."""
    if "prompt_logprobs" not in choice:
        return choice["token_ids"] or [0], [-1.0]
    told = [next(iter(entry.items())) for entry in choice["prompt_logprobs"][1:]]
    first = choice["prompt_token_ids"][:1]
    return [*first, *(int(token) for token, _ in told)], [None, *(score["logprob"] for _, score in told)]


def _cut(connection: socket.socket):
    with contextlib.suppress(OSError):  # the other side may have closed it first
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
