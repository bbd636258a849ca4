"""
Real input through the real script: `examples/distill.py` with published tokenizers and chat templates on GSM8K questions.

    CTOPD_ASSETS=<folder> python benchmarks/real_input.py

The folder holds `tokenizers/<name>` as published on the hub and `datasets/gsm8k/{train,test}.jsonl`. Each run is a process
of its own; figures go to `benchmarks/results/real_input.json`.

Decisions:
- Models have random weights and two narrow layers, but every row of the real vocabulary. So the student writes random
  tokens, half characters included: the hardest text for the alignment, and no statement about learning.
- A random student would never end its turn, so a bias at sampling makes the end as likely as 2 % a token. It is not part of
  the scored distribution, which does not matter to what is measured here.
- How the two tokenizers meet on sensible text is measured apart, on GSM8K's reference answers.
- Peak memory is that of the whole process: Python, torch, two models, dataset.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from itertools import groupby
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config, set_seed

from trl_ctopd import TextAligner, TextAlignment, token_bytes


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "real_input.json"
PAIRS = (("llama-3.2", "qwen2.5"), ("qwen2.5", "llama-3.2"), ("mistral-v3", "deepseek-v3"))
MODELS = {  # architecture, rows of the published embedding, stop ids of the published generation config
    "llama-3.2": (LlamaConfig, 128256, [128001, 128008, 128009]),
    "qwen2.5": (Qwen2Config, 151936, [151645, 151643]),
    "mistral-v3": (MistralConfig, 32768, 2),
    "deepseek-v3": (LlamaConfig, 129280, 1),
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
STOP_PROBABILITY = 0.02
MEANS = (
    "alignment/one_to_one_fraction",
    "alignment/masked_fraction",
    "alignment/neutralised_fraction",
    "alignment/student_tokens_per_chunk",
    "alignment/teacher_tokens_per_chunk",
    "completions/truncated_fraction",
    "completions/empty_fraction",
    "completions/mean_length",
    "seconds/generation",
    "seconds/alignment",
    "seconds/teacher",
    "seconds/student",
)


@dataclass(frozen=True)
class Overlap:
    """How a student's and a teacher's tokens meet on some texts; fractions of the student's tokens."""

    texts: int
    student_tokens: int
    teacher_tokens: int
    chunks: int
    one_to_one_fraction: float
    masked_fraction: float


def build_model(name: str, assets: Path, folder: Path) -> Path:
    """A random model of the published vocabulary with the published tokenizer, saved as a hub repository would be."""
    config_class, rows, stop_ids = MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizers" / name)
    torch.manual_seed(sorted(MODELS).index(name))
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": stop_ids, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForCausalLM.from_config(config_class(vocab_size=rows, tie_word_embeddings=True, **special, **SHAPE))
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


