"""Aligns a completion with its teacher's writing of the same turn, section by section: thought with thought, answer with answer.

The student's text is parsed by the student's own markup, and written again with the teacher's. The text of a section is the same
on both sides and is aligned byte for byte. Between two sections each side has its own markup: one event with two spellings.

    student   <think>\\n  Two and two.  \\n</think>\\n\\n                                          It is four.  <|im_end|>
    teacher   <|channel|>analysis<|message|>  Two and two.  <|end|>…final<|message|>  It is four.  <|return|>

- Student ids are never encoded again. A control token is known by its id, so a text that spells one is text.
- On the teacher's side a section and plain markup next to it are encoded together, since one token may hold the end of the one
  and the beginning of the other (`.\\n`). The chunk then holds both.
- Whitespace around a tag belongs to the tag, up to as much as the template writes there; a student may write less. What is beyond
  that is text.
- A section that the teacher's template has no form for is masked, with its reason.

Chunks are found on a grid of places that both sides share. A section takes one place a byte. A stretch of markup takes three: a
student's token that ends within the markup ends at the first of its two inner borders, a teacher's at the second. So both sides
meet at the ends of markup, and never within it.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .aligner import AlignedTokens, TextAligner, TextAlignment, decoded, in_text
from .altered_text import MaskedStretch
from .calls import MARKUP, beside, pieces
from .chat import Speaker, unshared_markup
from .chunks import Side, bounds, synchronized_chunks
from .token_bytes import TokenTable
from .turns import ANSWER, CALLS, THOUGHT, Turn, Unrenderable, one_of, read_turn


START, END = "start", "end"
_MARKUP = 3  # places of the grid that a stretch of markup takes
_SPACE = " \t\r\n"
_REASON = {THOUGHT: "thought", CALLS: "call"}
_SAID = {  # warnings, given once each, for sections that are masked
    "thought": "the student writes thoughts, and the teacher's template has no place for one: they are masked, and the teacher does "
    "not read them (masked_bytes/thought counts them). thought_policy='text' lets it read them as the beginning of the answer; "
    "or give its template the setting that opens a thought (teacher_chat_template_kwargs)",
    "call": "the student writes calls of tools that the teacher's template has no place for, or that are not as the student's own "
    "template writes them: they are masked (masked_bytes/call counts them)",
}


@dataclass(frozen=True)
class Unit:
    """A stretch of the student's turn, and what the teacher reads in its place.

    Attributes:
        start, end: the stretch, in the student's symbols.
        teacher: what the teacher reads in its place; "" where `shared`.
        shared: whether both sides have the same text there; False for markup.
        reason: why the stretch is masked; None where it is not.
    """

    start: int
    end: int
    teacher: str
    shared: bool
    reason: str | None = None


@dataclass(frozen=True)
class Parsed:
    """A completion, parsed by its own markup.

    Attributes:
        sections: kind, start and end of each section, in symbols.
        marks: start and end of the markup before each section and, if the turn has ended, after the last one.
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
            or written[slice(*self.sections[0][1:])].strip(_SPACE)
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
        loose = {(THOUGHT, form.literals[1]) for form in turn.forms.values() if form.loose}
        # gpt-oss writes what is said before a call as it writes a thought, which is the likelier of the two
        for here, there, literal in sorted(_steps(turn), key=lambda step: (-len(step[2]), step[1] != THOUGHT)):
            pattern = self._loosely(literal, (here, literal) in loose)
            self._steps.setdefault(here, []).append((there, pattern))

    def symbols(self, literal: str) -> str:
        """A literal as symbols (see the function of this name)."""
        parts, at = [], 0
        for match in self._pattern.finditer(literal) if self._pattern else ():
            parts += [literal[at : match.start()].encode().decode("latin-1"), self._controls[match[0]]]
            at = match.end()
        return "".join([*parts, literal[at:].encode().decode("latin-1")])

    def _loosely(self, literal: str, loose: bool) -> re.Pattern:
        """A pattern that finds a literal with as much whitespace around its tags as it has, or less; with `loose`, with any."""
        text = self.symbols(literal)
        if loose:
            return re.compile(rf"[{_SPACE}]*{re.escape(text)}[{_SPACE}]*")
        core = text.strip(_SPACE)
        if not core:
            return re.compile(_optional(text))
        before, after = text[: text.index(core)], text[text.index(core) + len(core) :]
        return re.compile(_optional(before) + re.escape(core) + _optional(after))

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
        if here == START:
            here = ANSWER
            marks.append((0, 0))
        end = self._ends(text, here, at, stop) if ended else stop
        sections.append((here, at, end))
        if ended:
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


