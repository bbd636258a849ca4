"""`make demo`: trains a teacher and a weak student, distils the teacher into the student, and shows the result.

    python examples/demo/run.py --seed 1 [--no-control] [--quick] [--output demo_output]

- The distillation sees only questions. The student learns what is right from the teacher's log-probs of the student's own text.
- The control differs in one thing: each chunk gets the gap of another chunk of the batch. So none of its result can come from
  the teacher's scores of this text.
- Accuracies are greedy, on amounts that no training has seen.
- It uses one thread on the CPU, even if there are more cores. Models this small mostly wait for Python, and where another program
  has the second core, two threads took four times as long as one.
"""

import argparse
import copy
import importlib.metadata
import json
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `demo` is a package when this file is the script

import torch
from datasets import Dataset
from demo import models, show, task, toy_tokenizers
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
    set_seed,
)

from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer, align_text
from trl_ctopd.losses import DPCA, Metrics, ScoredChunks
from trl_ctopd.losses.credit import gaps


HELD_OUT = 600
CURVE_POINT = 200  # held-out amounts for each point of the learning curve
PROMPTS_PER_STEP, LEARNING_RATE = 64, 1e-4
CHILDISHNESS = 0.8  # share of irregular words that are wrong in the student's training text


@dataclass(frozen=True)
class Steps:
    """Of the two pretrainings and of the distillation."""

    teacher: int = 750
    student: int = 850
    distillation: int = 80


FULL, QUICK = Steps(), Steps(375, 425, 40)


@dataclass
class World:
    """The two models and their questions."""

    teacher: PreTrainedModel
    teacher_tokenizer: PreTrainedTokenizerBase
    student: PreTrainedModel
    student_tokenizer: PreTrainedTokenizerBase
    held_out: list[int]
    questions: Dataset


@dataclass
class Curve:
    """Greedy accuracy on held-out amounts after some steps, and the student's gap to the teacher at all steps."""

    label: str
    accuracy: dict[int, float] = field(default_factory=dict)
    nats_per_byte: dict[int, float] = field(default_factory=dict)


