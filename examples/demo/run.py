"""`make demo`: trains a teacher and a weak student, distils the one into the other, and shows what came of it.

    python examples/demo/run.py --seed 1 [--no-control] [--output demo_output]

- The distillation sees questions alone. What is right, the student learns from the teacher's log-probs of what it wrote.
- The control is the same run but for one thing: each chunk gets the gap of another chunk of the batch. What it learns,
  it doesn't learn from the teacher's judgement of its own words.
- Everything is measured on amounts that no training has seen, with greedy decoding.
- Runs on the CPU, where there is a GPU too: at this size a GPU waits for Python.
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

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from demo import models, show, task, toy_tokenizers  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainerCallback, set_seed  # noqa: E402

from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer  # noqa: E402
from trl_ctopd.credit import gaps  # noqa: E402
from trl_ctopd.losses import DPCA, Metrics, ScoredChunks  # noqa: E402


HELD_OUT = 600
CURVE_POINTS = 200  # held-out amounts behind each point of the learning curve
TEACHER_STEPS, STUDENT_STEPS = 800, 900
DISTILLATION_STEPS, PROMPTS_A_STEP, LEARNING_RATE = 100, 64, 1e-4
CHILDISHNESS = 0.7


@dataclass
class World:
    """Who takes part and what they are asked."""

    teacher: PreTrainedModel
    teacher_tokenizer: PreTrainedTokenizerBase
    student: PreTrainedModel
    student_tokenizer: PreTrainedTokenizerBase
    held_out: list[int]
    questions: Dataset


@dataclass
class Curve:
    """Greedy accuracy on held-out amounts at some steps, and the student's gap to the teacher at each."""

    label: str
    accuracy: dict[int, float] = field(default_factory=dict)
    gap: dict[int, float] = field(default_factory=dict)


def main(seed: int, control: bool, output: Path) -> dict:
    output.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    with stopwatch("pretraining", seconds):
        world = build_world(seed)
    with stopwatch("measuring", seconds):
        teacher_accuracy = models.accuracy(world.teacher, world.teacher_tokenizer, world.held_out)
        answers_before = models.write(world.student, world.student_tokenizer, world.held_out)
    before = task.share_right(world.held_out, answers_before)
    print(f"On {HELD_OUT} held-out amounts: teacher {teacher_accuracy:.1%} right, student {before:.1%}.")

    curves = [Curve("distilled")]
    with stopwatch("distillation", seconds):
        distilled = distil(world, "dpca", curves[0], seed, output / "student")
    answers_after = models.write(distilled, world.student_tokenizer, world.held_out)
    after = task.share_right(world.held_out, answers_after)
    figures = {
        "teacher_accuracy": teacher_accuracy,
        "student_accuracy_before": before,
        "student_accuracy_after": after,
        "gap_recovered": (after - before) / (teacher_accuracy - before),
    }
    if control:
        curves.append(Curve("control: gaps shuffled"))
        with stopwatch("control", seconds):
            shuffled = distil(world, dpca_with_shuffled_gaps, curves[1], seed)
        after = models.accuracy(shuffled, world.student_tokenizer, world.held_out)
        figures |= {
            "control_accuracy_after": after,
            "control_gap_recovered": (after - before) / (teacher_accuracy - before),
        }

    show.learning_curve(curves, before, teacher_accuracy, output / "learning_curve.png")
    show.samples(world.held_out[:6], answers_before, answers_after)
    show.table(figures)
    peak_gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    report = {
        **figures,
        "seed": seed,
        "held_out_prompts": HELD_OUT,
        "distillation_steps": DISTILLATION_STEPS,
        "prompts_per_step": PROMPTS_A_STEP,
        "learning_rate": LEARNING_RATE,
        "seconds": {phase: round(spent, 1) for phase, spent in seconds.items()},
        "peak_memory_gigabytes": round(peak_gigabytes, 2),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "trl_ctopd")},
        "curves": {curve.label: {"accuracy": curve.accuracy, "gap_nats_per_byte": curve.gap} for curve in curves},
    }
    (output / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"{sum(seconds.values()):.0f} seconds, {peak_gigabytes:.1f} GB. See {output}/: metrics.json, learning_curve.png, student/")
    return report