def _steps(turn: Turn) -> list[tuple[str, str, str]]:
    """All steps from one kind of section to the next that the forms have, with the literal between the two; without repetitions, in
    the order of the forms."""
    steps = [
        step
        for form in turn.forms.values()
        for step in zip((START, *form.sections), (*form.sections, END), form.literals, strict=True)
    ]
    return list(dict.fromkeys(steps))


# --- what the teacher reads


@dataclass(frozen=True)
class Plan:
    """What the teacher reads for a completion.

    Attributes:
        on_tail: whether it goes on from the teacher's generation prompt; False: from its stem.
        opening: what stands before the first unit; read, not scored.
        units: in order; they cover the completion.
    """

    on_tail: bool
    opening: str
    units: tuple[Unit, ...]


def plan(
    parsed: Parsed,
    written: str,
    ended: bool,
    teacher: Turn,
    eos: str,
    *,
    markup_policy: str = "bridge",
    thought_policy: str = "mask",
    eos_policy: str = "bridge",
    calls: Sequence[Unit] | None = None,
) -> Plan:
    """
    Sets the sections that `Grammar.parse` found beside the teacher's form of the same turn.

    Args:
        written: the completion's symbols.
        teacher: how its template writes this turn.
        eos: its EOS token, which ends a turn where the template writes no end.
        calls: units of the calls, from the first call's name to the end of the turn; None where the teacher cannot read them.
    """
    sections, marks, kinds = parsed.sections, parsed.marks, list(parsed.kinds)
    steps = {(here, there): literal for here, there, literal in reversed(_steps(teacher))}  # the simplest form's
    lost = {kinds.index(kind): _REASON[kind] for kind in lost_kinds(parsed.kinds, teacher, calls is None)}
    form = teacher.forms.get(tuple(kind for n, kind in enumerate(kinds) if n not in lost))
    literals = list(form.literals) if form else [steps.get((START, kinds[0]), "") if 0 not in lost else ""]
    if not form and all(n in lost for n in range(len(kinds))):
        literals = [steps.get((START, ANSWER), "")]
    on_tail = literals[0].startswith(teacher.tail)
    literals[0] = literals[0].removeprefix(teacher.tail)

    units: list[Unit] = []
    opening, kept = "", 0
    for n, ((kind, a, b), (begin, end)) in enumerate(zip(sections, marks, strict=False)):
        reason = lost.get(n)
        if reason == "thought" and thought_policy == "text":
            units += [Unit(begin, end, "", False, "markup"), Unit(a, b, "", True)]
            continue
        if reason is not None:
            units += [Unit(begin, end, "", False, reason), Unit(a, b, "", False, reason)]
            continue
        literal = _spaced(literals[kept], written[begin:end]) if form and form.loose else literals[kept]
        if n and n - 1 in lost and thought_policy == "text":
            literal = literal or "\n\n"
        after_lost = n > 0 and n - 1 in lost
        if not kept and begin == end and not after_lost:
            opening = literal
        else:
            why = lost[n - 1] if after_lost else None if markup_policy == "bridge" and literal else "markup"
            units.append(Unit(begin, end, literal, False, why))
        units += calls if kind == CALLS and calls is not None else [Unit(a, b, "", True)]
        kept += 1
    if not kept:
        opening = literals[0]
    if ended and (calls is None or CALLS not in kinds):
        begin, end = marks[-1]
        last_lost = lost.get(len(sections) - 1)
        bridged = eos_policy == "bridge" and form is not None and not last_lost
        literal = ((form.end or eos) if form else "") if bridged else ""
        units.append(Unit(begin, end, literal, False, last_lost if last_lost else None))
    return Plan(on_tail, opening, tuple(unit for unit in units if unit.shared or unit.teacher or unit.end > unit.start))


