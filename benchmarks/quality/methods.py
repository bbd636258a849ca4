"""The methods that are compared, and a run of each.

Decisions:
- Our methods all use `CrossTokenizerGKDTrainer`; `trl_gold…` are TRL's own `GOLDTrainer`.
- Every run has the same number of updates, prompts and completions a prompt, but for `gvpo`, which compares completions of one prompt: it
  has as many completions, four for each of a quarter of the prompts. All have AdamW with linear decay and no warm-up. A
  method's own settings are those of its paper. The learning rate is chosen for each method and world from one grid.
- TRL's trainer lets the teacher read the student's chat template, in the teacher's tokens. Teachers as small as these know
  only their own template. In `trl_gold_template…` a patch in this file gives the teacher its own template instead.
- FLOPs are 2 · parameters · tokens for a forward pass and 6 for a training step. Generation counts as one forward pass over
  prompt and completion. The teacher's FLOPs are those that the method needs: none for `sft`, those of generation for `seq_kd`.
  Our trainer scores such texts too, for its log; that time is in the seconds, but not in the FLOPs.
- Seconds are CPU time of the process, without evaluation, since the machine has other work.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl.experimental.gold import GOLDConfig, GOLDTrainer, gold_trainer

from benchmarks.clock import Clock, stopwatch
from benchmarks.speed.alignment import LARGE_CHUNK, next_match
from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer, TextAligner, TextAlignment
from trl_ctopd.losses.policy_gradient import PolicyGradient
from trl_ctopd.text.aligner import AlignedTokens

from . import models
from .models import messages
from .tasks import Item, second_skill
from .worlds import World


@dataclass(frozen=True)
class Method:
    """
    Attributes:
        config: of our trainer, or of TRL's if `gold`.
        decode_and_compare: whether the published aligner replaces the byte-exact one.
        own_template: whether GOLD's teacher reads its own chat template.
        teacher_flops: whether the method needs the teacher.
    """

    config: dict = field(default_factory=dict)
    decode_and_compare: bool = False
    gold: bool = False
    own_template: bool = False
    teacher_flops: bool = True


LOGGED = (
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "gap/nats_per_byte",
    "alignment/masked_fraction",
    "completions/mean_length",
    "completions/truncated_fraction",
    "given/gap/nats_per_byte",
    "given/completions/mean_length",
    "given/completions/truncated_fraction",
)


@dataclass
class Constant(PolicyGradient):
    """A control without a teacher: every token has the advantage -1 (arXiv 2608.31046)."""

    def __call__(self, batch, num_items):
        advantages = -(batch.student_chunks >= 0).to(batch.student_log_probs.dtype)
        return self.surrogate(batch, advantages, torch.zeros_like(advantages), num_items)


def _ours(loss: str, **config) -> Method:
    return Method({"distillation_loss": loss, **config})


def _off_policy(loss: str, **loss_kwargs) -> Method:
    return _ours(loss, lmbda=0.0, **({"distillation_loss_kwargs": loss_kwargs} if loss_kwargs else {}))


ON_POLICY = {"lmbda": 1.0, "temperature": 1.0, "top_p": 1.0, "uld_token_merge_strategy": "bayesian"}
ON_POLICY |= {"uld_skip_student_eos": False, "uld_skip_teacher_eos": False}
HYBRID = {"uld_use_hybrid_loss": True}

METHODS: dict[str, Method] = {
    "dpca": _ours("dpca", event="open"),
    "dpca_macro": _ours("dpca", event="open", credit="macro"),
    "dpca_closed": _ours("dpca", event="closed"),
    "strict_sampled": _ours("strict_sampled"),
    "reverse_kl": _ours("reverse_kl"),
    "seq_kd": Method({"distillation_loss": "sft", "lmbda": 0.0, "seq_kd": True}),
    "bpm": _ours("bpm"),
    "strict_topk": _ours("strict_topk"),
    "simct": _ours("simct"),
    "dpca_uniform": _ours("dpca", event="open", credit="uniform"),
    "dpca_last": _ours("dpca", event="open", credit="last"),
    "sft": Method({"distillation_loss": "sft", "lmbda": 0.0}, teacher_flops=False),
    "escd": _ours("escd"),
    "gold": _ours("gold"),
    "alm": _ours("alm"),
    "gvpo": _ours("gvpo", num_generations=4, per_device_train_batch_size=6),
    "dpca_byte_length": _ours("dpca", event="open", credit="byte_length"),
    "xtoken": _ours("xtoken"),
    "uld": _ours("uld"),
    "cdm": _ours("cdm"),
    "multi_level_ot": _ours("multi_level_ot"),
    "trl_gold": Method(gold=True),
    "trl_gold_on": Method(ON_POLICY, gold=True),
    "trl_gold_template_on": Method(ON_POLICY, gold=True, own_template=True),
    "trl_gold_template_hybrid": Method({**ON_POLICY, **HYBRID}, gold=True, own_template=True),
    "trl_gold_template_off": Method({**ON_POLICY, "lmbda": 0.0}, gold=True, own_template=True),
    "dpca_decode_and_compare": Method({"distillation_loss": "dpca", "event": "open"}, decode_and_compare=True),
    "constant": Method({"distillation_loss": Constant()}, teacher_flops=False),
    "alm_off": _off_policy("alm"),
    "gold_off": _off_policy("gold"),
    "uld_off": _off_policy("uld", cross_entropy_weight=1.0),
    "cdm_off": _off_policy("cdm", cross_entropy_weight=1.0),
}


@dataclass(frozen=True)
class Run:
    """One run's settings: all that determines it, apart from the size of its world."""

    method: str
    task: str
    pair: str
    teacher: str  # "cross" or "same": whether it has another tokenizer than the student, or the same
    seed: int
    learning_rate: float
    updates: int
    prompts: int  # for each update
    purpose: str  # "tuning" runs are evaluated on prompts of their own
    measured_at: tuple[int, ...]  # updates after which greedy accuracy is measured


