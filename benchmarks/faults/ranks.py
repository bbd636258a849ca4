"""
What becomes of a training in two processes of which one goes wrong: one run for each of `CASES`, and a table.

```bash
python -m benchmarks.faults.ranks
```

Each run is started with `accelerate launch`. A good end is: the launcher returns an error, no process is left, the output names the
cause, and from the fault to the end of the last process no more than `BOUND` seconds pass. Where a server hangs and nobody
interrupts, the run may first wait for it as long as `teacher_server_patience` says.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from datasets import Dataset, IterableDataset  # noqa: E402
from toys import prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from benchmarks.faults.server import HANG, HabitServer  # noqa: E402
from benchmarks.report import header, save  # noqa: E402
from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer  # noqa: E402


OUTPUT = Path(__file__).parents[1] / "results" / "faults" / "ranks.json"
BOUND = 5.0  # seconds
PATIENCE, TIMEOUT = 5.0, 2.0  # seconds, of the run that waits for a server until it gives up
BAD = 1  # the rank that goes wrong


def raise_error():
    raise RuntimeError("this rank's callback fails")


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Case:
    """What goes wrong, and what the output must say of it."""

    says: str  # a pattern
    rows: Callable | None = None  # what the bad rank's dataset is instead of `prompts()`
    after_step: Callable | None = (
        None  # what the bad rank does after its first step, once the others wait for a silent server
    )
    hangs_for: tuple[int, ...] = ()  # ranks whose server is silent from the second step on
    ctrl_c: str = ""  # once these wait for it: "all", as a terminal does it, or "rank", the bad one alone
    settings: dict = field(default_factory=dict)
    bound: float = BOUND


def with_bad_row():
    rows = prompts().to_list()
    rows[6] = {"prompt": [{"role": "user"}], "completion": []}
    return rows


def bad_stream():
    return IterableDataset.from_generator(lambda: iter(with_bad_row()))


LONG = {"teacher_server_timeout": HANG, "teacher_server_patience": HANG}
CASES = {
    "a bad row in one rank's dataset": Case("Row 6 of the train dataset", lambda: Dataset.from_list(with_bad_row())),
    "a bad row in one rank's stream": Case(
        "Row 6 of the train dataset", bad_stream, settings={"accelerator_config": {"dispatch_batches": False}}
    ),
    "datasets of unlike length": Case("The train dataset has 16, 12 rows", lambda: prompts(12)),
    "an error in a callback of one rank": Case("RuntimeError: this rank's callback fails", after_step=raise_error),
    "Ctrl-C on one rank": Case("KeyboardInterrupt", after_step=interrupt),
    "one rank is killed": Case(r"Signal 9 \(SIGKILL\)", after_step=die),
    "the server hangs for one rank": Case(
        "TeacherServerError: .*did not answer for 5 s",
        hangs_for=(BAD,),
        settings={"teacher_server_timeout": TIMEOUT, "teacher_server_patience": PATIENCE},
        bound=BOUND + PATIENCE + TIMEOUT,
    ),
    "Ctrl-C while the server hangs for one rank": Case("Interrupt", hangs_for=(BAD,), settings=LONG, ctrl_c="all"),
    "Ctrl-C while the server hangs for both": Case("Interrupt", hangs_for=(0, 1), settings=LONG, ctrl_c="all"),
    "Ctrl-C on one rank while the server hangs for both": Case(
        "KeyboardInterrupt", hangs_for=(0, 1), settings=LONG, ctrl_c="rank"
    ),
    "an error on one rank while the server hangs for the other": Case(
        "RuntimeError: this rank's callback fails", after_step=raise_error, hangs_for=(0,), settings=LONG
    ),
}


# One rank


class Fault(TrainerCallback):
    """After this rank's first step: tells in `folder` which process it is, and does what its case says."""

    def __init__(self, folder: Path, rank: int, act: Callable | None, waits: bool):
        self.folder, self.rank, self.act, self.waits = folder, rank, act, waits

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1:
            return
        write(self.folder / str(self.rank), os.getpid())
        if self.act is not None:
            while self.waits and not (self.folder / "silent").exists():
                time.sleep(0.02)
            write(self.folder / "fault", time.time())
            self.act()


def write(file: Path, value: float):
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(str(value))
    part.rename(file)


