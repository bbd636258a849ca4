"""Whole next-token distributions without ever holding them: projected tile by tile, and again in the backward pass.

A loss on distributions names the positions it compares and hands over a function of a few rows of log-probs. Rows come
through in tiles, each under activation checkpointing, so that no more than one tile of logits is alive, whatever the
length of the texts. Where the texts are short, a loss may keep what its gradient needs, so that nothing is projected
twice. The naive equivalent of `over_tiles`:

    function(student.log_probs()[student_rows], teacher.log_probs()[teacher_rows], *per_row)

Letters: n rows of a tile, V_S and V_T head rows of the two models, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint


@dataclass
class Distributions:
    """
    One model's next-token distributions.

    Args:
        hidden (`torch.Tensor` of shape (B, L, H)): what its LM head reads at each position; position i is the one that
            token i was drawn from.
        head (`Callable`): hidden states (n, H) in, logits (n, V) out, at the temperature of the run.
    """

    hidden: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]

    def rows(self, positions: torch.Tensor) -> torch.Tensor:
        """(n, H) hidden states at `positions` (n,), which count through the rows of the batch one after the other."""
        return self.hidden.flatten(0, 1).index_select(0, positions.to(self.hidden.device))

    def log_probs(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, H) hidden states in, (n, V) log-probs in nats out, in float32 at least."""
        logits = self.head(rows)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def over_tiles(
    function: Callable,
    tile: int | Sequence[list[int]],
    student: tuple[Distributions, torch.Tensor] | None,
    teacher: tuple[Distributions, torch.Tensor] | None,
    *per_row: torch.Tensor,
    keep: bool = False,
) -> tuple[torch.Tensor, ...]:
    """
    `function` of the log-probs at many positions, a tile of them at a time.

    Args:
        function (`Callable`): takes the student's log-probs (n, V_S) and the teacher's (n, V_T), without the side that
            is `None`, and the same rows of each of `per_row`; returns a tuple of tensors whose first dimension is n.
        tile (`int`): n at most. Or, for inputs that do not run in step, the sizes of the tiles of each: of the student's
            positions, the teacher's, and of each of `per_row`.
        student, teacher (`tuple` of `Distributions` and `torch.LongTensor` of shape (N,), *optional*): whose log-probs,
            and where. The teacher's carry no gradient.
        per_row (`torch.Tensor` of shape (N, ...)): what else belongs to each position.
        keep (`bool`): no tile is made anew for the backward pass, so that what `function` saves for it is alive for all N positions.

    Returns:
        `function`'s tensors for all N positions. No position still is one empty tile, so that the student's head takes
        part in every backward pass.
    """
    sides = [side for side in (student, teacher) if side is not None]
    device = sides[0][1].device
    inputs = [side.rows(positions) for side, positions in sides]

    def run(*parts):
        rows, others = parts[: len(sides)], parts[len(sides) :]
        log_probs = []
        for side, hidden in zip(sides, rows, strict=True):
            with torch.set_grad_enabled(torch.is_grad_enabled() and side is student):
                log_probs.append(side[0].log_probs(hidden).to(device))
        return function(*log_probs, *others)

    outputs = []
    tensors = (*inputs, *per_row)
    sizes = [tile] * len(tensors) if isinstance(tile, int) else tile
    tiles = [*zip(*(tensor.split(size) for tensor, size in zip(tensors, sizes, strict=True)), strict=True)]
    for number, parts in enumerate(tiles, 1):
        # the backward pass begins with the last tile, so that this one need not be made anew for it
        if torch.is_grad_enabled() and number < len(tiles) and not keep:
            outputs.append(checkpoint(run, *parts, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(run(*parts))
    return tuple(torch.cat(column) for column in zip(*outputs, strict=True))
