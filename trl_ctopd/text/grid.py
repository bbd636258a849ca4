"""The places that both sides of a turn share.

A section takes one place a byte. A stretch of markup takes three: a student's token that ends within the markup ends at the first of
its two inner borders, a teacher's at the second. So both sides meet at the ends of markup, and never within it.
"""

from collections.abc import Sequence

import numpy as np

from .aligner import TextAligner
from .altered_text import MaskedStretch
from .chunks import Side
from .parsing import name_of, runs, section_text
from .planning import Unit


_MARKUP = 3  # places of a stretch of markup


class Grid:
    """The places that both sides share, one a byte of a section and three a stretch of markup, and each side's way to them.

    Attributes:
        size: number of places.
        student, teacher: two arrays each. For every offset in the side's own text: the place where a token that ends there
            ends, and the place where a token that begins there begins.
        shown: (size + 1,) offset in `text` (the sections with the student's markup) of each place.
        content: (size + 1,) bytes of section text before each place.
        is_markup: (size,) True for places of markup.
        undecided: places at which markup ends that may yet be other markup, and those in whitespace after it, with which that may go on.
        masked: stretches of places that are masked; those with an empty reason are not counted.
    """

    def __init__(self, units: Sequence[Unit], written: str, aligner: TextAligner):
        self.units, self.masked = units, []
        self.undecided: list[int] = []
        self._written, names = written, aligner.student_table.names
        length = len(written)
        left, right = np.full(length + 1, -1), np.full(length + 1, -1)
        left[0] = right[0] = 0
        teacher_left, teacher_right, theirs = [0], [0], 0
        shown, content, texts, self.teacher_texts = [0], [0], [], []
        is_markup: list[bool] = []
        size, since = 0, None  # where markup begins that is undecided yet
        leads = bool(units) and units[0].leads and any(_is_read(unit) for unit in units)
        for unit in units:
            a, b = unit.start, unit.end
            if unit.shared:
                text, offsets, invalid = section_text(written[a:b])
                width = len(text.encode())
                places = size + offsets
                self.teacher_texts.append(text)
                teacher_left += range(size + 1, size + width + 1)
                teacher_right[-1:] = range(size, size + width + 1)
                left[a + 1 : b + 1], right[a : b + 1] = places[1:], places
                left[a] = size if left[a] < 0 else left[a]
                self.masked += [MaskedStretch(size + at, size + at + 3, "invalid_utf8") for at in invalid]
                self.masked += [
                    MaskedStretch(size + stretch.start, size + stretch.end, "markup")
                    for stretch in aligner.occurrences(text.encode())
                ]
                shown += range(shown[-1] + 1, shown[-1] + width + 1)
                content += range(content[-1] + 1, content[-1] + width + 1)
                texts.append(text)
                if since is not None:
                    space = len(text[: len(text) - len(text.lstrip())].encode())
                    self.undecided += range(size + 1, size + space + 1)
                    since = since if space == width else None
            else:
                width, since = _MARKUP, None
                literal = "".join(name_of(symbol, names) for symbol in runs(written[a:b]))
                left[a + 1 : b], right[a + 1 : b] = size + 1, size + 1
                left[a] = size if left[a] < 0 else left[a]
                if b > a:
                    right[a], left[b] = size, size + width
                right[b] = size + width
                theirs = len(unit.teacher.encode())
                if theirs:
                    teacher_right[-1] = size
                    teacher_left += [size + 2] * (theirs - 1) + [size + width]
                    teacher_right += [size + 2] * (theirs - 1) + [size + width]
                else:
                    teacher_right[-1] = size + width
                self.teacher_texts.append(unit.teacher)
                if unit.reason or ((a == b or not theirs) and not (leads and unit.leads)):
                    self.masked.append(MaskedStretch(size, size + width, unit.reason or ""))
                elif unit.undecided:
                    since = size
                    self.undecided.append(size + width)
                shown += [shown[-1]] * (width - 1) + [shown[-1] + len(literal.encode())]
                content += [content[-1]] * width
                texts.append(literal)
            size += width
            is_markup += [not unit.shared] * width
        if leads:  # the first token of the side that writes no markup there stands for that of the other too
            right[0] = teacher_right[0] = 0
        if since is not None:  # cut off there
            self.masked.append(MaskedStretch(since, size, "markup"))
        self.is_markup = np.array(is_markup, dtype=bool)
        self.size, self.text = size, "".join(texts)
        self.student, self.teacher = (left, right), (np.array(teacher_left), np.array(teacher_right))
        self.shown, self.content = np.array(shown), np.array(content)

    def silent(self, ends: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """(S,) True for student tokens without text: an id beyond the vocabulary, or a control token within a section."""
        in_section = np.zeros(len(self._written) + 1, dtype=bool)
        for unit in self.units:
            if unit.shared:
                in_section[unit.start : unit.end] = True
        codes = np.array([ord(symbol) for symbol in self._written] + [0])
        return (widths == 0) | ((widths == 1) & (codes[ends - widths] > 255) & in_section[ends - widths])

    def of_teacher(self, start: int, end: int, reason: str) -> MaskedStretch:
        """A stretch of the teacher's text as places; markup that it touches is masked as a whole."""
        left, right = self.teacher
        first, last = int(right[start]), int(left[end])
        at = 0
        for unit, text in zip(self.units, self.teacher_texts, strict=True):
            width = len(text.encode()) if unit.shared else _MARKUP
            if not unit.shared:
                first = at if at < first < at + width else first
                last = at + width if at < last < at + width else last
            at += width
        return MaskedStretch(first, last, reason)


def _is_read(unit: Unit) -> bool:
    """Whether the teacher reads something for it."""
    return unit.end > unit.start if unit.shared else bool(unit.teacher)


def side_on(ends: np.ndarray, widths: np.ndarray, left: np.ndarray, right: np.ndarray) -> Side:
    """One side's tokens on the grid, given where they end in its own text."""
    starts = ends - widths
    stops = left[ends]
    begins = np.where(widths > 0, np.minimum(right[starts], stops), stops)
    return Side(stops, stops - begins, np.array([len(ends)]))
