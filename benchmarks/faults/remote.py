"""
What happens to a training whose teacher's server misbehaves: one run for each of `HABITS` (server.py), and a table.

```bash
python examples/small_models.py small
python -m benchmarks.faults.remote --models small
```

Each run is a process of its own: a few steps, with the server inside it. The server behaves until the training has begun. A run
may end in four ways:

- as with a good server: its weights are the same;
- without some texts: its weights are those of a run whose server refuses exactly these texts, and their share is logged;
- with an error that names the server and the problem;
- anything else is **silently wrong**.

Everything that a run prints, and all files that it leaves, are searched for the API key in several spellings. The longest time in
which nothing happens (between two steps, or to the end) must stay below its bound: `PATIENCE`, plus one try, plus twice the
longest step with a good server.
"""

import argparse
import base64
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.faults.server import HABITS, HabitServer, _chosen, _status
from benchmarks.report import header, save
from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer


OUTPUT = Path(__file__).parents[1] / "results" / "faults" / "remote.json"
KEY = "Sesame-0pen/Now+9"
STEPS, ROWS = 3, 8
TIMEOUT, RETRIES, PATIENCE = 1.0, 4, 5.0
REFUSES = "refuses one text in three"
TWO = "one of two servers takes requests and never answers"


class Moments(TrainerCallback):
    def __init__(self):
        self.moments = []

    def on_step_end(self, *args, **kwargs):
        self.moments.append(time.monotonic())


def train(models: Path, folder: Path, habit: str | None) -> dict:
    """A training in this process; returns its weights, log and times."""
    tokenizers = {name: AutoTokenizer.from_pretrained(models / name) for name in ("student", "teacher")}
    known = {**HABITS, REFUSES: _status(400, when=_chosen), TWO: HABITS["takes requests and never answers"]}
    servers = [HabitServer(tokenizers["teacher"], known.get(habit), KEY)]
    servers += [HabitServer(tokenizers["teacher"], None, KEY)] if habit == TWO else []
    os.environ["TEACHER_SERVER_API_KEY"] = KEY
    moments = Moments()
    trainer = CrossTokenizerGKDTrainer(
        AutoModelForCausalLM.from_pretrained(models / "student"),
        [server.url for server in servers],
        CrossTokenizerGKDConfig(
            str(folder / "run"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_steps=STEPS,
            per_device_train_batch_size=ROWS,
            max_new_tokens=12,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="steps",
            save_steps=1,
            report=True,
            report_to=[],
            teacher_server_timeout=TIMEOUT,
            teacher_server_retries=RETRIES,
            teacher_server_patience=PATIENCE,
        ),
        Dataset.from_list([{"prompt": f"What is {n} plus {n * 7}?"} for n in range(STEPS * ROWS)]),
        processing_class=tokenizers["student"],
        teacher_processing_class=tokenizers["teacher"],
        callbacks=[moments],
    )
    begin = time.monotonic()
    for server in servers:
        server.misbehaves = True
    error = ""
    try:
        trainer.train()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
        print(error)
    times = [begin, *moments.moments, time.monotonic()]
    logs = [log["teacher/failed_fraction"] for log in trainer.state.log_history if "teacher/failed_fraction" in log]
    trained = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return {
        "error": error,
        "steps": trainer.state.global_step,
        "left_out": sum(logs) / max(1, len(logs)),
        "longest_silence": max(later - earlier for earlier, later in zip(times, times[1:], strict=False)),
        "weights": trained,
    }


def child(models: Path, folder: Path, habit: str | None):
    log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.save(train(models, folder, habit), folder / "result.pt")
    sys.stdout.flush()
    print("done")


def keys_shown(folder: Path) -> list[str]:
    """Names of the files that hold the key in one of its spellings."""
    spellings = {KEY, quote(KEY, safe=""), json.dumps(KEY)[1:-1], base64.b64encode(KEY.encode()).decode()}
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path.name for path in files if any(spelled.encode() in path.read_bytes() for spelled in spellings)]


def run(models: Path, habit: str | None) -> dict:
    """The training in a process of its own, which must end by itself."""
    with tempfile.TemporaryDirectory() as name:
        folder, begin = Path(name), time.monotonic()
        process = multiprocessing.get_context("fork").Process(target=child, args=(models, folder, habit))
        process.start()
        process.join(300)
        ended = not process.is_alive()
        if not ended:
            process.kill()
            process.join()
        found = torch.load(folder / "result.pt") if (folder / "result.pt").exists() else {}
        shown = keys_shown(folder)
        if not found:
            print((folder / "output.txt").read_text()[-2000:])
    return {**found, "ended": ended, "seconds": time.monotonic() - begin, "keys_shown": shown}


def outcome(found: dict, good: dict, refused: dict) -> str:
    if not found["ended"] or "weights" not in found:
        return "did not end" if not found["ended"] else "ended without a word"
    if found["error"]:
        return "error" if found["error"].startswith("TeacherServerError") else "silently wrong"
    for reference, name in ((good, "as with a good server"), (refused, "without some texts")):
        same = torch.allclose(found["weights"], reference["weights"], rtol=0, atol=1e-6)
        if same and found["left_out"] == reference["left_out"]:
            return name
    return "silently wrong"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="what examples/small_models.py made")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = header()
    good, refused = run(args.models, None), run(args.models, REFUSES)
    assert not good["error"] and not refused["error"] and refused["left_out"] > good["left_out"] == 0
    assert not torch.allclose(good["weights"], refused["weights"], rtol=0, atol=1e-6)
    bound = PATIENCE + TIMEOUT + 2 * good["longest_silence"]
    rows = []
    print("| habit | what became of the training | longest silence (s) | key shown |\n|---|---|---|---|")
    for habit in [*HABITS, TWO]:
        found = run(args.models, habit)
        row = {
            "habit": habit,
            "outcome": outcome(found, good, refused),
            "error": found.get("error", "").replace(str(args.models), ""),
            "steps": found.get("steps"),
            "left_out": found.get("left_out"),
            "longest_silence": round(found.get("longest_silence", found["seconds"]), 2),
            "seconds": round(found["seconds"], 2),
            "keys_shown": found["keys_shown"],
        }
        rows.append(row)
        told = f"{row['outcome']} after {row['steps']} steps" if row["outcome"] == "error" else row["outcome"]
        print(f"| {habit} | {told} | {row['longest_silence']} | {', '.join(row['keys_shown']) or 'no'} |", flush=True)
    report |= {
        "timeout": TIMEOUT,
        "retries": RETRIES,
        "patience": PATIENCE,
        "bound": round(bound, 2),
        "silently_wrong": sum(row["outcome"] not in OUTCOMES for row in rows),
        "keys_shown": sum(bool(row["keys_shown"]) for row in rows),
        "longest_silence": max(row["longest_silence"] for row in rows),
        "habits": rows,
    }
    save(args.output, report)
    print({name: report[name] for name in ("silently_wrong", "keys_shown", "longest_silence", "bound")})


OUTCOMES = ("as with a good server", "without some texts", "error")


if __name__ == "__main__":
    main()
