"""A rollout: one completion, tokenized by the student and by the teacher, with the chunks that both share.

Lists of ids in, padded tensors out. Rows are prompt + completion padded on the right, so that positions are right for
every kind of position embedding. Index i of a chunk tensor belongs to the token at i + 1, as for log-probs.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from ..text.aligner import AlignedTokens, TextAligner, TextAlignment
from ..text.altered_text import MaskedStretch
from ..text.parsing import named
from ..text.sections import SectionAligner
from .frames import Frame, Prompt, Reopened, TurnOf


__all__ = [
    "Frame",
    "Part",
    "Prompt",
    "Rollout",
    "by_length",
    "collate",
    "grouped_by_length",
    "on_columns",
    "on_grid",
    "pad_rows",
    "pad_scores",
    "pair",
    "unscored",
]


@dataclass(frozen=True)
class Part:
    """
    What one of several teachers adds to a mixture.

    Attributes:
        weight: of its log-probs.
        rollout: the completion in its tokens.
        places: (T_k,) for each of its tokens, the mixture's token whose log-prob it adds to; -1 for none.
        chunks: (T_k,) for each of its tokens, the mixture's chunk; -1 for none.
    """

    weight: float
    rollout: "Rollout"
    places: np.ndarray
    chunks: np.ndarray


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
        other_ends: further ids with which the teacher might have ended the text, besides its last one.
        given: with tools, the stretches of `student_ids` that the student did not write: results, and the header of the turn
            after them.
        teacher_starts: places in `teacher_ids` where a turn after results begins.
        markup: (S,) True for the tokens of chunks with markup between sections, of which the two sides may spell other bytes; None for
            none.
        untold: (S,) True for the tokens of chunks of which the teacher's distributions tell nothing ([`SectionAligner.untold`]); None for none.
        parts: of a mixture of teachers, what each adds. `teacher_ids` and `teacher_chunks` are then the mixture's own, and the ids
            mean nothing.
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
    given: tuple[tuple[int, int], ...] = ()
    teacher_starts: tuple[int, ...] = ()
    markup: np.ndarray | None = None
    untold: np.ndarray | None = None
    parts: tuple[Part, ...] = ()

    @property
    def num_given(self) -> int:
        return sum(stop - start for start, stop in self.given)


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
    A plain text has no turn, so any of the teacher's stop ids ends it: the log-prob of its end is that of all of them together
    (`Rollout.other_ends`). A completion that was cut off has no end on either side. Rows that exceed `teacher_context`, prompt
    included, take no part, nor do padding rows.

    A completion of several turns (`Frame.later`) is paired turn by turn. Each model reads the text between two turns in its own
    template, and that text is not scored.

    Args:
        prompts: B prompts.
        completions: B lists of student ids, up to and including the first stop token.
        aligner: of the two tokenizers.
        turn_ends: for each student id that ends a turn, the teacher's ids for a turn end, at least one.
        text_ends: for each student id that ends a turn, the teacher's ids of which any one ends a plain-text row. None: such a row
            ends like a turn.
        eos_policy: `"bridge"` or `"mask"`.
        teacher_context: tokens the teacher can read, None for no limit.
        sections: aligns completions that have sections (thought, answer, calls), by the markup of their prompt's frame. None
            where the teacher reads the student's own ids and its turn begins after the generation prompt.
    """
    assert all(turn_ends.values()), "a turn end without tokens would cost the teacher nothing"
    turns = [prompt.turns(ids) for prompt, ids in zip(prompts, completions, strict=True)]
    flat = [turn for own in turns for turn in own]
    found = iter(_pair_turns(flat, aligner, turn_ends, text_ends, eos_policy, sections))
    rollouts = [
        _joined(prompt, ids, [next(found) for _ in own], eos_policy)
        for prompt, ids, own in zip(prompts, completions, turns, strict=True)
    ]
    return [_within(rollout, teacher_context) for rollout in rollouts]