class DecodeAndCompare:
    """DPCA's published aligner in place of ours: extends a slice on each side until both decode to the same text, drops
    chunks of more than six tokens, and stops aligning a text where it gets stuck."""

    def __init__(self, aligner: TextAligner, student, teacher):
        self._exact, self.student, self.teacher = aligner, student, teacher

    def __call__(self, completions) -> list[TextAlignment]:
        return [self._aligned(alignment) for alignment in self._exact(completions)]

    def _aligned(self, exact: TextAlignment) -> TextAlignment:
        student_ids, teacher_ids = exact.student.ids, exact.teacher.ids
        student, teacher = (np.full(len(ids), -1) for ids in (student_ids, teacher_ids))
        at, number = (0, 0), 0
        while at[0] < len(student_ids) and at[1] < len(teacher_ids):
            match = next_match(self, student_ids, teacher_ids, *at)
            if match is None:
                break
            if max(match[0] - at[0], match[1] - at[1]) <= LARGE_CHUNK:
                student[at[0] : match[0]] = teacher[at[1] : match[1]] = number
                number += 1
            at = match
        sides = ((exact.student, student), (exact.teacher, teacher))
        student, teacher = (AlignedTokens(side.ids, chunks, side.widths) for side, chunks in sides)
        return replace(exact, student=student, teacher=teacher, num_chunks=number)


