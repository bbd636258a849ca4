"""What the student would write for a turn that its teacher wrote, for `seq_kd`.

The teacher's turn is parsed by the markup of the teacher's own template, and written with that of the student's: thought as thought, answer as
answer, call as call. It is the way of `text.sections` with the two sides exchanged.

Left out: a section that the student's template has no place for, which is counted; control tokens within a section; and the first bytes
of a character at which a completion was cut off.
"""

import codecs
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..text.aligner import TextAligner
from ..text.chat import Speaker
from ..text.one_tokenizer import is_one_tokenizer
from ..text.parsing import named, symbols
from ..text.sections import SectionAligner, aligner_of
from ..text.token_bytes import token_table
from ..text.turns import ANSWER, CALLS, Form, Turn, read_turn
from .frames import Frame, Prompt


logger = logging.getLogger(__name__)
_SIMPLE = Turn(forms={(ANSWER,): Form((ANSWER,), ("", ""))}).to_json()  # an answer, and the token that ends a turn
_SAID = {
    "thought": "seq_kd: the teacher writes thoughts, and the student's template has no place for one: they are left out "
    "(seq_kd/left_out_fraction counts them). thought_policy='text' makes them the beginning of the answer",
    "call": "seq_kd: the teacher writes calls of tools that the student's template has no place for, or that are not as the teacher's own "
    "template writes them: they are left out (seq_kd/left_out_fraction counts them)",
}


@dataclass(frozen=True)
class Respelled:
    """A completion of the teacher's as the student would write it.

    Attributes:
        prompt: what it goes on from. Where a finished turn lacks what the student's generation prompt writes, it ends before that.
        ids: in the student's tokens.
        size, left_out: bytes that the teacher wrote, control tokens by their names, and of these the bytes of sections that the student has
            no place for, and of their markup.
    """

    prompt: Prompt
    ids: list[int]
    size: int
    left_out: int


class Respeller:
    """
    Args:
        student, teacher: how each is spoken to.
        stop_ids: the ids that end the teacher's turn.
        thought_policy: `"mask"` leaves a thought out that the student's template has no place for; `"text"` makes it the beginning of the
            answer.
    """

    def __init__(self, student: Speaker, teacher: Speaker, stop_ids: Sequence[int], thought_policy: str):
        self._student, self._teacher, self._stop_ids = student, teacher, stop_ids
        self._thought_policy, self._has_told = thought_policy, False
        self._left_out = {"call"} if thought_policy == "text" else {"call", "thought"}
        self._table = token_table(teacher.tokenizer)

    @cached_property
    def _aligner(self) -> TextAligner:
        return aligner_of(self._teacher, self._student)

    @cached_property
    def _sections(self) -> SectionAligner:
        own = {"thought_policy": self._thought_policy, "said": _SAID, "weighs_forms": False}
        return SectionAligner(self._aligner, self._teacher, self._student, **own)

    @cached_property
    def _one_tokenizer(self) -> bool:
        return is_one_tokenizer(self._student.tokenizer, self._teacher.tokenizer)

    def __call__(self, prompt: Prompt, ids: list[int]) -> Respelled:
        """`ids`: what the teacher wrote after `prompt.teacher_ids`, its stop token included."""
        frame, ended = prompt.framed, bool(ids) and ids[-1] in self._stop_ids
        if not ended:
            ids = self._whole_characters(ids)
        size = len(named(ids, self._table)[0].encode())
        ours, theirs = frame.student or _SIMPLE, frame.teacher or _SIMPLE
        if self._one_tokenizer and ours == theirs and not frame.is_text:
            if ended and ids[-1] not in self._student.stop_ids():
                ids = [*ids[:-1], *self._student.turn_end[-1:]]
            return Respelled(prompt, ids, size, 0)
        found = None if frame.is_text else self._sections.parse(ids, ended, theirs)
        if found is None:
            on_tail, own = self._answer(frame, ids[:-1] if ended else ids, ended)
            return Respelled(prompt if on_tail else prompt.before_reference(), own, size, 0)
        written, _, parsed = found
        self._tell_of_controls("".join(written[a:b] for kind, a, b in parsed.sections if kind != CALLS))
        whole = self._sections(ids, ended, found, theirs, ours)
        left_out = whole.alignment.num_masked(*self._left_out)
        prompt = prompt if whole.on_tail else prompt.before_reference()
        return Respelled(prompt, [*whole.opening, *whole.alignment.teacher.ids], size, left_out)

    def _answer(self, frame: Frame, ids: list[int], ended: bool) -> tuple[bool, list[int]]:
        """An answer without markup: whether it goes on from the student's prompt as it is, and its ids."""
        self._tell_of_controls(symbols(np.array(ids, dtype=np.int64), self._table)[0])
        [read] = self._aligner([ids], [frame.teacher_continues])
        text = read.text
        if not frame.is_text and self._student.template:
            return self._student.answer(read_turn(frame.student or _SIMPLE), text, ended)
        end = self._student.text_end if frame.is_text else self._student.turn_end
        own = self._student.continuation_ids(text)
        return True, own + end if ended else own

    def _whole_characters(self, ids: list[int]) -> list[int]:
        """Without the last tokens of a text that ends amid a character."""
        while ids:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            decoder.decode(self._table.read(np.array(ids, dtype=np.int64))[0])
            if not decoder.getstate()[0]:
                break
            ids = ids[:-1]
        return ids

    def _tell_of_controls(self, inside: str):
        """Warns once of control tokens within a section, which the teacher's template does not write there. `inside`: symbols."""
        found = sorted({ord(symbol) - 256 for symbol in inside if ord(symbol) > 255})
        if self._has_told or not found:
            return
        self._has_told = True
        names = ", ".join(repr(self._table.names[i]) for i in found)
        logger.warning(
            f"seq_kd: the teacher writes control tokens where its chat template has none ({names}). They are left out, and what stands "
            "between them is taken for one text."
        )
