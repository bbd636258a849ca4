"""
How close each credit's gradient is to the exact one, in a world where all completions can be listed.

    python -m benchmarks.quality.gradient      # from the repository root; a minute

Writes `gradient.json` to `benchmarks/results/quality/`.

Decisions:
- The student is a table of logits: five tokens over the letters a and b, three tokens a completion, 125 completions. The
  teacher is another table, with tokens of up to two letters. It reads two letters a token, so that no later text moves a boundary.
- The exact gradient is that of Σ_h p(h) · KL(p(· | h) ‖ q(· | h)), where h is the text before a chunk and · runs over all
  possible chunks. `cosine` is between it and the expectation of the sampled gradient over all completions.
- `noise` is the trace of the sampled gradient's covariance for one completion, over the squared norm of its expectation. It is
  about the number of completions that a step needs before the signal is as large as the noise. It has no scale, so credits
  can be compared.
- A clip of 10 nats is on, as in training. `far` draws both tables' logits with deviation 2, `near` with 0.5.
"""

import argparse
import itertools
import statistics

import numpy as np
import torch

from benchmarks.report import header, save
from trl_ctopd.losses import DPCA, ScoredChunks, StrictSampled
from trl_ctopd.losses.credit import CREDITS
from trl_ctopd.text.chunks import Side, synchronized_chunks

from .run import RESULTS


TOKENS = ("a", "b", "ab", "ba", "aab")
TEACHER_TOKENS = ("a", "b", "aa", "ab", "ba", "bb")
LENGTH = 3
DEVIATIONS = {"far": 2.0, "near": 0.5}
LOSSES = {credit: DPCA(credit=credit, event="open") for credit in CREDITS} | {"strict mask": StrictSampled()}


