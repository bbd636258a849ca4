"""Where a rollout ends before its turn does: KAT, and what it is compared with.

    kat        ends where the student has for long agreed with the teacher (losses/kat.py)
    random     KAT's kept shares, dealt out at random among a step's completions of a process: cuts of equal length, elsewhere
    growing    `max_new_tokens` grows from `start` over the first `steps` optimizer steps

Decisions
- The log-probs of the student are those that it sampled with, so that no forward pass is added.
- What follows the cut takes no part in the loss or in N. It is masked and counted, as the end of the turn is.
- With `early_stop_tokens`, the student writes so many tokens, the teacher reads them, and rows that KAT ends there are not
  written on. Where exactly they are cut is decided once, when all is written, as without it.
- A chunk that the cut goes through takes no part as a whole. The last chunk of text that goes on decides nothing yet, since the
  teacher's tokens there may change.
- Evaluation writes whole texts.

Left out: the teacher's and the student's caches between two pieces. Each piece reads the text before it again.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import nn

from ..config import CrossTokenizerGKDConfig
from ..losses.kat import KAT, divergences
from .generation import Writer, Written
from .pairing import Prompt, Rollout
from .rewards import without_chunks


logger = get_logger(__name__)

_FILE = "early_stop.json"
Figures = dict[str, tuple[float, float]]


@dataclass
class Growing:
    """
    Args:
        start (`int`): `max_new_tokens` of the first optimizer step.
        steps (`int`): optimizer steps until `max_new_tokens` is reached, in a straight line.
    """

    start: int = 64
    steps: int = 500

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ValueError(f"growing's {field.name} must be a whole number of at least 1, got {value!r}.")

    def limit(self, step: int, most: int) -> int:
        """Of optimizer step `step`, counted from 0."""
        return most if step >= self.steps else self.start + (most - self.start) * step // self.steps


def settings_of(args: CrossTokenizerGKDConfig) -> KAT | Growing:
    """The rule that `early_stop` names. Raises `ValueError` for settings that it does not have, or with which it could do nothing."""
    kwargs, kind = args.early_stop_kwargs or {}, Growing if args.early_stop == "growing" else KAT
    known = [field.name for field in fields(kind)]
    if unknown := sorted(set(kwargs) - set(known)):
        raise ValueError(
            f"early_stop={args.early_stop!r} has no setting {', '.join(map(repr, unknown))}: it takes {', '.join(known)}."
        )
    rule = kind(**kwargs)
    if isinstance(rule, Growing):
        if rule.start >= args.max_new_tokens:
            raise ValueError(
                f"early_stop='growing' starts at {rule.start} tokens, and max_new_tokens={args.max_new_tokens}: nothing would grow."
            )
        return rule
    if (least := rule.exempt + rule.window + rule.patience - 1) > args.max_new_tokens:
        raise ValueError(
            f"early_stop={args.early_stop!r} reads at least {least} tokens before it cuts (exempt + window + patience - 1), and "
            f"max_new_tokens={args.max_new_tokens}: it would cut nothing. Lower `window` in early_stop_kwargs."
        )
    return rule


def check_early_stop(args: CrossTokenizerGKDConfig):
    """Raises `ValueError` for settings that cannot work together with `early_stop`."""
    if args.early_stop is None:
        for name in ("early_stop_kwargs", "early_stop_tokens"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name}={getattr(args, name)!r} has no effect without early_stop: set that to 'kat'.")
        return
    if args.lmbda == 0:
        raise ValueError(
            f"early_stop={args.early_stop!r} has no effect with lmbda=0.0: it is for text that the student writes."
        )
    settings_of(args)
    pieces = args.early_stop_tokens is not None
    if pieces and args.early_stop != "kat":
        raise ValueError(
            f"early_stop_tokens={args.early_stop_tokens} is for early_stop='kat', and early_stop={args.early_stop!r}: random cuts "
            "take their lengths from whole texts, and a growing max_new_tokens needs no teacher while the student writes. Leave it out."
        )
    if pieces and args.early_stop_tokens >= args.max_new_tokens:
        raise ValueError(
            f"early_stop_tokens={args.early_stop_tokens} is not below max_new_tokens={args.max_new_tokens}: all would be written "
            "before anything is decided. Lower it, or leave it out to only mask what follows a cut."
        )
    if args.use_vllm and (pieces or args.early_stop == "growing"):
        asked = f"early_stop_tokens={args.early_stop_tokens}" if pieces else "early_stop='growing'"
        raise ValueError(
            f"{asked} needs another max_new_tokens in each call, and vLLM writes whole completions here: set use_vllm=False"
            + (", or leave early_stop_tokens out, so that what follows a cut is only masked." if pieces else ".")
        )
    if args.early_stop == "growing":
        return
    if args.generation_backend == "transformers_continuous" and not args.use_vllm:
        raise ValueError(
            f"early_stop={args.early_stop!r} reads the log-probs that the student samples with, which "
            f"generation_backend={args.generation_backend!r} does not tell: choose 'transformers'."
        )
    bent = {"top_p": args.top_p < 1, "top_k": args.top_k > 0, "min_p": args.min_p is not None}
    bent["generation_kwargs"] = bool(args.generation_kwargs)
    if any(bent.values()):
        names = [name for name, is_set in bent.items() if is_set]
        raise ValueError(
            f"early_stop={args.early_stop!r} compares the probabilities that the student samples with with the teacher's, and "
            f"{', '.join(names)} changes them: leave it at its default."
        )


def check_pieces(args: CrossTokenizerGKDConfig, sharded: bool):
    """Raises `ValueError` where processes would make unlike numbers of forward passes that they have to make together."""
    if args.early_stop_tokens is not None and sharded:
        raise ValueError(
            f"early_stop_tokens={args.early_stop_tokens}: each process writes as many pieces as its rows need, and under ZeRO-3 or "
            "FSDP all would have to write the same number, and hang. Leave it out (what follows a cut is then only masked), or train "
            "with DDP."
        )
    if args.early_stop in ("kat", "random") and sharded and not args.gather_for_generation:
        raise ValueError(
            f"early_stop={args.early_stop!r} has not been tried with gather_for_generation=False: set it to True, or leave early_stop out."
        )


class EarlyStop:
    """
    Args:
        args: the run's settings, with an `early_stop`.
        accelerator: the run's processes, which share one memory of rollouts.
        teachers: read the text.
        tools, judges: whether the student calls tools, and whether functions judge its completions.

    Raises `ValueError` for what cannot work together.
    """

    def __init__(self, args: CrossTokenizerGKDConfig, accelerator, teachers: Any, tools: bool, judges: bool):
        self._args, self._accelerator, self._teachers = args, accelerator, teachers
        self._rule = settings_of(args)
        if tools:
            raise ValueError(
                f"early_stop={args.early_stop!r} with tools: a cut would leave calls without results, or results without the turn "
                "that reads them. Leave one of the two out."
            )
        if judges and args.early_stop_tokens is not None:
            raise ValueError(
                f"early_stop_tokens={args.early_stop_tokens} with reward_funcs or teacher_gate: they would judge texts that have been "
                "left unfinished. Leave early_stop_tokens out: texts are then written to their end, and what follows a cut is masked."
            )

    # Writing

    def write(self, write: Writer, model: nn.Module, prompts: list[Prompt], step: int) -> list[Written]:
        """Completions by `write`, of which some may be left unfinished. Where the length of a call varies, `write` takes `limit`, as
        `TransformersWriter` does."""
        if isinstance(self._rule, Growing):
            return write(model, prompts, step, limit=self._rule.limit(step, self._args.max_new_tokens))
        threshold = self._rule.threshold(step)
        if self._args.early_stop_tokens is None or threshold is None:
            return write(model, prompts, step)
        written: list[Written] = [([], []) for _ in prompts]
        going, left = list(range(len(prompts))), self._args.max_new_tokens
        while going:
            piece = min(self._args.early_stop_tokens, left)
            before = [replace(prompts[row], student_ids=[*prompts[row].student_ids, *written[row][0]]) for row in going]
            for row, (ids, log_probs) in zip(going, write(model, before, step, limit=piece), strict=True):
                written[row] = [*written[row][0], *ids], [*written[row][1], *log_probs]
            left -= piece
            going = self._going_on(prompts, written, going, threshold) if left else []
        return written

    def _going_on(self, prompts: list[Prompt], written: list[Written], rows: list[int], threshold: float) -> list[int]:
        """Those of `rows` that have not ended, neither by themselves nor by the rule."""
        rollouts = self._teachers.pair([prompts[row] for row in rows], [written[row][0] for row in rows])
        unended = [place for place, rollout in enumerate(rollouts) if not rollout.ended]
        read = self._teachers.read([rollouts[place] for place in unended], False)
        going = []
        for number, place in enumerate(unended):
            rollout, row = rollouts[place], rows[place]
            closed = without_chunks(rollout, {max(rollout.student_chunks, default=-1)} - {-1})
            divergence = _divergences(closed, written[row][1], read.row(number))
            if self._rule.cut(self._rule.means(divergence[~divergence.isnan()]), threshold) is None:
                going.append(row)
        return going

    # What takes part

    def masked(
        self, rollouts: Sequence[Rollout], sampled: Sequence[list[float] | None], readings: Any, step: int
    ) -> tuple[list[Rollout], Figures]:
        """
        The rollouts without what follows their cuts, and figures of what that is. Every process calls it once for each optimizer
        step.

        Args:
            sampled: of each rollout, the log-probs that its tokens were sampled with; None for text that the student did not write.
            readings: the teachers' `Readings` of the rollouts.
        """
        if isinstance(self._rule, Growing):
            limit = self._rule.limit(step, self._args.max_new_tokens)
            return list(rollouts), {"early_stop/max_new_tokens": (limit, 1)}
        rule, threshold = self._rule, self._rule.threshold(step)
        own = [row for row, log_probs in enumerate(sampled) if log_probs is not None]
        found = {row: _divergences(rollouts[row], sampled[row], readings.row(row)) for row in own}
        places = {row: (~divergence.isnan()).nonzero()[:, 0] for row, divergence in found.items()}
        places = {row: tokens for row, tokens in places.items() if len(tokens)}
        means = {row: rule.means(found[row][tokens]) for row, tokens in places.items()}
        cuts = {row: rule.cut(z, threshold) for row, z in means.items()}
        rule.remember(gather_object([z.min().item() for z in means.values() if len(z)]))
        if self._args.early_stop == "random":
            cuts = _dealt_out(cuts, {row: len(tokens) for row, tokens in places.items()})
        kept = list(rollouts)
        for row, cut in cuts.items():
            if cut is not None and cut < len(places[row]):
                after = rollouts[row].student_chunks[int(places[row][cut]) :]
                kept[row] = without_chunks(rollouts[row], set(after.tolist()) - {-1})
        before = sum(_scored(rollouts[row]) for row in own)
        figures: Figures = {
            "early_stop/cut_fraction": (sum(kept[row] is not rollouts[row] for row in own), len(places)),
            "early_stop/masked_fraction": (before - sum(_scored(kept[row]) for row in own), before),
        }
        return kept, figures if threshold is None else {**figures, "early_stop/threshold": (threshold, 1)}

    # Checkpoints

    def save(self, checkpoint: str):
        """Writes the memory, which is the same in all processes."""
        if isinstance(self._rule, KAT) and self._args.should_save:
            (Path(checkpoint) / _FILE).write_text(json.dumps(list(self._rule.lowest)))

    def load(self, checkpoint: str):
        file = Path(checkpoint) / _FILE
        if isinstance(self._rule, Growing):
            return
        if not file.exists():
            logger.warning(
                f"{checkpoint} has no {_FILE}: early_stop={self._args.early_stop!r} gathers its memory anew."
            )
            return
        self._rule.lowest.clear()
        self._rule.remember(json.loads(file.read_text()))


def _divergences(rollout: Rollout, log_probs: list[float], teacher: torch.Tensor) -> torch.Tensor:
    """(S,) of `losses.kat.divergences`. NaN where the writer did not tell how likely a token was."""
    student = torch.tensor(log_probs, dtype=torch.float64)
    chunks = torch.as_tensor(rollout.student_chunks), torch.as_tensor(rollout.teacher_chunks)
    return divergences(student, teacher.cpu()[: len(chunks[1])], *chunks)


def _dealt_out(cuts: dict[int, int | None], lengths: dict[int, int]) -> dict[int, int]:
    """The kept shares of `lengths` that `cuts` leave, each given to a row at random, as cuts."""
    shares = [1.0 if cuts[row] is None else cuts[row] / lengths[row] for row in cuts]
    order = torch.randperm(len(shares)).tolist()
    return {row: math.ceil(shares[place] * lengths[row]) for row, place in zip(cuts, order, strict=True)}


def _scored(rollout: Rollout) -> int:
    return int(np.count_nonzero(rollout.student_chunks >= 0))
