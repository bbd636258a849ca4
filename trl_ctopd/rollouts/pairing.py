"""A rollout: one completion, tokenized by the student and by the teacher, with the chunks that both share.

Lists of ids in, padded tensors out. Rows are prompt + completion padded on the right, so that positions are right for
every kind of position embedding. Index i of a chunk tensor belongs to the token at i + 1, as for log-probs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import numpy as np
import torch

from ..text.aligner import TextAligner, TextAlignment
from ..text.chat import Opened
from ..text.sections import SectionAligner


@dataclass(frozen=True)
class Reopened:
    """An edit of a prompt's end: drops the last `dropped` ids and appends `added`."""

    dropped: int = 0
    added: tuple[int, ...] = ()

    @classmethod
    def of(cls, ids: Sequence[int], others: Sequence[int]) -> "Reopened":
        """The edit that turns `ids` into `others`."""
        shared = 0
        for ours, theirs in zip(ids, others, strict=False):
            if ours != theirs:
                break
            shared += 1
        return cls(len(ids) - shared, tuple(others[shared:]))

    def __call__(self, ids: list[int]) -> list[int]:
        return [*ids[: len(ids) - self.dropped], *self.added] if self.dropped or self.added else ids


@dataclass(frozen=True)
class Frame:
    """How the two templates write the turn after a prompt, where it does not begin with the answer on both sides.

    Attributes:
        plain: edit of the teacher's prompt to the one before the answer of a finished turn.
        stem: edit of the teacher's prompt to the one that all its turns begin with.
        reference: edit of the student's prompt to the one before its reference.
        student, teacher: how each template writes the turn (`Turn.to_json`); "" where the student's turns are only answers.
        is_text: whether the row is plain text, which no template writes.
    """

    plain: Reopened = Reopened()
    stem: Reopened = Reopened()
    reference: Reopened = Reopened()
    student: str = ""
    teacher: str = ""
    is_text: bool = False

    @classmethod
    def of(cls, student: Opened, teacher: Opened, reference_prompt: list[int]) -> "Frame":
        return cls(
            Reopened.of(teacher.ids, teacher.plain),
            Reopened.of(teacher.ids, teacher.stem),
            Reopened.of(student.ids, reference_prompt),
            *(("", "") if student.is_simple else (student.turn.to_json(), teacher.turn.to_json())),
            is_text=teacher.is_text,
        )

    def to_json(self) -> str:
        """ "" for the default frame."""
        if self == Frame():
            return ""
        parts = {
            name: [part.dropped, part.added] if isinstance(part, Reopened) else part
            for name, part in vars(self).items()
        }
        return json.dumps(parts, ensure_ascii=False)


@lru_cache(maxsize=4096)
def _read_frame(text: str) -> Frame:
    parts = json.loads(text) if text else {}
    for name, part in parts.items():
        if isinstance(part, list):
            dropped, added = part
            parts[name] = Reopened(dropped, tuple(added))
    return Frame(**parts)


@dataclass
class Prompt:
    """
    One dataset row, rendered for both models.

    Attributes:
        student_ids, teacher_ids: the prompt in the tokens of each.
        reference_ids: the reference completion in student ids, if there is one.
        teacher: name of the teacher that reads it, where there are several.
        frame: a `Frame` as JSON.
        is_padding: whether the row only fills up its batch. Another process or an earlier batch has it too, and nothing of it
            is scored.
    """

    student_ids: list[int]
    teacher_ids: list[int]
    reference_ids: list[int] | None = None
    teacher: str = ""
    frame: str = ""
    is_padding: bool = False

    @property
    def framed(self) -> Frame:
        return _read_frame(self.frame)

    def before_reference(self) -> "Prompt":
        """The prompt as the student reads it before the reference."""
        return replace(self, student_ids=self.framed.reference(self.student_ids))


@dataclass
class Rollout:
    """
    A completion of `prompt`, with S student tokens and T teacher tokens.

    Attributes:
        student_ids, student_chunks, student_widths (S,): each token, its chunk (-1 = takes no part), and its bytes.
        teacher_ids, teacher_chunks (T,): each token and its chunk.
        ended: whether the writer ended its turn.
        unread: whether the teacher's context is too short. The row then keeps one teacher token and nothing to score, so that
            all processes run the same number of forward passes.
        teacher_prompt_ids: what the teacher reads before the completion, its turn opened as in a finished turn.
        other_ends: the ids with which the teacher might have ended the text, besides its last one.
    """

    prompt: Prompt
    student_ids: list[int]
    student_chunks: np.ndarray
    student_widths: np.ndarray
    teacher_ids: list[int]
    teacher_chunks: np.ndarray
    num_chunks: int
    ended: bool
    unread: bool
    alignment: TextAlignment
    teacher_prompt_ids: list[int]
    other_ends: tuple[int, ...] = ()


