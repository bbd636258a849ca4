"""What the teacher reads for a completion that was parsed into sections: the same turn in its own template's markup."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

from .parsing import END, START, Parsed, steps
from .turns import ANSWER, CALLS, THOUGHT, Form, Turn, shared_space


_REASON = {THOUGHT: "thought", CALLS: "call"}


@dataclass(frozen=True)
class Unit:
    """A stretch of the student's turn, and what the teacher reads in its place.

    Attributes:
        start, end: the stretch, in the student's symbols.
        teacher: what the teacher reads in its place; "" where `shared`.
        shared: whether both sides have the same text there; False for markup.
        reason: why the stretch is masked; None where it is not.
        undecided: whether one side writes markup that begins like this where another section follows, so that only what comes next tells
            which of the two it is.
        leads: whether one side alone writes markup here, before all else, so that it is one event with what follows.
    """

    start: int
    end: int
    teacher: str
    shared: bool
    reason: str | None = None
    undecided: bool = False
    leads: bool = False


@dataclass(frozen=True)
class Opening:
    """What the teacher reads before a turn, where the student's own template leaves it a choice between several forms.

    Attributes:
        on_tail: whether all forms go on from the teacher's generation prompt; False: from its stem.
        shared: what it writes before all of them; read, not scored.
        parted: the forms before which one side alone writes markup after that. It is scored with what follows, since it is what the form costs.
        loses: whether the teacher's template has no place for the first section of some form.
        foretells: whether its markup before a section tells what comes after it, which the student decides there (gpt-oss writes what is said
            before a call as a thought).
    """

    on_tail: bool
    shared: str
    parted: frozenset[tuple[str, ...]]
    loses: bool
    foretells: bool


@dataclass(frozen=True)
class Plan:
    """What the teacher reads for a completion.

    Attributes:
        on_tail: whether it goes on from the teacher's generation prompt; False: from its stem.
        opening: what stands before the first unit; read, not scored. Of a turn that can take one form alone, that is all markup before it.
        units: in order; they cover the completion.
    """

    on_tail: bool
    opening: str
    units: tuple[Unit, ...]


def plan(
    parsed: Parsed,
    ended: bool,
    teacher: Turn,
    eos: str,
    *,
    markup_policy: str = "bridge",
    thought_policy: str = "mask",
    eos_policy: str = "bridge",
    calls: Sequence[Unit] | None = None,
    undecided: Collection[tuple[str, str]] = (),
    begun: Opening | None = None,
) -> Plan:
    """
    Sets the sections that `Grammar.parse` found beside the teacher's form of the same turn.

    Args:
        teacher: how its template writes this turn.
        eos: its EOS token, which ends a turn where the template writes no end.
        calls: units of the calls, from the first call's name to the end of the turn; None where the teacher cannot read them.
        undecided: from one section to the next, where the markup in between is (see [`Unit`]).
        begun: `opening_of` the two turns.
    """
    sections, marks, kinds = parsed.sections, parsed.marks, list(parsed.kinds)
    lost = {kinds.index(kind): _REASON[kind] for kind in lost_kinds(parsed.kinds, teacher, calls is None)}
    form, literals = _literals(kinds, lost, teacher)
    on_tail = begun.on_tail if begun else literals[0].startswith(teacher.tail)
    opening = begun.shared if begun else ""
    literals[0] = literals[0].removeprefix(teacher.tail if on_tail else "").removeprefix(opening)
    bridges = markup_policy == "bridge"

    units: list[Unit] = []
    kept = 0
    for n, ((kind, a, b), (begin, end)) in enumerate(zip(sections, marks, strict=False)):
        reason = lost.get(n)
        if reason == "thought" and thought_policy == "text":
            units += [Unit(begin, end, "", False, "markup"), Unit(a, b, "", True)]
            continue
        if reason is not None:
            units += [Unit(begin, end, "", False, reason), Unit(a, b, "", False, reason)]
            continue
        literal = literals[kept]
        if n and n - 1 in lost and thought_policy == "text":
            literal = literal or "\n\n"
        after_lost = n > 0 and n - 1 in lost
        # where the student writes none, its first token of text is what decides on the form, whatever is done with markup
        one_sided = literal != "" if begin == end else bridges and literal == ""
        leads = n == 0 and begun is not None and one_sided
        if leads:
            units.append(Unit(begin, end, literal, False, leads=True))
        elif not kept and begin == end and not after_lost:
            opening += literal
        else:
            why = lost[n - 1] if after_lost else None if bridges and literal else "markup"
            step = kinds[n - 1] if n else START, kind
            units.append(Unit(begin, end, literal, False, why, undecided=step in undecided))
        units += calls if kind == CALLS and calls is not None else [Unit(a, b, "", True)]
        kept += 1
    if not kept:
        opening += literals[0]
    if ended and (calls is None or CALLS not in kinds):
        begin, end = marks[-1]
        last_lost = lost.get(len(sections) - 1)
        bridged = eos_policy == "bridge" and form is not None and not last_lost
        literal = ((form.end or eos) if form else "") if bridged else ""
        units.append(Unit(begin, end, literal, False, last_lost if last_lost else None))
    elif not ended and len(marks) > len(sections):  # cut off amid it
        units.append(Unit(*marks[-1], "", False, "markup"))
    return Plan(on_tail, opening, tuple(unit for unit in units if unit.shared or unit.teacher or unit.end > unit.start))


def with_shared_space(units: Sequence[Unit], written: str) -> list[Unit]:
    """The units, with the whitespace that the two sides' markup of one begins with alike as a shared unit of its own: a newline before both
    `</think>` and `<|end|>` is the same text to both."""
    found: list[Unit] = []
    for unit in units:
        size = 0 if unit.shared or unit.reason else len(shared_space(written[unit.start : unit.end], unit.teacher))
        if (
            size and unit.start + size < unit.end and size < len(unit.teacher)
        ):  # something to stand beside the other's rest
            found.append(Unit(unit.start, unit.start + size, "", True))
            unit = replace(unit, start=unit.start + size, teacher=unit.teacher[size:])
        found.append(unit)
    return found


def undecided_steps(turn: Turn, encode: Callable[[str], list[int]]) -> set[tuple[str, str]]:
    """From one section to the next, where the markup in between is in tokens how that to another section begins: `</think>` before an answer,
    and before a call."""
    written = [(here, there, encode(literal)) for here, there, literal in steps(turn) if there != END and literal]
    return {
        (here, there)
        for here, there, ids in written
        for other_here, other, longer in written
        if here == other_here and there != other and longer[: len(ids)] == ids
    }


def opening_of(student: Turn, teacher: Turn, cut: Callable[[str], Sequence[str]]) -> Opening | None:
    """
    How the teacher's forms of what the student may write begin. None where the student's template has one form alone after its generation
    prompt: what the teacher writes before that costs every text the same.

    Args:
        cut: cuts markup where the teacher's tokens never join it.
    """
    tail = student.tail
    own = {
        kinds: form.opening.removeprefix(tail) for kinds, form in student.forms.items() if form.opening.startswith(tail)
    }
    lost = {kinds: lost_of(kinds, teacher) for kinds in own}
    kept = [kinds for kinds in own if len(lost[kinds]) < len(kinds)]
    if len(own) < 2 or not kept:
        return None
    theirs = {}
    for kinds in kept:
        places = {n: "" for n, kind in enumerate(kinds) if kind in lost[kinds]}
        theirs[kinds] = _literals(kinds, places, teacher)[1][0]
    on_tail = all(literal.startswith(teacher.tail) for literal in theirs.values())
    if on_tail:
        theirs = {kinds: literal.removeprefix(teacher.tail) for kinds, literal in theirs.items()}
    # what stands before a thought that is lost takes no part
    beside = [kinds for kinds in kept if kinds[0] not in lost[kinds]]

    def parted(shared: str) -> frozenset[tuple[str, ...]]:
        one_sided = {kinds for kinds in beside if (own[kinds] == "") != (theirs[kinds] == shared)}
        # a student may leave out the markup that its template writes before an answer
        return frozenset(one_sided | {kinds for kinds in beside if kinds == (ANSWER,) and theirs[kinds] != shared})

    shared = "".join(commonprefix([[*cut(literal)] for literal in theirs.values()])) if parted("") else ""
    begun_alike: dict[tuple[str, str], set[str]] = {}
    for kinds in beside:
        begun_alike.setdefault((own[kinds], kinds[0]), set()).add(theirs[kinds])
    return Opening(
        on_tail,
        shared,
        parted(shared),
        loses=any(kinds[0] in lost[kinds] for kinds in own),
        foretells=any(len(literals) > 1 for literals in begun_alike.values()),
    )


def _literals(kinds: Sequence[str], lost: Mapping[int, str], teacher: Turn) -> tuple[Form | None, list[str]]:
    """The teacher's form of a turn of these sections without the lost ones, and what it writes before each that is left. Where
    it has no such form: None, and what it writes before a turn's first section, or before an answer if all are lost."""
    form = teacher.forms.get(tuple(kind for n, kind in enumerate(kinds) if n not in lost))
    if form:
        return form, list(form.literals)
    before = {
        there: literal for here, there, literal in reversed(steps(teacher)) if here == START
    }  # the simplest form's
    if len(lost) == len(kinds):
        return None, [before.get(ANSWER, "")]
    return None, ["" if 0 in lost else before.get(kinds[0], "")]


def lost_kinds(kinds: tuple[str, ...], teacher: Turn, without_calls: bool) -> set[str]:
    """Those of a student's sections that the teacher's template has no place for."""
    lost = {CALLS} & {*kinds} if without_calls else set()
    kept = tuple(kind for kind in kinds if kind not in lost)
    opens = any(form.sections[0] == THOUGHT for form in teacher.forms.values())
    if THOUGHT in kept and not (opens if len(kept) == 1 else kept in teacher.forms):  # one alone is unfinished
        lost = lost | {THOUGHT}
    return lost


def lost_of(kinds: tuple[str, ...], teacher: Turn) -> set[str]:
    """`lost_kinds`, of calls too where the teacher's template writes none in such a turn."""
    return lost_kinds(kinds, teacher, CALLS in kinds and kept_kinds(kinds, teacher) not in teacher.forms)


def kept_kinds(kinds: tuple[str, ...], teacher: Turn) -> tuple[str, ...]:
    """Those of a student's sections that the teacher's template has a place for, where it can write the calls."""
    lost = lost_kinds(kinds, teacher, False)
    return tuple(kind for kind in kinds if kind not in lost)
