"""Calls of tools as a template writes them: read from a student's text, and set beside the teacher's.

A call has *atoms*: its name, keys and values, which every template writes. Each template puts its own markup around them. How a
template's calls are read is found by rendering calls with probes in them. What was read is rendered again, and is taken only if
that gives the student's text, byte for byte. Otherwise the call is masked: one with other whitespace around tags and JSON's
punctuation, for example. Nothing is read of calls of which one cannot be read.

An atom that both templates write alike is shared text. One that they serialise differently (JSON's escapes, a list in Python's
spelling) is masked, and each model reads its own.

Left out: templates that write the arguments before the name.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any

from .conversation import SURROGATE
from .turns import CALL_ID, Unrenderable


DEEPEST = 32  # levels of lists and dicts in a call, far below what JSON and recursive templates can take

Write = Callable[[Sequence[dict]], str]  # calls in, what stands from before the first one to the end of the turn out

_NAMES, _KEYS, _TEXTS = "qzname{}zq", "qzkey{}zq", "qztext{}zq"
_NUMBERS = 7_310_000_000
_NAME = r"[^\s\"'<>(){}\[\],]+"
_ID = r"[\w.:-]+"
_SPACE = r"[ \t\r\n]"
ANY_SPACE = f"{_SPACE}*"


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


def loosely(literal: str, in_json: bool = True) -> str:
    """A pattern that finds a literal with any whitespace where it has some within, between two tags and, `in_json`, around punctuation."""
    marks = r"[{}\[\]:,]" if in_json else "(?!)"
    parts = re.split(rf"{ANY_SPACE}({marks}){ANY_SPACE}|{_SPACE}+|(?<=>)(?=<)", literal)
    found = re.escape(parts[0])
    for before, mark, text in zip(parts[::2], parts[1::2], parts[2::2], strict=False):
        within_words = before[-1:].isalnum() and text[:1].isalnum()
        gap = ANY_SPACE + re.escape(mark) + ANY_SPACE if mark else f"{_SPACE}+" if within_words else ANY_SPACE
        found += gap + re.escape(text)
    return found.replace(ANY_SPACE * 2, ANY_SPACE)


def json_of(literal: str) -> str:
    """The end of a literal before a call that is JSON: from the whitespace and brackets before its first `{"` on. "" for none."""
    found = re.search(rf'(?:{_SPACE}|\[)*\{{{ANY_SPACE}".*', literal, re.DOTALL)
    return found[0] if found else ""


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
        closing: JSON only. Matches what stands between the arguments of one call and the name of the next.
        given_id: JSON only. Matches what stands between the arguments and the end of an id after them.
    """

    opening: str
    as_json: bool
    after_name: re.Pattern
    values: tuple[tuple[re.Pattern, re.Pattern, tuple[re.Pattern, ...]], ...] = ()
    bare: tuple[re.Pattern, ...] = ()
    closing: re.Pattern | None = None
    given_id: re.Pattern | None = None

    @cached_property
    def tag(self) -> str:
        """The last whole tag before a name, such as `<tool_call>`; "" for none."""
        return "".join(re.findall(r"<[^<>\s]+>|\[[A-Z_]+\]", self.opening)[-1:])

    @cached_property
    def _another(self) -> re.Pattern:
        """Finds where another call begins."""
        after_tag = self.opening.rpartition(self.tag)[2] if self.tag else self.opening
        markup = (json_of(after_tag) or after_tag).lstrip(" \t\r\n[")
        ways = [re.escape(self.tag), loosely(markup).removeprefix(ANY_SPACE) if markup.startswith(("<", "{")) else ""]
        return re.compile("|".join(way for way in ways if way) or "(?!)")

    def read(self, text: str, tools: Sequence[Mapping] | None = None) -> list[dict] | None:
        """The calls in `text`, which reaches from the first one's name to the end of the turn; None where the template does not
        write calls so. `tools`: the schemas of those that may be called, which tell texts from numbers where a template does not."""
        calls, at = [], 0
        try:
            while at < len(text):
                call, at = self._call(text, at, tools or ())
                calls.append(call)
        except ValueError:
            return None
        return calls or None

    def _call(self, text: str, at: int, tools: Sequence[Mapping]) -> tuple[dict, int]:
        """The call that stands at `at`, and where the next one's name would."""
        for bare in self.bare:
            named = bare.match(text, at)
            if named and (bare != self.bare[-1] or named.end() == len(text)):
                return a_call(named["name"], {}), named.end()
        found = self.after_name.match(text, at)
        if found is None:
            raise ValueError("no name")
        at = found.end()
        if self.as_json:
            arguments, after, given = self._json(text, at)
        else:
            arguments, after = self._keyed(text, at, _schemas_of(found["name"], tools))
            given = None
        own_id = found.groupdict().get("id") or given or CALL_ID
        return {**a_call(found["name"], arguments), "id": own_id}, after

    def _json(self, text: str, at: int) -> tuple[dict, int, str | None]:
        arguments, end = _decoded(text, at)
        if not isinstance(arguments, dict):
            raise ValueError("no object")
        given = self.given_id and self.given_id.match(text, end)
        follows = self.closing and self.closing.match(text, end)
        if not follows and any(begun and begun.search(text, end) for begun in (self._another, self.closing)):
            raise ValueError("another call, after what is no markup")
        return arguments, follows.end() if follows else len(text), given["id"] if given else None

    def _keyed(self, text: str, at: int, schemas: Mapping[str, Any]) -> tuple[dict, int]:
        arguments: dict[str, Any] = {}
        ways = {before: (follow, closings) for before, follow, closings in reversed(self.values)}
        while True:
            key, way, at = _first(text, at, list(ways))
            follow, closings = ways[way]
            has_types = len(ways) > 1
            is_text = has_types and way == self.values[0][0]
            whole = 0 if is_text else _end_of_value(text, at, (follow, *closings))
            rest, stop, end = _first(text, at + whole, [follow, *closings])
            if any(map(self._another.search, (key, rest))):
                raise ValueError("another call, after what is no markup")
            value = text[at : at + whole] + rest
            if not is_text:
                value = _parsed(value) if has_types else _guessed(value, schemas.get(key))
            arguments[key], at = value, end
            if stop != follow:
                return arguments, at