def train(name: str, folder: Path, urls: list[str]):
    # a shell makes the jobs that it starts in the background ignore Ctrl-C, and so would everything that they start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    case, rank = CASES[name], int(os.environ["RANK"])
    bad = rank == BAD
    rows = prompts()
    if case.rows is not None:
        if "dispatch_batches" in str(case.settings):
            rows = IterableDataset.from_generator(lambda: iter(prompts().to_list()))
        rows = case.rows() if bad else rows
        if bad:
            write(folder / "fault", time.time())
    args = CrossTokenizerGKDConfig(
        str(folder / "run"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        max_new_tokens=8,
        max_steps=50,
        per_device_train_batch_size=2,
        save_strategy="no",
        **case.settings,
    )
    trainer = CrossTokenizerGKDTrainer(
        student_model(),
        urls[rank] if urls else teacher_model(),
        args,
        rows,
        processing_class=student_tokenizer(),
        teacher_processing_class=teacher_tokenizer(),
        callbacks=[Fault(folder, rank, case.after_step if bad else None, bool(case.hangs_for))],
    )
    trainer.train()


# All of them


def run(name: str, folder: Path, limit: float = 300) -> dict:
    """What became of a case's run, which leaves its files in `folder`: `ended`, `code`, `says` and `seconds` since the fault."""
    case = CASES[name]
    servers, waiting = [], []
    if case.hangs_for:
        for rank in (0, 1):
            servers.append(HabitServer(teacher_tokenizer(), _silent(folder, rank, waiting, rank in case.hangs_for)))
            servers[-1].misbehaves = True
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", str(ROOT / "examples" / "accelerate_configs" / "cpu" / "ddp.yaml"), __file__]
    path = os.pathsep.join([*sys.path[:2], os.environ.get("PYTHONPATH", "")])
    with open(folder / "output.txt", "w") as output:
        launcher = subprocess.Popen(
            [*launch, "--case", name, "--folder", str(folder), *(server.url for server in servers)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        until = time.monotonic() + limit
        while not {*case.hangs_for} <= {*waiting} and launcher.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        write(folder / "silent", time.time())
        if case.hangs_for and not case.after_step:
            write(folder / "fault", time.time())
        if case.ctrl_c == "all":
            os.killpg(launcher.pid, signal.SIGINT)
        elif case.ctrl_c:
            os.kill(int((folder / str(BAD)).read_text()), signal.SIGINT)
        while (
            launcher.poll() is None or _left(folder)
        ) and time.monotonic() < until:  # a rank may outlive its launcher
            time.sleep(0.02)
    ends, left = time.time(), _left(folder)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    code = launcher.wait()
    for server in servers:
        server.close()
    said = (folder / "output.txt").read_text()
    return {
        "ended": not left,
        "code": code,
        "says": [line.strip() for line in said.splitlines() if re.search(case.says, line)][:1],
        "seconds": round(ends - float((folder / "fault").read_text()), 2) if (folder / "fault").exists() else None,
    }


def _silent(folder: Path, rank: int, waiting: list[int], hangs: bool) -> Callable:
    def habit(request, ids):
        if hangs and (folder / str(rank)).exists():
            waiting.append(rank)
            time.sleep(HANG)

    return habit


def _left(folder: Path) -> list[int]:
    """Ids of processes that have `folder` in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the cases whose name has this in it")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("urls", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.case:
        return train(options.case, options.folder, options.urls)
    report, found = header(), {}
    print("| what goes wrong | what the output says | seconds to the end of all | bound |\n|---|---|---|---|")
    for name, case in CASES.items():
        if options.only and options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            own = run(name, Path(folder))
            if not own["says"]:
                print((Path(folder) / "output.txt").read_text()[-3000:])
        good = (
            own["ended"]
            and own["code"] != 0
            and own["says"]
            and own["seconds"] is not None
            and own["seconds"] <= case.bound
        )
        found[name] = {**own, "bound": case.bound, "good": bool(good)}
        print(f"| {name} | {''.join(own['says'])[:120]} | {own['seconds']} | {case.bound:g} |", flush=True)
    wrong = [name for name, own in found.items() if not own["good"]]
    save(options.output, report | {"wrong": len(wrong), "cases": found})
    print(f"wrong: {', '.join(wrong) or 'none'}")


if __name__ == "__main__":
    main()
