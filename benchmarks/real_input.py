"""
Real input through the real script: `examples/distill.py` with published tokenizers and chat templates on GSM8K questions.

    CTOPD_ASSETS=<folder> python -m benchmarks.real_input

The folder holds `tokenizers/<name>` as published on the hub and `datasets/gsm8k/{train,test}.jsonl`. Each run is a process of
its own. The results go to `benchmarks/results/real_input.json`, and two alignments of each pair are printed for inspection.

Decisions:
- Models have random weights and two narrow layers, but all rows of the real vocabulary. So the student writes random tokens,
  half characters included. That is the hardest text for the alignment, and says nothing about learning.
- A random student would never end its turn, so a bias in sampling gives the end a probability of 2 % at each token. The scored
  distribution does not have this bias, which does not affect what is measured here.
- The alignment of the two tokenizers on sensible text is measured separately, on GSM8K's reference answers.
- Peak memory is that of the whole process: Python, torch, two models, dataset.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from benchmarks.clock import stopwatch
from benchmarks.report import assets_folder, header, save
from trl_ctopd import TextAligner, TextAlignment, token_bytes
from trl_ctopd.rollouts.pairing import Prompt, Rollout, pair
from trl_ctopd.text.chat import Conversation, Speaker, unshared_markup


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "real_input.json"
PAIRS = (("llama-3.2", "qwen2.5"), ("qwen2.5", "llama-3.2"), ("mistral-v3", "deepseek-v3"))
MODELS = {  # architecture, rows of the published embedding, stop ids of the published generation config
    "llama-3.2": (LlamaConfig, 128256, [128001, 128008, 128009]),
    "qwen2.5": (Qwen2Config, 151936, [151645, 151643]),
    "mistral-v3": (MistralConfig, 32768, [2]),
    "deepseek-v3": (LlamaConfig, 129280, [1]),
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
SETTINGS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_new_tokens": 64}
SECTIONS = ("alignment/", "completions/", "masked_bytes/", "seconds/", "gap/")  # of the log


@dataclass(frozen=True)
class Overlap:
    """How two tokenizers align on some texts. `one_to_one_fraction` is a share of the student tokens that are not masked."""

    texts: int
    student_tokens: int
    teacher_tokens: int
    chunks: int
    one_to_one_fraction: float
    masked_fraction: float


def build_model(name: str, assets: Path, folder: Path) -> Path:
    """A random model with the published vocabulary and tokenizer, saved like a hub repository."""
    config_class, rows, stop_ids = MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizers" / name)
    torch.manual_seed(sorted(MODELS).index(name))
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": stop_ids, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForCausalLM.from_config(
        config_class(vocab_size=rows, tie_word_embeddings=True, **special, **SHAPE)
    )
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return folder / name


def sampling(name: str) -> dict:
    """`GenerationConfig` fields that make a random model with this vocabulary end its turn."""
    _, rows, stop_ids = MODELS[name]
    return {"sequence_bias": [[[stop_ids[-1]], math.log(STOP_PROBABILITY * rows)]]}


def distill(student: str, teacher: str, folder: Path, dataset: Path, steps: int, **settings: int) -> dict:
    """Runs the script on two models in `folder`; returns wall seconds, peak memory in MiB and the log of every step."""
    options = {
        "model_name_or_path": folder / student,
        "teacher_model_name_or_path": folder / teacher,
        "dataset_name": dataset,
        "prompt_column": "question",
        "use_peft": True,
        "lora_r": 8,
        "lora_target_modules": "all-linear",
        "learning_rate": 1e-4,
        **SETTINGS,
        **settings,
        "generation_kwargs": json.dumps(sampling(student)),
        "max_steps": steps,
        "logging_steps": 1,
        "output_dir": folder / "output",
    }
    command = [sys.executable, str(ROOT / "examples" / "distill.py")]
    command += [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets_cache")}
    with open(folder / "output.log", "w+") as log:
        with stopwatch() as spent:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{log.read()}")
    state = json.loads((folder / "output" / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    log_of_steps = [entry for entry in state["log_history"] if "loss" in entry]
    return {"wall_seconds": spent.seconds, "peak_memory_mib": usage.ru_maxrss / 1024, "log": log_of_steps}


def means(log: list[dict]) -> dict[str, float]:
    names = dict.fromkeys(name for entry in log for name in entry if name.startswith(SECTIONS))
    values = {name: [entry[name] for entry in log if name in entry] for name in names}
    return {name: sum(own) / len(own) for name, own in values.items()}


def overlap(alignments: list[TextAlignment]) -> Overlap:
    one_to_one = masked = 0
    for alignment in alignments:
        m, k = Counter(alignment.student_chunks), Counter(alignment.teacher_chunks)
        one_to_one += sum(m[chunk] == k[chunk] == 1 for chunk in range(len(alignment.chunk_bytes)))
        masked += m[-1]
    student_tokens = sum(len(alignment.student_ids) for alignment in alignments)
    return Overlap(
        texts=len(alignments),
        student_tokens=student_tokens,
        teacher_tokens=sum(len(alignment.teacher_ids) for alignment in alignments),
        chunks=sum(len(alignment.chunk_bytes) for alignment in alignments),
        one_to_one_fraction=one_to_one / (student_tokens - masked),
        masked_fraction=masked / student_tokens,
    )


class Pair:
    """A student's and a teacher's tokenizer, set up as in the trainer."""

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase):
        self.student, self.teacher = Speaker(student), Speaker(teacher)
        self.aligner = TextAligner(
            student,
            teacher,
            masked_strings=unshared_markup(self.student, self.teacher),
            teacher_control_ids=self.teacher.control_ids,
        )

    def rollouts(self, completions: list[list[int]], stop_ids: list[int]) -> list[Rollout]:
        nothing = [Prompt([], [])] * len(completions)
        return pair(nothing, completions, self.aligner, turn_ends=dict.fromkeys(stop_ids, self.teacher.turn_end))

    def show(self, rollout: Rollout) -> str:
        """One line for each chunk: its bytes, the student's tokens, the teacher's. `----`: tokens that take no part."""
        students = _spelled_tokens(rollout.student_ids, rollout.student_chunks, self.student.tokenizer)
        teachers = _spelled_tokens(rollout.teacher_ids, rollout.teacher_chunks, self.teacher.tokenizer)
        labels = [_spelled(data) for data in rollout.alignment.chunk_bytes]
        labels += ["(end of turn)"] * (rollout.num_chunks - len(labels)) + [""]
        lines = [f"{'chunk':30} {'student':44} teacher"]
        for chunk, label in enumerate(labels):
            left, right = _take(students, chunk), _take(teachers, chunk)
            for name, ours, theirs in zip(("----", label), left, right, strict=True):
                if ours or theirs:
                    lines.append(f"{name:30} {' | '.join(ours):44} {' | '.join(theirs)}")
        return "\n".join(lines)


def _spelled_tokens(ids: list[int], chunks: list[int], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    table, names = token_bytes(tokenizer), tokenizer.convert_ids_to_tokens(ids)
    spelled = [_spelled(table[i] if i < len(table) else b"") or str(name) for i, name in zip(ids, names, strict=True)]
    return list(zip(chunks, spelled, strict=True))


def _take(tokens: list[tuple[int, str]], chunk: int) -> tuple[list[str], list[str]]:
    """Removes from the front of `tokens` those that take no part, then those of `chunk`. Returns both."""
    taken = []
    for wanted in (-1, chunk):
        count = next((n for n, (found, _) in enumerate(tokens) if found != wanted), len(tokens))
        taken.append([text for _, text in tokens[:count]])
        del tokens[:count]
    return taken[0], taken[1]


def _spelled(data: bytes) -> str:
    text = data.decode(errors="backslashreplace").replace(" ", "␣")
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def sample(name: str, folder: Path, questions: list[str], max_new_tokens: int = 32) -> list[list[int]]:
    """The random student's completions."""
    model = AutoModelForCausalLM.from_pretrained(folder / name)
    speaker = Speaker(AutoTokenizer.from_pretrained(folder / name))
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": max_new_tokens, "pad_token_id": 0, **sampling(name)}
    torch.manual_seed(0)
    completions = []
    for question in questions:
        prompt = speaker.prompt_ids(Conversation([{"role": "user", "content": question}]))
        completions.append(model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist())
    return completions


