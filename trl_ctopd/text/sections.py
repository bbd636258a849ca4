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

Chunks are found on a grid of places that both sides share (`grid.py`).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .aligner import AlignedTokens, TextAligner, TextAlignment
from .altered_text import MaskedStretch
from .calls import MARKUP, beside, pieces, with_ids
from .chat import Speaker, unshared_markup
from .chunks import synchronized_chunks
from .grid import Grid, side_on
from .parsing import Grammar, Parsed, spelled, symbols
from .planning import Opening, Unit, kept_kinds, opening_of, plan, undecided_steps, with_shared_space
from .token_bytes import TokenTable
from .turns import ANSWER, CALLS, Turn, Unrenderable, one_of, read_turn


_SAID = {  # warnings, given once each, for sections that are masked
    "thought": "the student writes thoughts, and the teacher's template has no place for one: they are masked, and the teacher does "
    "not read them (masked_bytes/thought counts them). thought_policy='text' lets it read them as the beginning of the answer; "
    "or give its template the setting that opens a thought (teacher_chat_template_kwargs)",
    "call": "the student writes calls of tools that the teacher's template has no place for, or that are not as the student's own "
    "template writes them: they are masked (masked_bytes/call counts them)",
}


@dataclass(frozen=True)
class Sectioned:
    """One completion, aligned section by section.

    Attributes:
        alignment: of the whole turn, its end included; `text` has the markup as the student spelled it.
        widths: (S,) bytes of section text in each student token; 0 in markup.
        markup: (S,) True for the tokens of chunks with markup.
        on_tail, opening: as in `Plan`; the opening as ids.
        on_plain: whether that is what the teacher's template writes before an answer alone.
    """

    alignment: TextAlignment
    widths: np.ndarray
    markup: np.ndarray
    on_tail: bool
    opening: list[int]
    on_plain: bool


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
        said: for what is masked, by its reason, what a warning says of it once.
        weighs_forms: whether all forms of a turn are read from one place on, so that what each of them costs is scored. False: each begins as
            its template opens it.
        markup_policy, thought_policy, eos_policy: of `plan`.
    """

    def __init__(
        self,
        aligner: TextAligner,
        student: Speaker,
        teacher: Speaker,
        masked_strings: Sequence[str] = (),
        said: Mapping[str, str] = _SAID,
        weighs_forms: bool = True,
        **policies: str,
    ):
        self._masked_strings, self._warnings, self._weighs_forms = masked_strings, said, weighs_forms
        self._aligner, self._speakers, self._policies = aligner, (student, teacher), policies
        self._controls = {name: teacher.tokenizer.convert_tokens_to_ids(name) for name in teacher.controls}
        self._eos = teacher.tokenizer.convert_ids_to_tokens(teacher.turn_end[-1])
        self._pattern = one_of(self._controls)
        self._grammars: dict[str, Grammar] = {}
        self._undecided: dict[tuple[str, str], set[tuple[str, str]]] = {}
        self._openings: dict[tuple[str, str], Opening | None] = {}
        self._said: set[str] = set()

    def parse(
        self, ids: Sequence[int], ended: bool, student: str, teacher: str = ""
    ) -> tuple[str, np.ndarray, Parsed] | None:
        """Symbols, widths and sections of a completion; None where it is an answer without markup. `student`, `teacher`: both turns as JSON;
        with the teacher's, an answer before which it alone writes markup that is scored has sections too."""
        if student not in self._grammars:
            self._grammars[student] = Grammar(read_turn(student), self._aligner.student_table)
        written, widths = symbols(np.array(ids, dtype=np.int64), self._aligner.student_table)
        parsed = self._grammars[student].parse(written, ended).without_empty_thought(written)
        is_plain = (
            len(parsed.sections) == 1 and parsed.sections[0][0] == ANSWER and parsed.marks[0][0] == parsed.marks[0][1]
        )
        after = parsed.marks[-1][1] - parsed.marks[-1][0] if len(parsed.marks) > len(parsed.sections) else 0
        if is_plain and after <= ended:
            begun = self._opening(student, teacher) if teacher else None
            if begun is None or (ANSWER,) not in begun.parted:
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
        calls, turn = None, read_turn(teacher)
        if ended and CALLS in parsed.kinds:
            calls = self._calls(written, parsed, student, turn, executed, policies)
        undecided = self._undecided_steps(student, teacher)
        own = {"calls": calls, "undecided": undecided, "begun": self._opening(student, teacher)}
        planned = plan(parsed, ended, turn, self._eos, **own, **policies)
        units = [self._masked(unit, written) for unit in planned.units]
        planned = replace(planned, units=tuple(with_shared_space(units, written)))
        self._say({unit.reason for unit in planned.units})
        grid = Grid(planned.units, written, self._aligner)
        # a tokenizer that puts a space before a text writes that of the opening itself
        spaced = planned.opening.endswith(" ") and self._aligner.teacher_table.prefix_space != "never"
        teacher_ids, ends, sizes, masked = self._teacher(grid, spaced)
        ours = side_on(np.cumsum(widths), widths, *grid.student)
        theirs = side_on(ends, sizes, *grid.teacher)
        stretches = sorted({*grid.masked, *masked}, key=lambda stretch: (stretch.start, stretch.end))
        places = np.array([(stretch.start, stretch.end) for stretch in stretches], dtype=np.int64).reshape(-1, 2)
        chunks = synchronized_chunks(ours, theirs, np.array([grid.size]), places, grid.undecided)
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
        upto = np.append(0, np.cumsum(grid.is_markup))
        has_markup = np.append(upto[chunks.end] > upto[chunks.start], False)  # the last for tokens of chunk -1
        content = grid.content[stops] - grid.content[starts]
        on_tail = planned.on_tail
        on_plain = turn.plain is not None and (turn.tail if on_tail else "") + planned.opening == turn.plain.opening
        return Sectioned(alignment, content, has_markup[chunks.student], on_tail, opening, on_plain)

    def untold(self, student: str, teacher: str) -> str:
        """Of which chunks of a turn the teacher's distributions tell nothing. "first": of what the turn's forms write there, something is masked, or
        stands on one side alone. "all": what it reads there rests on what comes later. Else "". `student`, `teacher`: both turns as JSON."""
        begun = self._opening(student, teacher)
        if begun is None:
            return ""
        return "all" if begun.foretells else "first" if begun.parted or begun.loses or not self._bridges else ""

    @property
    def _bridges(self) -> bool:
        return self._policies.get("markup_policy", "bridge") == "bridge"

    def _opening(self, student: str, teacher: str) -> Opening | None:
        if (student, teacher) not in self._openings:
            turns = read_turn(student), read_turn(teacher)
            found = opening_of(*turns, self._speakers[1].cut) if self._weighs_forms else None
            self._openings[student, teacher] = found
        return self._openings[student, teacher]

    def _undecided_steps(self, student: str, teacher: str) -> set[tuple[str, str]]:
        if (student, teacher) not in self._undecided:
            sides = zip(self._speakers, (student, teacher), strict=True)
            self._undecided[student, teacher] = set().union(
                *(undecided_steps(read_turn(turn), side.encode) for side, turn in sides)
            )
        return self._undecided[student, teacher]

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
        kinds = kept_kinds(parsed.kinds, turn)
        start, grammar = parsed.sections[-1][1], self._grammars[student]
        calls = executed or with_ids(read_calls(parsed, written, ours, self._aligner.student_table) or ())
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
            try:
                if executed is None and grammar.symbols(ours.calls_text(calls)) != written[start:]:
                    return None
                whole = Unit(start, len(written), theirs.calls_text(calls), False, "call")
            except Unrenderable:
                return None
            return self._ended(whole, policies)
        units = []
        for mine, other, kind in beside(*(side[1:] for side in sides)):
            size = len(grammar.symbols(mine))
            # what a call says is text to both, whatever it names; markup of the same letters may be a control token to one of them
            is_text = kind != MARKUP or not self._pattern or not self._pattern.search(other)
            shared = mine == other and is_text and all(ord(symbol) < 256 for symbol in grammar.symbols(mine))
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
        text = spelled(written[unit.start : unit.end], self._aligner.student_table)
        return replace(unit, reason="markup") if any(own in text for own in self._masked_strings) else unit

    def _say(self, reasons: set[str | None]) -> None:
        for reason in sorted(reasons & self._warnings.keys() - self._said):
            self._said.add(reason)
            warnings.warn(self._warnings[reason], stacklevel=2)

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

    def _teacher(self, grid: "Grid", spaced: bool) -> tuple[list[int], np.ndarray, np.ndarray, list[MaskedStretch]]:
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


def read_calls(
    parsed: Parsed, written: str, student: Speaker, table: TokenTable, tools: Sequence[Mapping] | None = None
) -> list[dict] | None:
    """The calls at the end of a completion of these symbols, whose last section they are; None where they cannot be read."""
    text = spelled(written[parsed.sections[-1][1] :], table)
    return student.call_reader.read(text, tools) if student.call_reader else None
