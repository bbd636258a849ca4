"""Calls of tools as a template writes them: read from a student's text, and set beside the teacher's.

A call has *atoms*: its name, keys and values, which every template writes. Each template puts its own markup around them. How a
template's calls are read is found by rendering calls with probes in them. What was read is rendered again, and is taken only if
that gives the student's text, byte for byte. Otherwise the call is masked.

An atom that both templates write alike is shared text. One that they serialise differently (JSON's escapes, a list in Python's
spelling) is masked, and each model reads its own.

Left out: templates that write the arguments before the name.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from .turns import CALL_ID, Unrenderable


Write = Callable[[Sequence[dict]], str]  # calls in, what stands from before the first one to the end of the turn out

_NAMES, _KEYS, _TEXTS = "qzname{}zq", "qzkey{}zq", "qztext{}zq"
_NUMBERS = 7_310_000_000
_NAME = r"(?P<name>[^\s\"'<>(){}\[\],]+)"


@dataclass(frozen=True)
class Piece:
    """A part of the text of calls. `label` names an atom: (call,) its name, (call, argument, 0) a key, (call, argument, 1) a value.
    None for markup."""

    text: str
    label: tuple[int, ...] | None = None


def with_ids(calls: Sequence[dict], made: int = 0) -> list[dict]:
    """The calls, with an id for each that was read from a template without ids; `made`: how many there were before."""
    return [{**call, "id": f"call{made + n:05}"} if call["id"] == CALL_ID else call for n, call in enumerate(calls)]


def a_call(name: str, arguments: Mapping[str, Any]) -> dict:
    return {"id": CALL_ID, "type": "function", "function": {"name": name, "arguments": dict(arguments)}}


# --- writing


def pieces(calls: Sequence[dict], write: Write) -> list[Piece] | None:
    """A template's text for `calls`, cut into atoms and markup; None where it cannot be cut with certainty."""
    probes, atoms = [], {}
    kept: dict[tuple[int, ...], Any] = {}  # values without a probe, since a template may write their type
    for n, call in enumerate(calls):
        function, arguments = call["function"], {}
        atoms[_NAMES.format(n)] = (n,), function["name"]
        ranks = {
            key: rank for rank, key in enumerate(sorted(function["arguments"], key=lambda key: (key.lower(), key)))
        }
        for m, (key, value) in enumerate(function["arguments"].items()):
            probe_key, place = _KEYS.format(f"{n}x{ranks[key]:03}"), (n, m)  # a template may sort them
            atoms[probe_key] = (*place, 0), key
            probe: Any = value
            if isinstance(value, str) or type(value) is int:
                probe = _TEXTS.format(f"{n}x{m}") if isinstance(value, str) else _NUMBERS + 1000 * n + m
                atoms[str(probe)] = (*place, 1), value
            else:
                kept[(*place, 1)] = value
            arguments[probe_key] = probe
        probes.append({**call, "function": {**function, "name": _NAMES.format(n), "arguments": arguments}})
    written, probed = write(calls), write(probes)
    parts = re.split("(" + "|".join(map(re.escape, sorted(atoms, key=len, reverse=True))) + ")", probed)
    found, at = [Piece(parts[0])], len(parts[0])
    if not written.startswith(parts[0]):
        return None
    for probe, literal in zip(parts[1::2], parts[2::2], strict=True):
        label, value = atoms[probe]
        spelled = next((text for text in _spellings(value) if written.startswith(text + literal, at)), None)
        if spelled is None:
            return None
        found.append(Piece(spelled, label))
        at += len(spelled) + len(literal)
        if (*label[:2], 1) in kept:  # after its key
            place = (*label[:2], 1)
            value = max(_spellings(kept[place]), key=lambda text: (text in literal, len(text)))
            before, _, literal = literal.rpartition(value)
            found += [Piece(before), Piece(value, place)]
        found.append(Piece(literal))
    whole = "".join(piece.text for piece in found) == written  # not where a list or dict is written in a way of its own
    labels = {piece.label for piece in found}
    return found if whole and labels.issuperset([*kept, *(label for label, _ in atoms.values())]) else None


