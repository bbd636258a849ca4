"""Parses a completion into sections (thought, answer, calls) by the markup of the student's own template."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .aligner import decoded, in_text
from .calls import ANY_SPACE, json_of, loosely
from .chunks import bounds
from .token_bytes import TokenTable
from .turns import ANSWER, CALLS, THOUGHT, Turn, one_of


START, END = "start", "end"
SPACE = " \t\r\n"


@dataclass(frozen=True)
class Parsed:
    """A completion, parsed by its own markup.

    Attributes:
        sections: kind, start and end of each section, in symbols.
        marks: start and end of the markup before each section and, if the turn has ended or was cut off amid markup, after the last one.
    """

    sections: tuple[tuple[str, int, int], ...]
    marks: tuple[tuple[int, int], ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind, *_ in self.sections)

    def without_empty_thought(self, written: str) -> "Parsed":
        """A thought of nothing but whitespace counts as markup before the next section."""
        if (
            len(self.sections) < 2
            or self.sections[0][0] != THOUGHT
            or written[slice(*self.sections[0][1:])].strip(SPACE)
        ):
            return self
        (begin, _), (_, end), *rest = self.marks
        return Parsed(self.sections[1:], ((begin, end), *rest))


def symbols(ids: np.ndarray, table: TokenTable) -> tuple[str, np.ndarray]:
    """What ids (N,) spell as a string of symbols, and how many symbols each id has (N,). A byte is the character of its value, a
    control token the character 256 + id."""
    spelled, widths = table.read(ids)
    places = np.flatnonzero(np.isin(ids, list(table.special)))
    if not len(places):
        return spelled.decode("latin-1"), widths
    ends, text, at, parts = np.cumsum(widths), spelled.decode("latin-1"), 0, []
    for place in places.tolist():
        parts += [text[at : ends[place]], chr(256 + int(ids[place]))]
        at = ends[place]
    widths = widths.copy()
    widths[places] = 1
    return "".join([*parts, text[at:]]), widths


class Grammar:
    """Parses completions of one side: for each kind of section, which kinds may come next, and after which markup."""

    def __init__(self, turn: Turn, table: TokenTable):
        self._controls = {name: chr(256 + i) for i, name in table.names.items() if i in table.special}
        self._pattern = one_of(self._controls)
        self.tail = self.symbols(turn.tail)
        self._steps: dict[str, list[tuple[str, re.Pattern]]] = {}
        self._literals: dict[str, list[str]] = {}
        loose = {(THOUGHT, form.literals[1]) for form in turn.forms.values() if form.loose}
        # gpt-oss writes what is said before a call as it writes a thought, which is the likelier of the two
        for here, there, literal in sorted(steps(turn), key=lambda step: (-len(step[2]), step[1] != THOUGHT)):
            pattern = self._loosely(literal, (here, literal) in loose, there == CALLS)
            self._steps.setdefault(here, []).append((there, pattern))
            self._literals.setdefault(here, []).append(self.symbols(literal).strip(SPACE))

    def symbols(self, literal: str) -> str:
        """A literal as symbols (see the function of this name)."""
        parts, at = [], 0
        for match in self._pattern.finditer(literal) if self._pattern else ():
            parts += [literal[at : match.start()].encode().decode("latin-1"), self._controls[match[0]]]
            at = match.end()
        return "".join([*parts, literal[at:].encode().decode("latin-1")])

    def _loosely(self, literal: str, loose: bool, calls: bool) -> re.Pattern:
        """A pattern that finds a literal with as much whitespace around its tags as it has, or less; with `loose`, with any. In the JSON
        before a call's name, any."""
        text = self.symbols(literal)
        if loose:
            any_space = rf"[{SPACE}]*"
            tag_and_rest = re.split(rf"[{SPACE}]+", text.strip(SPACE), maxsplit=1)
            return re.compile(any_space + any_space.join(map(re.escape, tag_and_rest)) + any_space)
        core = text.strip(SPACE)
        if not core:
            return re.compile(_optional(text))
        before, after = text[: text.index(core)], text[text.index(core) + len(core) :]
        in_json = json_of(core) if calls else ""
        head, rest = re.escape(core.removesuffix(in_json)), loosely(in_json)
        rest = rest if head else rest.removeprefix(ANY_SPACE)
        return re.compile(_optional(before) + head + rest + _optional(after))

    def parse(self, written: str, ended: bool) -> Parsed:
        """The sections of a completion. `ended`: its last symbol is a stop token."""
        shift = len(self.tail)
        text, stop = self.tail + written, len(self.tail + written) - ended
        at, here = 0, START
        marks, sections = [], []
        while True:
            found = self._next(text, here, at, stop)
            if found is None:
                break
            there, begin, end = found
            if here != START:
                sections.append((here, at, begin))
            marks.append((begin, end))
            here, at = there, end
        end = stop if ended else self._begun(text, here, at, stop)
        if here == START:
            here = ANSWER
            marks.append((0, 0))
        if ended and here == THOUGHT and not sections and at >= shift and self._begins_an_answer(text, at, stop):
            here = ANSWER  # a turn has none but a thought only where its writer was cut off
        if ended:
            end = self._ends(text, here, at, stop)
        sections.append((here, at, end))
        if ended or end < stop:
            marks.append((end, len(text)))
        move = lambda place: max(place - shift, 0)  # noqa: E731
        return Parsed(
            tuple((kind, move(a), move(b)) for kind, a, b in sections), tuple((move(a), move(b)) for a, b in marks)
        )

    def _next(self, text: str, here: str, at: int, stop: int) -> tuple[str, int, int] | None:
        ways = [way for way in self._steps.get(here, ()) if way[0] != END]
        if here == START:
            for there, pattern in ways:
                if match := pattern.match(text, at, stop):
                    return there, at, match.end()
            return None
        found = [(match, there) for there, pattern in ways if (match := pattern.search(text, at, stop))]
        found = [(match, there) for match, there in found if match.end() > match.start()]
        if not found:
            return None
        match, there = min(found, key=lambda way: (way[0].start(), -way[0].end()))
        return there, match.start(), match.end()

    def _begun(self, text: str, here: str, at: int, stop: int) -> int:
        """Where the markup begins that a turn was cut off amid, if it has begun with a control token; else `stop`. What it spells would
        be taken for text."""
        for size in range(min(stop - at, max(map(len, self._literals.get(here, [""]))) - 1), 0, -1):
            written = text[stop - size : stop]
            if max(written) > "\xff" and any(own.startswith(written) for own in self._literals[here]):
                return stop - size
        return stop

    def _begins_an_answer(self, text: str, at: int, stop: int) -> bool:
        """Whether what stands before `at` opens an answer as well as a thought (Apriel)."""
        matches = (pattern.match(text, 0, stop) for there, pattern in self._steps.get(START, ()) if there == ANSWER)
        return any(match and match.end() == at for match in matches)

    def _ends(self, text: str, here: str, at: int, stop: int) -> int:
        """Where the last section ends: before the markup that ends with the stop token."""
        for there, pattern in self._steps.get(here, ()):
            if there == END:
                for match in pattern.finditer(text, at):
                    if match.end() == len(text):
                        return match.start()
        return stop


