"""
Does a student take over a preference that the pairs alone teach worse? DPO and CTPD on the same pairs, some of them wrong.

    python -m benchmarks.preference.run      # from the repository root; about three minutes of one core

Task and models are those of `benchmarks.quality`: `plurals`, a student with a Unigram tokenizer that adds an s to everything, a
teacher with byte-level BPE that knows them. A pair is the right answer and one with mistakes; in `SWAPPED` of the pairs they are
swapped, as with labels that are not all right.

Decisions:
- `dpo` is TRL's `DPOTrainer`, with the student's start as the reference. `ctpd` has the teacher as the reference; `ctpd_weights` has
  two more, the teacher after DPO on these pairs and on the swapped ones (T⁺, T⁻ of the paper).
- All methods have the same pairs, updates, batch size and beta. Each gets the learning rate that is best in greedy accuracy on
  prompts of its own, with a seed of its own.
- Measured on held-out prompts: greedy accuracy, and the share of pairs whose right answer is likelier.
"""

import argparse
import copy
import random
import statistics
import tempfile
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.clock import stopwatch
from benchmarks.quality import models
from benchmarks.quality.run import SCALES
from benchmarks.quality.tasks import IRREGULAR, Item, Task
from benchmarks.quality.worlds import World, world
from benchmarks.report import header, save
from benchmarks.speed.models import quiet
from trl_ctopd import CrossTokenizerDPOConfig, CrossTokenizerDPOTrainer


OUTPUT = Path(__file__).parents[1] / "results" / "preference" / "preference.json"
SWAPPED = 0.3
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
METHODS = ("dpo", "ctpd", "ctpd_weights")
SEEDS, TUNING_SEED = (0, 1, 2), 100
BETA, BATCH = 0.1, 16


def pairs_of(task: Task, items: list[Item], swapped: float, seed: int) -> Dataset:
    """A right answer and one with mistakes for each item, `swapped` of them the wrong way round. Items of regular nouns alone, with
    which no mistake is made, are left out."""
    rng, rows = random.Random(seed), []
    for item in items:
        if not any(noun in IRREGULAR for noun in item.facts):
            continue
        wrong = item.answer
        while wrong == item.answer:
            wrong = task.mistaken(item, rng)
        sides = [[{"role": "assistant", "content": text}] for text in (item.answer, wrong)]
        chosen, rejected = sides[::-1] if rng.random() < swapped else sides
        rows.append({"prompt": models.messages(item.prompt), "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def common(folder: str, learning_rate: float, updates: int, seed: int, **settings) -> dict:
    return {
        "output_dir": folder, "learning_rate": learning_rate, "max_steps": updates, "seed": seed, "beta": BETA,
        "per_device_train_batch_size": BATCH, "lr_scheduler_type": "linear", "warmup_steps": 0, "logging_steps": updates,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "dataloader_pin_memory": False, **settings,
    }  # fmt: skip


def dpo(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, settings: dict) -> PreTrainedModel:
    trainer = DPOTrainer(
        copy.deepcopy(model), args=DPOConfig(**settings), train_dataset=pairs, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.model


def ctpd(
    own: World, pairs: Dataset, settings: dict, weighers: tuple = (None, None), scored: dict | None = None
) -> PreTrainedModel:
    """`scored` keeps the rendered pairs with the teachers' columns for later runs with the same teachers."""
    scored, kind = {} if scored is None else scored, weighers[0] is not None
    trainer = CrossTokenizerDPOTrainer(
        copy.deepcopy(own.student), copy.deepcopy(own.teacher), CrossTokenizerDPOConfig(**settings),
        scored.get(kind, pairs),
        positive_teacher=copy.deepcopy(weighers[0]), negative_teacher=copy.deepcopy(weighers[1]),
        processing_class=own.student_tokenizer, teacher_processing_class=own.teacher_tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    scored[kind] = trainer.train_dataset
    trainer.train()
    return trainer.model


def measured(model: PreTrainedModel, own: World, items: list[Item]) -> dict:
    """On `items` with which a mistake can be made."""
    model.eval()
    tokenizer, scores = own.student_tokenizer, []
    items = [item for item in items if any(noun in IRREGULAR for noun in item.facts)]
    pairs = pairs_of(own.task, items, 0.0, seed=7)
    for side in ("chosen", "rejected"):
        ids = [
            [*tokenizer.encode(row[0]["content"], add_special_tokens=False), tokenizer.eos_token_id]
            for row in pairs[side]
        ]
        scores.append(models.total_log_probs(model, tokenizer, [item.prompt for item in items], ids))
    return {
        "accuracy": models.accuracy(model, tokenizer, own.task, items),
        "pairs_right": (scores[0] > scores[1]).float().mean().item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    quiet()
    report = header() | {"swapped": SWAPPED, "updates": args.updates, "batch": BATCH, "beta": BETA}
    own = world(SCALES["cpu"].size, "plurals", "families")
    items = own.questions[: BATCH * args.updates]
    with tempfile.TemporaryDirectory() as folder, stopwatch() as spent:
        settings = partial(common, folder, updates=args.updates)
        pairs = pairs_of(own.task, items, SWAPPED, seed=0)
        swapped = pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})
        taught = settings(learning_rate=3e-5, seed=0, beta=0.3)  # the paper's beta for the two weighing teachers
        weighers = tuple(dpo(own.teacher, own.teacher_tokenizer, rows, taught) for rows in (pairs, swapped))

        def student(method: str, learning_rate: float, seed: int) -> PreTrainedModel:
            how = settings(learning_rate=learning_rate, seed=seed)
            if method == "dpo":
                return dpo(own.student, own.student_tokenizer, pairs, how)
            return ctpd(own, pairs, how, weighers if method == "ctpd_weights" else (None, None), scored)

        tuning, runs, rates, scored = [], [], {}, {}
        for method in METHODS:
            for rate in LEARNING_RATES:
                found = measured(student(method, rate, TUNING_SEED), own, own.validation)
                tuning.append({"method": method, "learning_rate": rate, **found})
                print(tuning[-1], flush=True)
            own_runs = [run for run in tuning if run["method"] == method]
            rates[method] = max(own_runs, key=lambda run: (run["accuracy"], run["pairs_right"]))["learning_rate"]
        for method in METHODS:
            for seed in SEEDS:
                found = measured(student(method, rates[method], seed), own, own.held_out)
                runs.append({"method": method, "seed": seed, "learning_rate": rates[method], **found})
                print(runs[-1], flush=True)
        start = measured(own.student, own, own.held_out)
    report |= {"start": start, "teacher_accuracy": own.figures["teacher"], "tuning": tuning, "runs": runs}
    report["medians"] = {
        method: {
            name: statistics.median(run[name] for run in runs if run["method"] == method)
            for name in ("accuracy", "pairs_right")
        }
        for method in METHODS
    }
    save(args.output, report | {"cpu_seconds": round(spent.cpu_seconds)})


if __name__ == "__main__":
    main()
