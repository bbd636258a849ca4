"""What training does to a student that equals its teacher, by exact expected gradients (no sampling, no model).

    python -m benchmarks.fixed_point.run --assets FOLDER      # writes benchmarks/results/fixed_point/exact.json

A text is a whole number from 0 to 999, all equally likely, a full stop and the end of the turn. The student has the same
distribution of texts as the teacher, each in its own published tokenizer, so their KL is 0. Then come 400 steps of Adam (rate
.02) on the exact expectation of each loss's gradient over all thousand texts. The student's free parameters are the logits at
every prefix. The chunks, and the tokens that may continue at their ends, are those that the package finds.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.report import header, save
from trl_ctopd.losses import ALM, DPCA, ScoredChunks, StrictSampled
from trl_ctopd.rollouts.closing import add_going_on, teacher_going_on, without_undecided
from trl_ctopd.rollouts.pairing import Prompt, Rollout, collate, on_grid, pair
from trl_ctopd.text.aligner import TextAligner
from trl_ctopd.text.continuations import Continuations


PAIRS = (
    ("smollm2-instruct", "llama-3.2"),
    ("qwen2.5", "deepseek-v3"),
    ("mistral-v3", "llama-3.2"),
    ("phi-3-mini", "deepseek-v3"),
    ("llama-2", "llama-3.2"),
    ("smollm2-instruct", "gpt2"),  # in both of these a later digit can undo what the next one decided
    ("smollm2-instruct", "t5-small"),
    ("llama-3.2", "smollm2-instruct"),  # a student token holds several of the teacher's
)
STEPS, RATE = 400, 0.02
FILE = Path(__file__).parents[1] / "results" / "fixed_point" / "exact.json"


@dataclass
class OneSided:
    """A loss that is not told how the teacher leaves the student's tokens closed."""

    loss: Callable
    event: str = "closed"

    def __call__(self, batch: ScoredChunks, num_items: int) -> tuple[torch.Tensor, dict]:
        return self.loss(replace(batch, teacher_close_log_probs=None), num_items)


METHODS = {
    "dpca (closed, macro: the default)": DPCA(),
    "dpca, closed on the student's side alone": OneSided(DPCA()),
    "dpca, credit previous": DPCA("previous"),
    "dpca, open, semantic (the paper's)": DPCA(event="open"),
    "dpca, open, macro": DPCA("macro", event="open"),
    "strict_sampled": StrictSampled(),
    "alm": ALM(),
}


