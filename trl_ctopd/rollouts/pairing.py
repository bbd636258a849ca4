"""A rollout: one completion, written down once in student tokens and once in the teacher's, with their chunks.

Lists of ids in, padded tensors out. Rows are prompt + completion padded on the right, so that positions are right for
every kind of position embedding; index i of a chunk tensor belongs to the token at i + 1, as log-probs do.
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
    """A prompt whose last `dropped` ids give way to `added`."""

    dropped: int = 0
    added: tuple[int, ...] = ()

    @classmethod
    def of(cls, ids: Sequence[int], others: Sequence[int]) -> "Reopened":
        """How `others` come from `ids`."""
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
        plain, stem: the teacher's prompt up to a finished turn's answer, and up to what all its turns begin with.
        reference: the student's prompt up to where its reference begins.
        student, teacher: how each template writes the turn (`Turn.to_json`); "" where the student's knows an answer only.
    """

    plain: Reopened = Reopened()
    stem: Reopened = Reopened()
    reference: Reopened = Reopened()
    student: str = ""
    teacher: str = ""

    @classmethod
    def of(cls, student: Opened, teacher: Opened, reference_prompt: list[int]) -> "Frame":
        return cls(
            Reopened.of(teacher.ids, teacher.plain),
            Reopened.of(teacher.ids, teacher.stem),
            Reopened.of(student.ids, reference_prompt),
            *(("", "") if student.is_simple else (student.turn.to_json(), teacher.turn.to_json())),
        )

    def to_json(self) -> str:
        """ "" for a frame that says nothing."""
        if self == Frame():
            return ""
        parts = {name: [part.dropped, part.added] for name, part in vars(self).items() if isinstance(part, Reopened)}
        return json.dumps({**parts, "student": self.student, "teacher": self.teacher}, ensure_ascii=False)


@lru_cache(maxsize=4096)
def _read_frame(text: str) -> Frame:
    parts = json.loads(text) if text else {}
    for name in parts.keys() - {"student", "teacher"}:
        dropped, added = parts[name]
        parts[name] = Reopened(dropped, tuple(added))
    return Frame(**parts)


@dataclass
class Prompt:
    """One dataset row, rendered for both models: token ids, the reference in student ids if there is one, which of several
    teachers reads it, and a `Frame` as JSON. `is_padding`: the row is there only to make its batch as
    large as the others, and nothing of it is scored; another process or an earlier batch has it too."""

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
        """The prompt as the student would have read it before the reference."""
        return replace(self, student_ids=self.framed.reference(self.student_ids))


@dataclass
class Rollout:
    """
    A completion of `prompt`: `student_ids` with their chunk and their bytes (S,), `teacher_ids` with their chunk (T,);
    -1 takes no part. `ended` tells whether the writer ended its turn, `unread` whether the teacher's context is too
    short for it. `teacher_prompt_ids` are what the teacher reads first, its turn opened as its template opens a finished one:
    a text beyond its context keeps its place with one token and nothing to score, so that all processes run the same number
    of forward passes.
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


def pair(
    prompts: Sequence[Prompt],
    completions: Sequence[list[int]],
    aligner: TextAligner,
    *,
    turn_ends: Mapping[int, Sequence[int]],
    eos_policy: str = "bridge",
    teacher_context: int | None = None,
    sections: SectionAligner | None = None,
) -> list[Rollout]:
    """
    Sets each completion beside the teacher's tokenization of its text.

    The end of the turn is one event with two spellings: with `eos_policy="bridge"` the student's stop token and the
    teacher's turn end are one chunk; with `"mask"` the student's stop token takes no part and the teacher reads no end.
    A completion cut off before its end has none on either side. Where prompt and completion exceed `teacher_context`
    the row takes no part, and neither does a padding row.

    Args:
        prompts: B prompts.
        completions: B lists of student ids, up to and including the first stop token.
        aligner: of the two tokenizers.
        turn_ends: for each student id that ends a turn, the teacher's ids that do, at least one.
        eos_policy: `"bridge"` or `"mask"`.
        teacher_context: tokens the teacher can read, None for no limit.
        sections: aligns the completions that have sections by the markup of their prompt's frame; None where the teacher reads
            the student's own ids, and its turn from the generation prompt on.
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
            alignment, student_widths = whole.alignment, whole.widths
            before = prompt.teacher_ids if whole.on_tail else frame.stem(prompt.teacher_ids)
            before = [*before, *whole.opening]
            rollouts.append(
                _rollout(
                    prompt,
                    ids,
                    end,
                    alignment,
                    alignment.student.chunks,
                    student_widths,
                    alignment.teacher.ids,
                    alignment.teacher.chunks,
                    alignment.num_chunks,
                    before,
                    teacher_context,
                )
            )
            continue
        student, teacher, num_chunks = alignment.student, alignment.teacher, alignment.num_chunks
        student_chunks, student_widths = student.chunks, student.widths
        teacher_ids, teacher_chunks = teacher.ids, teacher.chunks
        if end:
            bridged = eos_policy == "bridge"
            student_chunks = np.append(student_chunks, num_chunks if bridged else -1)
            student_widths = np.append(student_widths, 0)
            if bridged:
                turn_end = turn_ends[ids[-1]]
                teacher_ids = [*teacher_ids, *turn_end]
                teacher_chunks = np.append(teacher_chunks, [num_chunks] * len(turn_end))
                num_chunks += 1
        before = frame.plain(prompt.teacher_ids) if sections else prompt.teacher_ids
        rollouts.append(
            _rollout(
                prompt,
                ids,
                end,
                alignment,
                student_chunks,
                student_widths,
                teacher_ids,
                teacher_chunks,
                num_chunks,
                before,
                teacher_context,
            )
        )
    return rollouts