def lost_kinds(kinds: tuple[str, ...], teacher: Turn, without_calls: bool) -> set[str]:
    """Those of a student's sections that the teacher's template has no place for."""
    lost = {CALLS} & {*kinds} if without_calls else set()
    kept = tuple(kind for kind in kinds if kind not in lost)
    opens = any(form.sections[0] == THOUGHT for form in teacher.forms.values())
    if THOUGHT in kept and not (opens if len(kept) == 1 else kept in teacher.forms):  # one alone is unfinished
        lost = lost | {THOUGHT}
    return lost


def _spaced(literal: str, mark: str) -> str:
    """A literal of a loose form, with the whitespace that the student wrote around its own."""
    core = mark.strip(_SPACE)
    if not core or not literal or literal != literal.strip(_SPACE):
        return literal
    before, _, after = mark.partition(core)
    return before + literal + after


# --- both on one grid


@dataclass(frozen=True)
class Sectioned:
    """One completion, aligned section by section.

    Attributes:
        alignment: of the whole turn, its end included; `text` has the markup as the student spelled it.
        widths: (S,) bytes of section text in each student token; 0 in markup.
        on_tail, opening: as in `Plan`; the opening as ids.
    """

    alignment: TextAlignment
    widths: np.ndarray
    on_tail: bool
    opening: list[int]


def aligner_of(student: Speaker, teacher: Speaker, masked_strings: Sequence[str] = ()) -> TextAligner:
    """The aligner of what the student writes with the teacher's tokens, each in its own template's markup. `masked_strings` are masked
    beside markup that one side has no equivalent of."""
    return TextAligner(
        student.tokenizer,
        teacher.tokenizer,
        masked_strings=sorted({*unshared_markup(student, teacher), *masked_strings}),
        teacher_control_ids=teacher.control_ids,
        teacher_continues=teacher.continues,
    )


