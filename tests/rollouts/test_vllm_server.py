"""A real vLLM server on the CPU, in an environment of its own, which CTOPD_VLLM names (the `vllm` program in it); skipped
without."""

import contextlib
import os
import socket
import subprocess
import time

import httpx2
import needs
import pytest
import torch
from accelerate import Accelerator
from protocol_server import ProtocolServer
from toys import SGD, fix_rollouts, step_of, teacher_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from trl_ctopd.teachers.local import LocalTeacher
from trl_ctopd.teachers.remote import RemoteTeacher
from trl_ctopd.teachers.servers import Servers


CONTEXT, WAIT = 256, 900  # tokens; seconds for the server to start on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model, with padded rows past its tokenizer, as published models have."""
    needs.vllm()
    folder = tmp_path_factory.mktemp("vllm") / "teacher"
    torch.manual_seed(1)
    tokenizer = teacher_tokenizer()
    shape = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # heads of 64
    config = LlamaConfig(vocab_size=len(tokenizer) + 11, initializer_range=0.2, max_position_embeddings=512, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def vllm(folder, *settings: str):
    """The address that vLLM serves the model of `folder` at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [os.environ["CTOPD_VLLM"], "serve", str(folder), "--port", str(port), "--max-model-len", str(CONTEXT)]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | quiet
    log = folder.parent / "log.txt"
    server = subprocess.Popen(
        [*command, "--enforce-eager", *settings],
        env=environment,
        cwd=folder.parent,
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
    )
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + WAIT
    try:
        while not _is_up(url):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def served(folder):
    """The folder, and the address that it is served at in float32."""
    with vllm(folder, "--dtype", "float32") as url:
        yield folder, url


def _is_up(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.TransportError:
        return False


def texts() -> tuple[list[list[int]], list[list[int]]]:
    encode = lambda text: teacher_tokenizer().encode(text, add_special_tokens=False)  # noqa: E731
    return (
        [encode(f"What is {n} plus two?") for n in range(16)],
        [encode(f"{n} and two is the sum" + " of what" * n) for n in range(16)],
    )


def remote(url: str) -> torch.Tensor:
    """Log-probs of all tokens of the completions of `texts`."""
    teacher = RemoteTeacher(Servers([url]))
    teacher.check(teacher_tokenizer())
    scores = teacher.start(*texts())
    return torch.cat([scores.row(row) for row in range(len(scores))]).double()


def local(folder, dtype: torch.dtype) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return torch.cat(LocalTeacher(model, Accelerator(cpu=True)).log_probs(*texts())).double()


def test_vllms_log_probs_are_transformers_own(served):
    folder, url = served
    teacher = RemoteTeacher(Servers([url]))
    assert (teacher.root, teacher.context) == (str(folder), CONTEXT - 1)
    torch.testing.assert_close(remote(url), local(folder, torch.float32), rtol=1e-5, atol=1e-5)


def test_in_bf16_vllm_is_as_near_to_the_model_as_transformers_is(folder):
    """Two programs round at other places: what they agree on is bounded by what rounding does to either."""
    with vllm(folder, "--dtype", "bfloat16") as url:
        found = remote(url)
    exact, rounded = local(folder, torch.float32), local(folder, torch.bfloat16)
    noise = (rounded - exact).abs().mean()
    assert (found - exact).abs().mean() < 1.5 * noise
    assert (found - rounded).abs().mean() < 2 * noise
    assert (found - exact).mean().abs() < 5 * noise / len(found) ** 0.5, "no side is favoured"


def test_a_vllm_that_tells_logits_is_refused(folder):
    refused = pytest.raises(
        ValueError, match="above 0: the server has to score with raw log-probs .*--logprobs-mode raw_logprobs"
    )
    with vllm(folder, "--dtype", "float32", "--logprobs-mode", "raw_logits") as url, refused:
        remote(url)


def test_the_protocol_server_of_these_tests_answers_as_vllm_does(served):
    folder, url = served
    ids = teacher_tokenizer().encode("What is two plus three?")
    answers = []
    with ProtocolServer(AutoModelForCausalLM.from_pretrained(folder), teacher_tokenizer(), name=str(folder)) as other:
        for address in (url, other.url):
            payload = {
                "model": str(folder),
                "prompt": ids,
                "prompt_logprobs": 0,
                "max_tokens": 1,
                "return_token_ids": True,
            }
            answer = httpx2.post(f"{address}/v1/completions", json=payload, timeout=600).json()
            [choice] = answer["choices"]
            answers.append(
                (answer["model"], choice["prompt_token_ids"], [list(e or []) for e in choice["prompt_logprobs"]])
            )
    assert answers[0] == answers[1]


def test_training_with_vllms_log_probs_is_training_with_the_teacher_here(served, build):
    folder, url = served
    steps = []
    for teacher in (url, AutoModelForCausalLM.from_pretrained(folder)):
        steps.append(step_of(fix_rollouts(build(teacher=teacher, **{**SGD, "max_steps": 2}))))
    assert steps[1].abs().max() > 1e-3
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=1e-5)
