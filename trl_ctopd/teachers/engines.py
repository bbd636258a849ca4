"""How each kind of server is asked for the log-probs of a text, how its answer is read, and how its kind is found.

| kind | request | scores |
|---|---|---|
| vLLM | `POST /v1/completions` with `prompt_logprobs` | `choices[0].prompt_logprobs`: for each token, by id |
| SGLang | `POST /generate` with `input_ids`, `return_logprob`, `logprob_start_len` 0, `max_new_tokens` 0 | `meta_info.input_token_logprobs`: [log-prob, id, text] |
| echo | `POST /v1/completions` with `echo` and `logprobs`, as Fireworks has it | `choices[0].logprobs`: `token_ids`, `token_logprobs` |

The kind is found by requesting the scores of a few tokens in each of these ways. An answer is read into one dict for each
token, of log-probs by id. The first token has none. A request may also ask for the k most likely tokens at each place. vLLM
returns them in the same field, SGLang in `meta_info.input_top_logprobs` (`top_logprobs_num` in the request). `echo` returns
their texts, not their ids.

Left out: servers that score only what they generate.
"""

from collections.abc import Sequence

from .answers import AnswerError
from .servers import FailedTryError, RequestRefusedError, Server, Servers


_NO_SUCH_WAY = (404, 405, 501)
Entry = dict[int, object]
_UNCUT = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
_UNABLE = {  # by `owned_by` in `GET /v1/models`
    "llamacpp": "llama.cpp's server",
    "lmdeploy": "LMDeploy",
    "tensorrt_llm": "TensorRT-LLM over HTTP",
    "library": "Ollama",
}


class VLLM:
    """https://docs.vllm.ai, OpenAI-compatible server, extra parameters of completions."""

    name = "vLLM's completions (`prompt_logprobs`)"
    path = "/v1/completions"
    names_model = True  # whether each answer names the model
    adds_special_tokens = False  # to a text that it reads
    tells_likeliest = True

    def request(self, model: str, prompt: str | list[int], temperature: float = 1.0, likeliest: int = 0) -> dict:
        # no scores of further tokens: vLLM 0.32 exits when it has to name a row past the tokenizer
        own = {"prompt_logprobs": likeliest, "max_tokens": 1, "temperature": temperature}
        payload = {"model": model, "prompt": prompt, **own}
        return (
            payload if isinstance(prompt, list) else {**payload, "add_special_tokens": False, "return_token_ids": True}
        )

    def entries(self, answer: dict) -> list[Entry | None]:
        found = _choice(answer).get("prompt_logprobs")
        if not isinstance(found, list):
            raise AnswerError("an answer without `prompt_logprobs`")
        return [_by_id(entry) if isinstance(entry, dict) else None for entry in found]

    def ids(self, answer: dict, expected: Sequence[int]) -> list[int]:
        """The token ids that the server read."""
        read = _choice(answer).get("prompt_token_ids")
        if read is not None:
            return read
        # an older server: the first token has no score, so its id is not sent
        return [*expected[:1], *(token for entry in self.entries(answer)[1:] for token in entry or {})]

    def drawing(self, model: str, prompt: list[int], count: int) -> dict:
        # without a seed: vLLM 0.32 on a CPU exits when it gets one
        own = {"n": count, "max_tokens": 1, "return_token_ids": True, "prompt_logprobs": None}
        return {"model": model, "prompt": prompt, **own, **_UNCUT}

    def drawn(self, answer: dict) -> list[int] | None:
        """The new token of each choice; None where the answer has no ids."""
        choices = answer.get("choices")
        if not (isinstance(choices, list) and choices and all(isinstance(choice, dict) for choice in choices)):
            raise AnswerError("an answer without choices")
        return _firsts([choice.get("token_ids") for choice in choices])


class SGLang:
    """https://docs.sglang.io, native API, `/generate`."""

    name = "SGLang's `/generate`"
    path = "/generate"
    names_model = False
    adds_special_tokens = True
    tells_likeliest = True

    def request(self, model: str, prompt: str | list[int], temperature: float = 1.0, likeliest: int = 0) -> dict:
        return {
            **({"top_logprobs_num": likeliest} if likeliest else {}),
            "text" if isinstance(prompt, str) else "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 0, "temperature": temperature},
            "return_logprob": True,
            "logprob_start_len": 0,
        }

    def entries(self, answer: dict) -> list[Entry | None]:
        meta = answer.get("meta_info")
        found = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
        if not isinstance(found, list) or not all(isinstance(one, list) and len(one) >= 2 for one in found):
            raise AnswerError("an answer without `meta_info.input_token_logprobs`")
        entries = [{own[1]: own[0]} for own in found[1:]]
        likeliest = meta.get("input_top_logprobs")
        for entry, others in zip(entries, (likeliest or [])[1:], strict=False):
            entry.update({one[1]: one[0] for one in others or []})
        return [None, *entries]

    def ids(self, answer: dict, expected: Sequence[int]) -> list[int]:
        self.entries(answer)
        return [one[1] for one in answer["meta_info"]["input_token_logprobs"]]

    def drawing(self, model: str, prompt: list[int], count: int) -> dict:
        return {
            "input_ids": prompt,
            "sampling_params": {"n": count, "max_new_tokens": 1, "ignore_eos": True, **_UNCUT},
            "return_logprob": True,
        }

    def drawn(self, answer: dict | list) -> list[int] | None:
        answers = answer if isinstance(answer, list) else [answer]
        if not all(isinstance(one, dict) and isinstance(one.get("meta_info"), dict) for one in answers):
            raise AnswerError("an answer without `meta_info`")
        found = [one["meta_info"].get("output_token_logprobs") for one in answers]
        return _firsts([[one[1] for one in own] if own else None for own in found])