def _pair_turns(
    turns: Sequence[TurnOf],
    aligner: TextAligner,
    turn_ends: Mapping[int, Sequence[int]],
    text_ends: Mapping[int, Sequence[int]] | None,
    eos_policy: str,
    sections: SectionAligner | None,
) -> list[Rollout]:
    """Pairs each turn separately. If another turn follows, the teacher reads the end of the turn whatever `eos_policy` is."""
    ended = [bool(turn.student_ids) and turn.student_ids[-1] in turn_ends for turn in turns]
    found = [
        sections.parse(ids, end, prompt.framed.student, prompt.framed.teacher)
        if sections and prompt.framed.student
        else None
        for (prompt, ids, _), end in zip(turns, ended, strict=True)
    ]
    contents = [
        [] if parsed else turn.student_ids[:-1] if end else turn.student_ids
        for turn, end, parsed in zip(turns, ended, found, strict=True)
    ]
    frames, rollouts = [turn.prompt.framed for turn in turns], []
    continues = [frame.student_continues for frame in frames], [frame.teacher_continues for frame in frames]
    alignments = aligner(contents, *continues)
    for (prompt, ids, calls), end, alignment, parsed in zip(turns, ended, alignments, found, strict=True):
        frame = prompt.framed
        if parsed:
            whole = sections(ids, end, parsed, frame.student, frame.teacher, calls)
            alignment, widths, markup = whole.alignment, whole.widths, whole.markup
            before = prompt.teacher_ids if whole.on_tail else frame.stem(prompt.teacher_ids)
            before = frame.plain(prompt.teacher_ids) if whole.on_plain else [*before, *whole.opening]
        else:
            widths, markup = alignment.student.widths, None
            before = frame.plain if sections else frame.stem if frame.from_stem else Reopened()
            before = before(prompt.teacher_ids)
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
            markup=markup,
        )
        if end and not parsed:
            turn_end = turn_ends[ids[-1]] if eos_policy == "bridge" or calls is not None else ()
            if turn_end and text_ends and frame.is_text:
                first, *others = text_ends[ids[-1]]
                turn_end, rollout = [first], replace(rollout, other_ends=tuple(others))
            rollout = _with_turn_end(rollout, turn_end)
        if sections and frame.student and ids and (untold := sections.untold(frame.student, frame.teacher)):
            chunks = rollout.student_chunks
            rollout.untold = (chunks >= 0) & ((chunks == chunks[0]) | (untold == "all"))
        rollouts.append(rollout)
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


def _joined(prompt: Prompt, ids: list[int], turns: Sequence[Rollout], eos_policy: str) -> Rollout:
    """Joins the rollouts of a conversation's turns into one."""
    if len(turns) == 1:
        return turns[0]
    given = tuple((later.start, later.stop) for later in prompt.framed.later)
    student_chunks, teacher_chunks, num_chunks = np.full(len(ids), -1), [], 0
    student_widths, (markup, untold) = np.zeros(len(ids), dtype=np.int64), np.zeros((2, len(ids)), dtype=bool)
    teacher_ids: list[int] = []
    starts: list[int] = []
    places = zip([0, *(stop for _, stop in given)], turns, strict=True)
    for place, turn in places:
        if place:
            teacher_ids += turn.teacher_prompt_ids
            teacher_chunks.append(np.full(len(turn.teacher_prompt_ids), -1))
            starts.append(len(teacher_ids))
        teacher_ids += turn.teacher_ids
        own, theirs = turn.student_chunks, turn.teacher_chunks
        if eos_policy == "mask" and turn is not turns[-1] and own[-1] >= 0:
            own, theirs = (np.where(chunks == own[-1], -1, chunks) for chunks in (own, theirs))
        student_chunks[place : place + len(own)] = np.where(own >= 0, own + num_chunks, -1)
        teacher_chunks.append(np.where(theirs >= 0, theirs + num_chunks, -1))
        student_widths[place : place + len(own)] = turn.student_widths
        if turn.markup is not None:
            markup[place : place + len(own)] = turn.markup
        if turn.untold is not None:
            untold[place : place + len(own)] = turn.untold
        num_chunks += turn.num_chunks
    return Rollout(
        prompt=prompt,
        student_ids=ids,
        student_chunks=student_chunks,
        student_widths=student_widths,
        teacher_ids=teacher_ids,
        teacher_chunks=np.concatenate(teacher_chunks),
        num_chunks=num_chunks,
        ended=turns[-1].ended,
        unread=False,
        alignment=_joined_alignment(ids, given, turns),
        teacher_prompt_ids=turns[0].teacher_prompt_ids,
        given=given,
        teacher_starts=tuple(starts),
        markup=markup,
        untold=untold,
    )