def _first(text: str, at: int, marks: Sequence[re.Pattern]) -> tuple[str, re.Pattern, int]:
    """The text before the first of `marks`, the longest where several stand there; that mark, and where it ends."""
    found = [(match.start(), -match.end(), n) for n, mark in enumerate(marks) if (match := mark.search(text, at))]
    if not found:
        raise ValueError("none of the marks")
    place, end, n = min(found)
    return text[at:place], marks[n], -end


def _end_of_value(text: str, at: int, marks: Sequence[re.Pattern]) -> int:
    """The length of the JSON value that stands at `at` and before one of `marks`; 0 where there is none."""
    try:
        _, end = _decoded(text, at)
    except ValueError:
        return 0
    return end - at if any(mark.match(text, end) for mark in marks) else 0


def _decoded(text: str, at: int) -> tuple[Any, int]:
    """The JSON value that stands at `at`, and where it ends.

    Raises `ValueError` where there is none, and for one that no template could write or no tokenizer encode."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    _refuse_what_cannot_be_written(value)
    return value, end


def _refuse_what_cannot_be_written(value: Any, levels: int = DEEPEST) -> None:
    if isinstance(value, str) and SURROGATE.search(value):
        raise ValueError("half a character")
    if isinstance(value, list | dict):
        if not levels:
            raise ValueError("nested too deeply")
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            _refuse_what_cannot_be_written(item, levels - 1)


_CONSTANTS = {"True": True, "False": False, "None": None}
_JSON_TYPES = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    type(None): {"null"},
    list: {"array"},
    dict: {"object"},
    str: set(),
}


def _parsed(text: str) -> Any:
    """The value of a JSON text, or of a constant of Python's."""
    text = text.strip(" \t\r\n")
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    value, end = _decoded(text, 0)
    if end < len(text):
        raise ValueError("more than a value")
    return value


