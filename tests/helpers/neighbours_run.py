"""One rank of a preference run (CTPD) and of a run with rewards. test_neighbours_together.py starts it with `accelerate launch`,
and calls it for the single process. Arguments: the folder of the saved models, to which rank 0 writes, and the cases."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from toys import prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer

from trl_ctopd import (
    CrossTokenizerDPOConfig,
    CrossTokenizerDPOTrainer,
    CrossTokenizerGKDConfig,
    CrossTokenizerGKDTrainer,
)


PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
}
TOKENIZERS = {"processing_class": student_tokenizer(), "teacher_processing_class": teacher_tokenizer()}


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def preference(folder: Path, processes: int) -> CrossTokenizerDPOTrainer:
    rows = [
        {
            "prompt": row,
            "chosen": said(f"{n + 40} is the sum"),
            "rejected": said(f"{n * 2} is what" + " of two" * (n % 3)),
        }
        for n, row in enumerate(prompts(8)["prompt"])
    ]
    args = CrossTokenizerDPOConfig(str(folder), per_device_train_batch_size=4 // processes, **PLAIN)
    student, teacher = (
        str(folder.parent / name) for name in ("student", "teacher")
    )  # ZeRO-3 splits them as it loads them
    return CrossTokenizerDPOTrainer(student, teacher, args, Dataset.from_list(rows), **TOKENIZERS)


def preference_of_itself(folder: Path, processes: int) -> CrossTokenizerDPOTrainer:
    """In half precision, with the student as its own reference, and texts whose log-probs half precision would round to whole nats."""
    rows = [
        {
            "prompt": row,
            "chosen": said(f"{n + 40} is the sum" + " of one" * 40),
            "rejected": said("is what" + " of two" * n),
        }
        for n, row in enumerate(prompts(8)["prompt"])
    ]
    settings = {**PLAIN, "bf16": True, "beta": 1.0, "max_steps": 1}
    args = CrossTokenizerDPOConfig(str(folder), per_device_train_batch_size=4 // processes, **settings)
    student = str(folder.parent / "student")
    tokenizers = dict.fromkeys(TOKENIZERS, TOKENIZERS["processing_class"])
    return CrossTokenizerDPOTrainer(student, student, args, Dataset.from_list(rows), **tokenizers)


def rewards(folder: Path, processes: int) -> CrossTokenizerGKDTrainer:
    args = CrossTokenizerGKDConfig(
        str(folder), per_device_train_batch_size=4 // processes, num_generations=2, max_new_tokens=8, **PLAIN
    )
    turn = iter(range(10**6))
    tokenizer = TOKENIZERS["processing_class"]

    def longer(completions, **columns):
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = CrossTokenizerGKDTrainer(
        student_model(), teacher_model(), args, prompts(8), reward_funcs=longer, **TOKENIZERS
    )

    def write(model, prompts, step):
        texts = [" is the sum" if next(turn) % 2 else "one plus two is the sum of what" for _ in prompts]
        return [(tokenizer.encode(text) + [tokenizer.eos_token_id], None) for text in texts]

    trainer.rollouts.write = write
    return trainer


CASES = {"preference": preference, "preference-of-itself": preference_of_itself, "rewards": rewards}


def save_models(folder: Path):
    for name, model, tokenizer in (
        ("student", student_model(), student_tokenizer()),
        ("teacher", teacher_model(), teacher_tokenizer()),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def run(folder: Path, processes: int, names: Sequence[str] = tuple(CASES)) -> dict:
    found = {}
    for name in names:
        trainer = CASES[name](folder / name, processes)
        trainer.train()
        found[name] = [
            {key: log[key] for key in ("loss", "grad_norm", "reward", "reward_std", "rewards/margins") if key in log}
            for log in trainer.state.log_history
            if "loss" in log
        ]
        found["type"] = str(trainer.accelerator.distributed_type)
        if trainer.accelerator.is_main_process:
            (folder / f"found-{processes}.json").write_text(json.dumps(found))
    return found


if __name__ == "__main__":
    run(Path(sys.argv[1]), 2, sys.argv[2:])
