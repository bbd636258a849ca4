"""How noisy each loss's gradient is on two pretrained models: variance over its squared mean.

    python -m benchmarks.real_models.noise [--models FOLDER] [--data mbpp.jsonl] [--losses dpca hybrid bpm]

Decisions:
- The prompts are always the same. A draw is one completion for each prompt, by the published student with a new LoRA adapter on
  all linear layers. All losses get the same draws, so that their figures can be compared side by side.
- For n draws with gradients g_k over the adapter's weights and mean m: variance V = Σ|g_k − m|² / (n − 1), squared mean
  |m|² − V / n, since |m|² alone includes a part of the noise. The figure is V over that. It is well measured if it is below n.
- Results are written after each draw from the second on, so that a run may be stopped.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from demo_real import problems
from demo_real.run import STUDENT, TEACHER, build, named, prompts_of

from benchmarks import report
from trl_ctopd.losses import LOSSES, build_loss

from . import script


RESULTS = Path(__file__).parents[1] / "results" / "real_models"
PROMPTS, TOKENS, DRAWS = 8, 64, 16


class Noise:
    """Sums over draws of a gradient, and the noise computed from them."""

    def __init__(self):
        self.draws, self.total, self.squares = 0, None, 0.0

    def add(self, gradient: torch.Tensor) -> None:
        self.draws += 1
        self.total = gradient.double() if self.total is None else self.total + gradient
        self.squares += gradient.double().square().sum().item()

    def figures(self) -> dict[str, float]:
        """`noise` is None where there are too few draws to distinguish the mean from zero."""
        mean = (self.total / self.draws).square().sum().item()
        variance = (self.squares - self.draws * mean) / (self.draws - 1)
        squared_mean = mean - variance / self.draws
        noise = variance / squared_mean if squared_mean > 0 else None
        return {"variance": variance, "squared_mean": squared_mean, "noise": noise}


def configured(spec: str):
    """A loss from its text form: `dpca:event=open,credit=semantic` is dpca with these settings."""
    name, _, settings = spec.partition(":")
    pairs = (pair.split("=") for pair in settings.split(",") if pair)
    return build_loss(name, **{key: setting(value) for key, value in pairs})


def setting(text: str) -> int | float | str:
    """A number where `text` is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def measured(student: str, teacher: str, data: str, specs: list[str], draws: int) -> Iterator[tuple[int, dict]]:
    """After each draw but the first, their number and the figures by loss."""
    tasks = problems.load_problems(data)[:PROMPTS]
    losses = {spec: configured(spec) for spec in specs}
    reading = next((loss for loss in losses.values() if loss.signal == "logits"), next(iter(losses.values())))
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(
            student,
            teacher,
            prompts_of(tasks),
            Path(folder),
            distillation_loss=reading,
            per_device_train_batch_size=PROMPTS,
            max_new_tokens=TOKENS,
        )
    model = trainer.model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    [prompts] = [batch["prompts"] for batch in trainer.get_train_dataloader()]
    noise = {spec: Noise() for spec in specs}
    for draw in range(draws):
        trainer.distillation_loss = reading  # a draw holds what it reads, of which the others are content with less
        with trainer.rollouts.seeded(draw):
            [batch] = trainer._roll_out(model, [prompts], "train")
        batch = trainer._prepare_inputs(batch)
        for spec, loss in losses.items():
            trainer.distillation_loss = loss
            trainer.compute_loss(model, batch).backward()
            noise[spec].add(torch.cat([weight.grad.flatten() for weight in weights]))
            model.zero_grad(set_to_none=True)
        print(f"draw {draw + 1} of {draws}", flush=True)
        if draw:
            yield draw + 1, {spec: own.figures() for spec, own in noise.items()}


def main() -> None:
    parser = script.parser(__doc__, RESULTS / "noise.json")
    parser.add_argument(
        "--losses", nargs="+", default=[*LOSSES], help="names, with settings as name:key=value,key=value"
    )
    parser.add_argument("--draws", type=int, default=DRAWS)
    options = parser.parse_args()
    made_with = report.header()
    student, teacher = named(STUDENT, options.models), named(TEACHER, options.models)
    settings = {"prompts": PROMPTS, "tokens": TOKENS, "student": STUDENT, "teacher": TEACHER}
    for draws, found in measured(student, teacher, options.data, options.losses, options.draws):
        report.save(options.output, {**made_with, **settings, "draws": draws, "losses": found})
    for spec, figures in found.items():
        print(f"{spec:40} {'unknown' if figures['noise'] is None else round(figures['noise'], 2)}")


if __name__ == "__main__":
    main()
