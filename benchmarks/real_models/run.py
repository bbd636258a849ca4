"""Compares methods on two pretrained models: one JSON line for each run, in `benchmarks/results/real_models/runs.jsonl`, from which
`report.py` makes the tables of docs/real_models.md.

    python -m benchmarks.real_models.run [--models FOLDER] [--minutes 60]     # from the repository root

Stop it at any time and start it again: finished runs are skipped.

Decisions:
- Every run trains a LoRA adapter of rank 16 on all linear layers with AdamW at a constant rate, 8 prompts × 64 tokens a step. The
  methods' own settings are those of benchmarks/quality.
- Runs go seed by seed over data sets, rates, pairs and methods, in the order in which these are given, so that an interrupted
  benchmark is still balanced.
- A student of four bits is held as bitsandbytes rounds it. Its teacher is the same model unrounded, so that one tokenizer is left, and what
  the adapter can learn is what rounding took.
- The held-out gap is the same for all methods: after some updates the student samples one answer to each held-out prompt, with the
  same seed every time, and each model's log-prob of it is summed over all chunks (`examples/demo_real/measuring.py`).
- CPU seconds are those of the process, without measuring, since the machine has other work.
- TRL's GOLD trains the same adapter of the same models. Its teacher reads its own chat template, by a patch in
  benchmarks/quality; without the patch it reads the student's.
"""

import argparse
import copy
import hashlib
import json
import logging
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from datasets import Dataset
from demo_real.measuring import measured_rows
from demo_real.run import STUDENT, TEACHER, build, named
from transformers import PrinterCallback, TrainerCallback
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from benchmarks.clock import stopwatch
from benchmarks.quality.methods import METHODS as QUALITY
from benchmarks.quality.methods import Method, number, teacher_template
from benchmarks.quality.run import append, read
from benchmarks.report import header
from benchmarks.speed.models import quiet
from trl_ctopd import CrossTokenizerGKDTrainer
from trl_ctopd.models.products import onednn_is_faster, onednn_packs

from . import MEASURED_RUN
from .data import DATASETS


RESULTS = Path(__file__).parents[1] / "results" / "real_models"
PAIRS = {
    "smollm2<-qwen": (STUDENT, TEACHER),
    "qwen<-smollm2": (TEACHER, STUDENT),
    "smollm2-4bit<-smollm2": (STUDENT, STUDENT),
}
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
METHODS: dict[str, Method] = {
    "dpca": QUALITY["dpca_closed"],
    "reverse_kl": QUALITY["reverse_kl"],
    "dpca_open": QUALITY["dpca"],
    "trl_gold_off": QUALITY["trl_gold_template_off"],
    "sft": QUALITY["sft"],
    "bpm": QUALITY["bpm"],
    "seq_kd": QUALITY["seq_kd"],
    "trl_gold_on": QUALITY["trl_gold_template_hybrid"],
    "alm": QUALITY["alm"],
}
UPDATES, LONGER = 12, {"dpca_open": 24}
MEASURED_AT = (3, 6, UPDATES, 16, 2 * UPDATES)
RATE, PROMPTS, TOKENS, HELD_OUT = 3e-4, 8, 64, 24
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
LOGGED = ("step", "loss", "grad_norm", "gap/nats_per_byte", "entropy", "alignment/masked_fraction")
LOGGED += ("completions/mean_length", "completions/truncated_fraction")


@dataclass(frozen=True)
class Run:
    """All that determines a run. `start` as the method: the untrained student, measured alone."""

    method: str
    dataset: str
    pair: str
    seed: int
    learning_rate: float
    updates: int
    prompts: int = PROMPTS
    tokens: int = TOKENS
    held_out: int = HELD_OUT


def key(run: Run) -> str:
    return hashlib.sha256(json.dumps(asdict(run), sort_keys=True).encode()).hexdigest()[:16]


def runs(
    methods: Sequence[str],
    datasets: Sequence[str],
    seeds: int,
    rates: Sequence[float],
    pairs: Sequence[str],
    updates: int | None = None,
    held_out: int = HELD_OUT,
) -> Iterator[Run]:
    for seed, dataset, pair in product(range(seeds), datasets, pairs):
        yield Run("start", dataset, pair, seed, 0.0, 0, held_out=held_out)
        for rate, method in product(rates, methods):
            length = updates or LONGER.get(method, UPDATES)
            yield Run(method, dataset, pair, seed, rate, length, held_out=held_out)


class Watch(TrainerCallback):
    """Measures the held-out gap after some updates, with the CPU seconds that training has taken until then."""

    def __init__(self, trainer: CrossTokenizerGKDTrainer, steps: Sequence[int]):
        self._trainer, self._steps = trainer, steps
        self._paused = time.process_time()  # when training began, as if measuring took no time
        self.curve: dict[int, dict] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._paused = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self._steps:
            self.measure(state.global_step)
            control.should_log = True  # the evaluation's own log has cleared it

    def measure(self, step: int) -> None:
        trained = time.process_time() - self._paused
        model = self._trainer.model
        training = model.training
        with stopwatch() as spent:
            gap, rows = measured_rows(self._trainer)
        model.train(training)
        self._paused += spent.cpu_seconds
        rows = [[round(nats, 4), size] for nats, size in rows]
        self.curve[step] = {**asdict(gap), "cpu_seconds": round(trained, 2), "rows": rows}