class Watch(TrainerCallback):
    """Measures greedy accuracy after some updates, and the CPU seconds that this takes."""

    def __init__(self, run: Run, world: World, items: list[Item], clock: Clock):
        self._run, self._world, self._items, self._clock = run, world, items, clock
        self.accuracy: dict[int, float] = {}
        self.student_tokens: dict[int, int] = {}
        self.cpu_seconds = 0.0

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step not in self._run.measured_at:
            return
        world = self._world
        with stopwatch() as spent, self._clock.phase("evaluation"), _evaluating(model):
            self.accuracy[state.global_step] = models.accuracy(model, world.student_tokenizer, world.task, self._items)
        self.student_tokens[state.global_step] = int(self._clock.step.tokens["written"])
        self.cpu_seconds += spent.cpu_seconds


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Sampling inside does not change the random numbers of the training."""
    training = model.training
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        yield
    model.train(training)


def do(run: Run, world: World, folder: Path, rendered: dict) -> dict:
    """The result of a run. `rendered` keeps a world's dataset, rendered for both models, from one run to the next."""
    items = world.validation if run.purpose == "tuning" else world.held_out
    method, clock = METHODS[run.method], Clock("cpu")
    watch = Watch(run, world, items, clock)
    trainer = (_trl if method.gold else _ours_built)(method, run, world, folder, watch, rendered)
    trainer.remove_callback(PrinterCallback)
    (_watch_trl if method.gold else _watch_ours)(trainer, clock)
    clock.start()
    sides = world.student_tokenizer, world.teacher_tokenizer
    with teacher_template(*sides) if method.own_template else nullcontext():
        trainer.train()
    clock.stop()
    tokens = {name: int(count) for name, count in clock.step.tokens.items()}
    student = trainer.model
    with clock.phase("evaluation"), _evaluating(student):
        ends = _measured(run, student, world, items)
    parameters = {"student": student.num_parameters(), "teacher": world.teacher.num_parameters()}
    written_share = method.config.get("lmbda", 0.5 if method.gold else 1.0)
    finite = all(torch.isfinite(weight).all() for weight in student.parameters())
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        **ends,
        "accuracy_curve": watch.accuracy,
        "student_tokens_curve": watch.student_tokens,
        "start": world.figures["start"],
        "teacher_accuracy": world.figures["teacher"],
        "cpu_seconds": round(clock.step.cpu_seconds - watch.cpu_seconds, 2),
        "tokens": tokens,
        "parameters": parameters,
        "teacher_flops": 2 * parameters["teacher"] * tokens["teacher"] * method.teacher_flops,
        "student_flops": int((6 + 2 * written_share) * parameters["student"] * tokens["student"]),
        "finite": bool(finite),
        "log": [{name: number(entry[name]) for name in LOGGED if name in entry} for entry in log],
    }


def number(value):
    return (round(value, 5) if math.isfinite(value) else str(value)) if isinstance(value, float) else value


def _measured(run: Run, student: PreTrainedModel, world: World, items: list[Item]) -> dict:
    """Greedy accuracy, also on the second skill; and, except for tuning runs, pass@k and the gap of sampled answers."""
    tokenizer, task = world.student_tokenizer, world.task
    found = {"accuracy": models.accuracy(student, tokenizer, task, items)}
    skill = second_skill()
    written = models.write(student, tokenizer, [item.prompt for item in skill], 40)
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    found["second_skill"] = sum(t == item.answer for t, item in zip(texts, skill, strict=True)) / len(skill)
    samples = 4
    asked = items[: len(items) // (4 if run.purpose == "tuning" else 2)]
    written = models.write(student, tokenizer, [item.prompt for item in asked], task.max_new_tokens, samples)
    repeated = [item for item in asked for _ in range(samples)]
    good = models.right(task, tokenizer, repeated, written)
    found["sampled_accuracy"] = sum(good) / len(good)
    found[f"pass_at_{samples}"] = sum(any(good[i : i + samples]) for i in range(0, len(good), samples)) / len(asked)
    return {**found, "gap_nats_per_byte": _gap(student, world, repeated, written)}


def _gap(student: PreTrainedModel, world: World, items: list[Item], written: list[list[int]]) -> float | None:
    """Student minus teacher log-prob of whole sampled answers that end, in nats a byte. The teacher reads their text."""
    tokenizer, end = world.student_tokenizer, world.student_tokenizer.eos_token_id
    pairs = [(item.prompt, ids) for item, ids in zip(items, written, strict=True) if ids[-1] == end and len(ids) > 1]
    if not pairs:
        return None
    prompts, completions = zip(*pairs, strict=True)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    theirs = world.teacher_tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    theirs = [[*ids, world.teacher_tokenizer.eos_token_id] for ids in theirs]
    own = models.total_log_probs(student, tokenizer, prompts, list(completions))
    taught = models.total_log_probs(world.teacher, world.teacher_tokenizer, prompts, theirs)
    return round(((own - taught).sum() / sum(len(text.encode()) for text in texts)).item(), 5)


# --- our trainer


def _ours_built(
    method: Method, run: Run, world: World, folder: Path, watch: Watch, rendered: dict
) -> CrossTokenizerGKDTrainer:
    key = (run.task, run.pair, run.teacher)
    if key not in rendered:
        # with references, so that the same dataset serves the off-policy methods
        rendered[key] = _trainer(Method({"distillation_loss": "sft", "lmbda": 0.0}), run, world, folder, _rows(world))
        rendered[key] = rendered[key].train_dataset
    trainer = _trainer(method, run, world, folder, rendered[key], callbacks=[watch])
    if method.decode_and_compare:
        seat = trainer.panel.only
        seat.aligner = DecodeAndCompare(seat.aligner, world.student_tokenizer, world.teacher_tokenizer)
    return trainer


def _trainer(
    method: Method, run: Run, world: World, folder: Path, rows: Dataset, **options
) -> CrossTokenizerGKDTrainer:
    return CrossTokenizerGKDTrainer(
        model=copy.deepcopy(world.student),
        teacher_model=copy.deepcopy(world.teacher),  # a trainer replaces its models' forward
        args=CrossTokenizerGKDConfig(
            max_new_tokens=world.task.max_new_tokens,
            activation_checkpointing=False,
            **{**_common(run, world, folder), **method.config},
        ),
        train_dataset=rows,
        processing_class=world.student_tokenizer,
        teacher_processing_class=world.teacher_tokenizer,
        **options,
    )


def _rows(world: World) -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": messages(item.prompt), "completion": [{"role": "assistant", "content": item.answer}]}
            for item in world.questions
        ]
    )