def pair(
    prompts: Sequence[Prompt],
    completions: Sequence[list[int]],
    aligner: TextAligner,
    *,
    turn_ends: Mapping[int, Sequence[int]],
    text_ends: Mapping[int, Sequence[int]] | None = None,
    eos_policy: str = "bridge",
    teacher_context: int | None = None,
    sections: SectionAligner | None = None,
) -> list[Rollout]:
    """
    Pairs each completion with the teacher's tokens of its text.

    The end of the turn is one event with two spellings: with `eos_policy="bridge"` the student's stop token and the
    teacher's turn end are one chunk; with `"mask"` the student's stop token takes no part and the teacher reads no end.
    A plain text has no turn, so that it ends with any of the teacher's stop ids: what counts is the log-prob of all of them
    together (`Rollout.other_ends`). A completion that was cut off has no end on either side. Rows that exceed `teacher_context`, prompt included, take no
    part, nor do padding rows.

    Args:
        prompts: B prompts.
        completions: B lists of student ids, up to and including the first stop token.
        aligner: of the two tokenizers.
        turn_ends: for each student id that ends a turn, the teacher's ids for a turn end, at least one.
        text_ends: for each student id that ends a turn, the teacher's ids of which any one ends a plain-text row; None where
            such a row ends as a turn does.
        eos_policy: `"bridge"` or `"mask"`.
        teacher_context: tokens the teacher can read, None for no limit.
        sections: aligns completions that have sections (thought, answer, calls), by the markup of their prompt's frame. None
            where the teacher reads the student's own ids and its turn begins after the generation prompt.
    """
    assert all(turn_ends.values()), "a turn end without tokens would cost the teacher nothing"
    ended = [bool(ids) and ids[-1] in turn_ends for ids in completions]
    found = [
        sections.parse(ids, end, prompt.framed.student) if sections and prompt.framed.student else None
        for prompt, ids, end in zip(prompts, completions, ended, strict=True)
    ]
    contents = [
        [] if parsed else ids[:-1] if end else ids for ids, end, parsed in zip(completions, ended, found, strict=True)
    ]
    rollouts = []
    for prompt, ids, end, alignment, parsed in zip(prompts, completions, ended, aligner(contents), found, strict=True):
        frame = prompt.framed
        if parsed:
            whole = sections(ids, end, parsed, frame.student, frame.teacher)
            alignment, widths = whole.alignment, whole.widths
            before = prompt.teacher_ids if whole.on_tail else frame.stem(prompt.teacher_ids)
            before = [*before, *whole.opening]
        else:
            widths = alignment.student.widths
            before = frame.plain(prompt.teacher_ids) if sections else prompt.teacher_ids
        rollout = Rollout(
            prompt=prompt,
            student_ids=ids,
            student_chunks=alignment.student.chunks,
            student_widths=widths,
            teacher_ids=alignment.teacher.ids,
            teacher_chunks=alignment.teacher.chunks,
            num_chunks=alignment.num_chunks,
            ended=end,
            unread=False,
            alignment=alignment,
            teacher_prompt_ids=before,
        )
        if end and not parsed:
            turn_end = turn_ends[ids[-1]] if eos_policy == "bridge" else ()
            if turn_end and text_ends and frame.is_text:
                first, *others = text_ends[ids[-1]]
                turn_end, rollout = [first], replace(rollout, other_ends=tuple(others))
            rollout = _with_turn_end(rollout, turn_end)
        rollouts.append(_within(rollout, teacher_context))
    return rollouts


def _with_turn_end(rollout: Rollout, turn_end: Sequence[int]) -> Rollout:
    """Adds the student's stop token: one chunk with the teacher's `turn_end`, or without part where that is empty."""
    chunk = rollout.num_chunks if turn_end else -1
    ended = replace(
        rollout,
        student_chunks=np.append(rollout.student_chunks, chunk),
        student_widths=np.append(rollout.student_widths, 0),
    )
    if not turn_end:
        return ended
    return replace(
        ended,
        teacher_ids=[*rollout.teacher_ids, *turn_end],
        teacher_chunks=np.append(rollout.teacher_chunks, [chunk] * len(turn_end)),
        num_chunks=chunk + 1,
    )


