"""Where the text of an optimizer step comes from: prompts in, micro-batches out that the teachers have scored.

Decisions
- All prompts of a step are written for in one call, and all completions are paired and read together.
- Each micro-batch is text of the student or text it did not write, never both: the two may have different losses. Which one
  it is depends on seed and step alone, so that all processes agree.
- What the student draws depends on seed, step and process alone, so that evaluating or resuming changes no rollout.

Left out: the losses, what is logged, and which rows a step gets.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..config import CrossTokenizerGKDConfig
from ..models.packing import Packer
from ..models.sharding import own_rows
from ..text.chat import Speaker
from ..text.continuations import Continuations
from .ahead import Ahead
from .closing import Tables, add_going_on, unclosed, without, without_undecided
from .compiled import COMPILED, CompiledDecode, chosen_backend, while_compiling
from .early_stop import EarlyStop
from .generation import (
    TransformersWriter,
    Writer,
    Written,
    recorded_for_its_cache,
    sampling_config,
    step_seed,
    write,
)
from .metrics import rollout_metrics
from .pairing import Prompt, Rollout, collate, grouped_by_length, on_columns
from .respelling import Respeller
from .rewards import Judges
from .spelling import other_spellings
from .stops import add_other_stops
from .student_copy import StudentCopy
from .tools import ToolLoop
from .vllm import VLLMWriter


logger = get_logger(__name__)


class Readings(Protocol):
    """The teachers' scores of a step's rollouts, by row."""

    reference: "Readings | None"  # of the reference teacher, where there is one

    def log_probs(self, rows: Sequence[int], length: int) -> Any:
        """(len(rows), `length`) log-probs, 0 past a row's end: a tensor, or a promise of one."""

    def tells_closings(self, rows: Sequence[int]) -> list[bool]:
        """Which of `rows` have closings of their own: those of a mixture are in its log-probs."""

    def row(self, row: int) -> torch.Tensor:
        """(T,) log-probs of one row, which are waited for."""

    def hidden(self, rows: Sequence[int], length: int) -> Any:
        """(len(rows), `length`, H) states that the LM head of a teacher in this process reads, which was asked for them: a tensor, or
        a promise of one. None where the teacher is at a server."""


class WritingSeat(Protocol):
    """A teacher that can write, for `seq_kd`."""

    teacher: Any  # its `model` is the module
    tokenizer: PreTrainedTokenizerBase
    side: Speaker
    context: int | None
    stop_ids: list[int]


class Teachers(Protocol):
    """What a [`RolloutSource`] asks of the teachers; `teachers.panel.Panel` is one."""

    seats: Mapping[str, Any]  # by name, in an order that all processes share

    @property
    def only(self) -> WritingSeat | None:
        """The teacher, where it is the only one."""

    def pair(self, prompts: Sequence[Prompt], completions: Sequence[list[int]]) -> list[Rollout]: ...

    def foresee(self) -> Any:
        """For `read`: takes texts of a step as they become known, by `add(prompt, completion)`, until it is read or `close`d; None
        where nothing is gained."""

    def read(
        self,
        rollouts: Sequence[Rollout],
        with_hidden: bool,
        tables: Sequence[Tables] | None = None,
        foreseeing: Any = None,
        wanted: Sequence[int] | None = None,
    ) -> Readings: ...


def student_writer(
    model: nn.Module, accelerator, student: Speaker, config: GenerationConfig, args: CrossTokenizerGKDConfig
) -> Writer:
    """
    What writes as `args` ask: vLLM, or the student's own `generate`.

    Args:
        model: the student, an adapter included, before it is wrapped.
        student: how it is spoken to.
        config: how it writes; its `eos_token_id` are the ids that end a turn.
    """
    if args.use_vllm:
        return VLLMWriter(model, accelerator, student.tokenizer, args, config.eos_token_id)
    decode = None
    if chosen_backend(model, args, accelerator) == COMPILED:
        decode = CompiledDecode(falls_back=args.generation_backend == "auto")
    record = recorded_for_its_cache(model, config, args) or args.early_stop in ("kat", "random")
    return TransformersWriter(config, accelerator, args, record, decode)