def _spellings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]]
    tight = {"separators": (",", ":")}
    ways = [json.dumps(value, ensure_ascii=False), json.dumps(value), json.dumps(value, ensure_ascii=False, **tight)]
    return [*ways, json.dumps(value, ensure_ascii=False, sort_keys=True), str(value)]


ATOM, MARKUP, UNLIKE = "atom", "markup", "unlike"


def beside(student: Sequence[Piece], teacher: Sequence[Piece]) -> list[tuple[str, str, str]]:
    """The student's and the teacher's text of each stretch, in order, and its kind: `ATOM`, the same one on both sides; `MARKUP`; or
    `UNLIKE`, which holds an atom that stands elsewhere on the other side (a template that sorts keys)."""
    ours, theirs = ([piece.label for piece in side] for side in (student, teacher))
    blocks = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    pairs = [(i + n, j + n) for i, j, size in blocks for n in range(size) if ours[i + n] is not None]
    found = {None, *(ours[i] for i, _ in pairs)}
    rows, at = [], (0, 0)
    for i, j in [*pairs, (len(student), len(teacher))]:
        stretches = student[at[0] : i], teacher[at[1] : j]
        texts = ["".join(piece.text for piece in stretch) for stretch in stretches]
        if any(texts):
            alike = all(piece.label in found for stretch in stretches for piece in stretch)
            rows.append((*texts, MARKUP if alike else UNLIKE))
        if (i, j) != (len(student), len(teacher)):
            rows.append((student[i].text, teacher[j].text, ATOM))
        at = i + 1, j + 1
    return rows


# --- reading


@dataclass(frozen=True)
class CallReader:
    """Reads calls as one template writes them: arguments as one JSON text, or key by key.

    Attributes:
        opening: what stands before the first name.
        as_json: whether the arguments are one JSON text.
        after_name: matches a name, and what stands between it and the JSON text or the first key.
        values: key by key only. Two rows, for texts and for other values: what stands between a key and its value, between a
            value and the next key, and after the last value.
        bare: key by key only. Match a name without arguments, and what stands after it.
        closing: JSON only. What stands between two calls.
    """

    opening: str
    as_json: bool
    after_name: re.Pattern
    values: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    bare: tuple[re.Pattern, ...] = ()
    closing: str | None = None

    def read(self, text: str) -> list[dict] | None:
        """The calls in `text`, which reaches from the first one's name to the end of the turn; None where the template does not
        write calls so."""
        calls, at = [], 0
        while at < len(text):
            try:
                call, at = self._call(text, at)
            except ValueError:
                break
            calls.append(call)
        return calls or None

    def _call(self, text: str, at: int) -> tuple[dict, int]:
        """The call that stands at `at`, and where the next one's name would."""
        for bare in self.bare:
            named = bare.match(text, at)
            if named and (bare != self.bare[-1] or named.end() == len(text)):
                return a_call(named["name"], {}), named.end()
        found = self.after_name.match(text, at)
        if found is None:
            raise ValueError("no name")
        arguments, at = (self._json if self.as_json else self._keyed)(text, found.end())
        call = a_call(found["name"], arguments)
        if (given := found.groupdict().get("id")) is not None:
            call["id"] = given
        return call, at

    def _json(self, text: str, at: int) -> tuple[dict, int]:
        arguments, end = json.JSONDecoder().raw_decode(text, at)
        if not isinstance(arguments, dict):
            raise ValueError("no object")
        follows = self.closing is not None and text.startswith(self.closing, end)
        return arguments, end + len(self.closing) if follows else len(text)

    def _keyed(self, text: str, at: int) -> tuple[dict, int]:
        arguments: dict[str, Any] = {}
        ways = {before: (follow, closings) for before, follow, closings in reversed(self.values)}
        while True:
            key, way, at = _first(text, at, list(ways))
            follow, closings = ways[way]
            is_text = len(ways) > 1 and way == self.values[0][0]
            whole = 0 if is_text else _end_of_value(text, at, (follow, *closings))
            rest, stop, end = _first(text, at + whole, [follow, *closings])
            value = text[at : at + whole] + rest
            arguments[key], at = value if is_text else _value(value), end
            if stop != follow:
                return arguments, at


