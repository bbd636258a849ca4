"""A teacher behind a server: token ids go out, log-probs of those tokens come back. engines.py knows each kind of server.

Decisions
- One request for each completion, many in flight. The server is asked only for the log-probs of the tokens it was sent, for
  those of the most likely tokens where the loss reads them (`ask_likeliest`), and to generate one token or none. Results come
  in the order of the rows.
- A text that is known before the others of its step can be asked for at once (`Foreseen`). When the step is scored, its answer counts as
  any other.
- Everything is checked. At the start: the server has one model of that name; it reads a probe text as the same token ids as the
  tokenizer, special tokens included, up to the tokenizer's highest id; its log-probs are at most 0, the same at any sampling
  temperature, and agree with how often it samples tokens. In each answer: the model's name, the length, the ids sent, log-probs
  of at most 0.
- An answer that fails its check, or a request that the server refuses, costs only its row: the row becomes NaN, takes no part,
  and is counted. If no row of a step can be scored, or of several small steps, that is an error.
- Each step ends with the probe, at every server that answered. A server that has another model by then is an error before that
  step's update. A server that was down has to pass the probe before it gets work again.
- A zero probability is -inf (vLLM sends -9999), and its chunk is neutralised, as with a teacher in this process.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from threading import Lock

import torch
from transformers import PreTrainedTokenizerBase

from ..rollouts.waiting import result_of
from . import answers
from .answers import AnswerError
from .engines import find_engine
from .servers import RequestRefusedError, Server, Servers, TeacherServerError, logger
from .transport import DaemonPool


PROBE = (
    "The quick brown fox, 1234.5 times: «où est l'élève ?» Съешь ещё. 敏捷的棕色狐狸。\n\tdef f(x): return x ** 2  # 🙂"
)
_SAME_MODEL = 0.2  # nats a token, mean over the probe; half precision differs by less
COUNT = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17,"  # the next token is nearly certain
_DRAWS = (16, 64)  # number of sampled tokens that are scored, and that are counted
Likeliest = (
    tuple[torch.Tensor, torch.Tensor] | None
)  # (T, k) ids and log-probs of the k most likely tokens at each place
_SYSTEMATIC = 8  # so many completions in a row without a score are not the fault of their texts


class RemoteTeacher:
    """
    A teacher that servers score for.

    Args:
        servers (`Servers`): the servers that have it.
        model (`str`, *optional*): its name there, or the name or folder it was loaded from. Needed where a server has
            several models.
        unlisted (`bool`): accept the name even if the server does not list it.

    Attributes: `name` and `root`, the model's name at the servers and what they loaded it from; `context`, the tokens of prompt
    and completion that they accept.

    Raises:
        ValueError: a server has several models and none of that name, or another model than the other servers.
        TeacherServerError: no server answers.
    """

    signals = ("logprobs", "likeliest")

    def __init__(self, servers: Servers, model: str | None = None, unlisted: bool = False):
        self._servers = servers
        self._pool = DaemonPool(servers.concurrency, "teacher")
        self._probe_ids: list[int] = []
        self._probe_scores: torch.Tensor | None = None
        self._unscored = 0  # completions since the last step in which one was scored
        self._likeliest: int | None = None  # how many of the most likely tokens are requested; None: no loss reads them
        self._named, self._wanted, self._unlisted = "", model, unlisted
        self.name, self.root, self.context = "", "", None
        servers.each(self._meet)

    # At the start

    def _meet(self, server: Server):
        """Finds `server`'s name for the model, what it loaded it from, its context, and its kind."""
        entry = self._entry(server)
        if self.name not in ("", entry["id"]):
            raise ValueError(
                f"The teacher's server {server.url} serves {entry['id']!r}, and another one serves {self.name!r}: all "
                "addresses must be those of one model."
            )
        self.name, self.root = entry["id"], entry.get("root") or entry["id"]
        length = entry.get("max_model_len") or entry.get("context_length")
        if isinstance(length, int):
            room = length - 1  # the server may generate one token
            self.context = room if self.context is None else min(room, self.context)
        server.engine = find_engine(self._servers, server, self.name, entry.get("owned_by"))
        logger.info(f"The teacher's server {server.url} is asked for scores by {server.engine.name}.")

    def _entry(self, server: Server) -> dict:
        """The server's entry for the model."""
        found, wanted = self._servers.send(server, "GET", "/v1/models").get("data"), self._wanted
        models = {
            entry["id"]: entry for entry in found or [] if isinstance(entry, dict) and isinstance(entry.get("id"), str)
        }
        same_root = [entry for entry in models.values() if entry.get("root") == wanted]
        fits = [models[wanted]] if wanted in models else same_root or list(models.values())
        if self._unlisted and wanted not in models and not same_root:
            return {"id": wanted}
        if len(fits) != 1:
            raise ValueError(
                f"The teacher's server {server.url} serves {', '.join(map(repr, models)) or 'no model'}: name one of them "
                "with `teacher_model_name_or_path`, beside `teacher_server_url`, or with `teacher_server_model`, where the "
                "tokenizer has another name."
            )
        return fits[0]

    def check(self, tokenizer: PreTrainedTokenizerBase):
        """
        Compares every server that is up with `tokenizer`, and all of them with each other.

        Raises `ValueError` for token ids that differ, for scores that are not raw log-probs, and for servers with different
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
                self._check_ids(server, tokenizer, text)
                self._check_scores(server)
                self._check_draws(server, tokenizer.encode(COUNT, add_special_tokens=False))
                scores = self._probe(server)
            except (AnswerError, RequestRefusedError) as error:
                raise ValueError(f"The teacher's server {server.url} cannot score a probe text: {error}") from error
            if self._probe_scores is None:
                self._probe_scores = scores
            self._compare(server, scores, ValueError)

        self._servers.each(check)
        self._servers.confirm = self._confirm

    def ask_likeliest(self, count: int):
        """
        Makes requests also ask for the `count` most likely tokens at each place.

        Raises `ValueError` where a server does not return them.
        """
        self._likeliest = count

        def check(server: Server):
            if not count:
                return
            way = (
                "Lower the loss's `top_k` (0: log-probs of the text alone), or start vLLM with `--max-logprobs` as high"
            )
            if not server.engine.tells_likeliest:
                raise ValueError(
                    f"The teacher's server {server.url} is asked by {server.engine.name}, which does not return the ids of the "
                    f"{count} most likely tokens. {way}."
                )
            try:
                path, payload = self._request(server, self._probe_ids, likeliest=count)
                answer = self._servers.send(server, "POST", path, payload)
                answers.likeliest(server.engine.entries(answer), 1, count)
            except (AnswerError, RequestRefusedError) as error:
                raise ValueError(
                    f"The teacher's server {server.url} does not return the {count} most likely tokens: {error}. {way}."
                ) from error

        self._servers.each(check)

    def ask_closings(self, count: int):
        """As `ask_likeliest`, for how the teacher leaves the student's tokens closed. Where a server does not return as many, a warning
        says that nothing is known of it."""
        before = self._likeliest
        try:
            self.ask_likeliest(max(count, before or 0))
        except ValueError as error:
            self._likeliest = before
            logger.warning(
                f"{error} Closed chunks then do not know how likely the teacher is to go on where the student's token ends. Where student "
                "tokens hold several of the teacher's (a newline with the indentation after it), what is learned there is biased."
            )

    def _check_ids(self, server: Server, tokenizer, text: str):
        engine = server.engine
        expected = tokenizer.encode(text, add_special_tokens=engine.adds_special_tokens)
        answer = self._servers.send(server, "POST", engine.path, engine.request(self.name, text))
        found = engine.ids(answer, expected)
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
        """Only log-probs are never above 0, and only raw ones stay the same under other sampling settings."""
        one, other = (self._probe(server, temperature=temperature) for temperature in (1.0, 2.0))
        if not answers.distance(one, other) <= _SAME_MODEL:
            raise ValueError(
                f"The log-probs of the teacher's server {server.url} change with the sampling temperature: start it with "
                "`--logprobs-mode raw_logprobs` (vLLM)."
            )

    def _check_draws(self, server: Server, prompt: list[int]):
        """
        Compares the tokens that the server samples after `prompt` with its scores. A few are scored; the others must be among
        those as often as the scores say. So the server samples from what it scores with, and that sums to 1.
        """
        engine = server.engine
        payload = engine.drawing(self.name, prompt, sum(_DRAWS))
        ids = engine.drawn(self._servers.send(server, "POST", engine.path, payload, kind=dict | list))
        if ids is None or len(ids) != sum(_DRAWS):
            logger.warning(
                f"The teacher's server {server.url} does not return the ids of tokens that it samples. Whether they come as often "
                "as its log-probs say is not checked."
            )
            return
        named = {token for token in ids[: _DRAWS[0]] if token <= self._probe_ids[-1]}
        sums = self._pool.map(lambda token: self._read(server, [*prompt, token], len(prompt)).exp().sum().item(), named)
        probability, hits = sum(sums), sum(token in named for token in ids[_DRAWS[0] :])
        if not answers.agree(hits, _DRAWS[1], probability):
            raise ValueError(
                f"The scores of the teacher's server {server.url} do not agree with what it samples: by them, about "
                f"{_DRAWS[1] * probability:.3g} of {_DRAWS[1]} sampled tokens should be among those scored, and {hits} are. "
                "Start it with `--logprobs-mode raw_logprobs`."
            )

    def _probe(self, server: Server, **settings) -> torch.Tensor:
        return self._read(server, self._probe_ids, 1, **settings)

    def _read(self, server: Server, ids: list[int], first: int, **settings) -> torch.Tensor:
        """The log-probs of `ids[first:]`, from a single request."""
        answer = self._servers.send(server, "POST", *self._request(server, ids, **settings))
        return self._scores(server, answer, ids, first)

    def _confirm(self, server: Server):
        try:
            if server.engine is None:
                self._meet(server)
            elif not server.engine.names_model:
                self._entry(server)
            self._compare(server, self._probe(server), TeacherServerError)
        except ValueError as error:
            raise TeacherServerError(str(error)) from error
        except (AnswerError, RequestRefusedError) as error:
            raise TeacherServerError(f"The teacher's server {server.url} cannot score a probe text: {error}") from error

    def _compare(self, server: Server, scores: torch.Tensor, error: type[Exception]):
        difference = answers.distance(scores, self._probe_scores)
        if not difference <= _SAME_MODEL:
            raise error(
                f"The teacher's server {server.url} serves another model than at the start: its log-probs of a probe text differ "
                f"by {difference:.2g} nats a token from those of {self.name!r}."
            )

    # Scoring

    def start(
        self,
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
        other_ends: Sequence[Sequence[int]] | None = None,
        foreseen: "Foreseen | None" = None,
    ) -> "RemoteScores":
        """Begins to score B completions, each after its prompt (token ids), and returns at once. `other_ends` as for
        `LocalTeacher.log_probs`; each costs a request. `foreseen`: those that were begun before."""
        foreseen = self.foresee() if foreseen is None else foreseen
        return RemoteScores(self, prompts, completions, other_ends or [()] * len(prompts), foreseen)

    def foresee(self) -> "Foreseen":
        """A step begins, of which texts may be known before the others."""
        self._servers.begin()
        return Foreseen(self)

    def score_text(
        self, prompt: list[int], completion: list[int], other_ends: Sequence[int] = ()
    ) -> tuple[torch.Tensor, Likeliest, set[Server]]:
        """As `score`, where the last token may also be any of `other_ends`, with all servers that had part in it."""
        scores, likeliest, *servers = self.score(prompt, completion)
        for token in other_ends:
            other, _, server = self.score([*prompt, *completion[:-1]], [token])
            scores[-1:] = torch.logaddexp(scores[-1:], other)
            servers.append(server)
        return scores, likeliest, {*servers} - {None}

    def score(self, prompt: list[int], completion: list[int]) -> tuple[torch.Tensor, Likeliest, Server | None]:
        """Log-probs (len(completion),) in nats on the CPU; ids and log-probs (T, count) of the most likely tokens at each place,
        if requested; and the server that computed them."""
        count = self._likeliest
        if not completion:
            return torch.zeros(0), self.no_likeliest(0), None
        ids = [*prompt, *completion]
        answer, server = self._servers.post(lambda server: self._request(server, ids, likeliest=count or 0))
        scores = self._scores(server, answer, ids, len(prompt))
        found = answers.likeliest(server.engine.entries(answer), len(prompt), count) if count else None
        return scores, found or self.no_likeliest(len(completion)), server

    def no_likeliest(self, tokens: int) -> Likeliest:
        """A placeholder for tokens that the server did not return; None where they are not requested."""
        if self._likeliest is None:
            return None
        shape = tokens, self._likeliest
        return torch.zeros(shape, dtype=torch.long), torch.full(shape, -torch.inf)

    def submit(self, task: Callable, *arguments) -> Future:
        """Runs `task` on one of the threads that wait for the servers."""
        return self._pool.submit(task, *arguments)

    def end_step(self, servers: Iterable[Server], asked: int, reasons: Sequence[str]):
        """
        Ends a step in which `servers` have scored all of the `asked` completions but those with a reason in `reasons`.

        Raises `TeacherServerError` where a server has another model by now, and where so many completions in a row were not
        scored that their texts cannot be the reason.
        """
        if reasons and len(reasons) == asked:
            self._unscored += asked
            if self._unscored >= _SYSTEMATIC:
                raise TeacherServerError(
                    f"None of the last {self._unscored} completions could be scored by the teacher; the last: {reasons[-1]}."
                )
            servers = self._servers.servers
        elif asked:
            self._unscored = 0
        for server in servers:
            self._servers.recheck(server)

    def _request(self, server: Server, prompt: list[int], **settings) -> tuple[str, dict]:
        return server.engine.path, server.engine.request(self.name, prompt, **settings)

    def _scores(self, server: Server, answer: dict, ids: list[int], first: int) -> torch.Tensor:
        """The log-probs of `ids[first:]`. Raises `AnswerError` where `answer` does not hold them."""
        named = answer.get("model", self.name)
        self._named = self._named or named  # a service may answer with a longer name than the one in the request
        if server.engine.names_model and named != self._named:
            raise AnswerError(f"an answer of the model {named!r} instead of {self._named!r}")
        return answers.scores(server.engine.entries(answer), ids, first)


class Foreseen:
    """Texts of a step that a teacher was asked for before all of them were known."""

    def __init__(self, teacher: RemoteTeacher):
        self._teacher = teacher
        self._futures: dict[tuple, list[Future]] = defaultdict(list)

    def add(self, *text: Sequence[int]):
        """Begins to score a text: the arguments of `RemoteTeacher.score_text`."""
        self._futures[_key(text)].append(self._teacher.submit(self._teacher.score_text, *text))

    def take(self, *text: Sequence[int]) -> Future | None:
        """The scores of this text, once for each time that it was added."""
        futures = self._futures[_key(text)]
        return futures.pop() if futures else None

    def close(self):
        """What has not been taken is not wanted."""
        for futures in self._futures.values():
            for future in futures:
                future.cancel()


def _key(text: tuple[Sequence[int], ...]) -> tuple:
    return tuple(map(tuple, text))


class RemoteScores:
    """The scores of a step's rows, which may still be on their way."""

    def __init__(
        self,
        teacher: RemoteTeacher,
        prompts: Sequence[list[int]],
        completions: Sequence[list[int]],
        other_ends: Sequence[Sequence[int]],
        foreseen: Foreseen,
    ):
        self._teacher = teacher
        self._lengths = [len(completion) for completion in completions]
        self._asked = sum(length > 0 for length in self._lengths)
        self._lock, self._open = Lock(), len(self._lengths)
        self._servers: set[Server] = set()
        self._reasons: dict[int, str] = {}
        self._settled: dict[int, tuple[torch.Tensor, Likeliest]] = {}
        self._end = Future()  # of the probe at the end of the step
        texts = list(zip(prompts, completions, other_ends, strict=True))
        # those that were foreseen come first in the threads' queue, so that none of these waits for one behind it
        self._futures = [teacher.submit(self._score, row, *own, foreseen.take(*own)) for row, own in enumerate(texts)]
        foreseen.close()

    def __len__(self) -> int:
        return len(self._lengths)

    def row(self, row: int) -> torch.Tensor:
        """
        Waits for the log-probs of that completion's tokens; NaN where it could not be scored.

        Raises `TeacherServerError` where no server answers, and the errors of `RemoteTeacher.end_step`.
        """
        return self._wait(row)[0]

    def likeliest(self, row: int) -> Likeliest:
        """Waits for the ids and log-probs (T, k) of the most likely tokens at each place of that completion, if requested."""
        return self._wait(row)[1]

    def _wait(self, row: int) -> tuple[torch.Tensor, Likeliest]:
        if row not in self._settled:
            try:
                self._settled[row] = result_of(self._futures[row])
                if len(self._settled) == len(self._futures):
                    result_of(self._end)
            except BaseException:
                for future in self._futures:
                    future.cancel()
                raise
        return self._settled[row]

    def failed(self, row: int) -> bool:
        return row in self._reasons

    def _score(
        self,
        row: int,
        prompt: list[int],
        completion: list[int],
        other_ends: Sequence[int],
        foreseen: Future | None,
    ) -> tuple[torch.Tensor, Likeliest]:
        try:
            if foreseen is None:
                scores, likeliest, servers = self._teacher.score_text(prompt, completion, other_ends)
            else:
                scores, likeliest, servers = foreseen.result()
        except (AnswerError, RequestRefusedError) as error:
            logger.warning(f"A completion could not be scored by the teacher and takes no part: {error}")
            scores, servers = torch.full((len(completion),), float("nan")), set()
            likeliest = self._teacher.no_likeliest(len(completion))
            self._reasons[row] = str(error)
        with self._lock:
            self._open -= 1
            self._servers |= servers
            last = not self._open
        if last:
            self._finish()
        return scores, likeliest

    def _finish(self):
        try:
            self._teacher.end_step(self._servers, self._asked, list(self._reasons.values()))
        except BaseException as error:
            self._end.set_exception(error)
        else:
            self._end.set_result(None)