def _joined_alignment(ids: list[int], given: Sequence[tuple[int, int]], turns: Sequence[Rollout]) -> TextAlignment:
    """Joins the turns' alignments, with the text between them as the student reads it."""
    tables = turns[0].alignment._tables
    texts, spelled, masked, spans, student, teacher = [], b"", [], [], [], []
    num_chunks = 0
    for n, turn in enumerate(turns):
        if n:
            text, widths = named(ids[slice(*given[n - 1])], tables[0])
            texts.append(text)
            masked.append(MaskedStretch(len(spelled), len(spelled) + len(text.encode()), "tool"))
            spelled += text.encode()
            count = len(turn.teacher_prompt_ids)
            student.append((np.full(len(widths), -1), widths))
            teacher.append((np.full(count, -1), np.zeros(count, dtype=np.int64)))
        own, base, size = turn.alignment, len(spelled), len(turn.alignment._spelled)
        whole = n < len(turns) - 1  # if another turn follows, the end belongs to it too
        ends = turn.num_chunks - own.num_chunks if whole else 0
        for side, found, chunks in (
            (student, own.student, turn.student_chunks),
            (teacher, own.teacher, turn.teacher_chunks),
        ):
            chunks = chunks if whole else found.chunks
            widths = np.append(found.widths, np.zeros(len(chunks) - len(found.widths), dtype=np.int64))
            side.append((np.where(chunks >= 0, chunks + num_chunks, -1), widths))
        spans.append(np.concatenate([own._spans, np.full((ends, 2), size)]) + base)
        masked += [MaskedStretch(one.start + base, one.end + base, one.reason) for one in own.masked]
        texts.append(own.text)
        spelled += own._spelled
        num_chunks += own.num_chunks + ends
    last = turns[-1].alignment
    teacher_ids = [
        i
        for n, turn in enumerate(turns)
        for i in [
            *(turn.teacher_prompt_ids if n else []),
            *(last.teacher.ids if turn is turns[-1] else turn.teacher_ids),
        ]
    ]
    sides = []
    for own_ids, parts in ((ids[: sum(len(chunks) for chunks, _ in student)], student), (teacher_ids, teacher)):
        chunks, widths = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        sides.append(AlignedTokens(own_ids, chunks, widths))
    from_tools = sum(stop - start for start, stop in given), sum(len(turn.teacher_prompt_ids) for turn in turns[1:])
    text, spans = "".join(texts), np.concatenate(spans)
    return TextAlignment(text, *sides, num_chunks, masked, spelled, spans, tables, from_tools)


def _within(rollout: Rollout, teacher_context: int | None) -> Rollout:
    """The rollout; without scored tokens if its row is padding or longer than the teacher's context."""
    length = len(rollout.teacher_prompt_ids) + len(rollout.teacher_ids)
    unread = teacher_context is not None and length > teacher_context
    if not unread and not rollout.prompt.is_padding:
        return rollout
    before = rollout.teacher_prompt_ids[:1] if unread else rollout.teacher_prompt_ids
    return replace(unscored(rollout), unread=unread, teacher_prompt_ids=before)


def unscored(rollout: Rollout) -> Rollout:
    """The rollout with nothing to score: the teacher reads its prompt alone."""
    return replace(
        rollout,
        student_chunks=np.full_like(rollout.student_chunks, -1),
        teacher_ids=[],
        teacher_chunks=rollout.teacher_chunks[:0],
        num_chunks=0,
        other_ends=(),
        teacher_starts=(),
    )


