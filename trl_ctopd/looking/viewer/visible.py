"""Makes bytes readable: invisible characters get a sign or a name, bytes that are not a character are written in hexadecimal,
and readable text stays as it is.

The output cannot hide, reorder or imitate text: control and format characters are never passed on, except for those inside
an emoji.
"""

import unicodedata
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import regex


class Piece(NamedTuple):
    """A part of what some bytes show. `kind`: "text" (unchanged), "sign" (for whitespace), "name" (of an invisible character),
    "hex" (bytes that are not a character)."""

    kind: str
    text: str


_SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_NAMES = {
    "\u00a0": "NBSP", "\u00ad": "SHY", "\u061c": "ALM", "\u180e": "MVS", "\u200b": "ZWSP", "\u200c": "ZWNJ",
    "\u200d": "ZWJ", "\u200e": "LRM", "\u200f": "RLM", "\u202a": "LRE", "\u202b": "RLE", "\u202c": "PDF",
    "\u202d": "LRO", "\u202e": "RLO", "\u2060": "WJ", "\u2066": "LRI", "\u2067": "RLI", "\u2068": "FSI",
    "\u2069": "PDI", "\ufe0e": "VS15", "\ufe0f": "VS16", "\ufeff": "BOM", "\u007f": "DEL", "\u0000": "NUL",
    "\u001b": "ESC",
}  # fmt: skip
_INVISIBLE = {"Cc", "Cf", "Cn", "Co", "Zl", "Zp", "Zs"}
_BLANK = {
    "\u034f",
    "\u115f",
    "\u1160",
    "\u17b4",
    "\u17b5",
    "\u2800",
    "\u3164",
    "\uffa0",
}  # letters and marks that look empty
_SELECTOR = regex.compile(r"\p{Variation_Selector}")
# an emoji with its modifiers, a keycap, a flag; a joiner at the end joins nothing and is left out
_EMOJI = regex.compile(r"[0-9#*]\ufe0f?\u20e3|(?=\p{Extended_Pictographic}).(?:.*[^\u200c\u200d])?", regex.DOTALL)
_BYTES = regex.compile(r"[\udc80-\udcff]")  # Python's surrogates for bytes that are not characters
_JOINED = {"text": "", "hex": " "}


def pieces(data: bytes) -> list[Piece]:
    """What `data` shows, with neighbouring text merged, and neighbouring bytes too."""
    found: list[Piece] = []
    for piece in chain.from_iterable(map(_read, graphemes(data))):
        if found and found[-1].kind == piece.kind and piece.kind in _JOINED:
            found[-1] = Piece(piece.kind, found[-1].text + _JOINED[piece.kind] + piece.text)
        else:
            found.append(piece)
    return found


def plain(data: bytes) -> str:
    """`pieces` as one string, with names and hexadecimal in angle brackets."""
    return "".join(piece.text if piece.kind in ("text", "sign") else f"⟨{piece.text}⟩" for piece in pieces(data))


def legible(text: str) -> str:
    """`text` for a terminal: spaces and line breaks unchanged, all else as in `plain`."""
    kept = {("sign", "␣"): " ", ("sign", "⏎"): "\n"}
    found = pieces(text.encode("utf-8", "surrogateescape" if _BYTES.search(text) else "surrogatepass"))
    return "".join(
        kept.get(piece) or (piece.text if piece.kind in ("text", "sign") else f"⟨{piece.text}⟩") for piece in found
    )


def graphemes(data: bytes) -> list[str]:
    """The user-perceived characters (graphemes). A byte that belongs to none is a lone surrogate."""
    return regex.findall(r"\X", data.decode("utf-8", "surrogateescape"))


def num_bytes(grapheme: str) -> int:
    return len(grapheme.encode("utf-8", "surrogateescape"))


def is_rtl(text: str) -> bool:
    """Whether most of its letters are read from right to left."""
    kinds = [unicodedata.bidirectional(character) for character in text]
    return kinds.count("R") + kinds.count("AL") > kinds.count("L")


def _read(grapheme: str) -> Iterator[Piece]:
    reserved = unicodedata.category(grapheme[0]) == "Cn"  # unassigned, for a future emoji: no font has it
    emoji = None if reserved else _EMOJI.match(grapheme)
    if emoji:
        yield Piece("text", emoji[0])
    stands = emoji is not None  # whether a combining mark has a base character
    for character in grapheme[emoji.end() if emoji else 0 :]:
        category = unicodedata.category(character)
        if "\udc80" <= character <= "\udcff":
            yield Piece("hex", f"{ord(character) - 0xDC00:02X}")
        elif character in _SIGNS:
            yield Piece("sign", _SIGNS[character])
        elif category in _INVISIBLE or character in _BLANK or _SELECTOR.match(character):
            yield Piece("name", _NAMES.get(character) or f"U+{ord(character):04X}")
        elif category.startswith("M") and not stands:
            yield Piece("text", "◌" + character)
            stands = True
        else:
            yield Piece("text", character)
            stands = True
