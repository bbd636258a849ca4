"""
Whether a student that equals its teacher stays, and one that does not arrives, through the trainer.

    python -m benchmarks.fixed_point.trained      # from the repository root; some minutes
    python -m benchmarks.fixed_point.trained --steps 240 --methods reverse_kl "dpca (closed, the default)" --every 20 --output FILE

Writes `benchmarks/results/fixed_point/trained.json`; with `--every`, also the reverse KL during training.

Decisions:
- A text is a whole number from 0 to 999 and a full stop, all equally likely. The teacher writes up to three digits a token, the
  student one: what tokenizers of the kinds of Llama-3 or DeepSeek and of Qwen, Mistral or Gemma do. Both learn this law from
  nothing, so that next to nothing is left to learn; another student has learned that numbers of one, two and three digits are
  equally frequent.
- The reverse KL is that of the texts, exact over the thousand: the student's probability of each, divided by their sum, against
  the teacher's. `elsewhere` is the student's probability of all other texts.
- One learning rate and linear decay for all methods.
"""

import argparse
import copy
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, Olmo2Config, PrinterCallback, TrainerCallback, set_seed

from benchmarks.quality import models
from benchmarks.quality.models import messages
from benchmarks.quality.toy_pairs import CHATML, ONE_DIGIT, PHI, SPECIAL, THREE_DIGITS, byte_level_bpe, with_template
from benchmarks.report import header, save
from benchmarks.speed.models import quiet
from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer


TEXTS = [f"{n}." for n in range(1000)]
FILE = Path(__file__).parents[1] / "results" / "fixed_point" / "trained.json"
PROMPT, RATE = "Write a number.", 1e-3
STARTS = {"equal": (1 / 1000,) * 3, "a third each": (1 / 30, 1 / 270, 1 / 2700)}  # of a number of so many digits
METHODS = {
    "dpca (closed, the default)": {"distillation_loss": "dpca"},
    "dpca, credit previous": {"distillation_loss": "dpca", "credit": "previous", "event": "open"},
    "dpca, open, semantic": {"distillation_loss": "dpca", "event": "open", "credit": "semantic"},
    "strict_sampled": {"distillation_loss": "strict_sampled"},
    "alm": {"distillation_loss": "alm"},
    "bpm": {"distillation_loss": "bpm"},
    "reverse_kl": {"distillation_loss": "reverse_kl"},
}


def build(start: str, steps: int, seed: int = 0):
    """Teacher, student and their tokenizers."""
    rng = random.Random(seed)
    lines = [f"{PROMPT}\n{text}" for text in TEXTS]
    student_tokenizer = with_template(byte_level_bpe(lines, 0, SPECIAL[PHI], ONE_DIGIT), PHI)
    teacher_tokenizer = with_template(byte_level_bpe(TEXTS * 2, 1300, SPECIAL[CHATML], THREE_DIGITS), CHATML)
    set_seed(seed)
    found = []
    for config, tokenizer, weights in (
        (Olmo2Config, teacher_tokenizer, STARTS["equal"]),
        (LlamaConfig, student_tokenizer, STARTS[start]),
    ):
        model = models.new_model(config, tokenizer, 64, 2)
        chances = torch.tensor([weights[len(text) - 2] for text in TEXTS])
        _learn(model, models.as_batch(tokenizer, [(PROMPT, "", text) for text in TEXTS]), chances, steps, rng)
        found += [model, tokenizer]
    return found


def _learn(model, texts: dict[str, torch.Tensor], chances: torch.Tensor, steps: int, rng: random.Random) -> None:
    """The law of `texts`, on 256 draws a step."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    for _ in range(steps):
        drawn = torch.multinomial(chances, 256, replacement=True, generator=generator)
        model(**{name: rows[drawn] for name, rows in texts.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def state(student, student_tokenizer, teacher, teacher_tokenizer) -> dict:
    scores = []
    for model, tokenizer in ((student, student_tokenizer), (teacher, teacher_tokenizer)):
        ids = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
        own = [[*row, tokenizer.eos_token_id] for row in ids]
        scores.append(models.total_log_probs(model, tokenizer, [PROMPT] * len(TEXTS), own).double())
    log_p, log_q = scores
    p, whole = log_p.softmax(0), log_p.exp().sum().item()
    by_digits = [p[[len(text) == digits + 1 for text in TEXTS]].sum().item() for digits in (1, 2, 3)]
    kl = (p * (log_p.log_softmax(0) - log_q.log_softmax(0))).sum().item()
    return {"kl": round(kl, 5), "digits": [round(x, 5) for x in by_digits], "elsewhere": round(1 - whole, 5)}


class Curve(TrainerCallback):
    """The reverse KL after every so many steps."""

    def __init__(self, every: int, kl_of: Callable):
        self._every, self._kl_of, self.kl = every, kl_of, {}

    def on_step_end(self, args, trainer_state, control, model, **kwargs):
        if trainer_state.global_step % self._every == 0:
            self.kl[trainer_state.global_step] = self._kl_of(model.eval())
            model.train()


def train(method: str, world, steps: int, batch: int, seed: int, every: int | None) -> dict:
    teacher, teacher_tokenizer, student, student_tokenizer = world
    with tempfile.TemporaryDirectory() as folder:
        trainer = CrossTokenizerGKDTrainer(
            model=copy.deepcopy(student),
            teacher_model=copy.deepcopy(teacher),
            args=CrossTokenizerGKDConfig(
                output_dir=folder,
                per_device_train_batch_size=batch,
                max_steps=steps,
                learning_rate=RATE,
                lr_scheduler_type="linear",
                max_new_tokens=8,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                activation_checkpointing=False,
                dataloader_pin_memory=False,
                seed=seed,
                **METHODS[method],
            ),
            train_dataset=Dataset.from_dict({"prompt": [messages(PROMPT)] * (steps * batch)}),
            processing_class=student_tokenizer,
            teacher_processing_class=teacher_tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        curve = Curve(
            every or steps + 1, lambda model: state(model, student_tokenizer, teacher, teacher_tokenizer)["kl"]
        )
        trainer.add_callback(curve)
        trainer.train()
    found = state(trainer.model.eval(), student_tokenizer, teacher, teacher_tokenizer)
    return {**found, "curve": curve.kl} if every else found


def main(
    steps: int,
    batch: int,
    pretraining: int,
    seed: int,
    starts: list[str],
    methods: list[str],
    every: int | None,
    file: Path,
) -> None:
    settings = {"steps": steps, "batch": batch, "pretraining": pretraining, "seed": seed, "learning_rate": RATE}
    kept = json.loads(file.read_text()) if file.exists() else {}
    same = all(kept.get(name) == value for name, value in settings.items())
    report = {**header(), **settings, "starts": kept["starts"] if same else {}}
    for start in starts:
        world = build(start, pretraining)
        found = report["starts"].setdefault(start, {})
        found["start"] = state(world[2], world[3], world[0], world[1])
        for method in methods:
            found[method] = train(method, world, steps, batch, seed, every)
            print(start, method, found[method], flush=True)
            save(file, report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pretraining", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--every", type=int)
    parser.add_argument("--output", type=Path, default=FILE)
    arguments = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    settings = arguments.steps, arguments.batch, arguments.pretraining, arguments.seed, arguments.starts
    main(*settings, arguments.methods, arguments.every, arguments.output)