def _rollout(
    prompt: Prompt,
    ids: list[int],
    ended: bool,
    alignment: TextAlignment,
    student_chunks: np.ndarray,
    student_widths: np.ndarray,
    teacher_ids: list[int],
    teacher_chunks: np.ndarray,
    num_chunks: int,
    before: list[int],
    teacher_context: int | None,
) -> Rollout:
    """`before`: what the teacher reads first."""
    unread = teacher_context is not None and len(before) + len(teacher_ids) > teacher_context
    if unread or prompt.is_padding:
        student_chunks = np.full_like(student_chunks, -1)
        teacher_ids, teacher_chunks, num_chunks = [], teacher_chunks[:0], 0
    return Rollout(
        prompt,
        ids,
        student_chunks,
        student_widths,
        teacher_ids,
        teacher_chunks,
        num_chunks,
        ended,
        unread,
        alignment,
        before[:1] if unread else before,
    )


def grouped_by_length(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows of `batches`, dealt again so that like lengths meet, the longest first; each batch keeps its size."""
    rows = iter(sorted((row for batch in batches for row in batch), key=lambda row: -lengths[row]))
    return [list(islice(rows, len(batch))) for batch in batches]


def collate(rollouts: Sequence[Rollout], pad_token_id: int, pad_to_multiple_of: int | None = None) -> dict:
    """
    A micro-batch of tensors on the CPU.

    Returns:
        `input_ids`, `labels` (B, 1 + S), padded at the end, which no token before can see: `labels` holds the ids that are
        scored, -100 elsewhere; `scored` (2, n): row of each scored token, and column of the one before it, -1 being a
        row's last; `padding_rows` (B,), True for padding rows; `student_chunks`, `student_widths` (B, S);
        `teacher_chunks`, `teacher_ids` (B, T); `prompt_lengths` (B,), the index of each row's first completion token;
        `lengths` (B,), of prompt and completion; `num_chunks` (`int`), at least 1; `frames`, those of the B prompts.
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
    """`values` (n,) of the tokens that `collate` calls `scored`, as (B, S), 0 elsewhere."""
    grid = torch.zeros(input_ids.shape, dtype=values.dtype, device=input_ids.device)
    return grid.index_put(tuple(scored), values.to(grid.device))[:, :-1]


def on_columns(values: Sequence[Sequence[float]], batch: dict) -> torch.Tensor:
    """`values`, one for each completion token of each row of a batch that `collate` made, as (B, S), 0 elsewhere."""
    starts = batch["prompt_lengths"].tolist()
    return pad_rows(values, batch["input_ids"].shape[1], 0.0, starts)[:, 1:].float()


def pad_scores(scores: Sequence[torch.Tensor], length: int) -> torch.Tensor:
    """B teacher rows of shape (T_b, ...) as one (B, `length`, ...) tensor, 0 where a row has ended."""
    padded = scores[0].new_zeros(len(scores), length, *scores[0].shape[1:])
    for row, score in enumerate(scores):
        padded[row, : len(score)] = score
    return padded


def pad_rows(
    rows: Sequence[Sequence[float]], length: int, value: float, starts: Sequence[int] | None = None
) -> torch.Tensor:
    """(B, `length`) of B rows of numbers of the kind of `value`, each from its start on (0 without `starts`), `value` elsewhere."""
    padded = np.full((len(rows), length), value)
    for row, (own, start) in enumerate(zip(rows, starts or [0] * len(rows), strict=True)):
        padded[row, start : start + len(own)] = own
    return torch.from_numpy(padded)
