"""A real vLLM server on the CPU, in an environment of its own, which CTOPD_VLLM names (the `vllm` program in it); skipped
without."""

import os
import socket
import subprocess
import time

import httpx2
import pytest
import torch
from protocol_server import ProtocolServer
from toys import SGD, fix_rollouts, step_of, teacher_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from trl_ctopd.teachers.remote import RemoteTeacher
from trl_ctopd.teachers.servers import Servers


CONTEXT, WAIT = 256, 900  # tokens; seconds for the server to start on a busy machine


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The folder of a small model, and the address that it is served at."""
    program = os.environ.get("CTOPD_VLLM")
    if not program:
        pytest.skip("needs vLLM: CTOPD_VLLM names no `vllm` program")
    folder = tmp_path_factory.mktemp("vllm") / "teacher"
    torch.manual_seed(1)
    tokenizer = teacher_tokenizer()
    shape = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }  # heads of 64
    config = LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, max_position_embeddings=512, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        program,
        "serve",
        str(folder),
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        str(CONTEXT),
    ]
    settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    log = folder.parent / "log.txt"
    server = subprocess.Popen(
        [*command, "--enforce-eager"],
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
        yield folder, url
    finally:
        server.terminate()
        server.wait(60)


def _is_up(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.TransportError:
        return False


def test_vllms_log_probs_are_transformers_own(served):
    folder, url = served
    teacher = RemoteTeacher(Servers([url]))
    teacher.check(teacher_tokenizer())
    assert (teacher.root, teacher.context) == (str(folder), CONTEXT - 1)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encode = lambda text: teacher_tokenizer().encode(text, add_special_tokens=False)  # noqa: E731
    prompts = [encode(f"What is {n} plus two?") for n in range(16)]
    completions = [encode(f"{n} and two is the sum" + " of what" * n) for n in range(16)]
    scores = teacher.start(prompts, completions)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        right = logits.double().log_softmax(-1)[range(len(completion)), completion]
        torch.testing.assert_close(scores.row(row).double(), right, rtol=1e-5, atol=1e-5)


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
            answer = httpx2.post(f"{address}/v1/completions", json=payload, timeout=60).json()
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
