"""
How noisy each loss's gradient is, and the cost of knowing only the teacher's most likely tokens.

    python -m benchmarks.quality.noise      # from the repository root; minutes

Writes `noise.json` to `benchmarks/results/quality/`; `report.py` makes the table.

Decisions:
- The gradient of all the student's weights at the start of each task, for 8 completions at a time, the same for every loss.
- Noise is the variance of these gradients (the trace of their covariance) over the squared norm of their mean. Products of
  different draws estimate the squared norm without the variance. A loss with another target can be quiet: `cosine` is between
  its mean and that of `reverse_kl` without distributions (`dpca` with closed chunks), estimated likewise, so it may exceed 1.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.report import header, save
from benchmarks.speed.models import quiet
from trl_ctopd.losses import BPM, DPCA, ReverseKL

from .methods import Method, Run, _rows, _trainer
from .run import HOME, RESULTS, SCALES
from .worlds import world


PROMPTS, DRAWS = 8, 16
LOSSES = {
    "dpca, open, semantic": DPCA("semantic", event="open"),
    "dpca, open, macro": DPCA("macro", event="open"),
    "bpm": BPM(),
    **{f"reverse_kl, top_k={k}": ReverseKL(top_k=k) for k in (0, 8, 32, 128)},
    "reverse_kl": ReverseKL(),
}
AIM = "reverse_kl, top_k=0"


def gradients(task: str, draws: int) -> dict[str, torch.Tensor]:
    """(draws, weights) for each loss."""
    pair = HOME[task]
    own = world(SCALES["cpu"].size, task, pair)
    run = Run("reverse_kl", task, pair, "cross", 1, 3e-4, draws, PROMPTS, "noise", ())
    found = {name: [] for name in LOSSES}
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(Method({"distillation_loss": "reverse_kl"}), run, own, Path(folder), _rows(own))
        trainer.model.train()
        weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        prompts = iter(trainer.get_train_dataloader())
        for draw in range(draws):
            trainer.state.global_step = draw
            [inputs], count = trainer.get_batch_samples(prompts, 1, trainer.args.device)
            batch = trainer._score(trainer.model, trainer._prepare_inputs(inputs))[0]
            for name, loss in LOSSES.items():
                parts = torch.autograd.grad(loss(batch, count)[0], weights, retain_graph=True, allow_unused=True)
                pairs = zip(parts, weights, strict=True)
                found[name].append(
                    torch.cat([torch.zeros_like(w).flatten() if g is None else g.flatten() for g, w in pairs])
                )
    return {name: torch.stack(rows) for name, rows in found.items()}


def product(a: torch.Tensor, b: torch.Tensor) -> float:
    """The product of two means of draws (n, weights), without products of a draw with itself."""
    n = len(a)
    return ((a.sum(0) @ b.sum(0) - (a * b).sum()) / (n * (n - 1))).item()


def figures(found: dict[str, torch.Tensor]) -> dict[str, dict[str, float | None]]:
    aim, result = found[AIM], {}
    for name, rows in found.items():
        square = product(rows, rows)
        noise = rows.var(0).sum().item() / square if square > 0 else None
        both = square * product(aim, aim)
        cosine = product(rows, aim) / both**0.5 if both > 0 else None
        result[name] = {key: None if x is None else round(x, 3) for key, x in (("noise", noise), ("cosine", cosine))}
    return result


def main(draws: int) -> None:
    report = {**header(), "draws": draws, "completions": PROMPTS, "tasks": {}}
    for task in HOME:
        report["tasks"][task] = figures(gradients(task, draws))
        print(task, report["tasks"][task], flush=True)
    save(RESULTS / "noise.json", report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS)
    quiet()
    torch.set_num_threads(1)
    main(parser.parse_args().draws)