def _within(rollout: Rollout, teacher_context: int | None) -> Rollout:
    """The rollout; without scored tokens if its row is padding or longer than the teacher's context."""
    length = len(rollout.teacher_prompt_ids) + len(rollout.teacher_ids)
    unread = teacher_context is not None and length > teacher_context
    if not unread and not rollout.prompt.is_padding:
        return rollout
    return replace(
        rollout,
        student_chunks=np.full_like(rollout.student_chunks, -1),
        teacher_ids=[],
        teacher_chunks=rollout.teacher_chunks[:0],
        num_chunks=0,
        unread=unread,
        teacher_prompt_ids=rollout.teacher_prompt_ids[:1] if unread else rollout.teacher_prompt_ids,
        other_ends=(),
    )


def grouped_by_length(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows of `batches`, redistributed by length, the longest first. Each batch keeps its size."""
    rows = iter(sorted((row for batch in batches for row in batch), key=lambda row: -lengths[row]))
    return [list(islice(rows, len(batch))) for batch in batches]


def collate(rollouts: Sequence[Rollout], pad_token_id: int, pad_to_multiple_of: int | None = None) -> dict:
    """
    A micro-batch of tensors on the CPU.

    Returns:
        A `dict` of
        `input_ids` (B, 1 + S): prompt and completion, padded at the end;
        `labels` (B, 1 + S): the ids that are scored, -100 elsewhere;
        `scored` (2, n): row of each scored token, and column of the token before it, counted from the end (-1 is the last);
        `padding_rows` (B,): True for padding rows;
        `student_chunks`, `student_widths` (B, S): chunk (-1 = takes no part) and bytes of each student token;
        `teacher_chunks`, `teacher_ids` (B, T);
        `prompt_lengths` (B,): index of each row's first completion token;
        `lengths` (B,): tokens of prompt and completion;
        `num_chunks` (`int`): the largest number of chunks of a row, at least 1;
        `frames`: the frames of the B prompts.
    """
    rows = [[*rollout.prompt.student_ids, *rollout.student_ids] for rollout in rollouts]
    length = max(len(row) for row in rows)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    starts = [len(rollout.prompt.student_ids) for rollout in rollouts]
    input_ids = pad_rows(rows, length, pad_token_id)
    chunks = pad_rows([rollout.student_chunks for rollout in rollouts], length, -1, starts)
    widths = pad_rows([rollout.student_widths for rollout in rollouts], length, 0, starts)
    row, column = (chunks[:, 1:] >= 0).nonzero(as_tuple=True)
    teacher_length = max(1, *(len(rollout.teacher_ids) for rollout in rollouts))
    return {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(chunks < 0, -100),
        "scored": torch.stack([row, column - length]),
        "padding_rows": torch.tensor([rollout.prompt.is_padding for rollout in rollouts]),
        "student_chunks": chunks[:, 1:],
        "student_widths": widths[:, 1:],
        "teacher_chunks": pad_rows([rollout.teacher_chunks for rollout in rollouts], teacher_length, -1),
        "teacher_ids": pad_rows([rollout.teacher_ids for rollout in rollouts], teacher_length, 0),
        "prompt_lengths": torch.tensor(starts),
        "lengths": torch.tensor([len(row) for row in rows]),
        "num_chunks": max(1, *(rollout.num_chunks for rollout in rollouts)),
        "frames": [rollout.prompt.frame for rollout in rollouts],
    }


def on_grid(values: torch.Tensor, scored: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """`values` (n,) of the tokens that `collate` returns as `scored`, as (B, S), 0 elsewhere."""
    grid = torch.zeros(input_ids.shape, dtype=values.dtype, device=input_ids.device)
    return grid.index_put(tuple(scored), values.to(grid.device))[:, :-1]


def on_columns(values: Sequence[Sequence[float]], batch: dict) -> torch.Tensor:
    """`values`: one list a row, one number a completion token of a batch from `collate`. As (B, S), 0 elsewhere."""
    starts = batch["prompt_lengths"].tolist()
    return pad_rows(values, batch["input_ids"].shape[1], 0.0, starts)[:, 1:].float()


def pad_scores(scores: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """B rows of shape (T_b, ...) as one (B, `length`, ...) tensor, 0 past the end of a row."""
    padded = scores[0].new_zeros(len(scores), length, *scores[0].shape[1:])
    for row, score in enumerate(scores):
        padded[row, : len(score)] = score
    return padded


def pad_rows(
    rows: Sequence[Sequence[float]], length: int, value: float, starts: Sequence[int] | None = None
) -> torch.Tensor:
    """B rows of numbers as (B, `length`), in the type of `value`. Each begins at its start (0 without `starts`); `value` elsewhere."""
    padded = np.full((len(rows), length), value)
    for row, (own, start) in enumerate(zip(rows, starts or [0] * len(rows), strict=True)):
        padded[row, start : start + len(own)] = own
    return torch.from_numpy(padded)
