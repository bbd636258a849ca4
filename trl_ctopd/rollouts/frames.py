"""A prompt in the ids of both models, and its frame: how the two templates write the turns that follow it.

A frame is stored as JSON with its prompt's ids, so that a completion can be paired again, for example for the report.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from ..text.chat import Conversation, Opened
from ..text.turns import read_turn


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
class Later:
    """A turn that the student writes after tool results.

    Attributes:
        calls: the executed calls at the end of the turn before, as JSON.
        start, stop: the completion's student ids `start:stop` are the results and this turn's header, which are not scored.
        teacher_ids: the same in the teacher's ids.
        frame: how the two templates write this turn: a `Frame` as JSON. Its edits apply to `teacher_ids` instead of the prompt.
    """

    calls: str
    start: int
    stop: int
    teacher_ids: tuple[int, ...]
    frame: str


@dataclass(frozen=True)
class Frame:
    """How the two templates write the turn after a prompt, where it does not begin with the answer on both sides.

    Attributes:
        plain: edit of the teacher's prompt to the one before the answer of a finished turn.
        stem: edit of the teacher's prompt to the one that all its turns begin with.
        reference: edit of the student's prompt to the one before its reference.
        student, teacher: how each template writes the turn (`Turn.to_json`); "" where the student's turns are only answers. `teacher` is
            kept all the same where the teacher writes the references, and its turns are more than answers.
        from_stem: whether the student's turn begins at the stem and not after its generation prompt, as that of a reference may.
        is_text: whether the row is plain text, without a template.
        student_continues, teacher_continues: whether that side has the completion after text, and not after what opens a turn.
        asked: the conversation as JSON, to which tool results can be added; "" without tools.
        later: the turns that the student wrote after tool results.
    """

    plain: Reopened = Reopened()
    stem: Reopened = Reopened()
    reference: Reopened = Reopened()
    student: str = ""
    teacher: str = ""
    from_stem: bool = False
    is_text: bool = False
    student_continues: bool = False
    teacher_continues: bool = False
    asked: str = ""
    later: tuple[Later, ...] = ()

    @classmethod
    def of(
        cls,
        student: Opened,
        teacher: Opened,
        reference_prompt: list[int],
        asked: str = "",
        teacher_writes: bool = False,
    ) -> "Frame":
        """`teacher_writes`: whether turns of the teacher's are to be read too."""
        needs_theirs = not student.is_simple or (teacher_writes and not teacher.is_simple)
        return cls(
            Reopened.of(teacher.ids, teacher.plain),
            Reopened.of(teacher.ids, teacher.stem),
            Reopened.of(student.ids, reference_prompt),
            "" if student.is_simple else student.turn.to_json(),
            teacher.turn.to_json() if needs_theirs else "",
            is_text=teacher.is_text,
            student_continues=student.continues,
            teacher_continues=teacher.continues,
            asked=asked,
        )

    def to_json(self) -> str:
        """ "" for the default frame."""
        if self == Frame():
            return ""
        parts = {
            name: [part.dropped, part.added] if isinstance(part, Reopened) else part
            for name, part in vars(self).items()
        }
        parts["later"] = [list(vars(turn).values()) for turn in self.later]
        return json.dumps(parts, ensure_ascii=False)


@lru_cache(maxsize=4096)
def _read_frame(text: str) -> Frame:
    parts = json.loads(text) if text else {}
    later = [Later(calls, start, stop, tuple(ids), frame) for calls, start, stop, ids, frame in parts.pop("later", ())]
    for name, part in parts.items():
        if isinstance(part, list):
            dropped, added = part
            parts[name] = Reopened(dropped, tuple(added))
    return Frame(**parts, later=tuple(later))


@lru_cache(maxsize=4096)
def _at_the_stem(text: str) -> str:
    """A frame whose student writes without what the generation prompt writes after the turn's stem."""
    frame = _read_frame(text)
    student = replace(read_turn(frame.student), tail="").to_json() if frame.student else ""
    return replace(frame, student=student, reference=Reopened(), from_stem=True).to_json()


@dataclass(frozen=True)
class Share:
    """A teacher of a row: its name and weight, and the prompt in its own ids, with the frame of its template."""

    teacher: str
    weight: float
    ids: list[int]
    frame: str


def to_json(shares: Sequence[Share]) -> str:
    return json.dumps([[own.teacher, own.weight, own.ids, own.frame] for own in shares])


def shares_of(text: str) -> list[Share]:
    """The inverse of `to_json`; "" has none."""
    return [Share(*own) for own in json.loads(text)] if text else []


class TurnOf(NamedTuple):
    """One turn of a completion: the prompt that it follows, its student ids, and the executed calls at its end; None at the end of
    the last turn."""

    prompt: "Prompt"
    student_ids: list[int]
    calls: list[dict] | None


@dataclass
class Prompt:
    """
    One dataset row, rendered for both models.

    Attributes:
        student_ids, teacher_ids: the prompt in the tokens of each.
        reference_ids: the reference completion in student ids, if there is one.
        teacher: name of the teacher that reads it, where there are several.
        frame: a `Frame` as JSON.
        blend: the teachers that read it together, where there are several of them: `to_json` of their shares; else "". `teacher`, `teacher_ids`
            and `frame` are then those of the heaviest.
        row: the dataset's row as JSON, where functions of the user's are called with it; else "".
        is_padding: whether the row only fills up its batch. Another process or an earlier batch has it too, and nothing of it
            is scored.
    """

    student_ids: list[int]
    teacher_ids: list[int]
    reference_ids: list[int] | None = None
    teacher: str = ""
    frame: str = ""
    row: str = ""
    blend: str = ""
    is_padding: bool = False

    @property
    def framed(self) -> Frame:
        return _read_frame(self.frame)

    def before_reference(self) -> "Prompt":
        """The prompt as the student reads it before the reference, which is then a turn from there on."""
        ids = self.framed.reference(self.student_ids)
        if ids is self.student_ids:
            return self
        shares = [replace(own, frame=_at_the_stem(own.frame)) for own in shares_of(self.blend)]
        return replace(self, student_ids=ids, frame=_at_the_stem(self.frame), blend=to_json(shares) if shares else "")

    def turns(self, completion: list[int]) -> list[TurnOf]:
        """The turns of `completion`, which tool results separate. The prompt of a later turn is the text between it and the turn
        before."""
        later = self.framed.later
        begins, ends = [0, *(turn.stop for turn in later)], [*(turn.start for turn in later), len(completion)]
        prompts = [self, *(replace(self, teacher_ids=[*turn.teacher_ids], frame=turn.frame) for turn in later)]
        calls = [*(json.loads(turn.calls) for turn in later), None]
        return [
            TurnOf(prompt, completion[begin:end], own)
            for prompt, begin, end, own in zip(prompts, begins, ends, calls, strict=True)
        ]


def conversation_to_json(conversation: Conversation) -> str:
    """The conversation as JSON for `Frame.asked`, without its reference."""
    return json.dumps({**vars(conversation), "reference": None}, ensure_ascii=False)


def conversation_from_json(text: str) -> Conversation:
    return Conversation(**json.loads(text))