class SectionAligner:
    """Aligns completions that have more sections than an answer.

    Args:
        aligner: of the two tokenizers, see `aligner_of`.
        student, teacher: of the two conversations.
        masked_strings: markup with one of these is masked.
        markup_policy, thought_policy, eos_policy: of `plan`.
    """

    def __init__(
        self,
        aligner: TextAligner,
        student: Speaker,
        teacher: Speaker,
        masked_strings: Sequence[str] = (),
        **policies: str,
    ):
        self._masked_strings = masked_strings
        self._aligner, self._speakers, self._policies = aligner, (student, teacher), policies
        self._controls = {name: teacher.tokenizer.convert_tokens_to_ids(name) for name in teacher.controls}
        self._eos = teacher.tokenizer.convert_ids_to_tokens(teacher.turn_end[-1])
        self._pattern = one_of(self._controls)
        self._grammars: dict[str, Grammar] = {}
        self._said: set[str] = set()

    def parse(self, ids: Sequence[int], ended: bool, student: str) -> tuple[str, np.ndarray, Parsed] | None:
        """Symbols, widths and sections of a completion; None where it is an answer without markup. `student`: its turn as JSON."""
        if student not in self._grammars:
            self._grammars[student] = Grammar(read_turn(student), self._aligner.student_table)
        written, widths = symbols(np.array(ids, dtype=np.int64), self._aligner.student_table)
        parsed = self._grammars[student].parse(written, ended).without_empty_thought(written)
        is_plain = (
            len(parsed.sections) == 1 and parsed.sections[0][0] == ANSWER and parsed.marks[0][0] == parsed.marks[0][1]
        )
        if is_plain and (not ended or parsed.marks[-1][1] - parsed.marks[-1][0] <= 1):
            return None
        return written, widths, parsed

    def __call__(
        self,
        ids: Sequence[int],
        ended: bool,
        found: tuple[str, np.ndarray, Parsed],
        student: str,
        teacher: str,
        executed: Sequence[dict] | None = None,
    ) -> Sectioned:
        """
        Aligns one completion.

        Args:
            found: what `parse` returned for it.
            student, teacher: both turns as JSON.
            executed: the calls at its end, where results follow. The teacher reads them in its own markup, however the student
                spelled them, and the end of the turn.
        """
        written, widths, parsed = found
        policies = self._policies if executed is None else {**self._policies, "eos_policy": "bridge"}
        calls = None
        if ended and CALLS in parsed.kinds:
            calls = self._calls(written, parsed, student, read_turn(teacher), executed, policies)
        planned = plan(parsed, written, ended, read_turn(teacher), self._eos, calls=calls, **policies)
        planned = replace(planned, units=tuple(self._masked(unit, written) for unit in planned.units))
        self._say({unit.reason for unit in planned.units})
        grid = _Grid(planned.units, written, self._aligner)
        # a tokenizer that puts a space before a text writes that of the opening itself
        spaced = planned.opening.endswith(" ") and self._aligner.teacher_table.prefix_space != "never"
        teacher_ids, ends, sizes, masked = self._teacher(grid, spaced)
        ours = _side(np.cumsum(widths), widths, *grid.student)
        theirs = _side(ends, sizes, *grid.teacher)
        stretches = sorted({*grid.masked, *masked}, key=lambda stretch: (stretch.start, stretch.end))
        places = np.array([(stretch.start, stretch.end) for stretch in stretches], dtype=np.int64).reshape(-1, 2)
        chunks = synchronized_chunks(ours, theirs, np.array([grid.size]), places)
        chunks.student[grid.silent(np.cumsum(widths), widths)] = -1
        starts, stops = ours.ends - ours.widths, ours.ends
        shown = [
            MaskedStretch(int(grid.shown[stretch.start]), int(grid.shown[stretch.end]), stretch.reason)
            for stretch in stretches
            if stretch.reason and grid.shown[stretch.start] < grid.shown[stretch.end]
        ]
        alignment = TextAlignment(
            grid.text,
            AlignedTokens(list(ids), chunks.student, grid.shown[stops] - grid.shown[starts]),
            AlignedTokens(
                teacher_ids, chunks.teacher, grid.shown[theirs.ends] - grid.shown[theirs.ends - theirs.widths]
            ),
            int(chunks.counts[0]),
            shown,
            grid.text.encode(),
            np.stack([grid.shown[chunks.start], grid.shown[chunks.end]], 1),
            (self._aligner.student_table, self._aligner.teacher_table),
        )
        literal = planned.opening.removesuffix(" ") if spaced else planned.opening
        opening = [i for part in self._fragments(literal) for i in self._literal_ids(part)]
        return Sectioned(alignment, grid.content[stops] - grid.content[starts], planned.on_tail, opening)

    def _calls(
        self,
        written: str,
        parsed: Parsed,
        student: str,
        turn: Turn,
        executed: Sequence[dict] | None,
        policies: Mapping[str, str],
    ) -> list[Unit] | None:
        """Units from the first call's name to the end of the turn; None where the calls cannot be read, or where one of the
        templates cannot write them."""
        ours, theirs = self._speakers
        lost = lost_kinds(parsed.kinds, turn, False)
        kinds = tuple(kind for kind in parsed.kinds if kind not in lost)
        start, grammar = parsed.sections[-1][1], self._grammars[student]
        calls = executed or read_calls(parsed, written, ours, self._aligner.student_table)
        if not calls or kinds not in turn.forms:
            return None
        try:
            sides = [
                pieces(calls, lambda own, side=side, sections=sections: side.write_calls(sections, own))
                for side, sections in ((ours, parsed.kinds), (theirs, kinds))
            ]
        except Unrenderable:
            sides = [None, None]
        alike = None not in sides and grammar.symbols("".join(piece.text for piece in sides[0][1:])) == written[start:]
        if not alike:
            if executed is None:
                return None
            return self._ended(Unit(start, len(written), theirs.calls_text(executed), False, "call"), policies)
        units = []
        for mine, other, kind in beside(*(side[1:] for side in sides)):
            size, plain = len(grammar.symbols(mine)), not self._pattern or not self._pattern.search(other)
            shared = mine == other and plain and all(ord(symbol) < 256 for symbol in grammar.symbols(mine))
            masked = "markup" if policies.get("markup_policy") == "mask" else None
            reason = masked if kind == MARKUP else "call"
            units.append(Unit(start, start + size, "" if shared else other, shared, None if shared else reason))
            start += size
        return [*units[:-1], *self._ended(units[-1], policies)]

    def _ended(self, last: Unit, policies: Mapping[str, str]) -> list[Unit]:
        """The last unit of a turn, cut before its stop token."""
        controls = list(self._pattern.finditer(last.teacher)) if self._pattern else []
        if last.shared or not controls or controls[-1].end() != len(last.teacher):
            return [last]
        head, stop = last.teacher[: controls[-1].start()], controls[-1][0]
        bridged = policies.get("eos_policy", "bridge") == "bridge"
        units = [
            Unit(last.start, last.end - 1, head, False, last.reason),
            Unit(last.end - 1, last.end, stop if bridged else "", False),
        ]
        return [unit for unit in units if unit.teacher or unit.end > unit.start]

    def _masked(self, unit: Unit, written: str) -> Unit:
        """The unit; masked if it is markup with one of the masked strings."""
        if unit.shared or unit.reason is not None:
            return unit
        text = "".join(_name(run, self._aligner.student_table.names) for run in _runs(written[unit.start : unit.end]))
        return replace(unit, reason="markup") if any(own in text for own in self._masked_strings) else unit

    def _say(self, reasons: set[str | None]) -> None:
        for reason in sorted(reasons & _SAID.keys() - self._said):
            self._said.add(reason)
            warnings.warn(_SAID[reason], stacklevel=2)

    def _fragments(self, literal: str) -> list[str | int]:
        """A literal cut at its control tokens, each of which becomes its id."""
        parts: list[str | int] = []
        at = 0
        for match in self._pattern.finditer(literal) if self._pattern else ():
            parts += [literal[at : match.start()], self._controls[match[0]]]
            at = match.end()
        return [part for part in (*parts, literal[at:]) if part != ""]

    def _literal_ids(self, part: str | int) -> list[int]:
        return [part] if isinstance(part, int) else self._aligner.read_run(part, continues=True)[0]

    def _teacher(self, grid: "_Grid", spaced: bool) -> tuple[list[int], np.ndarray, np.ndarray, list[MaskedStretch]]:
        """The teacher's ids; where each ends in its text (T,) and how many bytes each covers (T,); and what is masked because
        its tokenizer changes the text. `spaced`: the first token brings a space of its own."""
        parts: list[str | int] = []
        for unit, text in zip(grid.units, grid.teacher_texts, strict=True):
            for part in [text] if unit.shared else self._fragments(text):
                if isinstance(part, str) and parts and isinstance(parts[-1], str):
                    parts[-1] += part
                else:
                    parts.append(part)
        names = {i: name for name, i in self._controls.items()}
        ids, ends, sizes, masked, at = [], [], [], [], 0
        for part in parts:
            if isinstance(part, int):
                size = len(names[part].encode())
                ids.append(part)
                ends.append(np.array([at + size]))
                sizes.append(np.array([size]))
            elif part:
                own, own_ends, own_sizes, own_masked = self._aligner.read_run(part, continues=not spaced or at > 0)
                ids += own
                ends.append(own_ends + at)
                sizes.append(own_sizes)
                masked += [
                    grid.of_teacher(stretch.start + at, stretch.end + at, stretch.reason) for stretch in own_masked
                ]
                size = len(part.encode())
            else:
                size = 0
            at += size
        empty = np.zeros(0, dtype=np.int64)
        return ids, np.concatenate([empty, *ends]), np.concatenate([empty, *sizes]), masked