def _first(text: str, at: int, marks: Sequence[str]) -> tuple[str, str, int]:
    """The text before the first of `marks`, the longest where several stand there; that mark, and where it ends."""
    found = [(place, -len(mark), mark) for mark in marks if (place := text.find(mark, at)) >= 0]
    if not found:
        raise ValueError("none of the marks")
    place, _, mark = min(found)
    return text[at:place], mark, place + len(mark)


def _end_of_value(text: str, at: int, marks: Sequence[str]) -> int:
    """The length of the JSON value that stands at `at` and before one of `marks`; 0 where there is none."""
    try:
        _, end = json.JSONDecoder().raw_decode(text, at)
    except ValueError:
        return 0
    return end - at if text.startswith(tuple(marks), end) else 0


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def find_reader(write: Write) -> CallReader | None:
    """A reader of the calls that `write` writes; None where it does not read trial calls back as they were."""
    try:
        reader = _json_reader(write) or _keyed_reader(write)
        opening = len(reader.opening) if reader else 0
        return (
            reader if reader and all(reader.read(write(calls)[opening:]) == calls for calls in _trials(write)) else None
        )
    except Unrenderable:
        return None


def _trials(write: Write) -> list[list[dict]]:
    """Calls to try a reader on; two at once where the template writes two."""
    one, other = a_call("qzone", {"qza": "some text", "qzb": 3}), a_call("qztwo", {})
    return [[one], *([[one, other]] if _tried(write, [one, other]) else [])]


def _tried(write: Write, calls: Sequence[dict]) -> str:
    try:
        text = write(calls)
    except Unrenderable:
        return ""
    return text if all(call["function"]["name"] in text for call in calls) else ""


def _named(middle: str) -> re.Pattern:
    """A name, and `middle` after it, with another id, number or name in its place."""
    parts = re.split(f"({CALL_ID}|{_NAMES.format(0)})", middle)
    known = {CALL_ID: r"(?P<id>[\w.:-]+)", _NAMES.format(0): "(?P=name)"}
    pattern = "".join(known.get(part) or re.sub(r"\d+", r"\\d+", re.escape(part)) for part in parts)
    return re.compile(_NAME + pattern)


def _json_reader(write: Write) -> CallReader | None:
    name, other, key, value = _NAMES.format(0), _NAMES.format(1), _KEYS.format(0), _TEXTS.format(0)
    calls = [a_call(name, {key: value}), a_call(other, {key: value})]
    text = write(calls[:1])
    pattern = re.compile(rf'\{{\s*"{key}"\s*:\s*"{value}"\s*\}}')
    found = pattern.search(text)
    at = text.find(name)
    if found is None or not 0 <= at < found.start():
        return None
    closing = None
    if (both := _tried(write, calls)) and (first := pattern.search(both)):
        closing = both[first.end() : both.index(other, first.end())]
    return CallReader(text[:at], True, _named(text[at + len(name) : found.start()]), closing=closing)


def _keyed_reader(write: Write) -> CallReader | None:
    name, other, value, number = _NAMES.format(0), _NAMES.format(1), _TEXTS.format(0), str(_NUMBERS)
    keys = [_KEYS.format(n) for n in range(2)]
    single = write([a_call(name, {keys[0]: value})])
    at, key = single.find(name), single.find(keys[0])
    if not 0 <= at < key < single.find(value):
        return None
    values = []
    for probe, given in ((value, value), (number, _NUMBERS)):
        text = write([a_call(name, {keys[0]: given, keys[1]: given})])
        first = text.index(keys[0]) + len(keys[0])
        begin = text.index(probe, first)
        closings = [text[text.rindex(probe) + len(probe) :]]
        if both := _tried(write, [a_call(name, {keys[0]: given}), a_call(other, {})]):
            after = both.index(probe) + len(probe)
            closings.insert(0, both[after : both.index(other, after)])
        values.append((text[first:begin], text[begin + len(probe) : text.index(keys[1], begin)], tuple(closings)))
    bare = [write([a_call(name, {})]).partition(name)[2]]
    if both := _tried(write, [a_call(name, {}), a_call(other, {})]):
        after = both.index(name) + len(name)
        bare.insert(0, both[after : both.index(other, after)])
    return CallReader(single[:at], False, _named(single[at + len(name) : key]), tuple(values), tuple(map(_named, bare)))