class Numbers:
    """
    The thousand texts in two tokenizers, and the student as a table of logits.

    Args:
        closed: whether chunks are those that closed events need, see `without_undecided`.

    Attributes:
        start (P, V): the student's log-probs at its P prefixes over its V tokens, with the teacher's distribution of texts.
    """

    def __init__(self, student, teacher, closed: bool):
        stop, end = student.eos_token_id, teacher.eos_token_id
        completions = [[*student.encode(f"{n}.", add_special_tokens=False), stop] for n in range(1000)]
        rollouts = pair(
            [Prompt([stop], [end])] * 1000, completions, TextAligner(student, teacher), turn_ends={stop: [end]}
        )
        tables = {"": Continuations(student, teacher, [stop])}
        tables[""].reverse = Continuations(teacher, student, [end])
        if closed:
            rollouts = [without_undecided(rollout, tables) for rollout in rollouts]
        self.batch = collate(rollouts, stop)
        add_going_on(self.batch, rollouts, tables)
        tokens = sorted({token for ids in completions for token in ids})
        column = {token: number for number, token in enumerate(tokens)}
        counts = Counter(tuple(ids[:i]) for ids in completions for i in range(len(ids) + 1))
        prefixes = sorted({tuple(ids[:i]) for ids in completions for i in range(len(ids))})
        row = {prefix: number for number, prefix in enumerate(prefixes)}
        self.start = torch.full((len(prefixes), len(tokens)), -1e9, dtype=torch.float64)
        for prefix in prefixes:
            for token in tokens:
                if share := counts[*prefix, token] / counts[prefix]:
                    self.start[row[prefix], column[token]] = math.log(share)
        texts, columns = self.batch["scored"][0].tolist(), (self.batch["scored"][1] + self.batch["input_ids"].shape[1])
        places = [(text, at) for text, at in zip(texts, columns.tolist(), strict=True)]  # the prompt is a single token
        self.rows = torch.tensor([row[tuple(completions[text][:at])] for text, at in places])
        self.columns = torch.tensor([column[completions[text][at]] for text, at in places])
        going_on = [(n, column[i]) for n, i in self.batch["going_on"].T.tolist() if i in column]
        self.places, self.ids = torch.tensor(going_on, dtype=torch.long).view(-1, 2).T
        self.teacher, self.teacher_close = self._teacher_log_probs(rollouts, tables[""])
        self.chunks = sum(len({*rollout.student_chunks}) for rollout in rollouts) / 1000

    def _teacher_log_probs(self, rollouts: list[Rollout], table: Continuations) -> tuple[torch.Tensor, torch.Tensor]:
        """(Y, T) of the teacher's tokens, and of leaving the student's token before each closed."""
        texts = [rollout.teacher_ids for rollout in rollouts]
        counts = Counter(tuple(ids[:i]) for ids in texts for i in range(len(ids) + 1))
        found = torch.zeros(2, *self.batch["teacher_ids"].shape, dtype=torch.float64)
        for text, (ids, rollout) in enumerate(zip(texts, rollouts, strict=True)):
            left = [counts[tuple(ids[:i])] for i in range(len(ids))]
            for place, token in zip(*teacher_going_on(rollout, table), strict=True):
                left[place] -= counts[*ids[:place], token]
            for i in range(len(ids)):
                before = counts[tuple(ids[:i])]
                found[0, text, i] = math.log(counts[tuple(ids[: i + 1])] / before)
                found[1, text, i] = math.log(left[i] / before)
        return found[0], found[1]

    def scored(self, logits: torch.Tensor) -> ScoredChunks:
        """All texts as the batch for a loss, for the student with these logits (P, V)."""
        log_probs = logits.log_softmax(-1)
        going_on = torch.zeros(len(self.rows), dtype=torch.float64).index_add(
            0, self.places, log_probs.exp()[self.rows[self.places], self.ids]
        )
        scored, input_ids = self.batch["scored"], self.batch["input_ids"]
        names = "student_chunks", "teacher_chunks", "student_widths", "num_chunks"
        return ScoredChunks(
            student_log_probs=on_grid(log_probs[self.rows, self.columns], scored, input_ids),
            teacher_log_probs=self.teacher,
            close_log_probs=on_grid(torch.log1p(-going_on), scored, input_ids),
            teacher_close_log_probs=self.teacher_close,
            **{name: self.batch[name] for name in names},
        )

    def expected_gradient(self, loss: Callable, logits: torch.Tensor) -> torch.Tensor:
        """(P, V) gradient of the loss, with each text weighted by its probability under the student."""
        batch = self.scored(logits)
        p = batch.student_log_probs.detach().sum(1).exp()
        leaves = [part.detach().requires_grad_() for part in (batch.student_log_probs, batch.close_log_probs)]
        value, _ = loss(replace(batch, student_log_probs=leaves[0], close_log_probs=leaves[1]), 1)
        slopes = torch.autograd.grad(value, leaves, allow_unused=True)
        parts = zip(slopes, (batch.student_log_probs, batch.close_log_probs), strict=True)
        surrogate = sum((p[:, None] * slope * part).sum() for slope, part in parts if slope is not None)
        return torch.autograd.grad(surrogate, logits)[0]

    def figures(self, logits: torch.Tensor) -> dict[str, float]:
        log_p = self.scored(logits).student_log_probs.detach().sum(1)
        p = log_p.exp()
        return {
            "kl": (p * (log_p + math.log(1000))).sum().item(),
            "one_digit": p[:10].sum().item(),
            "three_digits": p[100:].sum().item(),
        }


def train(world: Numbers, loss: Callable, steps: int = STEPS) -> dict:
    """The figures after `steps`, and the largest element of the gradient at the start."""
    logits = world.start.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=RATE)
    first = None
    for _ in range(steps):
        logits.grad = world.expected_gradient(loss, logits)
        first = logits.grad.abs().max().item() if first is None else first
        optimizer.step()
    return {"gradient_at_start": first, **world.figures(logits)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder with `tokenizers/` of the published models")
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--student", help="only this student's pairs; the other runs in the file are kept")
    parser.add_argument("--teacher", help="only this teacher's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [pair for pair in PAIRS if args.student in (None, pair[0]) and args.teacher in (None, pair[1])]
    kept = json.loads(args.out.read_text())["runs"] if args.out.exists() else []
    report, found = header(), [run for run in kept if (run["student"], run["teacher"]) not in chosen]
    for names in chosen:
        pair = [AutoTokenizer.from_pretrained(args.assets / "tokenizers" / name) for name in names]
        worlds = {closed: Numbers(*pair, closed) for closed in (True, False)}
        print(
            f"{names[0]} <- {names[1]}: {worlds[False].chunks:.2f} chunks a text, {worlds[True].chunks:.2f} closed ones"
        )
        for method, loss in METHODS.items():
            world = worlds[getattr(loss, "event", "open") == "closed"]
            figures = train(world, loss)
            found.append(
                {"student": names[0], "teacher": names[1], "chunks": world.chunks, "method": method, **figures}
            )
            print(
                f"   {method:36} gradient at start {figures['gradient_at_start']:.1e}  KL {figures['kl']:.4f}  ", end=""
            )
            print(f"one digit {figures['one_digit']:.1%}, three {figures['three_digits']:.1%}", flush=True)
    save(args.out, {**report, "steps": STEPS, "learning_rate": RATE, "optimizer": "Adam", "runs": found})


if __name__ == "__main__":
    main()