class Echo:
    """https://docs.fireworks.ai, completions, `echo` with `logprobs` and `token_ids`."""

    name = "completions with `echo` and `logprobs`, as Fireworks has them"
    path = "/v1/completions"
    names_model = True
    adds_special_tokens = True
    tells_likeliest = False

    def request(self, model: str, prompt: str | list[int], temperature: float = 1.0, likeliest: int = 0) -> dict:
        own = {"echo": True, "logprobs": 1, "max_tokens": 0, "temperature": temperature}
        return {"model": model, "prompt": prompt, **own}

    def entries(self, answer: dict) -> list[Entry | None]:
        scores = _choice(answer).get("logprobs")
        scores = scores if isinstance(scores, dict) else {}
        ids, values = scores.get("token_ids"), scores.get("token_logprobs")
        if not (isinstance(ids, list) and isinstance(values, list) and len(ids) == len(values)):
            raise AnswerError("an answer without `logprobs.token_ids` and `logprobs.token_logprobs`")
        return [None, *({token: value} for token, value in zip(ids[1:], values[1:], strict=True))]

    def ids(self, answer: dict, expected: Sequence[int]) -> list[int]:
        self.entries(answer)
        return _choice(answer)["logprobs"]["token_ids"]

    def drawing(self, model: str, prompt: list[int], count: int) -> dict:
        return {"model": model, "prompt": prompt, "n": count, "max_tokens": 1, "logprobs": 1, **_UNCUT, "top_k": 0}

    def drawn(self, answer: dict) -> list[int] | None:
        choices = answer.get("choices")
        if not (isinstance(choices, list) and choices and all(isinstance(choice, dict) for choice in choices)):
            raise AnswerError("an answer without choices")
        return _firsts([(choice.get("logprobs") or {}).get("token_ids") for choice in choices])


Engine = VLLM | SGLang | Echo
ENGINES: tuple[Engine, ...] = (VLLM(), SGLang(), Echo())


def find_engine(servers: Servers, server: Server, model: str, owner: object) -> Engine:
    """
    The kind of `server`, by the scores that it returns for a few tokens. `owner`: its `owned_by`.

    Raises `ValueError` where no kind works, so that it cannot be a teacher.
    """
    reasons, ids = [], list(range(10, 18))  # ids that every vocabulary has
    for engine in ENGINES if owner not in _UNABLE else ():
        try:
            answer = servers.send(server, "POST", engine.path, engine.request(model, ids))
            entries = engine.entries(answer)
        except FailedTryError as error:
            if error.status not in _NO_SUCH_WAY:
                raise
            reasons.append(f"{engine.name}: {error}")
            continue
        except (AnswerError, RequestRefusedError) as error:
            reasons.append(f"{engine.name}: {error}")
            continue
        if len(entries) == len(ids):
            return engine
        reasons.append(f"{engine.name}: {len(entries)} scores for {len(ids)} tokens")
    named = _UNABLE.get(owner) or ("Ollama" if _is_ollama(servers, server) else "none of these kinds")
    raise ValueError(
        f"The teacher's server {server.url} cannot score a text: it is {named}. What can: vLLM (`vllm serve`), SGLang "
        "(`python -m sglang.launch_server`), and completions with `echo` and `logprobs.token_ids`, as Fireworks has them. "
        "llama.cpp's server, Ollama, LMDeploy, mlx-lm, TensorRT-LLM over HTTP and `transformers serve` score only what they "
        f"write: serve the model with one of the others, or load it in this process (a GGUF file too). {'; '.join(reasons)}"
    )


def _is_ollama(servers: Servers, server: Server) -> bool:
    try:
        return isinstance(servers.send(server, "GET", "/api/version").get("version"), str)
    except (RequestRefusedError, FailedTryError):
        return False


def _choice(answer: dict) -> dict:
    """The only choice of an answer."""
    choices = answer.get("choices")
    if not (isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict)):
        raise AnswerError("an answer without one choice")
    return choices[0]


def _by_id(entry: dict) -> Entry:
    return {
        int(token): score.get("logprob") if isinstance(score, dict) else score
        for token, score in entry.items()
        if token.isdecimal()
    }


def _firsts(ids: list[list[int] | None]) -> list[int] | None:
    return [own[0] for own in ids] if all(isinstance(own, list) and own for own in ids) else None
