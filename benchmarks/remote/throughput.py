"""
How fast a server scores, and how long a training step waits for it, by the number of requests in flight.

```bash
python examples/small_models.py small
vllm serve small/teacher --port 8000 ...           # docs/remote_teacher.md
python -m benchmarks.remote.throughput --url http://localhost:8000 --models small --server "vLLM 0.32.0, CPU, float32"
```

Scoring: rows of 32 prompt and 128 completion tokens, sent as in training; tokens a second of both.
Waiting: the share of `seconds/teacher_wait` in `seconds/step`, in steps of 4 micro-batches of 4 prompts; medians.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks.clock import stopwatch
from benchmarks.report import header, save
from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer
from trl_ctopd.teachers.remote import RemoteTeacher
from trl_ctopd.teachers.servers import Servers


OUTPUT = Path(__file__).parents[1] / "results" / "remote"
CONCURRENCY = (1, 2, 4, 8, 16, 32)
ROWS, PROMPT, COMPLETION, ROUNDS = 64, 32, 128, 3
STEPS = 6  # after a warm-up step


def scoring(url: str, folder: Path, concurrency: int) -> list[float]:
    """Tokens a second in each round."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    teacher = RemoteTeacher(Servers([url], concurrency=concurrency))
    teacher.check(tokenizer)
    draws = torch.Generator().manual_seed(0)
    speeds = []
    for _ in range(ROUNDS):
        ids = torch.randint(4, len(tokenizer), (ROWS, PROMPT + COMPLETION), generator=draws).tolist()
        with stopwatch() as spent:
            scores = teacher.start([row[:PROMPT] for row in ids], [row[PROMPT:] for row in ids])
            for row in range(ROWS):
                scores.row(row)
        speeds.append(ROWS * (PROMPT + COMPLETION) / spent.seconds)
    return speeds


def waiting(url: str, folder: Path, concurrency: int) -> dict[str, float]:
    """Medians of a step's seconds over `STEPS` steps."""
    with tempfile.TemporaryDirectory() as output:
        trainer = CrossTokenizerGKDTrainer(
            model=str(folder / "student"),
            args=CrossTokenizerGKDConfig(
                output,
                teacher_server_url=[url],
                teacher_model_name_or_path=str(folder / "teacher"),
                teacher_server_concurrency=concurrency,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=4,
                max_new_tokens=COMPLETION,
                max_steps=1 + STEPS,
                logging_steps=1,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train"),
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "seconds/step" in entry][1:]
    names = ("step", "teacher_wait", "generation", "student")
    return {name: statistics.median(entry[f"seconds/{name}"] for entry in logs) for name in names}


def draw(path: Path, results: list[dict], server: str):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    places = [str(result["concurrency"]) for result in results]
    left.bar(places, [statistics.median(result["tokens_per_second"]) for result in results], color="#4477aa")
    left.set(xlabel="requests in flight", ylabel="teacher tokens a second", title="Scoring")
    shares = [100 * result["seconds"]["teacher_wait"] / result["seconds"]["step"] for result in results]
    right.bar(places, shares, color="#cc6677")
    right.set(xlabel="requests in flight", ylabel="% of a step", title="Waiting for the teacher", ylim=(0, 100))
    figure.suptitle(server, fontsize=9)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--models", type=Path, required=True, help="the folder that examples/small_models.py has made")
    parser.add_argument("--server", required=True, help="what the server is, in words")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    report = {
        **header(),
        "server": arguments.server,
        "rows": ROWS,
        "prompt": PROMPT,
        "completion": COMPLETION,
        "results": [],
    }
    for concurrency in CONCURRENCY:
        result = {
            "concurrency": concurrency,
            "tokens_per_second": scoring(arguments.url, arguments.models, concurrency),
            "seconds": waiting(arguments.url, arguments.models, concurrency),
        }
        print(result, flush=True)
        report["results"].append(result)
    save(OUTPUT / "throughput.json", report)
    draw(OUTPUT / "throughput.png", report["results"], arguments.server)


if __name__ == "__main__":
    main()