def by_length(rows: Iterable[int], lengths: Sequence[int], groups: Sequence[Hashable] | None = None) -> list[int]:
    """`rows`, the longest first. With the group of each row, those of one group follow one another, the group of the longest first."""
    order = sorted(rows, key=lambda row: -lengths[row])
    if groups is None:
        return order
    first: dict[Hashable, int] = {}
    for place, row in enumerate(order):
        first.setdefault(groups[row], place)
    return sorted(order, key=lambda row: first[groups[row]])


def of_like_length(lengths: Sequence[int]) -> list[list[int]]:
    """All rows in groups, the longest first: none is shorter than four fifths of the longest in its group."""
    groups: list[list[int]] = []
    for row in by_length(range(len(lengths)), lengths):
        if not groups or 5 * lengths[row] < 4 * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups


def grouped_by_length(
    lengths: Sequence[int], batches: Sequence[Sequence[int]], groups: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """The rows of `batches`, redistributed `by_length`. Each batch keeps its size."""
    rows = iter(by_length((row for batch in batches for row in batch), lengths, groups))
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
        `markup`, `untold` (B, S), each where a rollout has some: True for the tokens of chunks with markup, and of chunks that are untold;
        `student_chunks`, `student_widths` (B, S): chunk (-1 = takes no part) and bytes of each student token;
        `teacher_chunks`, `teacher_ids` (B, T);
        `prompt_lengths` (B,): index of each row's first completion token;
        `lengths` (B,): tokens of prompt and completion;
        `num_chunks` (`int`): the largest number of chunks of a row, at least 1;
        `frames`: the frames of the B prompts, or what each of several teachers reads.
    """
    rows = [[*rollout.prompt.student_ids, *rollout.student_ids] for rollout in rollouts]
    length = max(len(row) for row in rows)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    starts = [len(rollout.prompt.student_ids) for rollout in rollouts]
    input_ids = pad_rows(rows, length, pad_token_id)
    chunks = pad_rows([rollout.student_chunks for rollout in rollouts], length, -1, starts)
    widths = pad_rows([rollout.student_widths for rollout in rollouts], length, 0, starts)
    own = {}
    for name in ("markup", "untold"):
        marked = [() if (found := getattr(rollout, name)) is None else found for rollout in rollouts]
        if any(map(any, marked)):
            own[name] = pad_rows(marked, length, False, starts)[:, 1:]
    row, column = (chunks[:, 1:] >= 0).nonzero(as_tuple=True)
    teacher_length = max(1, *(len(rollout.teacher_ids) for rollout in rollouts))
    return {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(chunks < 0, -100),
        "scored": torch.stack([row, column - length]),
        "padding_rows": torch.tensor([rollout.prompt.is_padding for rollout in rollouts]),
        "student_chunks": chunks[:, 1:],
        "student_widths": widths[:, 1:],
        **own,
        "teacher_chunks": pad_rows([rollout.teacher_chunks for rollout in rollouts], teacher_length, -1),
        "teacher_ids": pad_rows([rollout.teacher_ids for rollout in rollouts], teacher_length, 0),
        "prompt_lengths": torch.tensor(starts),
        "lengths": torch.tensor([len(row) for row in rows]),
        "num_chunks": max(1, *(rollout.num_chunks for rollout in rollouts)),
        "frames": [rollout.prompt.blend or rollout.prompt.frame for rollout in rollouts],
    }


def on_grid(values: torch.Tensor, scored: torch.Tensor, input_ids: torch.Tensor, add: bool = False) -> torch.Tensor:
    """`values` (n,) of the tokens that `collate` returns as `scored`, as (B, S), 0 elsewhere. `add`: their sum where a place comes
    more than once."""
    grid = torch.zeros(input_ids.shape, dtype=values.dtype, device=input_ids.device)
    return grid.index_put(tuple(scored), values.to(grid.device), accumulate=add)[:, :-1]


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