def _optional(space: str) -> str:
    return "".join(f"{re.escape(character)}?" for character in space)


def steps(turn: Turn) -> list[tuple[str, str, str]]:
    """All steps from one kind of section to the next that the forms have, with the literal between the two; without repetitions, in
    the order of the forms."""
    found = [
        step
        for form in turn.forms.values()
        for step in zip((START, *form.sections), (*form.sections, END), form.literals, strict=True)
    ]
    return list(dict.fromkeys(found))


def section_text(written: str) -> tuple[str, np.ndarray, list[int]]:
    """A section's text, the offset in it of each border between its symbols, and the offsets of U+FFFD for invalid bytes."""
    codes = np.array([ord(symbol) for symbol in written], dtype=np.int64)
    raw = bounds(codes < 256)
    data = "".join(symbol for symbol in written if ord(symbol) < 256).encode("latin-1")
    [text], invalid = decoded([data])
    if not invalid:
        return text, raw, []
    return text, in_text(raw, invalid), in_text(np.array([start for start, _ in invalid]), invalid).tolist()


def text_of(written: str) -> str:
    """The text of a section of symbols, with U+FFFD for invalid bytes; without control tokens."""
    return section_text(written)[0]


def named(ids: Sequence[int], table: TokenTable) -> tuple[str, np.ndarray]:
    """The text of ids (N,), control tokens by their names, and how many of its bytes each stands for (N,)."""
    written, counts = symbols(np.array(ids, dtype=np.int64), table)
    sizes = [len(name_of(symbol, table.names).encode()) if ord(symbol) > 255 else 1 for symbol in written]
    stops = np.cumsum(counts)
    widths = np.append(0, np.cumsum(sizes, dtype=np.int64))
    parts = [name_of(run, table.names) for run in runs(written)]
    return "".join(parts), widths[stops] - widths[stops - counts]


def runs(written: str) -> list[str]:
    """Symbols as control tokens and runs of bytes."""
    return re.findall(r"[\x00-\xff]+|[^\x00-\xff]", written)


def spelled(written: str, table: TokenTable) -> str:
    """The text of symbols, control tokens by their names."""
    return "".join(name_of(run, table.names) for run in runs(written))


def name_of(run: str, names: Mapping[int, str]) -> str:
    return names[ord(run) - 256] if ord(run[0]) > 255 else run.encode("latin-1").decode(errors="replace")
