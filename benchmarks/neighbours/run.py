"""
What rewards and a gate add to a teacher that is often wrong, and where rollouts may end early.

    python -m benchmarks.neighbours.run rewards        # from the repository root; each takes a few minutes of one core
    python -m benchmarks.neighbours.run early_stop

Tasks, models and accuracy are those of `benchmarks.quality`. All runs of a table have `dpca` with closed chunks, the learning rate that
`benchmarks.quality` chose for it, and the same number of updates and of completions.

- `rewards`: `plurals`, with a teacher that was trained on answers of which `WRONG` are with mistakes. A completion is right if it is
  the right answer: reward 1, else 0; the gate leaves out those that are not.
- `early_stop`: `stories`, with the teacher that is right. KAT's window is a tenth of an answer here, which has some 60 tokens.
"""

import argparse
import copy
import random
import statistics
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PrinterCallback, set_seed

from benchmarks.clock import stopwatch
from benchmarks.quality import models
from benchmarks.quality.run import SCALES
from benchmarks.quality.worlds import World, world
from benchmarks.report import header, save
from benchmarks.speed.models import quiet
from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer


RESULTS = Path(__file__).parents[1] / "results" / "neighbours"
SEEDS = (0, 1, 2)
LEARNING_RATE, COMPLETIONS, UPDATES = 3e-4, 24, 24
WRONG = 0.7
KAT = {"window": 6, "patience": 2, "warmup_steps": 3, "warmup_rollouts": 72, "exempt": 6}


def right(completions, answer, **columns) -> list[float]:
    return [float(own[0]["content"] == true) for own, true in zip(completions, answer, strict=True)]


def is_right(completions, answer, **columns) -> list[bool]:
    return [bool(own) for own in right(completions, answer)]


CASES = {
    "rewards": {
        "teacher alone": {},
        "reward": {"reward_funcs": right, "reward_weight": 1.0},
        "gate": {"teacher_gate": is_right},
        "reward and gate": {"reward_funcs": right, "reward_weight": 1.0, "teacher_gate": is_right},
    },
    "early_stop": {
        "whole": {},
        "kat": {"early_stop": "kat", "early_stop_kwargs": KAT},
        "kat, 16 tokens at a time": {"early_stop": "kat", "early_stop_kwargs": KAT, "early_stop_tokens": 16},
        "random": {"early_stop": "random", "early_stop_kwargs": KAT},
        "growing": {"early_stop": "growing", "early_stop_kwargs": {"start": 16, "steps": 16}},
    },
}
WORLDS = {"rewards": ("plurals", "families"), "early_stop": ("stories", "sizes")}


def often_wrong(own: World) -> PreTrainedModel:
    """A teacher like the world's, trained on answers of which `WRONG` have mistakes."""
    size, task, rng = SCALES["cpu"].size, own.task, random.Random("often wrong")
    set_seed(0)
    kept = {item.prompt for item in (*own.held_out, *own.validation)}

    def example(draws=rng):
        item = task.draw(draws)
        while item.prompt in kept:
            item = task.draw(draws)
        return item.prompt, "", task.mistaken(item, draws) if draws.random() < WRONG else item.answer

    model = models.new_model(models.Olmo2Config, own.teacher_tokenizer, size.teacher_width, size.layers)
    steps = size.teacher_steps[task.name]
    models.pretrain(model, own.teacher_tokenizer, example, steps, "often wrong", size.learning_rate, size.batch_size)
    return model.eval()


def train(own: World, teacher: PreTrainedModel, case: dict, seed: int, folder: str, updates: int) -> dict:
    arguments = {name: case[name] for name in ("reward_funcs", "teacher_gate") if name in case}
    settings = {name: value for name, value in case.items() if name not in arguments}
    rows = [{"prompt": models.messages(item.prompt), "answer": item.answer} for item in own.questions]
    generations = 4
    trainer = CrossTokenizerGKDTrainer(
        model=copy.deepcopy(own.student),
        teacher_model=copy.deepcopy(teacher),
        args=CrossTokenizerGKDConfig(
            folder, learning_rate=LEARNING_RATE, lr_scheduler_type="linear", warmup_steps=0, max_steps=updates, seed=seed,
            per_device_train_batch_size=COMPLETIONS // generations, num_generations=generations, logging_steps=1,
            max_new_tokens=own.task.max_new_tokens, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
            **{"distillation_loss": "dpca", **settings},
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=own.student_tokenizer,
        teacher_processing_class=own.teacher_tokenizer,
        **arguments,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    with stopwatch() as spent:
        trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    student = trainer.model.eval()
    samples = 2
    asked = own.held_out[:100]
    written = models.write(
        student, own.student_tokenizer, [item.prompt for item in asked], own.task.max_new_tokens, samples
    )
    repeated = [item for item in asked for _ in range(samples)]

    def mean(name: str) -> float:
        return statistics.fmean(log.get(name, 0.0) for log in logs)

    return {
        "accuracy": models.accuracy(student, own.student_tokenizer, own.task, own.held_out),
        "sampled_accuracy": models.share_right(own.task, own.student_tokenizer, repeated, written),
        "tokens_written": round(COMPLETIONS * sum(log["completions/mean_length"] for log in logs)),
        "masked_fraction": mean("early_stop/masked_fraction"),
        "cut_fraction": mean("early_stop/cut_fraction"),
        "gated_fraction": mean("gate/masked_fraction"),
        "cpu_seconds": round(spent.cpu_seconds, 1),
    }


def medians(runs: list[dict]) -> dict[str, dict[str, float]]:
    names = [name for name in runs[0] if name not in ("case", "seed")]
    return {
        case: {name: statistics.median(run[name] for run in runs if run["case"] == case) for name in names}
        for case in dict.fromkeys(run["case"] for run in runs)
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=CASES)
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    quiet()
    report = header() | {"updates": args.updates, "completions": COMPLETIONS, "learning_rate": LEARNING_RATE}
    own = world(SCALES["cpu"].size, *WORLDS[args.table])
    teacher = often_wrong(own) if args.table == "rewards" else own.teacher
    report["start_accuracy"] = own.figures["start"]
    report["teacher_accuracy"] = models.accuracy(teacher, own.teacher_tokenizer, own.task, own.held_out)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            for name, case in CASES[args.table].items():
                runs.append({"case": name, "seed": seed, **train(own, teacher, case, seed, folder, args.updates)})
                print(runs[-1], flush=True)
            save(args.output or RESULTS / f"{args.table}.json", report | {"runs": runs, "medians": medians(runs)})


if __name__ == "__main__":
    main()
