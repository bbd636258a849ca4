"""An alignment, or a scored rollout, as HTML and CSS without a script.

Decisions.
- The text is on top; below each piece of it are the student's tokens, then the teacher's. All rows have the same height, so
  that one repeated mask paints the names of the rows beside them, wherever a line wraps.
- Everything that colour shows is also written: a token's credit as a number, a merged chunk as `2 : 3`, a masked stretch by its
  reason. Colour-blind readers can tell orange and blue apart.
- Each chunk has one box of figures, shown for the token under the pointer or with the keyboard's focus. It is below the token
  where the browser supports CSS anchors, else, and on a phone, at the bottom of the screen.
- A notebook viewer may strip the style, as Jupyter does until a notebook is trusted. What is left can be read from top to
  bottom, with the boxes closed.
- Everything from outside goes through `visible.pieces` and `html.escape`. The page's own policy forbids loading or running
  anything.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from math import exp, isfinite
from typing import TYPE_CHECKING
from unicodedata import bidirectional

from ...text.aligner import TextAlignment
from .segments import WHY, Group, Line, Segment, figures, lines, token_data
from .visible import pieces


if TYPE_CHECKING:
    from .scored import ScoredRollout

_SIDES = ("student", "teacher")
_HIGHLIGHTED = 24  # so many tokens of a chunk have their row in the box marked under the pointer


@cache
def stylesheet() -> str:
    """The CSS of all fragments. Every rule is limited to the inside of a `.ctopd`."""
    css = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    pointed = ",".join(
        f".ctopd .c:has(.{side}>.t:nth-child({n}):is(:hover,:focus)) .of-{side}:nth-child({n} of .of-{side})"
        for side in _SIDES
        for n in range(1, _HIGHLIGHTED + 1)
    )
    return f"{css}{pointed}{{background:var(--pointed)}}"


def page(shown: "TextAlignment | ScoredRollout") -> str:
    """A whole document."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>One text, two tokenizers</title>'
        f"<style>{stylesheet()}"
        ":root{color-scheme:light dark}body{margin:0;background:#f3f4f6}main{max-width:68rem;margin:0 auto;padding:1rem}"
        "@media(prefers-color-scheme:dark){body{background:#0d1117}}@media(max-width:40rem){main{padding:0}}</style></head>"
        f"<body><main>{fragment(shown, explained=True)}</main></body></html>"
    )


def fragment(shown: "TextAlignment | ScoredRollout", explained: bool = False) -> str:
    """One `<div class="ctopd">`. The page needs `stylesheet()`. `explained`: with the guide open."""
    scored = None if isinstance(shown, TextAlignment) else shown
    alignment = shown if scored is None else scored.alignment
    parts = [_facts(alignment, scored)]
    if scored is not None and scored.prompt:
        parts.append(f'<div class="prompt"><b>prompt</b> <bdi>{quoted(scored.prompt)}</bdi></div>')
    parts += [_line(line, alignment, scored) for line in lines(alignment)] or [
        '<p class="empty">an empty completion</p>'
    ]
    parts += [_legend(alignment, scored), _guide(scored, explained)]
    return f'<div class="ctopd{" scored" if scored else ""}">{"".join(parts)}</div>'


def number(value: float) -> str:
    """A number in nats, with its sign: `+0.48`, `−2.13`, `0`."""
    if not isfinite(value):
        return str(value)
    text = f"{value:+.2f}" if abs(value) < 9.995 else f"{value:+.1f}"
    return "0" if float(text) == 0 else text.replace("-", "−")


def probability(log_prob: float) -> str:
    """`exp(log_prob)` in words or per cent."""
    if not isfinite(log_prob):
        return "not finite"
    percent = 100 * exp(min(log_prob, 0.0))
    if percent >= 99.95:
        return "100 %"
    return next((f"{percent:.{d}f} %" for d in (1, 2, 3) if percent >= 10**-d), "below 0.001 %")


def facts(alignment: TextAlignment, scored: "ScoredRollout | None") -> list[tuple[str, str]]:
    """The line above the text: pairs of a number and what it counts."""
    found = figures([alignment])
    shown = [
        (f"{found['student_tokens']:,}", "student tokens"),
        (f"{found['teacher_tokens']:,}", "teacher tokens"),
        (f"{found['chunks']:,}", "chunks"),
    ]
    if found["one_to_one_fraction"] is not None:
        shown.append((f"{found['one_to_one_fraction']:.0%}", "of student tokens one-to-one"))
    if found["coverage"] is not None:
        shown.append((f"{found['coverage']:.0%}", "of bytes compared"))
    if scored is not None and scored.nats_per_byte is not None:
        shown.append((f"{scored.nats_per_byte:.3f}".replace("-", "−"), "nats a byte of gap"))
    return shown