def distill(student: Path, teacher: Path, dataset: Path, output: Path, steps: int, max_new_tokens: int = 64) -> dict:
    """Runs the script; returns wall seconds, peak memory in MiB and the log of every step."""
    stop_id = AutoTokenizer.from_pretrained(student).eos_token_id
    bias = math.log(STOP_PROBABILITY * AutoModelForCausalLM.from_pretrained(student).config.vocab_size)
    command = [sys.executable, str(ROOT / "examples" / "distill.py")]
    command += f"--model_name_or_path {student} --teacher_model_name_or_path {teacher}".split()
    command += f"--dataset_name {dataset} --prompt_column question --output_dir {output}".split()
    command += "--use_peft --lora_r 8 --lora_target_modules all-linear --learning_rate 1e-4".split()
    command += f"--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --max_steps {steps}".split()
    command += f"--max_new_tokens {max_new_tokens} --logging_steps 1 --disable_tqdm True".split()
    command += ["--generation_kwargs", json.dumps({"sequence_bias": [[[stop_id], bias]]})]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(output.parent / "datasets_cache")}
    start = time.perf_counter()
    with open(output.with_suffix(".log"), "w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if os.waitstatus_to_exitcode(status) != 0:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()}")
    [state] = output.glob(f"checkpoint-{steps}/trainer_state.json")
    steps_log = [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    return {"wall_seconds": seconds, "peak_memory_mib": usage.ru_maxrss / 1024, "steps": steps_log}


def overlap(alignments: list[TextAlignment]) -> Overlap:
    student_tokens = sum(len(alignment.student_ids) for alignment in alignments)
    one_to_one = masked = 0
    for alignment in alignments:
        sizes = [_sizes(chunks) for chunks in (alignment.student_chunks, alignment.teacher_chunks)]
        one_to_one += sum(m == k == 1 for m, k in zip(*sizes, strict=True))
        masked += alignment.student_chunks.count(-1)
    return Overlap(
        texts=len(alignments),
        student_tokens=student_tokens,
        teacher_tokens=sum(len(alignment.teacher_ids) for alignment in alignments),
        chunks=sum(len(alignment.chunk_bytes) for alignment in alignments),
        one_to_one_fraction=one_to_one / student_tokens,
        masked_fraction=masked / student_tokens,
    )


def _sizes(chunks: list[int]) -> list[int]:
    return [len(list(run)) for chunk, run in groupby(chunk for chunk in chunks if chunk >= 0)]


def show(alignment: TextAlignment, student_bytes: list[bytes], teacher_bytes: list[bytes]) -> str:
    """One line a chunk: its bytes, the student's tokens, the teacher's. `----` are tokens that take no part."""
    students = _runs(alignment.student_ids, alignment.student_chunks, student_bytes)
    teachers = _runs(alignment.teacher_ids, alignment.teacher_chunks, teacher_bytes)
    lines = []
    for chunk in [*range(len(alignment.chunk_bytes)), None]:
        left, right = _until(students, chunk), _until(teachers, chunk)
        for side in ("skipped", "tokens"):
            if left[side] or right[side]:
                label = "----" if side == "skipped" else _spelled(alignment.chunk_bytes[chunk])
                lines.append(f"{label:30} {' | '.join(left[side]):44} {' | '.join(right[side])}")
    return "\n".join(lines)


def _runs(ids: list[int], chunks: list[int], table: list[bytes]) -> list[tuple[int, str]]:
    spelled = [_spelled(table[i] if i < len(table) else b"") or f"<{i}>" for i in ids]
    return list(zip(chunks, spelled, strict=True))[::-1]


def _until(tokens: list[tuple[int, str]], chunk: int | None) -> dict[str, list[str]]:
    """Takes off `tokens` (last first) those up to and including the ones of `chunk`."""
    taken = {"skipped": [], "tokens": []}
    while tokens and (tokens[-1][0] == chunk or (tokens[-1][0] == -1 and not taken["tokens"])):
        taken["skipped" if tokens[-1][0] == -1 else "tokens"].append(tokens.pop()[1])
    return taken


def _spelled(data: bytes) -> str:
    """As text where it is printable UTF-8, as escaped bytes where not."""
    text = data.decode(errors="backslashreplace")
    return text.replace(" ", "␣") if text.isprintable() else repr(text)[1:-1].replace(" ", "␣").replace("\\\\x", "\\x")


def sample_completion(student: Path, question: str, max_new_tokens: int = 32) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(student)
    model = AutoModelForCausalLM.from_pretrained(student)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    set_seed(0)
    pad_token_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def measure(student: str, teacher: str, assets: Path, steps: int, folder: Path) -> dict:
    student_path, teacher_path = (build_model(name, assets, folder) for name in (student, teacher))
    run = distill(student_path, teacher_path, assets / "datasets" / "gsm8k", folder / "output", steps)
    log = run.pop("steps")

    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (student_path, teacher_path)]
    tables = [token_bytes(tokenizer) for tokenizer in tokenizers]
    aligner = TextAligner(*tokenizers)
    rows = [json.loads(line) for line in (assets / "datasets/gsm8k/test.jsonl").read_text().splitlines()]
    encoded = [tokenizers[0].encode(row["answer"], add_special_tokens=False) for row in rows]
    start = time.perf_counter()
    answers = aligner(encoded)
    seconds = time.perf_counter() - start
    [written] = aligner([sample_completion(student_path, rows[0]["question"])])
    for title, alignment in (("a random completion", written), ("the first reference answer", answers[0])):
        print(f"\n{student} <- {teacher}, {title}\n{'chunk':30} {'student':44} teacher")
        print(show(alignment, *tables))
    return {
        "student": student,
        "teacher": teacher,
        "student_rows": MODELS[student][1],
        "teacher_rows": MODELS[teacher][1],
        "optimizer_steps": len(log),
        **run,
        "mean_over_steps": {name: sum(entry[name] for entry in log) / len(log) for name in MEANS},
        "largest_gradient_norm": max(entry["grad_norm"] for entry in log),
        "reference_answers": {**asdict(overlap(answers)), "alignment_seconds": seconds},
    }


def machine() -> dict:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(), "device": "cpu"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    if not os.environ.get("CTOPD_ASSETS"):
        parser.error("CTOPD_ASSETS names no folder with the real tokenizers and data")
    runs = []
    for student, teacher in PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(measure(student, teacher, Path(os.environ["CTOPD_ASSETS"]), steps, Path(folder)))
        print(f"\n{json.dumps(runs[-1], indent=2)}")
    packages = ("trl_ctopd", "trl", "transformers", "tokenizers", "torch", "peft", "accelerate", "datasets")
    versions = {name: importlib.metadata.version(name) for name in packages} | {"python": platform.python_version()}
    report = {"date": date.today().isoformat(), "machine": machine(), "versions": versions, "runs": runs}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nFigures: {RESULTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
