"""`make demo-real`: SmolLM2-135M-Instruct learns to program from Qwen2.5-Coder-0.5B-Instruct, on two CPU cores.

    python examples/demo_real/run.py [--models FOLDER] [--data mbpp.jsonl] [--output demo_real_output]

- The two have different families, tokenizers (49,152 and 151,936 rows) and chat templates. Neither is trained from nothing:
  both are as published, and only a LoRA adapter of the student learns.
- The student sees task descriptions alone, no code. What is right it learns from the teacher's log-probs of what it wrote.
- Before and after, on tasks that no step has seen: the gap in nats a byte on sampled answers (the same draws every time), and
  how many tasks the greedy answer solves, run against the tests in a process without network, with little time and memory.
- Stopped at any time, the same command goes on where it was; what has been measured is kept in the output folder.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])  # so that `demo_real` and `benchmarks` are packages

from datasets import Dataset
from demo_real import problems, show
from demo_real.answering import answers
from demo_real.measuring import measure
from demo_real.problems import Problem
from peft import LoraConfig

from benchmarks.report import header
from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer


STUDENT = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEACHER = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
HELD_OUT = 200  # tasks that are never learned from
SOLVED, GAP_PROMPTS, ANSWER_TOKENS = (
    40,
    32,
    160,
)  # of the held-out tasks, how many are answered and how many give the gap
STEPS, PROMPTS_PER_STEP, TOKENS, LEARNING_RATE = 24, 8, 96, 3e-4
MICRO_BATCHES = 2  # of a step: the same gradient as with one, and two gigabytes less at the peak
LOSS = "reverse_kl"  # the teacher is in this process, so its distributions are at hand
STEPS_BETWEEN_CHECKPOINTS = 4


class Notes:
    """What has been measured, in a file, so that nothing is measured twice."""

    def __init__(self, path: Path, settings: dict):
        self._path = path
        self.values = json.loads(path.read_text()) if path.exists() else {"settings": settings}
        if self.values["settings"] != settings:
            raise SystemExit(
                f"{path} is of another run: {self.values['settings']}, and now {settings}. Choose another --output."
            )

    def once(self, name: str, measured: Callable[[], Any]) -> Any:
        if name not in self.values:
            began = time.perf_counter()
            self.keep(name, measured())
            self.spend(name, time.perf_counter() - began)
        return self.values[name]

    def keep(self, name: str, value: Any) -> None:
        self.values[name] = value
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps(self.values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(self._path)

    def spend(self, name: str, seconds: float) -> None:
        spent = self.values.get("seconds", {})
        self.keep("seconds", {**spent, name: round(spent.get(name, 0) + seconds, 1)})


def main(
    student: str, teacher: str, data: str, output: Path, loss: str, steps: int, seed: int, decay_steps: int = 0
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    settings = {"student": student, "teacher": teacher, "data": data, "loss": loss, "steps": steps, "seed": seed}
    if decay_steps:
        settings["decay_steps"] = decay_steps
    notes = Notes(output / "measured.json", settings)
    tasks = problems.load_problems(data)
    held_out, training = tasks[:SOLVED], tasks[HELD_OUT:]
    trainer = build(
        student,
        teacher,
        prompts_of(training),
        output / "student",
        prompts_of(held_out[:GAP_PROMPTS]),
        distillation_loss=loss,
        per_device_train_batch_size=PROMPTS_PER_STEP // MICRO_BATCHES,
        gradient_accumulation_steps=MICRO_BATCHES,
        per_device_eval_batch_size=PROMPTS_PER_STEP,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": decay_steps, "decay_type": "linear"},
        max_new_tokens=TOKENS,
        logging_steps=1,
        save_steps=STEPS_BETWEEN_CHECKPOINTS,
        save_total_limit=1,
        report=True,
        seed=seed,
    )
    model = trainer.accelerator.unwrap_model(trainer.model)

    def solving(own_model, tokenizer) -> dict:
        texts = [text for text, _, _ in answers(own_model, tokenizer, [t.messages for t in held_out], ANSWER_TOKENS)]
        return {
            "solved": sum(problems.solved(held_out, texts)),
            "parsable": sum(map(problems.is_python, texts)),
            "answers": texts,
        }

    say(f"{len(held_out)} held-out tasks, {len(training)} to learn from. Measuring student and teacher as they come.")
    with model.disable_adapter():
        before = notes.once("before", lambda: solving(model, trainer.processing_class))
    taught = notes.once("teacher", lambda: solving(trainer.teacher_model, trainer.teacher_processing_class))
    say(f"Solved: the student {before['solved']}, the teacher {taught['solved']}.")
    notes.once("gap_before", lambda: asdict(measure(trainer)))
    say(f"The gap is {notes.values['gap_before']['nats_per_byte']:.3f} nats a byte. {steps} steps.")

    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=any((output / "student").glob("checkpoint-*")))
    notes.spend("training", time.perf_counter() - began)
    trainer.save_model()
    notes.once("gap_after", lambda: asdict(measure(trainer)))
    after = notes.once("after", lambda: solving(model, trainer.processing_class))

    show.answers_side_by_side(held_out[:6], before["answers"], after["answers"], taught["answers"])
    show.figures(notes.values, len(held_out))
    history = [entry for entry in trainer.state.log_history if "gap/nats_per_byte" in entry]
    show.learning_curve(history, notes.values, len(held_out), output / "learning_curve.png")
    notes.keep("curve", [{name: entry[name] for name in ("step", "gap/nats_per_byte", "entropy")} for entry in history])
    notes.keep("made_with", {**header(), "peak_memory_gigabytes": peak_memory()})
    spent = sum(notes.values["seconds"].values())
    say(f"{spent / 60:.0f} minutes. In {output}: measured.json, learning_curve.png and student, with its report.html.")


def build(
    student: str, teacher: str, training: Sequence[dict], folder: Path, held_out: Sequence[dict] = (), **settings
) -> CrossTokenizerGKDTrainer:
    """A trainer on rows of datasets, with a LoRA adapter on all linear layers; on the CPU in float32, unless `settings` of the
    config say otherwise."""
    on_cpu = {
        "model_init_kwargs": {"dtype": "float32"},
        "teacher_model_init_kwargs": {"dtype": "float32"},
        "bf16": False,
        "use_cpu": True,
    }
    common = {"output_dir": str(folder), "gradient_checkpointing": False, "report_to": "none"}
    return CrossTokenizerGKDTrainer(
        model=student,
        teacher_model=teacher,
        args=CrossTokenizerGKDConfig(**{**common, **on_cpu, **settings}),
        train_dataset=Dataset.from_list(list(training)),
        eval_dataset=Dataset.from_list(list(held_out)) if held_out else None,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def prompts_of(tasks: Sequence[Problem]) -> list[dict]:
    return [{"prompt": task.messages} for task in tasks]


def peak_memory() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6), 2)


def named(model: str, folder: Path | None) -> str:
    """A model's name on the hub; or, in a folder that holds models by the lower-case ends of their names, its own folder."""
    return model if folder is None else str(folder / model.split("/")[-1].lower())


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default=STUDENT, help="hub name or folder")
    parser.add_argument("--teacher", default=TEACHER, help="hub name or folder")
    parser.add_argument(
        "--models", type=Path, help="folder that has both, as smollm2-135m-instruct and qwen2.5-coder-0.5b-instruct"
    )
    parser.add_argument("--data", default=problems.HUB_NAME, help="hub name, or a .jsonl file with MBPP's columns")
    parser.add_argument("--output", type=Path, default=Path("demo_real_output"))
    parser.add_argument("--loss", default=LOSS, help="any `distillation_loss`")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--decay-steps", type=int, default=0, help="of these, the last, in which the rate falls to 0")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    own_student, own_teacher = (named(name, options.models) for name in (options.student, options.teacher))
    if not 0 <= options.decay_steps <= options.steps:
        parser.error(f"--decay-steps={options.decay_steps} of --steps={options.steps}")
    main(
        own_student,
        own_teacher,
        options.data,
        options.output,
        options.loss,
        options.steps,
        options.seed,
        options.decay_steps,
    )
