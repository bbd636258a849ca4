"""The view in a terminal: rows of text, student tokens and teacher tokens, wrapped at the console's width."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from ...text.aligner import TextAlignment
from .html import facts, number
from .segments import WHY, Group, Segment, lines, token_data
from .visible import plain


if TYPE_CHECKING:
    from .scored import ScoredRollout

_NAMES = {"text": "text", "student": "student", "credit": "credit", "teacher": "teacher", "note": ""}
_DOWN, _UP = (214, 112, 20), (46, 124, 214)


class _Column(NamedTuple):
    """A segment or a group of them, whose rows are at most `width` cells wide."""

    width: int
    rows: dict[str, Text]


def print_shown(shown: "TextAlignment | ScoredRollout", console: Console | None = None) -> None:
    console = console or Console()
    scored = None if isinstance(shown, TextAlignment) else shown
    alignment = shown if scored is None else scored.alignment
    console.print(Text("  ".join(f"{figure} {name}" for figure, name in facts(alignment, scored)), style="dim"))
    names = [name for name in _NAMES if name != "credit" or scored is not None]
    margin = max(map(len, names)) + 1
    for line in lines(alignment):
        columns = [_group(group, alignment, scored) for group in line.groups]
        for wrapped in _wrapped(columns, console.width - margin - 1):
            for name in names:
                row = Text(no_wrap=True, overflow="crop").append(_NAMES[name].ljust(margin), style="dim")
                for column in wrapped:
                    row.append("│", style="dim").append_text(_centred(column.rows[name], column.width))
                console.print(row.append("│", style="dim"), soft_wrap=True)
    reasons = {reason for line in lines(alignment) for g in line.groups for s in g.segments for reason in s.reasons}
    for reason in sorted(reasons):
        console.print(Text(f"{WHY[reason][0]}: {WHY[reason][1]}", style="dim"))
    if scored is not None:
        console.print(Text(f"credit in nats, by {scored.method}: above 0 likelier, below 0 less likely", style="dim"))


def _wrapped(columns: list[_Column], width: int) -> Iterator[list[_Column]]:
    row: list[_Column] = []
    for column in columns:
        if row and sum(own.width + 1 for own in [*row, column]) > width:
            yield row
            row = []
        row.append(column)
    if row:
        yield row


def _group(group: Group, alignment: TextAlignment, scored) -> _Column:
    """The group's text above its segments."""
    columns = [_column(segment, alignment, scored) for segment in group.segments]
    rows = {
        name: Text.assemble(("┊", "dim")).join(_centred(column.rows[name], column.width) for column in columns)
        for name in columns[0].rows
    }
    text = plain(group.data) or ("⟨end of turn⟩" if group.segments[0].chunk >= 0 else "")
    rows["text"] = Text(text, style="bold")
    return _Column(max(row.cell_len for row in rows.values()), rows)


def _column(segment: Segment, alignment: TextAlignment, scored) -> _Column:
    if segment.chunk < 0:
        note = ", ".join(WHY[reason][0] for reason in segment.reasons)
    else:
        note = "" if segment.one_to_one else f"{len(segment.student)}:{len(segment.teacher)}"
    student = [_name(alignment, 0, token) for token in segment.student]
    credits = [""] * len(student)
    if scored is not None and segment.chunk >= 0:
        credits = [number(scored.advantages[token]) for token in segment.student]
    sizes = [max(cell_len(name), cell_len(credit)) for name, credit in zip(student, credits, strict=True)]
    styles = [_style(scored, segment, token) for token in segment.student]
    rows = {
        "student": _cells(student, sizes, styles),
        "credit": _cells(credits, sizes, styles),
        "teacher": Text.assemble(("╎", "dim")).join(Text(_name(alignment, 1, token)) for token in segment.teacher),
        "note": Text(note, style="dim" if segment.chunk >= 0 else "italic"),
    }
    return _Column(max(1, *(row.cell_len for row in rows.values())), rows)


def _cells(texts: list[str], sizes: list[int], styles: list[Style]) -> Text:
    cells = zip(texts, sizes, styles, strict=True)
    return Text.assemble(("╎", "dim")).join(
        Text.assemble(_centred(Text(text), size), style=style) for text, size, style in cells
    )


def _centred(text: Text, width: int) -> Text:
    missing = width - text.cell_len
    return Text.assemble(" " * (missing // 2), text, " " * (missing - missing // 2))


def _name(alignment: TextAlignment, side: int, token: int) -> str:
    row, name = token_data(alignment, side, token)
    return plain(row) if row else f"⟨{plain(name.encode())}⟩"


def _style(scored, segment: Segment, token: int) -> Style:
    """White on orange or blue, stronger for a larger credit. A credit near 0 has no colour."""
    if scored is None or segment.chunk < 0 or number(scored.advantages[token]) == "0":
        return Style()
    credit = scored.advantages[token]
    strength = 0.35 + 0.65 * abs(credit) / (1 + abs(credit))
    red, green, blue = (int(part * strength) for part in (_UP if credit > 0 else _DOWN))
    return Style(color="rgb(255,255,255)", bgcolor=f"rgb({red},{green},{blue})")