def measure(student: str, teacher: str, assets: Path, steps: int, folder: Path) -> dict:
    for name in (student, teacher):
        build_model(name, assets, folder)
    run = distill(student, teacher, folder, assets / "datasets" / "gsm8k", steps)
    log = run.pop("log")

    tokenizers = [AutoTokenizer.from_pretrained(folder / name) for name in (student, teacher)]
    both = Pair(*tokenizers)
    rows = [json.loads(line) for line in (assets / "datasets/gsm8k/test.jsonl").read_text().splitlines()]
    encoded = [tokenizers[0].encode(row["answer"], add_special_tokens=False) for row in rows]
    with stopwatch() as spent:
        answers = both.aligner(encoded)

    stop_ids = both.student.stop_ids(GenerationConfig.from_pretrained(folder / student))
    written = both.rollouts(sample(student, folder, [row["question"] for row in rows[:32]]), stop_ids)
    hardest = max(written, key=lambda rollout: rollout.student_chunks.count(-1))
    [reference] = both.rollouts([encoded[0] + both.student.turn_end[-1:]], stop_ids)
    print(
        f"\n{student} <- {teacher}\nOf 32 random completions, the one with the most masked tokens:\n{both.show(hardest)}"
    )
    print(f"\nThe first reference answer:\n{both.show(reference)}")
    return {
        "student": student,
        "teacher": teacher,
        "student_rows": MODELS[student][1],
        "teacher_rows": MODELS[teacher][1],
        "optimizer_steps": len(log),
        **run,
        "mean_over_steps": means(log),
        "largest_gradient_norm": max(entry["grad_norm"] for entry in log),
        "reference_answers": {**asdict(overlap(answers)), "alignment_seconds": spent.seconds},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    assets = assets_folder(parser)
    report = {
        **header(),
        "settings": {**SHAPE, **SETTINGS, "stop_probability": STOP_PROBABILITY},
        "runs": [],
    }
    for student, teacher in PAIRS:
        with tempfile.TemporaryDirectory() as folder:
            report["runs"].append(measure(student, teacher, assets, steps, Path(folder)))
        print(f"\n{json.dumps(report['runs'][-1], indent=2)}")
    save(RESULTS, report)


if __name__ == "__main__":
    main()