class _Grid:
    """The places that both sides share, one a byte of a section and three a stretch of markup, and each side's way to them.

    Attributes:
        size: number of places.
        student, teacher: two arrays each. For every offset in the side's own text: the place where a token that ends there
            ends, and the place where a token that begins there begins.
        shown: (size + 1,) offset in `text` (the sections with the student's markup) of each place.
        content: (size + 1,) bytes of section text before each place.
        masked: stretches of places that are masked; those with an empty reason are not counted.
    """

    def __init__(self, units: Sequence[Unit], written: str, aligner: TextAligner):
        self.units, self.masked = units, []
        self._written, names = written, aligner.student_table.names
        length = len(written)
        left, right = np.full(length + 1, -1), np.full(length + 1, -1)
        left[0] = right[0] = 0
        teacher_left, teacher_right, theirs = [0], [0], 0
        shown, content, texts, self.teacher_texts = [0], [0], [], []
        size = 0
        for unit in units:
            a, b = unit.start, unit.end
            if unit.shared:
                text, offsets, invalid = _section(written[a:b])
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
            else:
                width = _MARKUP
                literal = "".join(_name(symbol, names) for symbol in _runs(written[a:b]))
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
                if unit.reason or a == b or not theirs:
                    self.masked.append(MaskedStretch(size, size + width, unit.reason or ""))
                shown += [shown[-1]] * (width - 1) + [shown[-1] + len(literal.encode())]
                content += [content[-1]] * width
                texts.append(literal)
            size += width
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