def ahead_of(
    write: Writer, model: nn.Module, accelerator, config: GenerationConfig, args: CrossTokenizerGKDConfig
) -> Ahead | None:
    """What writes the text of the next step with `async_rollouts`: the server of `write`, or a copy of the student. The arguments are
    those of `student_writer`, and what it returned."""
    if not args.async_rollouts:
        return None
    return Ahead(write if args.use_vllm else StudentCopy(model, accelerator, config, args), args)


class RolloutSource:
    """
    Args:
        args: the run's settings.
        accelerator: the run's processes.
        student: how the student is spoken to.
        teachers: who reads the completions, and writes some with `seq_kd`.
        write: writes as the student.
        reads_distributions: whether the loss on text of the student (True) or on other text (False) needs the teacher's
            hidden states.
        continuations: by a teacher's name, with what its tokens go on, where the loss on text of the student (True) or on
            other text (False) reads how chunks close; else nothing.
        judges: reward completions and leave out those that are wrong.
        packer: packs the student's rows, where it can read such.
        state: gives the trainer's state, for the judges.
        tools: executes the student's calls of tools, in training, and in evaluation with `tools_in_evaluation`.
        ahead: writes in place of `write` in training, one step before.

    Raises:
        ValueError: where two of these do not go together.
    """

    def __init__(
        self,
        args: CrossTokenizerGKDConfig,
        accelerator,
        student: Speaker,
        teachers: Teachers,
        write: Writer,
        reads_distributions: Callable[[bool], bool],
        continuations: Callable[[bool], Mapping[str, Continuations | None]] = lambda on_policy: {},
        tools: ToolLoop | None = None,
        judges: Judges | None = None,
        state: Callable[[], Any] = lambda: None,
        packer: Packer | None = None,
        ahead: Ahead | None = None,
    ):
        self._args, self._accelerator = args, accelerator
        self._student, self._teachers = student, teachers
        self.write, self._reads_distributions = write, reads_distributions
        self._continuations, self._tools = continuations, tools
        self._judges, self._state, self._packer = judges, state, packer
        self.ahead, self.early_stop = ahead, None
        if ahead is not None and tools is not None:
            raise ValueError(
                "async_rollouts=1 does not go with tools: a completion would wait for its tools in the middle. Set async_rollouts=0."
            )
        if args.early_stop is not None:
            self.early_stop = EarlyStop(args, accelerator, teachers, tools is not None, judges is not None)

    def roll_out(
        self,
        model: nn.Module,
        window: Sequence[Sequence[Prompt]],
        step: int,
        mode: str,
        phase: Callable[[str], AbstractContextManager],
        following: Sequence[Sequence[Prompt]] = (),
    ) -> tuple[list[dict], dict[str, tuple[float, float]]]:
        """
        Completions for all prompts of `window`, one list a micro-batch, scored by their teachers.

        Args:
            model: the student, as it is wrapped for training.
            window: with `mode="train"`, each prompt gets `num_generations` completions.
            step: optimizer steps taken.
            mode: `"train"`, or `"eval"`, where the student writes every completion, one for each prompt.
            phase: called with the name of what begins, and times the `with` block.
            following: the `window` of the next step, if there is one, where that is to be written `ahead`.

        Returns:
            For each micro-batch what `collate` makes of its rollouts, with `teacher_log_probs` (B, T), or what waits for
            them; `teacher_places` (B,), each row's teacher by its place among the seats; `prompts` (B,), a number of each row's
            prompt; `on_policy`, whether the student wrote it; `index`, its place in the step; `teacher_hidden` (B, T, H) where its
            loss needs it; `going_on` (2, K) and `teacher_close_log_probs` (B, T) where its loss reads how chunks close (see
            `add_going_on`), with `unclosed` (B,) where it reads distributions too; `sampled_log_probs` (B, S) where the writer told them; and
            `packed`, the same rows packed, where that is less work. And the figures of the completions.
        """
        args, repeats = self._args, self._args.num_generations if mode == "train" else 1
        window, on_policy = self._asked(window, step, mode)
        with phase("generation"), while_compiling(lambda: phase("compilation")):
            tools = self._tools if mode == "train" or args.tools_in_evaluation else None
            early_stop = self.early_stop if mode == "train" else None
            write, of_ahead = self.write if early_stop is None else partial(early_stop.write, self.write), {}
            if self.ahead is not None:
                self.ahead.settle()  # an engine writes one thing at a time
                write = partial(self.ahead.take, tell=of_ahead.update) if mode == "train" else write
            foreseeing = None
            if write is self.write and tools is None and isinstance(write, TransformersWriter):
                foreseeing = self._teachers.foresee()
                write = write if foreseeing is None else self._telling(foreseeing, phase)
            drawn, figures = self._draw(write, model, window, on_policy, step, tools)
            if following:
                own = [
                    prompt
                    for prompts, on in zip(*self._asked(following, step + 1, mode), strict=True)
                    if on
                    for prompt in prompts
                ]
                self.ahead.begin(model, own, step + 1, step)
        kinds = [on for prompts, on in zip(window, on_policy, strict=True) for _ in prompts]
        prompts, (completions, sampled) = [prompt for prompt, _ in drawn], zip(*(own for _, own in drawn), strict=True)
        with phase("alignment"):
            rollouts = self._teachers.pair(prompts, completions)
        figures = {**figures, **of_ahead, **rollout_metrics(rollouts, kinds)}
        rewards = None
        if self._judges is not None and (mode == "train" or args.rewards_in_evaluation):
            with phase("rewards"):
                rewards, rollouts = self._judged(rollouts, kinds, repeats, mode, figures)
        with phase("teacher"):
            by_row = [self._continuations(on) for on in kinds]
            with_hidden = any(map(self._reads_distributions, on_policy))
            by_batch = self._rows(rollouts, window, on_policy)
            wanted = [row for rows in by_batch for row in rows]
            readings = self._teachers.read(rollouts, with_hidden, by_row, foreseeing, wanted)
            if early_stop is not None:
                rollouts, told = early_stop.masked(rollouts, sampled, readings, step)
                figures.update(told)

        batches, names, are_unclosed = [], list(self._teachers.seats), []
        for index, (rows, on) in enumerate(zip(by_batch, on_policy, strict=True)):
            own, tables = [rollouts[row] for row in rows], self._continuations(on)
            reads_distributions = self._reads_distributions(on)
            if tables:
                own = [without_undecided(rollout, tables) for rollout in own]
                last = [unclosed(rollout, tables) for rollout in own]
                real = [not rollout.prompt.is_padding for rollout in own]
                are_unclosed += [chunk >= 0 for chunk, is_real in zip(last, real, strict=True) if is_real]
                if not reads_distributions:
                    own = [without(rollout, chunk) for rollout, chunk in zip(own, last, strict=True)]
            batch = collate(own, self._student.tokenizer.pad_token_id, args.pad_to_multiple_of)
            if tables:
                add_going_on(batch, own, tables)
                if reads_distributions:
                    batch["unclosed"] = torch.tensor(last)
            add_other_stops(batch, own, self._teachers.alike_stops)
            batch["teacher_places"] = torch.tensor([names.index(rollout.prompt.teacher) for rollout in own])
            teacher_length = batch["teacher_chunks"].shape[1]
            batch["teacher_log_probs"] = readings.log_probs(rows, teacher_length)
            if (close := readings.close_log_probs(rows, teacher_length)) is not None:
                batch["teacher_close_log_probs"] = close
                batch["tells_closings"] = torch.tensor(readings.tells_closings(rows))
            if readings.reference is not None:
                batch["reference_teacher_log_probs"] = readings.reference.log_probs(rows, teacher_length)
            if reads_distributions and (hidden := readings.hidden(rows, teacher_length)) is not None:
                batch["teacher_hidden"] = hidden
            texts, given = zip(*((rollout.student_ids, rollout.given) for rollout in own), strict=True)
            other = other_spellings(texts, self._student.tokenizer, given)
            batch["other_spelling"] = on_columns(other, batch).bool() & (batch["student_chunks"] >= 0)
            if sampled[rows[0]] is not None:
                batch["sampled_log_probs"] = on_columns([sampled[row] for row in rows], batch)
            batch["prompts"] = torch.tensor([row // repeats for row in rows])
            if self._packer is not None:
                texts = [rollout.prompt.student_ids for rollout in own], [rollout.student_ids for rollout in own]
                packed = self._packer(*texts, batch["input_ids"].shape[1], args.pad_to_multiple_of or 1)
                batch.update({} if packed is None else {"packed": packed})
            if rewards is not None:
                batch["rewards"] = rewards[rows]
            batches.append({**batch, "on_policy": on, "index": index})
        return batches, {
            **figures,
            "off_policy_fraction": (on_policy.count(False), len(on_policy)),
            "closing/unclosed_fraction": (sum(are_unclosed), len(are_unclosed)),
        }

    def _judged(
        self,
        rollouts: list[Rollout],
        kinds: Sequence[bool],
        size: int,
        mode: str,
        figures: dict[str, tuple[float, float]],
    ) -> tuple[torch.Tensor | None, list[Rollout]]:
        """(N,) the rewards' part of each completion's advantage, 0 for text that the student did not write, None in evaluation;
        and the rollouts without what is wrong. `kinds`: whether the student wrote each. Adds to `figures`."""
        judges, rewards = self._judges, None
        if judges.reward:
            rows, rewards = [row for row, on in enumerate(kinds) if on], torch.zeros(len(rollouts))
            if rows:
                own = [rollouts[row] for row in rows]
                texts = [rollout.prompt for rollout in own], [rollout.student_ids for rollout in own]
                rewards[rows], told = judges.rewards(*texts, size, self._state(), self._accelerator.device)
                figures.update(told)
        if mode == "eval":
            return None, rollouts
        return rewards, judges.gated(rollouts, self._state(), figures.update)

    # Draws

    @contextmanager
    def seeded(self, step: int) -> Iterator[None]:
        """Draws within depend on seed, `step` and process alone."""
        devices = [self._accelerator.device] if self._accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(step_seed(self._args.seed, step, self._accelerator.process_index))
            yield

    def lmbda_draws(self, step: int, count: int) -> list[float]:
        """For each micro-batch a number in [0, 1), the same on every process: the student writes where it is below `lmbda`."""
        generator = torch.Generator().manual_seed(step_seed(self._args.seed, step - 1))
        return torch.rand(count, generator=generator).tolist()

    # Text

    def _asked(self, window: Sequence[Sequence[Prompt]], step: int, mode: str) -> tuple[list[list[Prompt]], list[bool]]:
        """The prompts of `window` as often as completions are made of them, and for each micro-batch whether the student writes them."""
        repeats = self._args.num_generations if mode == "train" else 1
        window = [[prompt for prompt in prompts for _ in range(repeats)] for prompts in window]
        on_policy = [mode == "eval" or draw < self._args.lmbda for draw in self.lmbda_draws(step, len(window))]
        return window, on_policy

    def _telling(self, foreseeing: Any, phase: Callable[[str], AbstractContextManager]) -> Writer:
        """`write`, which tells `foreseeing` of texts that are known before the others."""

        def write(model: nn.Module, prompts: list[Prompt], step: int) -> list[Written]:
            def ended(row: int, completion: list[int]):
                with phase("alignment"):
                    foreseeing.add(prompts[row], completion)

            try:
                return self.write(model, prompts, step, ended=ended)
            except BaseException:
                foreseeing.close()
                raise

        return write

    def _draw(
        self,
        write: Writer,
        model: nn.Module,
        window: Sequence[Sequence[Prompt]],
        on_policy: Sequence[bool],
        step: int,
        tools: ToolLoop | None,
    ) -> tuple[list[tuple[Prompt, Written]], dict[str, tuple[float, float]]]:
        """Each prompt of `window`, in its order, with a completion: the student's own, or one it did not write. And what is told
        of the tools that were called."""
        groups = list(zip(window, on_policy, strict=True))
        own, figures = [prompt for prompts, on in groups if on for prompt in prompts], {}
        if tools is None:
            own = zip(own, write(model, own, step), strict=True)
        else:
            own, figures = tools(write, model, own, step)
        written = iter(own)
        references, told = self.references([prompt for prompts, on in groups if not on for prompt in prompts])
        given = ((prompt, (ids, None)) for prompt, ids in references)
        drawn = [next(written if on else given) for prompts, on in groups for _ in prompts]
        return drawn, {**figures, **told}

    def references(
        self, prompts: Sequence[Prompt]
    ) -> tuple[list[tuple[Prompt, list[int]]], dict[str, tuple[float, float]]]:
        """
        Completions the student did not write, in student ids: the dataset's, or the teacher's with `seq_kd`. Each with the prompt that it
        goes on from, which may end before what the generation prompt writes; and what is told of them.

        Raises `ValueError` where a prompt leaves the teacher no room to write.
        """
        limit = self._args.max_new_tokens
        if not self._args.seq_kd or not prompts:
            return [(prompt.before_reference(), prompt.reference_ids[:limit]) for prompt in prompts], {}
        seat = self._teachers.only
        stop_ids, pad_token_id = seat.stop_ids, seat.tokenizer.pad_token_id
        config = sampling_config(self._args, stop_ids, stop_ids[0] if pad_token_id is None else pad_token_id)
        longest = max(len(prompt.teacher_ids) for prompt in prompts)
        if seat.context is not None:
            if longest >= seat.context:
                raise ValueError(
                    f"seq_kd: a prompt of {longest} teacher tokens leaves the teacher no room to write in its context of "
                    f"{seat.context}. Filter such rows out."
                )
            config.max_new_tokens = min(limit, seat.context - longest)
        ids = [prompt.teacher_ids for prompt in prompts]
        written = write(seat.teacher.model, ids, config, self._accelerator, self._args)
        found = [self._respell(prompt, own) for prompt, (own, _) in zip(prompts, written, strict=True)]
        real = [one for one in found if not one.prompt.is_padding]
        size, left_out = (sum(getattr(one, name) for one in real) for name in ("size", "left_out"))
        return [(one.prompt, one.ids[:limit]) for one in found], {"seq_kd/left_out_fraction": (left_out, size)}

    @cached_property
    def _respell(self) -> Respeller:
        seat = self._teachers.only
        return Respeller(self._student, seat.side, seat.stop_ids, self._args.thought_policy)

    # Rows

    def mark_padding_rows(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The rows of the batch that was read last, with those marked that only pad the last batch of an epoch."""
        own = own_rows(self._accelerator, len(prompts))
        return [*prompts[:own], *(replace(prompt, is_padding=True) for prompt in prompts[own:])]

    def _rows(
        self, rollouts: Sequence[Rollout], window: Sequence[Sequence[Prompt]], on_policy: Sequence[bool]
    ) -> list[list[int]]:
        """The rows of each micro-batch; with `length_grouped`, dealt by length among those of one kind. Those of one prompt stay
        together where they are packed."""
        ends = [*accumulate(map(len, window), initial=0)]
        batches = [list(range(start, end)) for start, end in pairwise(ends)]
        if not self._args.length_grouped:
            return batches
        lengths = [len(rollout.prompt.student_ids) + len(rollout.student_ids) for rollout in rollouts]
        prompts = None if self._packer is None else [tuple(rollout.prompt.student_ids) for rollout in rollouts]
        own, given = (
            iter(
                grouped_by_length(
                    lengths,
                    [rows for rows, on in zip(batches, on_policy, strict=True) if on == kind],
                    prompts,
                )
            )
            for kind in (True, False)
        )
        return [next(own if on else given) for on in on_policy]
