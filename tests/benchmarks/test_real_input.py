"""`examples/distill.py` with published tokenizers and templates over their full vocabularies; see benchmarks/real_input.py."""

import json
import runpy
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow  # half a minute: random models with 128 and 152 thousand rows
real_input = runpy.run_module("benchmarks.real_input")


@pytest.fixture(scope="module")
def folder(assets, tmp_path_factory) -> Path:
    """A random Llama-3.2 student and Qwen2.5 teacher, and a few GSM8K questions."""
    folder = tmp_path_factory.mktemp("real_input")
    for name in ("llama-3.2", "qwen2.5"):
        real_input["build_model"](name, assets, folder)
    with open(assets / "datasets" / "gsm8k" / "train.jsonl") as rows:
        (folder / "questions.jsonl").write_text("".join(next(rows) for _ in range(8)))
    return folder


def test_the_script_distils_qwen_into_llama_over_their_full_vocabularies(folder):
    small = {"per_device_train_batch_size": 2, "max_new_tokens": 24}
    run = real_input["distill"]("llama-3.2", "qwen2.5", folder, folder / "questions.jsonl", steps=2, **small)
    assert len(run["log"]) == 2
    figures = real_input["means"](run["log"])
    assert 0.5 < figures["alignment/one_to_one_fraction"] < 1  # of random tokens of all scripts
    assert figures["alignment/masked_fraction"] < 0.1
    assert all(0 < entry["grad_norm"] < 100 for entry in run["log"])
    adapter = json.loads((folder / "output" / "adapter_config.json").read_text())
    assert adapter["r"] == 8


def test_what_the_random_student_writes_is_the_same_bytes_on_both_sides(folder, assets):
    questions = [json.loads(line)["question"] for line in (folder / "questions.jsonl").read_text().splitlines()]
    completions = real_input["sample"]("llama-3.2", folder, questions[:4], max_new_tokens=16)
    tokenizers = [real_input["AutoTokenizer"].from_pretrained(folder / name) for name in ("llama-3.2", "qwen2.5")]
    stop_ids = real_input["MODELS"]["llama-3.2"][2]
    tables = [real_input["token_bytes"](tokenizer) for tokenizer in tokenizers]
    for rollout in real_input["Pair"](*tokenizers).rollouts(completions, stop_ids):
        assert rollout.num_chunks == len(rollout.alignment.chunk_bytes) + rollout.ended
        for chunk, data in enumerate(rollout.alignment.chunk_bytes):
            for ids, chunks, table in (
                (rollout.student_ids, rollout.student_chunks, tables[0]),
                (rollout.teacher_ids, rollout.teacher_chunks, tables[1]),
            ):
                assert b"".join(table[i] for i, own in zip(ids, chunks, strict=True) if own == chunk) == data