def _side(ends: np.ndarray, widths: np.ndarray, left: np.ndarray, right: np.ndarray) -> Side:
    """One side's tokens on the grid, given where they end in its own text."""
    starts = ends - widths
    stops = left[ends]
    begins = np.where(widths > 0, np.minimum(right[starts], stops), stops)
    return Side(stops, stops - begins, np.array([len(ends)]))


def _section(written: str) -> tuple[str, np.ndarray, list[int]]:
    """A section's text, the offset in it of each border between its symbols, and the offsets of U+FFFD for invalid bytes."""
    codes = np.array([ord(symbol) for symbol in written], dtype=np.int64)
    raw = bounds(codes < 256)
    data = "".join(symbol for symbol in written if ord(symbol) < 256).encode("latin-1")
    [text], invalid = decoded([data])
    if not invalid:
        return text, raw, []
    return text, in_text(raw, invalid), in_text(np.array([start for start, _ in invalid]), invalid).tolist()


def read_calls(parsed: Parsed, written: str, student: Speaker, table: TokenTable) -> list[dict] | None:
    """The calls at the end of a completion of these symbols, whose last section they are; None where they cannot be read."""
    text = "".join(_name(run, table.names) for run in _runs(written[parsed.sections[-1][1] :]))
    return student.call_reader.read(text) if student.call_reader else None


def text_of(written: str) -> str:
    """The text of a section of symbols, with U+FFFD for invalid bytes; without control tokens."""
    return _section(written)[0]


def named(ids: Sequence[int], table: TokenTable) -> tuple[str, np.ndarray]:
    """The text of ids (N,), control tokens by their names, and how many of its bytes each stands for (N,)."""
    written, counts = symbols(np.array(ids, dtype=np.int64), table)
    sizes = [len(_name(symbol, table.names).encode()) if ord(symbol) > 255 else 1 for symbol in written]
    stops = np.cumsum(counts)
    widths = np.append(0, np.cumsum(sizes, dtype=np.int64))
    parts = [_name(run, table.names) for run in _runs(written)]
    return "".join(parts), widths[stops] - widths[stops - counts]


def _runs(written: str) -> list[str]:
    """Symbols as control tokens and runs of bytes."""
    return re.findall(r"[\x00-\xff]+|[^\x00-\xff]", written)


def _name(run: str, names: Mapping[int, str]) -> str:
    return names[ord(run) - 256] if ord(run[0]) > 255 else run.encode("latin-1").decode(errors="replace")