def main(seed: int, control: bool, output: Path, steps: Steps = FULL) -> None:
    seconds: dict[str, float] = {}
    with stopwatch("pretraining", seconds):
        world = build_world(seed, steps)
    with stopwatch("measuring", seconds):
        teacher_accuracy = models.accuracy(world.teacher, world.teacher_tokenizer, world.held_out)
        answers_before = models.write(world.student, world.student_tokenizer, world.held_out)
    before = task.share_right(world.held_out, answers_before)
    print(f"{HELD_OUT} held-out amounts: the teacher writes {teacher_accuracy:.1%} right, the student {before:.1%}.")
    show_judgement(world, answers_before)

    curves = [Curve("distilled")]
    with stopwatch("distillation", seconds):
        distilled = distil(world, steps.distillation, "dpca", curves[0], seed, output / "student")
    with stopwatch("measuring", seconds):
        answers_after = models.write(distilled, world.student_tokenizer, world.held_out)
    after = task.share_right(world.held_out, answers_after)
    figures = {
        "teacher_accuracy": teacher_accuracy,
        "student_accuracy_before": before,
        "student_accuracy_after": after,
        "gap_recovered": (after - before) / (teacher_accuracy - before),
    }
    if control:
        curves.append(Curve("control, gaps shuffled"))
        with stopwatch("control", seconds):
            shuffled = distil(world, steps.distillation, dpca_with_shuffled_gaps, curves[1], seed, output / "control")
        with stopwatch("measuring", seconds):
            control_after = models.accuracy(shuffled, world.student_tokenizer, world.held_out)
        figures["control_accuracy_after"] = control_after
        figures["control_gap_recovered"] = (control_after - before) / (teacher_accuracy - before)

    show.samples(world.held_out[:6], answers_before, answers_after)
    show.figures(figures)
    show.learning_curve(curves, before, teacher_accuracy, output / "learning_curve.png")
    peak_gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    report = {
        **figures,
        "seed": seed,
        "held_out_prompts": HELD_OUT,
        "distillation_steps": steps.distillation,
        "prompts_per_step": PROMPTS_PER_STEP,
        "learning_rate": LEARNING_RATE,
        "seconds": {phase: round(spent, 1) for phase, spent in seconds.items()},
        "peak_memory_gigabytes": round(peak_gigabytes, 2),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "trl_ctopd")},
        "curves": {curve.label: {"accuracy": curve.accuracy, "gap": curve.nats_per_byte} for curve in curves},
    }
    (output / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    print(
        f"{sum(seconds.values()):.0f} seconds, {peak_gigabytes:.1f} GB. In {output}: metrics.json, learning_curve.png, and"
    )
    print(
        f"in the folder{'s student and control a model' if control else ' student the model'} with report.html to look at."
    )


def build_world(seed: int, steps: Steps = FULL) -> World:
    """Draws the held-out amounts, then trains tokenizers, teacher and student on other amounts."""
    set_seed(seed)
    rng = random.Random(seed)
    held_out = task.draw_different(HELD_OUT, rng)
    draw = partial(task.draw, rng, frozenset(held_out))
    tokenizer_text = [draw() for _ in range(4000)]
    teacher_tokenizer = toy_tokenizers.build_teacher_tokenizer(tokenizer_text)
    student_tokenizer = toy_tokenizers.build_student_tokenizer(tokenizer_text)
    teacher = models.new_teacher(teacher_tokenizer)
    models.pretrain(teacher, teacher_tokenizer, draw, task.answer, steps.teacher, "training the teacher")
    student = models.new_student(student_tokenizer)
    childish_answer = partial(task.answer, childishness=CHILDISHNESS, rng=rng)
    models.pretrain(student, student_tokenizer, draw, childish_answer, steps.student, "training the weak student")
    questions = [{"prompt": task.as_messages(draw())} for _ in range(steps.distillation * PROMPTS_PER_STEP)]
    return World(teacher, teacher_tokenizer, student, student_tokenizer, held_out, Dataset.from_list(questions))


def distil(world: World, steps: int, loss: str | Callable, curve: Curve, seed: int, folder: Path) -> PreTrainedModel:
    """A copy of the weak student after `steps` with `loss`; also saved in `folder`."""
    trainer = CrossTokenizerGKDTrainer(
        model=copy.deepcopy(world.student),
        teacher_model=world.teacher,
        args=CrossTokenizerGKDConfig(
            output_dir=str(folder),
            distillation_loss=loss,
            per_device_train_batch_size=PROMPTS_PER_STEP,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            max_new_tokens=models.MAX_NEW_TOKENS,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report=True,
            report_to="none",
            seed=seed,
        ),
        train_dataset=world.questions,
        processing_class=world.student_tokenizer,
        teacher_processing_class=world.teacher_tokenizer,
        callbacks=[Watch(curve, world)],
    )
    trainer.remove_callback(ProgressCallback)  # `Watch` has its own progress bar, with accuracy and gap
    trainer.train()
    trainer.save_model()
    return trainer.model.eval()


def dpca_with_shuffled_gaps(batch: ScoredChunks, num_items: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
    """DPCA of open chunks, with each chunk's gap replaced by that of another chunk from the whole batch."""
    log_probs = batch.student_log_probs.detach()
    gap, _ = gaps(log_probs, batch.teacher_log_probs, batch.student_chunks, batch.teacher_chunks, batch.num_chunks)
    is_chunk = batch.student_sum(torch.ones_like(log_probs)) > 0  # (B, C), False past a row's last chunk
    gap[is_chunk] = gap[is_chunk][torch.randperm(int(is_chunk.sum()))]
    # as if from a teacher that reads every chunk as one token, with a budget that gives exactly this gap
    chunk_numbers = torch.arange(batch.num_chunks).expand_as(gap)
    shuffled = replace(
        batch,
        teacher_log_probs=batch.student_sum(log_probs) + gap,
        teacher_chunks=chunk_numbers.masked_fill(~is_chunk, -1),
    )
    return DPCA("macro", event="open")(shuffled, num_items)


def show_judgement(world: World, answers: list[str]) -> None:
    """Shows chunk by chunk how the teacher scores the student's first wrong answer."""
    answered = zip(world.held_out, answers, strict=True)
    amount = next(amount for amount, answer in answered if not task.is_right(amount, answer))
    prompt = models.prompt_ids(world.student_tokenizer, amount)
    written = world.student.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=models.MAX_NEW_TOKENS)
    alignment = align_text(written[0, len(prompt) : -1].tolist(), world.student_tokenizer, world.teacher_tokenizer)
    student = models.log_probs(world.student, prompt, alignment.student_ids)
    teacher_prompt = models.prompt_ids(world.teacher_tokenizer, amount)
    teacher = models.log_probs(world.teacher, teacher_prompt, alignment.teacher_ids)
    show.judgement(alignment, world.student_tokenizer, world.teacher_tokenizer, student.tolist(), teacher.tolist())


class Watch(TrainerCallback):
    """Fills a `Curve` while the trainer runs, and moves a progress bar."""

    def __init__(self, curve: Curve, world: World, every: int = 5):
        self.curve, self.world, self.every = curve, world, every

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.curve.label)
        self.measure(model, state)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.bar.update()
        if state.global_step % self.every == 0:
            self.measure(model, state)

    def on_log(self, args, state, control, logs, **kwargs):
        if "gap/nats_per_byte" in logs:  # the trainer's last log is a summary without it
            gap = self.curve.nats_per_byte[state.global_step] = logs["gap/nats_per_byte"]
            self.bar.set_postfix(right=f"{self.right:.0%}", gap=f"{gap:.3f} nats/byte")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def measure(self, model: PreTrainedModel, state: TrainerState) -> None:
        model.eval()
        self.right = models.accuracy(model, self.world.student_tokenizer, self.world.held_out[:CURVE_POINT])
        self.curve.accuracy[state.global_step] = self.right
        state.log_history.append({"eval_accuracy": self.right, "step": state.global_step})  # for the report's curves
        model.train()


@contextmanager
def stopwatch(phase: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0) + time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--control",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also run the control, with the chunks' gaps shuffled across the batch",
    )
    parser.add_argument("--quick", action="store_true", help="half of all steps: to see it run, not for figures")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    main(arguments.seed, arguments.control, arguments.output, QUICK if arguments.quick else FULL)