def _guessed(text: str, schema: Any) -> Any:
    """The value that a template writes as `text`, which writes texts like other values: a text where the schema has texts and not what
    it would be in JSON."""
    try:
        value = _parsed(text)
    except ValueError:
        return text
    types = _types(schema)
    return text if "string" in types and not types & _JSON_TYPES[type(value)] else value


def _types(schema: Any) -> set[str]:
    """The JSON types that a schema names."""
    if not isinstance(schema, Mapping):
        return set()
    own = schema.get("type") or []
    found = {own} if isinstance(own, str) else {str(kind) for kind in own}
    found |= {"null"} if schema.get("nullable") else set()
    return found.union(*(_types(way) for key in ("anyOf", "oneOf") for way in schema.get(key) or ()))


def _schemas_of(name: str, tools: Sequence[Mapping]) -> Mapping[str, Any]:
    """The schemas of a tool's arguments, by their names."""
    functions = [tool.get("function", tool) for tool in tools]
    parameters = next((one.get("parameters") for one in functions if one.get("name") == name), None) or {}
    return parameters.get("properties") or {}


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


def _pattern(literal: str, known: Mapping[str, str], in_json: bool) -> str:
    """A literal `loosely`, with other numbers in it, and with the patterns of `known` in the place of those texts."""
    parts = re.split("(" + "|".join(known) + ")", literal)
    return "".join(known.get(part) or re.sub(r"\d+", r"\\d+", loosely(part, in_json)) for part in parts)


def _named(middle: str, in_json: bool = False) -> re.Pattern:
    """A name, and `middle` after it, with another id, number or name in its place."""
    known = {CALL_ID: f"(?P<id>{_ID})", _NAMES.format(0): "(?P=name)"}
    return re.compile(f"(?P<name>{_NAME})" + _pattern(middle, known, in_json))


def _mark(literal: str) -> re.Pattern:
    """What stands beside a value: whitespace at its ends might be the value's."""
    core = literal.strip()
    start = literal.index(core)
    before, after = literal[:start], literal[start + len(core) :]
    return re.compile(re.escape(before) + loosely(core, in_json=False) + re.escape(after))


def _json_reader(write: Write) -> CallReader | None:
    name, other, key, value = _NAMES.format(0), _NAMES.format(1), _KEYS.format(0), _TEXTS.format(0)
    calls = [a_call(name, {key: value}), a_call(other, {key: value})]
    text = write(calls[:1])
    pattern = re.compile(rf'\{{\s*"{key}"\s*:\s*"{value}"\s*\}}')
    found = pattern.search(text)
    at = text.find(name)
    if found is None or not 0 <= at < found.start():
        return None
    closing = given_id = None
    if (both := _tried(write, calls)) and (first := pattern.search(both)):
        between = both[first.end() : both.index(other, first.end())]
        after = _pattern(between, {CALL_ID: _ID, name: _NAME}, in_json=True)
        closing = re.compile(ANY_SPACE + after.removeprefix(ANY_SPACE))
    before_id, has_id, _ = text[found.end() :].partition(CALL_ID)
    if has_id:
        given_id = re.compile(_pattern(before_id, {name: _NAME}, in_json=True) + f"(?P<id>{_ID})")
    after_name = _named(text[at + len(name) : found.start()], in_json=True)
    return CallReader(text[:at], True, after_name, closing=closing, given_id=given_id)


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
        follow = text[begin + len(probe) : text.index(keys[1], begin)]
        values.append((_mark(text[first:begin]), _mark(follow), tuple(map(_mark, closings))))
    bare = [write([a_call(name, {})]).partition(name)[2]]
    if both := _tried(write, [a_call(name, {}), a_call(other, {})]):
        after = both.index(name) + len(name)
        bare.insert(0, both[after : both.index(other, after)])
    return CallReader(single[:at], False, _named(single[at + len(name) : key]), tuple(values), tuple(map(_named, bare)))