def build_world(seed: int) -> World:
    """Draws the held-out amounts, then trains tokenizers, teacher and student on others."""
    set_seed(seed)
    rng = random.Random(seed)
    held_out = task.draw_different(HELD_OUT, rng)
    draw = partial(task.draw, rng, frozenset(held_out))
    texts_about = [draw() for _ in range(4000)]
    teacher_tokenizer = toy_tokenizers.build_teacher_tokenizer(texts_about)
    student_tokenizer = toy_tokenizers.build_student_tokenizer(texts_about)
    teacher = models.new_teacher(teacher_tokenizer)
    models.pretrain(teacher, teacher_tokenizer, draw, task.answer, TEACHER_STEPS, "training the teacher")
    student = models.new_student(student_tokenizer)
    childish_answer = partial(task.answer, childishness=CHILDISHNESS, rng=rng)
    models.pretrain(student, student_tokenizer, draw, childish_answer, STUDENT_STEPS, "training the weak student")
    questions = [{"prompt": task.as_messages(draw())} for _ in range(DISTILLATION_STEPS * PROMPTS_A_STEP)]
    return World(teacher, teacher_tokenizer, student, student_tokenizer, held_out, Dataset.from_list(questions))


def distil(world: World, loss: str | Callable, curve: Curve, seed: int, save_to: Path | None = None) -> PreTrainedModel:
    """A copy of the weak student, after `DISTILLATION_STEPS` with `loss`."""
    watch = Watch(curve, world)
    trainer = CrossTokenizerGKDTrainer(
        model=copy.deepcopy(world.student),
        teacher_model=world.teacher,
        args=CrossTokenizerGKDConfig(
            output_dir=str(save_to or "unsaved"),
            distillation_loss=loss,
            per_device_train_batch_size=PROMPTS_A_STEP,
            max_steps=DISTILLATION_STEPS,
            learning_rate=LEARNING_RATE,
            max_new_tokens=models.MAX_NEW_TOKENS,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=seed,
        ),
        train_dataset=world.questions,
        processing_class=world.student_tokenizer,
        teacher_processing_class=world.teacher_tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(ProgressCallback)  # `watch` has a bar of its own, with the two figures that matter
    trainer.train()
    if save_to:
        trainer.save_model()
    return trainer.model.eval()


def dpca_with_shuffled_gaps(batch: ScoredChunks, num_items: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
    """DPCA, told that the gap of each chunk is that of another one, drawn from the whole batch."""
    log_probs = batch.student_log_probs.detach()
    gap, _ = gaps(log_probs, batch.teacher_log_probs, batch.student_chunks, batch.teacher_chunks, batch.num_chunks)
    is_chunk = batch.student_sum(torch.ones_like(log_probs)) > 0  # (B, C), False where a row has fewer than C
    gap[is_chunk] = gap[is_chunk][torch.randperm(int(is_chunk.sum()))]
    # a teacher that reads each chunk as one token, which costs the student's budget and the shuffled gap
    chunk_numbers = torch.arange(batch.num_chunks).expand_as(gap)
    shuffled = replace(
        batch,
        teacher_log_probs=batch.student_sum(log_probs) + gap,
        teacher_chunks=chunk_numbers.masked_fill(~is_chunk, -1),
    )
    return DPCA()(shuffled, num_items)


class Watch(TrainerCallback):
    """Fills a `Curve` while the trainer runs, and moves a progress bar."""

    def __init__(self, curve: Curve, world: World, every: int = 5):
        self.curve, self.world, self.every = curve, world, every

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.curve.label)
        self._measure(model, 0)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.bar.update()
        if state.global_step % self.every == 0:
            self._measure(model, state.global_step)

    def on_log(self, args, state, control, logs, **kwargs):
        if "gap/nats_per_byte" in logs:
            self.curve.gap[state.global_step] = logs["gap/nats_per_byte"]
            self.bar.set_postfix(accuracy=f"{self.accuracy:.2f}", nats_per_byte=f"{logs['gap/nats_per_byte']:.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def _measure(self, model: PreTrainedModel, step: int):
        was_training = model.training
        model.eval()
        amounts = self.world.held_out[:CURVE_POINTS]
        self.accuracy = models.accuracy(model, self.world.student_tokenizer, amounts)
        self.curve.accuracy[step] = self.accuracy
        model.train(was_training)


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
        help="also run the control, whose chunks' gaps are shuffled across the batch",
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    arguments = parser.parse_args()
    main(arguments.seed, arguments.control, arguments.output)