def _facts(alignment: TextAlignment, scored: "ScoredRollout | None") -> str:
    shown = "".join(f"<span><b>{figure}</b> {name}</span>" for figure, name in facts(alignment, scored))
    return f'<div class="facts">{shown}</div>'


def _line(line: Line, alignment: TextAlignment, scored: "ScoredRollout | None") -> str:
    texts = [group.data.decode("utf-8", "replace") for group in line.groups]
    around = zip(["", *texts[:-1]], texts, [*texts[1:], ""], strict=True)
    groups = (
        _group(group, _joins(before[-1:], text[:1]), _joins(text[-1:], after[:1]), alignment, scored)
        for group, (before, text, after) in zip(line.groups, around, strict=True)
    )
    return f'<div class="line" dir="{"rtl" if line.rtl else "ltr"}">{"".join(groups)}</div>'


def _joins(left: str, right: str) -> bool:
    """Whether the boundary falls between letters that are joined in writing (as in Arabic)."""
    return bool(left and right) and bidirectional(left) == bidirectional(right) == "AL"


def _group(group: Group, joins_before: bool, joins_after: bool, alignment: TextAlignment, scored) -> str:
    joins = " jb" * joins_before + " ja" * joins_after
    text = _pieces(group.data) or "&nbsp;"
    if not group.data and group.segments[0].chunk >= 0:
        text = '<i class="n">end of turn</i>'
    chunks = "".join(_chunk(segment, alignment, scored) for segment in group.segments)
    return f'<div class="g"><div class="x{joins}"><bdi>{text}</bdi></div><div class="cs">{chunks}</div></div>'


def _chunk(segment: Segment, alignment: TextAlignment, scored) -> str:
    if segment.chunk < 0:
        kind, note = "masked", ", ".join(WHY[reason][0] for reason in segment.reasons)
    elif segment.one_to_one:
        kind, note = "one", ""
    else:
        kind, note = "merged", f"{len(segment.student)} : {len(segment.teacher)}"
    rows = "".join(
        f'<div class="r {name}">{"".join(_token(alignment, side, token, scored) for token in tokens)}</div>'
        for side, (name, tokens) in enumerate(zip(_SIDES, (segment.student, segment.teacher), strict=True))
    )
    box = _box(segment, alignment, scored)
    return f'<div class="c {kind}">{rows}<div class="note">{note}</div>{box}</div>'


def _token(alignment: TextAlignment, side: int, token: int, scored) -> str:
    takes_part = (alignment.student_chunks, alignment.teacher_chunks)[side][token] >= 0
    label, style = f"<bdi>{_token_text(alignment, side, token)}</bdi>", ""
    if scored is not None and side == 0 and takes_part:
        credit = scored.advantages[token]
        strength = abs(credit) / (1 + abs(credit))
        style = f' style="--c:var(--{"up" if credit > 0 else "down"});--a:{strength:.0%}"'
        label += f"<small>{number(credit)}</small>"
    return f'<span class="t{"" if takes_part else " out"}" tabindex="0"{style}>{label}</span>'


def _token_text(alignment: TextAlignment, side: int, token: int) -> str:
    row, name = token_data(alignment, side, token)
    return _pieces(row) if row else f'<i class="n">{_pieces(name.encode())}</i>'


def _pieces(data: bytes) -> str:
    marks = {"text": "{}", "sign": '<i class="w">{}</i>', "name": '<i class="n">{}</i>', "hex": '<i class="h">{}</i>'}
    return "".join(marks[piece.kind].format(escape(piece.text)) for piece in pieces(data))


def quoted(text: str) -> str:
    """A text that is not a completion: spaces and line breaks unchanged, all else as in `visible`."""
    return (
        _pieces(text.encode("utf-8", "replace")).replace('<i class="w">␣</i>', " ").replace('<i class="w">⏎</i>', "\n")
    )


# --- the box of figures


def _box(segment: Segment, alignment: TextAlignment, scored) -> str:
    data = alignment._spelled[segment.start : segment.end]
    size = f"{len(data)} byte{'s' * (len(data) != 1)}"
    if segment.chunk < 0:
        why = "; ".join(WHY[reason][1] for reason in segment.reasons)
        head, says = "Not compared", f"{why[:1].upper()}{why[1:]}. No token here has a credit."
    else:
        head = f"Chunk {segment.chunk + 1}"
        says = _counted(segment) if scored is None else _verdict(segment, scored)
    text = f' <span class="q"><bdi>{_pieces(data)}</bdi></span> {size}' if data else ""
    rows = "".join(_rows(segment, alignment, scored))
    return f'<div class="box" role="tooltip" hidden><p><b>{head}</b>{text}</p><p>{says}</p><div class="rows">{rows}</div></div>'


