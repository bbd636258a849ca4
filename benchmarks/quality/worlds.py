"""A world: a task, a teacher that knows it, a weak student, and prompts. Trained once and cached on disk.

Decisions:
- All methods and seeds of a task and a pair of tokenizers use the same world, so that a difference between two runs is due to
  the method or to the seed of the distillation.
- The held-out prompts and those for choosing learning rates are disjoint. No training, of the two models or of the
  distillation, sees any of them.
- `teacher="same"` is another teacher, trained in the same way on the student's own tokenizer and template.
- The cache is keyed by the settings and by the code that makes a world.
"""

import fcntl
import hashlib
import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    Olmo2Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from . import models, tasks, toy_pairs
from .tasks import Item, Task


CACHE = Path(os.environ.get("CTOPD_BENCHMARK_CACHE", "~/.cache/trl_ctopd_benchmarks")).expanduser()
FOLDER = Path(__file__).parent
CODE = [FOLDER / name for name in ("tasks.py", "toy_pairs.py", "models.py")]
CODE.append(FOLDER.parents[1] / "examples" / "demo" / "from_nothing.py")


@dataclass(frozen=True)
class Size:
    """The sizes of the two models, the lengths of their trainings, and the lengths of the task's answers."""

    teacher_width: int
    student_width: int
    layers: int
    teacher_steps: dict[str, int]  # by task
    student_steps: dict[str, int]
    same_teacher_steps: dict[str, int]  # of a teacher with the student's tokenizer
    batch_size: int
    learning_rate: float
    task: dict[str, dict[str, int]]  # arguments of each task
    held_out: int
    prompts: int  # of the distillation
    device: str = "cpu"


@dataclass
class World:
    task: Task
    teacher: PreTrainedModel
    teacher_tokenizer: PreTrainedTokenizerBase
    student: PreTrainedModel
    student_tokenizer: PreTrainedTokenizerBase
    held_out: list[Item]
    validation: list[Item]
    questions: list[Item]
    folder: Path  # of the teacher and its tokenizer
    figures: dict[str, float]  # accuracies of the teacher and of the student at its start


def world(size: Size, task_name: str, pair: str, teacher: str = "cross", seed: int = 0) -> World:
    """The world, from the cache or trained now."""
    task = getattr(tasks, task_name)(**size.task.get(task_name, {}))
    rng = random.Random(f"{task_name} {seed}")
    held_out = tasks.draw_different(task, size.held_out, rng)
    kept = frozenset(item.prompt for item in held_out)
    validation = tasks.draw_different(task, size.held_out, rng, kept)
    kept |= frozenset(item.prompt for item in validation)
    unseen = replace(task, draw=partial(_draw_unseen, task, kept))
    questions = [unseen.draw(rng) for _ in range(size.prompts)]
    build = partial(_train, size, unseen, pair, seed=seed)
    student, student_tokenizer, student_figures, _ = _cached(
        {**_settings(size, "student", task_name), "pair": pair, "seed": seed},
        build,
        held_out,
    )
    teacher, teacher_tokenizer, teacher_figures, folder = _cached(
        {**_settings(size, f"{teacher} teacher", task_name), "pair": pair, "seed": seed},
        build,
        held_out,
    )
    figures = {"teacher": teacher_figures["accuracy"], "start": student_figures["accuracy"]}
    return World(
        task,
        teacher.to(size.device),
        teacher_tokenizer,
        student.to(size.device),
        student_tokenizer,
        held_out,
        validation,
        questions,
        folder,
        figures,
    )


def _settings(size: Size, side: str, task: str) -> dict:
    """The parts of `size` that the side's training depends on."""
    own = {"student": "student", "cross teacher": "teacher", "same teacher": "same_teacher"}[side]
    return {
        "side": side,
        "task": task,
        "arguments": size.task.get(task, {}),
        "width": size.student_width if side == "student" else size.teacher_width,
        "steps": getattr(size, f"{own}_steps")[task],
        **{name: getattr(size, name) for name in ("layers", "batch_size", "learning_rate", "held_out")},
    }


def _draw_unseen(task: Task, kept: frozenset[str], rng: random.Random) -> Item:
    while True:
        item = task.draw(rng)
        if item.prompt not in kept:
            return item


def _train(size: Size, task: Task, pair: str, side: str, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    rng = random.Random(f"{side} {seed}")
    set_seed(seed)
    items = [task.draw(rng) for _ in range(3000)]
    texts = [f"{item.prompt}\n{item.answer}" for item in items]
    texts += 20 * [f"{item.prompt}\n{item.answer}" for item in tasks.second_skill()]
    tokenizers = toy_pairs.build(pair, texts)
    is_student, settings = side == "student", _settings(size, side, task.name)
    tokenizer = tokenizers[0 if is_student or side == "same teacher" else 1]
    config = LlamaConfig if is_student else Olmo2Config
    model = models.new_model(config, tokenizer, settings["width"], size.layers).to(size.device)
    example = models.student_example if is_student else models.teacher_example
    label, steps = f"{task.name}, {pair}: {side}", settings["steps"]
    models.pretrain(model, tokenizer, partial(example, task, rng), steps, label, size.learning_rate, size.batch_size)
    return model, tokenizer


def _cached(settings: dict, build, held_out: list[Item]) -> tuple:
    """Model, tokenizer, figures and their folder."""
    code = "".join(path.read_text() for path in CODE)
    digest = hashlib.sha256((json.dumps(settings, sort_keys=True) + code).encode()).hexdigest()[:16]
    folder = CACHE / "worlds" / digest
    with locked(CACHE / "locks" / digest):
        if not (folder / "figures.json").exists():
            task = build.args[1]
            model, tokenizer = build(settings["side"])
            folder.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            figures = {"accuracy": models.accuracy(model, tokenizer, task, held_out)}
            (folder / "settings.json").write_text(json.dumps(settings, indent=2) + "\n")
            (folder / "figures.json").write_text(
                json.dumps(figures) + "\n"
            )  # written last: the folder is then complete
            print(f"{task.name}, {settings['pair']}: the {settings['side']}'s accuracy is {figures['accuracy']:.3f}")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder), json.loads((folder / "figures.json").read_text()), folder


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Yields whether the lock is ours. The system releases it when a process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