def do(
    run: Run, folder: Path, models: Path | None, adapters: Path | None = None, measured_at: Sequence[int] | None = None
) -> dict:
    """Trains, and measures after `measured_at` updates. The trained adapter is kept in a folder of `adapters`, where that is given."""
    method = METHODS.get(run.method, METHODS["dpca_open"])
    student, teacher = (named(name, models) for name in PAIRS[run.pair])
    rows = DATASETS[run.dataset]()
    held_out, training = rows[: run.held_out], rows[run.held_out :]
    common = {
        "per_device_train_batch_size": run.prompts,
        "max_steps": run.updates,
        "learning_rate": run.learning_rate,
        **MEASURED_RUN,
        "dataloader_pin_memory": False,
        "seed": run.seed,
    }
    own = (METHODS["dpca_open"] if method.gold else method).config  # GOLD's student is measured by our trainer
    common_ours = {**common, "max_new_tokens": run.tokens, "per_device_eval_batch_size": run.prompts}
    if "4bit" in run.pair:
        common_ours["model_init_kwargs"] = {"dtype": "float32", "quantization_config": FOUR_BITS}
    ours = build(student, teacher, training, folder, held_out, **common_ours, **own)
    watch = Watch(ours, MEASURED_AT if measured_at is None else measured_at)
    trainer = gold(method, run, ours, training, teacher, common) if method.gold else ours
    trainer.remove_callback(PrinterCallback)
    ours.remove_callback(PrinterCallback)
    sides = ours.processing_class, ours.teacher_processing_class
    if run.updates:
        trainer.add_callback(watch)
        with teacher_template(*sides) if method.own_template and run.dataset != "text" else nullcontext():
            trainer.train()
        if adapters:
            ours.save_model(str(adapters / f"{run.dataset}_{run.method}_{run.updates}_seed_{run.seed}"))
    else:
        watch.measure(0)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "curve": watch.curve,
        "finite": all(bool(torch.isfinite(weight).all()) for weight in ours.model.parameters()),
        "log": [{name: number(entry[name]) for name in LOGGED if name in entry} for entry in steps],
    }


def gold(
    method: Method, run: Run, ours: CrossTokenizerGKDTrainer, training: list[dict], teacher: str, common: dict
) -> GOLDTrainer:
    """TRL's trainer for our trainer's own student and teacher. Plain text goes through a template that adds nothing."""
    tokenizer = copy.deepcopy(ours.processing_class)
    if run.dataset == "text":
        tokenizer.chat_template = PLAIN
        training = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["completion"]}],
            }
            for row in training
        ]
    return GOLDTrainer(
        ours.model,
        ours.teacher_model,
        GOLDConfig(
            **common,
            output_dir=ours.args.output_dir,
            max_completion_length=run.tokens,
            max_length=None,
            use_uld_loss=True,
            teacher_tokenizer_name_or_path=teacher,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            **method.config,
        ),
        train_dataset=Dataset.from_list([{"messages": [*row["prompt"], *row["completion"]]} for row in training]),
        processing_class=tokenizer,
    )


def main(wanted: Sequence[Run], path: Path, models: Path | None, minutes: float | None, **how) -> None:
    begun, about = time.monotonic(), header()
    own = "oneDNN to write" if onednn_packs() else "torch's own"
    about["machine"]["products"] = "oneDNN" if onednn_is_faster() else own
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    for run in wanted:
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            break
        own = key(run)
        if own in read(path):
            continue
        entry = {"key": own, "run": asdict(run), "revision": revision, **about}
        with stopwatch() as spent, tempfile.TemporaryDirectory() as folder:
            try:
                entry |= do(run, Path(folder), models, **how)
            except (ValueError, NotImplementedError, RuntimeError) as error:
                entry["error"] = f"{type(error).__name__}: {error}"
        entry["all_cpu_seconds"] = round(spent.cpu_seconds, 1)
        append(path, entry)
        found = {step: point["nats_per_byte"] for step, point in entry.get("curve", {}).items()}
        print(f"{run.dataset}, {run.method}, seed {run.seed}: {entry.get('error', found)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=list(DATASETS))
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=["smollm2<-qwen"])
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--rates", nargs="+", type=float, default=[RATE])
    parser.add_argument("--updates", type=int, help="of every run; else 12, and 24 of dpca_open")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="prompts that give the gap")
    parser.add_argument(
        "--measured-at", nargs="+", type=int, help=f"updates after which the gap is measured; else {MEASURED_AT}"
    )
    parser.add_argument("--adapters", type=Path, help="folder that keeps each run's trained adapter")
    parser.add_argument("--minutes", type=float, help="no run is begun after that time")
    parser.add_argument("--models", type=Path, help="folder with both models; else they come from the hub")
    parser.add_argument("--results", type=Path, default=RESULTS / "runs.jsonl")
    options = parser.parse_args()
    quiet()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    wanted = runs(
        options.methods,
        options.datasets,
        options.seeds,
        options.rates,
        options.pairs,
        options.updates,
        options.held_out,
    )
    how = {"adapters": options.adapters, "measured_at": options.measured_at}
    main(list(wanted), options.results, options.models, options.minutes, **how)