class Tables:
    """Both models, and all completions with their log-probs."""

    def __init__(self, seed: int, deviation: float):
        self._generator, self._deviation = torch.Generator().manual_seed(seed), deviation
        self.prefixes = [p for length in range(LENGTH) for p in itertools.product(range(len(TOKENS)), repeat=length)]
        self.logits = self._draw(len(self.prefixes), len(TOKENS)).requires_grad_()
        self._row = {prefix: row for row, prefix in enumerate(self.prefixes)}
        self._teacher: dict[tuple[str, ...], torch.Tensor] = {}
        self.completions = list(itertools.product(range(len(TOKENS)), repeat=LENGTH))
        self.rows = torch.tensor([[self._row[y[:i]] for i in range(LENGTH)] for y in self.completions])
        self.ids = torch.tensor(self.completions)
        self.log_p = self.logits.log_softmax(-1)
        self.scores = self.log_p[self.rows, self.ids]  # (125, 3)

    def _draw(self, *shape: int) -> torch.Tensor:
        return self._deviation * torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def taught(self, text: str) -> list[float]:
        """The teacher's log-prob of each of its tokens of `text`."""
        found, pieces = [], in_pairs(text)
        for i, piece in enumerate(pieces):
            table = self._teacher.setdefault(tuple(pieces[:i]), self._draw(len(TEACHER_TOKENS)))
            found.append(table.log_softmax(-1)[TEACHER_TOKENS.index(piece)].item())
        return found

    def batch(self) -> ScoredChunks:
        texts = ["".join(TOKENS[i] for i in y) for y in self.completions]
        widths = [[np.array([len(TOKENS[i]) for i in y]) for y in self.completions]]
        widths.append([np.array([len(piece) for piece in in_pairs(text)]) for text in texts])
        flat = [np.concatenate(rows) for rows in widths]
        sides = [Side(np.cumsum(own), own, np.array([*map(len, rows)])) for own, rows in zip(flat, widths, strict=True)]
        chunks = synchronized_chunks(*sides, np.array([*map(len, texts)]), np.zeros((0, 2), dtype=np.int64))
        student, teacher = (
            [torch.from_numpy(part) for part in np.split(numbers, np.cumsum(side.counts)[:-1])]
            for numbers, side in zip((chunks.student, chunks.teacher), sides, strict=True)
        )
        scores = [torch.tensor(self.taught(text), dtype=torch.float64) for text in texts]
        padded = torch.nn.utils.rnn.pad_sequence
        return ScoredChunks(
            student_log_probs=self.scores.detach().requires_grad_(),
            teacher_log_probs=padded(scores, batch_first=True),
            student_chunks=torch.stack(student),
            teacher_chunks=padded(teacher, batch_first=True, padding_value=-1),
            student_widths=torch.from_numpy(np.stack(widths[0])),
            num_chunks=LENGTH,
        )

    def sampled_gradients(self, loss) -> torch.Tensor:
        """(125, logits): gradient of each completion's loss by the student's logits."""
        batch = self.batch()
        (slopes,) = torch.autograd.grad(loss(batch, 1)[0], batch.student_log_probs)
        score = torch.nn.functional.one_hot(self.ids, len(TOKENS)) - self.log_p.detach().exp()[self.rows]  # (125, 3, 5)
        found = torch.zeros(len(self.completions), *self.logits.shape, dtype=torch.float64)
        place = torch.arange(len(self.completions))[:, None].expand_as(self.rows)
        return found.index_put((place, self.rows), slopes[..., None] * score, accumulate=True).flatten(1)

    def exact_gradient(self) -> torch.Tensor:
        """The gradient of each chunk's reverse KL given the text before it. Chunks grow token by token until both sides end."""
        total = torch.zeros((), dtype=torch.float64)
        heads = [((), torch.zeros((), dtype=torch.float64))]
        while heads:
            head, log_p_head = heads.pop()
            growing = [(head, torch.zeros((), dtype=torch.float64))]
            while growing:
                tokens, log_p = growing.pop()
                text = "".join(TOKENS[i] for i in tokens)
                if tokens == head or (len(tokens) < LENGTH and len(text) % 2):
                    here = self.log_p[self._row[tokens]]
                    growing += [((*tokens, i), log_p + here[i]) for i in range(len(TOKENS))]
                    continue
                before = len(in_pairs("".join(TOKENS[i] for i in head)))
                log_q = sum(self.taught(text)[before:])
                total = total + log_p_head.exp().detach() * log_p.exp() * (log_p - log_q)
                if len(tokens) < LENGTH:
                    heads.append((tokens, log_p_head + log_p))
        return torch.autograd.grad(total, self.logits, retain_graph=True)[0].flatten()


def in_pairs(text: str) -> list[str]:
    return [text[i : i + 2] for i in range(0, len(text), 2)]


def compare(seed: int, deviation: float) -> dict[str, dict[str, float]]:
    """Cosine and noise of each loss's gradient."""
    tables = Tables(seed, deviation)
    exact, p = tables.exact_gradient(), tables.scores.detach().sum(1).exp()
    found = {}
    for name, loss in LOSSES.items():
        sampled = tables.sampled_gradients(loss)
        mean = p @ sampled
        spread = p @ sampled.square().sum(1) - mean.square().sum()
        found[name] = {
            "cosine": torch.nn.functional.cosine_similarity(mean, exact, dim=0).item(),
            "noise": (spread / mean.square().sum()).item(),
        }
    return found


def main(seeds: int) -> None:
    report = {**header(), "seeds": seeds, "deviations": DEVIATIONS, "gradients": {}}
    for name, deviation in DEVIATIONS.items():
        runs = [compare(100 * seed, deviation) for seed in range(seeds)]
        report["gradients"][name] = {
            loss: {
                figure: [round(f([run[loss][figure] for run in runs]), 4) for f in (statistics.median, min, max)]
                for figure in ("cosine", "noise")
            }
            for loss in LOSSES
        }
    save(RESULTS / "gradient.json", report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    torch.set_num_threads(1)
    main(parser.parse_args().seeds)
