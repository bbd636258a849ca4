"""A teacher behind a server: token ids go out, log-probs of those tokens come back, by vLLM's `POST /v1/completions` with
`prompt_logprobs`.

Decisions
- One request a completion, many at a time. The server is asked for the log-prob of each token it was sent, for those of no
  others (some releases of vLLM end with an error when they come to name a row past the tokenizer), and for a single new
  token, the fewest it writes. Results come in the order of the rows.
- Nothing is believed unchecked. At the start: one model, by name; the same token ids as the tokenizer's for a probe text,
  special tokens included, and up to the tokenizer's highest id; log-probs that are log-probs, and the same at any sampling
  temperature. In each answer: the model's name, the length, the ids sent, numbers at most 0.
- An answer that fails its check, or a request that the server refuses as such, costs its row alone: NaN, so that the row
  takes no part, and it is counted. If that is so for all rows of a step, it is an error.
- A step ends with the probe, at every server that answered: one that has another model by now is an error before that
  step's update. A server that was gone has to pass the same probe before it gets work again.
- A zero probability is -inf, vLLM's -9999 too; its chunk is neutralised, as with a teacher in this process.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import torch
from transformers import PreTrainedTokenizerBase

from .servers import RequestRefusedError, Server, Servers, TeacherServerError, logger


PROBE = (
    "The quick brown fox, 1234.5 times: «où est l'élève ?» Съешь ещё. 敏捷的棕色狐狸。\n\tdef f(x): return x ** 2  # 🙂"
)
_SAME_MODEL = 0.2  # nats a token, in the mean over the probe; the noise of half precision stays below
_FLOOR = -100.0  # in comparisons
_ZERO_PROBABILITY = -9999.0  # vLLM's stand-in for -inf
_ROUNDING = 1e-3


class AnswerError(Exception):
    """An answer that is no score of what was asked."""


class RemoteTeacher:
    """
    Args:
        servers (`Servers`): where it is served.
        model (`str`, *optional*): its name there, or the name or folder it was loaded from; needed where a server has
            several.

    Attributes: `name` and `root`, what the servers call the model and loaded it from; `context`, the tokens of prompt and
    completion that they take.

    Raises:
        ValueError: where a server has several models and none of that name, or another than the others.
        TeacherServerError: where none answers.
    """

    signals = ("logprobs",)

    def __init__(self, servers: Servers, model: str | None = None):
        self._servers = servers
        self._pool = ThreadPoolExecutor(servers.concurrency, thread_name_prefix="teacher")
        self._probe_ids: list[int] = []
        self._probe_scores: torch.Tensor | None = None
        self.name, self.root, self.context = "", "", None
        servers.each(lambda server: self._meet(server, model))

    # At the start

    def _meet(self, server: Server, wanted: str | None):
        """What `server` calls the model and loaded it from, and how long a text it takes."""
        models = {entry["id"]: entry for entry in self._servers.send(server, "GET", "/v1/models").get("data", [])}
        same_root = [entry for entry in models.values() if entry.get("root") == wanted]
        fits = [models[wanted]] if wanted in models else same_root or list(models.values())
        if len(fits) != 1:
            raise ValueError(
                f"The teacher's server {server.url} serves {', '.join(map(repr, models)) or 'no model'}: name one of them "
                "with `teacher_model_name_or_path`, beside `teacher_server_url`."
            )
        [entry] = fits
        if self.name not in ("", entry["id"]):
            raise ValueError(
                f"The teacher's server {server.url} serves {entry['id']!r}, and another one serves {self.name!r}: several "
                "addresses are those of one model."
            )
        self.name, self.root = entry["id"], entry.get("root") or entry["id"]
        if entry.get("max_model_len") is not None:
            room = entry["max_model_len"] - 1  # the server writes one token
            self.context = room if self.context is None else min(room, self.context)

    def check(self, tokenizer: PreTrainedTokenizerBase):
        """
        Compares every server that is up with `tokenizer`, and all of them with each other.

        Raises `ValueError` for token ids that differ, for scores that are no raw log-probs, and for servers with unlike
        models.
        """
        text = PROBE + "".join(tokenizer.all_special_tokens)
        expected = tokenizer.encode(text, add_special_tokens=False)
        self._probe_ids = [*expected, max(tokenizer.get_vocab().values())]
        if self.context is not None and len(self._probe_ids) > self.context:
            raise ValueError(
                f"The teacher's server takes texts of {self.context + 1} tokens, too few for a probe of "
                f"{len(self._probe_ids)}: start it with a larger `--max-model-len`."
            )

        def check(server: Server):
            try:
                self._check_ids(server, tokenizer, text, expected)
                self._check_scores(server)
                scores = self._probe(server)
            except (AnswerError, RequestRefusedError) as error:
                raise ValueError(f"The teacher's server {server.url} cannot score a probe text: {error}") from error
            if self._probe_scores is None:
                self._probe_scores = scores
            self._compare(server, scores, ValueError)

        self._servers.each(check)
        self._servers.confirm = self._confirm

    def _check_ids(self, server: Server, tokenizer, text: str, expected: list[int]):
        answer = self._servers.send(
            server, "POST", "/v1/completions", self._payload(text, add_special_tokens=False, return_token_ids=True)
        )
        found = _choice(answer).get("prompt_token_ids")
        if found is None:  # an older server: the first token has no score, and so no id
            found = expected[:1] + [int(key) for entry in _entries(answer)[1:] for key in entry]
        if found != expected:
            place = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
            place = min(len(found), len(expected)) if place is None else place
            raise ValueError(
                f"The teacher's server {server.url} reads a probe text as other token ids than "
                f"{type(tokenizer).__name__} {tokenizer.name_or_path!r}: from token {place} on "
                f"{found[place : place + 5]}, where the tokenizer has {expected[place : place + 5]}. Pass the tokenizer of "
                f"the model that is served ({self.root!r}) as `teacher_processing_class`."
            )

    def _check_scores(self, server: Server):
        """Only log-probs are never above 0, and only raw ones stay what they are under other sampling settings."""
        one, other = (self._probe(server, temperature=temperature) for temperature in (1.0, 2.0))
        if not _distance(one, other) <= _SAME_MODEL:
            raise ValueError(
                f"The log-probs of the teacher's server {server.url} change with the sampling temperature: start it with "
                "`--logprobs-mode raw_logprobs`."
            )

    def _probe(self, server: Server, **settings) -> torch.Tensor:
        payload = self._payload(self._probe_ids, **settings)
        answer = self._servers.send(server, "POST", "/v1/completions", payload)
        return self._scores(answer, self._probe_ids, 1)

    def _confirm(self, server: Server):
        try:
            self._compare(server, self._probe(server), TeacherServerError)
        except (AnswerError, RequestRefusedError) as error:
            raise TeacherServerError(f"The teacher's server {server.url} cannot score a probe text: {error}") from error

    def _compare(self, server: Server, scores: torch.Tensor, error: type[Exception]):
        difference = _distance(scores, self._probe_scores)
        if not difference <= _SAME_MODEL:
            raise error(
                f"The teacher's server {server.url} serves another model than was found at the start: its log-probs of a "
                f"probe text differ by {difference:.2g} nats a token from those of {self.name!r}."
            )

    # Scoring

    def start(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> "RemoteScores":
        """Begins to score B completions, each after its prompt (token ids), and comes back at once."""
        return RemoteScores(self, prompts, completions)

    def score(self, prompt: list[int], completion: list[int]) -> tuple[torch.Tensor, Server | None]:
        """Log-probs (len(completion),) in nats, on the CPU, and the server they are from."""
        if not completion:
            return torch.zeros(0), None
        ids = [*prompt, *completion]
        answer, server = self._servers.post("/v1/completions", self._payload(ids))
        return self._scores(answer, ids, len(prompt)), server

    def submit(self, task: Callable, *arguments) -> Future:
        """`task` on one of the threads that wait for the servers."""
        return self._pool.submit(task, *arguments)

    def recheck(self, servers: Iterable[Server]):
        """Raises `TeacherServerError` where one of them has another model by now."""
        for server in servers:
            self._servers.recheck(server)

    def _payload(self, prompt: str | list[int], **settings) -> dict:
        return {"model": self.name, "prompt": prompt, "prompt_logprobs": 0, "max_tokens": 1, **settings}

    def _scores(self, answer: dict, ids: list[int], first: int) -> torch.Tensor:
        """The log-probs of `ids[first:]`. Raises `AnswerError` where `answer` has others, or none."""
        if answer.get("model", self.name) != self.name:
            raise AnswerError(f"an answer of the model {answer['model']!r} instead of {self.name!r}")
        entries = _entries(answer)
        if len(entries) != len(ids):
            raise AnswerError(f"{len(entries)} scores for {len(ids)} tokens")
        values = []
        for place in range(1, len(ids)):
            entry = entries[place]
            if not isinstance(entry, dict) or str(ids[place]) not in entry:
                raise AnswerError(f"token {place} was {ids[place]}, and the answer scores {_keys(entry)}")
            if place >= first:
                values.append(_log_prob(entry[str(ids[place])], place))
        return torch.tensor(values)


class RemoteScores:
    """The scores of a step's rows, on their way. `failed` counts the rows left out so far."""

    def __init__(self, teacher: RemoteTeacher, prompts: Sequence[list[int]], completions: Sequence[list[int]]):
        self._teacher = teacher
        self._lengths = [len(completion) for completion in completions]
        self._asked = sum(length > 0 for length in self._lengths)
        self._lock, self._open = Lock(), len(self._lengths)
        self._servers: set[Server] = set()
        self._reasons: dict[int, str] = {}
        self._settled: dict[int, torch.Tensor] = {}
        self._end = Future()  # of the probe that ends the step
        rows = zip(prompts, completions, strict=True)
        self._futures = [teacher.submit(self._score, row, *texts) for row, texts in enumerate(rows)]

    def __len__(self) -> int:
        return len(self._lengths)

    def row(self, row: int) -> torch.Tensor:
        """
        Log-probs of that completion's tokens, NaN where it could not be scored; waits for them.

        Raises `TeacherServerError` where no server answers, where one has another model by now, and where no row at all
        could be scored.
        """
        if row not in self._settled:
            try:
                self._settled[row] = self._futures[row].result()
                if len(self._settled) == len(self._futures):
                    self._end.result()
            except BaseException:
                for future in self._futures:
                    future.cancel()
                raise
        return self._settled[row]

    def failed(self, row: int) -> bool:
        return row in self._reasons

    def _score(self, row: int, prompt: list[int], completion: list[int]) -> torch.Tensor:
        try:
            scores, server = self._teacher.score(prompt, completion)
        except (AnswerError, RequestRefusedError) as error:
            logger.warning(f"A completion could not be scored by the teacher and takes no part: {error}")
            scores, server = torch.full((len(completion),), float("nan")), None
            self._reasons[row] = str(error)
        with self._lock:
            self._open -= 1
            self._servers |= {server} - {None}
            last = not self._open
        if last:
            self._finish()
        return scores

    def _finish(self):
        try:
            if self._reasons and len(self._reasons) == self._asked:
                raise TeacherServerError(
                    f"None of the {self._asked} completions of this step could be scored by the teacher; the first: "
                    f"{next(iter(self._reasons.values()))}."
                )
            self._teacher.recheck(self._servers)
        except BaseException as error:
            self._end.set_exception(error)
        else:
            self._end.set_result(None)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.clamp(min=_FLOOR) - other.clamp(min=_FLOOR)).abs().mean().item()


def _choice(answer: dict) -> dict:
    choices = answer.get("choices")
    if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
        raise AnswerError("an answer without one choice")
    return choices[0]


def _entries(answer: dict) -> list[dict | None]:
    """What is said of each token of the prompt, by id; nothing of the first."""
    entries = _choice(answer).get("prompt_logprobs")
    if not isinstance(entries, list):
        raise AnswerError("an answer without `prompt_logprobs`")
    return entries


def _keys(entry: object) -> str:
    return ", ".join(map(str, entry)) if isinstance(entry, dict) else repr(entry)


def _log_prob(score: object, place: int) -> float:
    value = score.get("logprob") if isinstance(score, dict) else None
    if not isinstance(value, int | float) or math.isnan(value):
        raise AnswerError(f"token {place} has the log-prob {value}")
    if value > _ROUNDING:
        raise AnswerError(
            f"token {place} has the log-prob {value}, above 0: the server has to run with `--logprobs-mode raw_logprobs`"
        )
    return -math.inf if value <= _ZERO_PROBABILITY else min(float(value), 0.0)