def _counted(segment: Segment) -> str:
    if segment.one_to_one:
        return "One token on each side: compared directly."
    student, teacher = len(segment.student), len(segment.teacher)
    return (
        f"{student} student token{'s' * (student != 1)}, {teacher} teacher token{'s' * (teacher != 1)}: both sides end at "
        "the same byte only here, so they are compared as a whole."
    )


def _verdict(segment: Segment, scored: "ScoredRollout") -> str:
    student, teacher = scored.student_budget[segment.chunk], scored.teacher_budget[segment.chunk]
    budgets = (
        f"<span>teacher <b>{number(teacher)}</b> nats ({probability(teacher)})</span> "
        f"<span>student <b>{number(student)}</b> nats ({probability(student)})</span> "
    )
    if scored.neutral[segment.chunk]:
        return f"{budgets}The teacher's log-prob is not finite, so the chunk is left out."
    gap = scored.gap[segment.chunk]
    opinion = "less likely" if gap < 0 else "likelier"
    same = "The teacher finds this text as likely as the student does."
    words = same if number(gap) == "0" else f"The teacher finds this text {opinion} than the student does."
    return f"{budgets}<span>gap <b>{number(gap)}</b></span><br>{words}"


def _rows(segment: Segment, alignment: TextAlignment, scored) -> Iterator[str]:
    sides = zip(_SIDES, (segment.student, segment.teacher), (alignment.student_ids, alignment.teacher_ids), strict=True)
    for side, (name, tokens, ids) in enumerate(sides):
        if tokens:
            yield _row("head", [name, "id", *_headings(side, scored)])
        for token in tokens:
            cells = [
                _token_text(alignment, side, token),
                str(ids[token]),
                *_token_figures(side, token, segment, scored),
            ]
            yield _row(f"of-{name}", cells)


def _row(kind: str, cells: Sequence[str]) -> str:
    return f'<div class="{kind}">{"".join(f"<span>{cell}</span>" for cell in cells)}</div>'


def _headings(side: int, scored) -> list[str]:
    if scored is None:
        return []
    return ["log-prob", *(["share"] if scored.shares is not None else []), "credit"] if side == 0 else ["log-prob"]


def _token_figures(side: int, token: int, segment: Segment, scored) -> list[str]:
    if scored is None:
        return []
    if segment.chunk < 0:
        return ["–"] * len(_headings(side, scored))
    if side == 1:
        return [number(scored.teacher_log_probs[token])]
    share = [f"{scored.shares[token]:.0%}"] if scored.shares is not None else []
    return [number(scored.student_log_probs[token]), *share, f"<b>{number(scored.advantages[token])}</b>"]


# --- the legend


def _legend(alignment: TextAlignment, scored) -> str:
    found = [segment for line in lines(alignment) for group in line.groups for segment in group.segments]
    items = []
    if any(segment.one_to_one for segment in found):
        items.append('<span><i class="key one"></i>one token on each side</span>')
    if any(segment.chunk >= 0 and not segment.one_to_one for segment in found):
        items.append(
            '<span><i class="key merged"></i>merged: <b>2 : 3</b> is two student tokens, three of the teacher</span>'
        )
    for reason in dict.fromkeys(reason for segment in found for reason in segment.reasons):
        items.append(f'<span><i class="key masked"></i><b>{WHY[reason][0]}</b>: {WHY[reason][1]}</span>')
    if scored is not None:
        items.append(
            f"<span>credit in nats, by {escape(scored.method)}:</span>"
            '<span class="scale">less likely <b>−3</b><i></i><b>+3</b> likelier</span>'
        )
    return f'<div class="legend">{"".join(items)}</div>'


def _guide(scored, explained: bool) -> str:
    credit = (
        "<p><b>Colour</b> is credit. Both models give each chunk a probability. Where the teacher finds it less likely than "
        "the student, the difference, the <i>gap</i>, is negative: its student tokens are orange and will be written less "
        "often. Where the teacher finds it likelier they are blue. The figure in a token is its credit in nats.</p>"
        if scored is not None
        else ""
    )
    return (
        f"<details{' open' if explained else ''}><summary>How to read this</summary><p>The text stands on top, the <b>student</b>’s tokens for it below, "
        "then the <b>teacher</b>’s. Two tokenizers cut a text at different places. A <b>chunk</b> is the shortest stretch at "
        "whose two ends both of them cut: only there do both models say how likely the same bytes are, so only chunks can be "
        f"compared.</p>{credit}<p>␣ is a space, ⏎ a line break, ⇥ a tab; "
        '<i class="h">E2 82</i> are bytes that are no character by themselves, <i class="n">ZWJ</i> is the name of a '
        "character that cannot be seen. Point at a token, tap it, or go through them with the Tab key for its figures.</p>"
        "</details>"
    )
