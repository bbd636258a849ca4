"""
The effect of requests in flight, and of a student that works meanwhile, with a server that takes the same time for every text,
however many it has. Only the client is measured, since a server on the training cores would compete with it.

```bash
python examples/small_models.py small
python -m benchmarks.remote.latency --models small
```

The server here has no model: after `SECONDS` it returns -1 for every token. The measures are those of `throughput.py`.
"""

import argparse
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.remote.throughput import COMPLETION, CONCURRENCY, OUTPUT, PROMPT, ROWS, draw, scoring, waiting
from benchmarks.report import header, save


SECONDS = 0.1


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def fixed_latency(tokenizer):
    """The address of a server with a fixed latency."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # one packet for each answer

        def do_GET(self):
            self.answer({"data": [{"id": "none", "max_model_len": 4096}]})

        def do_POST(self):
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(SECONDS)
            ids = payload["prompt"]
            ids = tokenizer.encode(ids, add_special_tokens=False) if isinstance(ids, str) else ids
            scores = [None, *({str(token): {"logprob": -1.0}} for token in ids[1:])]
            self.answer({"model": "none", "choices": [{"prompt_logprobs": scores, "prompt_token_ids": ids}]})

        def answer(self, content: dict):
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

        def log_message(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, required=True, help="the folder that examples/small_models.py has made")
    models = parser.parse_args().models
    logging.set_verbosity_error()
    said = f"a stand-in without a model that takes {SECONDS} s for every text, however many it has"
    report = {**header(), "server": said, "rows": ROWS, "prompt": PROMPT, "completion": COMPLETION, "results": []}
    with fixed_latency(AutoTokenizer.from_pretrained(models / "teacher")) as url:
        for concurrency in CONCURRENCY:
            result = {
                "concurrency": concurrency,
                "tokens_per_second": scoring(url, models, concurrency),
                "seconds": waiting(url, models, concurrency),
            }
            print(result, flush=True)
            report["results"].append(result)
    save(OUTPUT / "latency.json", report)
    draw(OUTPUT / "latency.png", report["results"], said)


if __name__ == "__main__":
    main()