def _common(run: Run, world: World, folder: Path) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": run.prompts,
        "max_steps": run.updates,
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "logging_steps": max(1, run.updates // 8),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": world.student.device.type == "cpu",
        "dataloader_pin_memory": False,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": run.seed,
    }


def _watch_ours(trainer: CrossTokenizerGKDTrainer, clock: Clock) -> None:
    def read(args, kwargs, result):
        return {"teacher": sum(len(row) for part in args[:2] for row in part)}  # prompts and completions

    def learned(args, kwargs, result):
        tokens = int(args[1]["lengths"].sum())
        return {"student": tokens, "written": tokens - int(args[1]["prompt_lengths"].sum())}

    clock.watch(trainer.teacher, "scores", "teacher", read)
    clock.watch(trainer, "training_step", "student", learned)


# --- TRL's


def _trl(method: Method, run: Run, world: World, folder: Path, watch: Watch, rendered: dict) -> GOLDTrainer:
    rows = [
        {"messages": [*messages(item.prompt), {"role": "assistant", "content": item.answer}]}
        for item in world.questions
    ]
    return GOLDTrainer(
        copy.deepcopy(world.student),
        copy.deepcopy(world.teacher),
        GOLDConfig(
            **_common(run, world, folder),
            max_completion_length=world.task.max_new_tokens,
            max_length=None,
            use_uld_loss=True,
            teacher_tokenizer_name_or_path=str(world.folder),
            **method.config,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=world.student_tokenizer,
        callbacks=[watch],
    )


def _watch_trl(trainer: GOLDTrainer, clock: Clock) -> None:
    def read_by(side):
        return lambda args, kwargs, result: {side: int(kwargs["attention_mask"].sum())}

    original = trainer.compute_loss

    def counted(model, inputs, *args, **kwargs):
        clock.step.tokens["written"] += int((inputs["labels"] != -100).sum())
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = counted
    clock.watch(trainer, "generate_on_policy_outputs", "generation")
    clock.watch(trainer.teacher_model, "forward", "teacher", read_by("teacher"))
    clock.watch(trainer.model, "forward", "student", read_by("student"))


@contextmanager
def teacher_template(*sides: PreTrainedTokenizerBase) -> Iterator[None]:
    """Inside, GOLD's teacher reads each question in its own chat template. `sides`: the student's tokenizer and the teacher's."""
    original: Callable = gold_trainer.build_teacher_inputs_from_texts
    mark = "QUESTION"
    student, teacher = (
        t.apply_chat_template(messages(mark), add_generation_prompt=True, tokenize=False).split(mark) for t in sides
    )

    def translated(tokenizer, prompt_texts, *args, **kwargs):
        questions = []
        for text in prompt_texts:
            if not (text.startswith(student[0]) and text.endswith(student[1])):
                raise ValueError(f"Not a prompt of the student's chat template: {text!r}.")
            questions.append(text.removeprefix(student[0]).removesuffix(student[1]))
        return original(tokenizer, [question.join(teacher) for question in questions], *args, **kwargs)

    with mock.patch.object(gold_trainer, "build_teacher_inputs_from_texts", translated):
        yield
