"""The exact bytes that each token id stands for, for every family of tokenizer.

Decisions. A fast tokenizer is read by its own `decoder` and `model`, never by its class name; without a decoder, by how it
splits text. A slow one is read by what it holds (a SentencePiece processor, a tiktoken encoding, a WordPiece vocabulary, raw
UTF-8 bytes, code points). `decode([id])` is never called, since it loses half characters and leading spaces. Special tokens,
the unknown token and unused ids stand for no text: b"".

Left out: decoders that cannot be read token by token (regular expressions, end-of-word suffixes, CTC). They raise.
"""

import json
import re
import warnings
import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np


_BYTE_ROW = re.compile(r"<0x([0-9A-F]{2})>")
# A decoder step that strips the dummy prefix from the whole text. It changes no token's bytes.
_PREFIX_SPACE_STRIPPED = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]


class UnsupportedTokenizerError(ValueError):
    """The exact bytes of this tokenizer's tokens cannot be known."""

    def __init__(self, tokenizer: Any, reason: str):
        super().__init__(
            f"{type(tokenizer).__name__}: {reason}, so the exact bytes of its tokens cannot be known. Load the model's "
            "fast tokenizer (a `tokenizer.json` with a ByteLevel, Metaspace, Replace/ByteFallback or WordPiece "
            "decoder), or convert it to one."
        )


@dataclass(frozen=True)
class TokenTable:
    """A tokenizer's vocabulary in bytes, with what alignment needs besides.

    Attributes:
        rows: bytes of each id; index = id.
        special: ids of control tokens, which stand for no text.
        unknown: ids that the tokenizer writes for text it has no token for. Their rows are b"" too.
        word_starts: ids before which the tokenizer drops whitespace (WordPiece only, else empty).
        prefix_space: when the tokenizer puts a space before a text: "never", "unless_space" (where the text begins with
            none: Metaspace of the tokenizers library) or "always" (SentencePiece's own dummy prefix).
        names: the tokenizer's names for its control and unknown tokens, by id.
    """

    rows: list[bytes]
    special: frozenset[int]
    unknown: frozenset[int]
    word_starts: frozenset[int]
    prefix_space: str
    names: dict[int, str]

    @cached_property
    def _packed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The bytes of all rows in one array, the start and the width of each row. An empty row at the end serves all larger
        ids."""
        widths = np.array([*map(len, self.rows), 0])
        return np.frombuffer(b"".join(self.rows), dtype=np.uint8), np.cumsum(widths) - widths, widths

    def read(self, ids: np.ndarray) -> tuple[bytes, np.ndarray]:
        """The bytes that `ids` (N,) spell, and the number of bytes of each (N,). Ids past the last row spell nothing."""
        packed, starts, widths = self._packed
        ids = np.minimum(ids, len(self.rows))
        widths = widths[ids]
        place = np.repeat(starts[ids] - (np.cumsum(widths) - widths), widths)
        place += np.arange(len(place))
        return packed[place].tobytes(), widths


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of every token id: `b"".join(rows[i] for i in ids)` is what the ids spell.

    Index = id, up to the largest. Special and padding rows are b"". Added tokens that are not special are their
    content in UTF-8. A word-initial WordPiece token is the bare word (`##x` is b"x"): the whitespace before it is lost.
    Raises `UnsupportedTokenizerError` where exact bytes cannot be known.
    """
    return list(token_table(tokenizer).rows)


_tables: weakref.WeakKeyDictionary[Any, tuple[Any, TokenTable]] = weakref.WeakKeyDictionary()


def token_table(tokenizer: Any) -> TokenTable:
    """`token_bytes` and what alignment needs besides. Cached until the tokenizer's tokens change."""
    if not hasattr(tokenizer, "all_special_ids"):
        raise UnsupportedTokenizerError(tokenizer, "it is not a transformers tokenizer")
    fingerprint = _fingerprint(tokenizer)
    if tokenizer not in _tables or _tables[tokenizer][0] != fingerprint:
        _tables[tokenizer] = (fingerprint, _build_table(tokenizer))
    return _tables[tokenizer][1]


def _fingerprint(tokenizer: Any) -> tuple[Any, ...]:
    """Changes whenever tokens are added to the tokenizer or made special."""
    added = tuple((i, token.content, token.special) for i, token in sorted(_added_tokens(tokenizer).items()))
    return len(tokenizer), added, tuple(tokenizer.all_special_ids)


def _build_table(tokenizer: Any) -> TokenTable:
    read = _fast_pieces if getattr(tokenizer, "backend_tokenizer", None) is not None else _slow_pieces
    spelled, unknown, word_starts = read(tokenizer)
    added = _added_tokens(tokenizer)
    _check_roles(tokenizer, added)
    _check_ids(tokenizer, added, spelled)
    # An added token that the model's own vocabulary has too (Gemma's `▁▁`) keeps the model's spelling.
    spelled = {i: token.content.encode() for i, token in added.items()} | spelled
    special = _control_ids(tokenizer, added) - unknown - _text_that_pads(tokenizer, added, spelled)
    rows = [b""] * (max(spelled, default=-1) + 1)
    for i, row in spelled.items():
        if i not in special and i not in unknown:
            rows[i] = row
    silent = [*special, *unknown]
    names = dict(zip(silent, tokenizer.convert_ids_to_tokens(silent), strict=True))
    return TokenTable(rows, special, unknown, word_starts - special - unknown, _prefix_space(tokenizer, rows), names)


_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def _check_roles(tokenizer: Any, added: dict[int, Any]):
    """Raises `ValueError` where a token of the text was given a role, as by `pad_token_id = 0`, which is "!" in many vocabularies. It stays text in memory,
    and is a special token once the tokenizer has been saved (findings/saved_padding_is_read_otherwise.sh)."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return
    for role in _ROLES:
        i = getattr(tokenizer, f"{role}_token_id", None)
        if i is not None and i not in added and role != "unk":
            raise ValueError(
                f"{type(tokenizer).__name__}: {role}_token is {tokenizer.convert_ids_to_tokens(i)!r} (id {i}), a token of text. The text's own such tokens would "
                "count as control tokens, and saved and loaded the tokenizer would read text otherwise. Choose a special token of its own, or "
                "add one (`add_special_tokens`)."
            )


def _text_that_pads(tokenizer: Any, added: dict[int, Any], own: dict[int, bytes]) -> frozenset[int]:
    """A pad token of one character that the model's vocabulary (`own`) has too, and that has no other role: it was text when its role was given and
    saved, and the model writes it as text. Warns of it."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return frozenset()
    i = tokenizer.pad_token_id
    others = {getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES if role != "pad"}
    if i not in added or i in others or i not in own or len(added[i].content) > 1:
        return frozenset()
    warnings.warn(
        f"{type(tokenizer).__name__}: pad_token is {added[i].content!r} (id {i}), a token of text that was saved as a special one. It is read as text "
        "here, but the tokenizer cuts text at it, before all merges, and decode(..., skip_special_tokens=True) drops it. Load the tokenizer "
        "that the model was first published with.",
        stacklevel=2,
    )
    return frozenset({i})


def _check_ids(tokenizer: Any, added: dict[int, Any], spelled: dict[int, bytes]):
    """Raises `UnsupportedTokenizerError` where an added token has the id of another one: tokens that are added to a vocabulary with unused ids
    are numbered so (findings/added_tokens_take_ids_in_use.sh)."""
    if not added:
        return
    shared = []
    for name, i in tokenizer.get_vocab().items():
        own = added.get(i)
        if own is not None and own.content != name and (own.special or spelled.get(i) != own.content.encode()):
            shared.append((i, name))
    if shared:
        i, name = min(shared)  # a vocabulary comes in any order
        reason = f"id {i} is both {name!r} and {added[i].content!r}, which was added (ids are free from {max(spelled) + 1} on)"
        raise UnsupportedTokenizerError(tokenizer, reason)


def _control_ids(tokenizer: Any, added: dict[int, Any]) -> frozenset[int]:
    """Ids of tokens marked as special, and of those with a role (bos, eos, ...). Being listed in `all_special_ids` is not
    enough: transformers lists a SentencePiece model's user-defined symbols (newlines, runs of spaces), which are text."""
    ids = {getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES} - {None}
    ids |= {i for i in tokenizer.all_special_ids if i not in added or added[i].special}
    return frozenset(ids | {i for i, token in added.items() if token.special})


def _prefix_space(tokenizer: Any, rows: list[bytes]) -> str:
    """Found by encoding, so it does not matter which normalizer or pre-tokenizer adds the space."""
    bare, spaced = (b"".join(rows[i] for i in tokenizer.encode(text, add_special_tokens=False)) for text in ("a", " a"))
    if bare != b" a":
        return "never"
    return "always" if spaced == b"  a" else "unless_space"


def _added_tokens(tokenizer: Any) -> dict[int, Any]:
    """`AddedToken` by id. mistral-common has none; its control tokens are in `all_special_ids`."""
    return {} if _mistral_common(tokenizer) is not None else tokenizer.added_tokens_decoder


class _Pieces(NamedTuple):
    """A vocabulary: bytes by id, ids of the unknown token, ids before which whitespace is lost."""

    spelled: dict[int, bytes]
    unknown: frozenset[int] = frozenset()
    word_starts: frozenset[int] = frozenset()


def _fast_pieces(tokenizer: Any) -> _Pieces:
    backend = tokenizer.backend_tokenizer
    steps = _steps(backend.decoder, "decoders") if backend.decoder is not None else _undone(backend)
    if not steps:
        raise UnsupportedTokenizerError(
            tokenizer, "its backend has no decoder, and its pre-tokenizer is neither ByteLevel nor Metaspace"
        )
    steps = [step for step in steps if step["type"] != "Fuse" and step not in _PREFIX_SPACE_STRIPPED]
    kinds = {step["type"] for step in steps}
    vocabulary = backend.get_vocab(with_added_tokens=False)
    unknown_token, byte_fallback = _fast_model(tokenizer)
    unknown = frozenset({vocabulary[unknown_token]} if unknown_token in vocabulary else ())
    if kinds == {"ByteLevel"}:
        return _Pieces({i: _byte_level(piece) for piece, i in vocabulary.items()}, unknown)
    if kinds == {"WordPiece"}:
        return _word_pieces(vocabulary, steps[0]["prefix"], unknown)
    if kinds and kinds <= {"Replace", "Metaspace", "ByteFallback"}:
        replacements = [_replacement(tokenizer, step) for step in steps if step["type"] != "ByteFallback"]
        return _Pieces({i: _spaced(piece, replacements, byte_fallback) for piece, i in vocabulary.items()}, unknown)
    raise UnsupportedTokenizerError(tokenizer, f"its decoder is {'+'.join(sorted(kinds)) or 'empty'}")


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """The settings of a decoder, normalizer or pre-tokenizer, or of each in a sequence of them; `name` is that of the list."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return state[name] if state["type"] == "Sequence" else [state]


def _undone(backend: Any) -> list[dict[str, Any]]:
    """The decoder of a tokenizer that has none: what undoes how it prepares text. Empty where that does not tell the bytes."""
    steps = [*_steps(backend.normalizer, "normalizers"), *_steps(backend.pre_tokenizer, "pretokenizers")]
    if any(step["type"] == "ByteLevel" for step in steps):
        return [{"type": "ByteLevel"}]
    return [step for step in steps if step["type"] == "Metaspace"]


def _fast_model(tokenizer: Any) -> tuple[str | None, bool]:
    """The unknown token, and whether a row `<0x0A>` is one byte rather than six characters."""
    model = tokenizer.backend_tokenizer.model
    if getattr(model, "end_of_word_suffix", None):
        raise UnsupportedTokenizerError(tokenizer, f"it marks word ends by {model.end_of_word_suffix!r}")
    if type(model).__name__ != "Unigram":
        return getattr(model, "unk_token", None), getattr(model, "byte_fallback", False)
    state = json.loads(model.__getstate__())  # a Unigram model shows its settings nowhere else
    unknown_token = None if state["unk_id"] is None else state["vocab"][state["unk_id"]][0]
    return unknown_token, state["byte_fallback"]


def _replacement(tokenizer: Any, step: dict[str, Any]) -> tuple[str, str]:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    if "String" not in step["pattern"]:
        raise UnsupportedTokenizerError(tokenizer, f"its decoder replaces the pattern {step['pattern']}")
    return step["pattern"]["String"], step["content"]


def _slow_pieces(tokenizer: Any) -> _Pieces:
    ids = range(len(tokenizer))
    if (mistral := _mistral_common(tokenizer)) is not None:
        if hasattr(mistral, "id_to_byte_piece"):  # Tekken
            return _Pieces({i: mistral.id_to_byte_piece(i) for i in ids if not mistral.is_special(i)})
        return _sentencepiece(mistral._model, {i: mistral.id_to_piece(i) for i in ids})
    if (encoding := _tiktoken(tokenizer)) is not None:
        return _Pieces({encoding.encode_single_token(row): row for row in encoding.token_byte_values()})
    if hasattr(tokenizer, "sp_model"):
        # By the tokenizer's own numbering, which may differ from that of its SentencePiece model (fairseq offsets).
        return _sentencepiece(tokenizer.sp_model, dict(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)))
    if getattr(tokenizer, "_utf_vocab_size", None) == 256:  # ByT5
        return _Pieces({byte + tokenizer.offset: bytes([byte]) for byte in range(256)})
    if hasattr(tokenizer, "_unicode_vocab_size"):  # CANINE, whose ids are code points
        return _Pieces({i: chr(i).encode() for i in ids if not 0xD800 <= i < 0xE000})
    if hasattr(tokenizer, "wordpiece_tokenizer"):
        unknown = frozenset({tokenizer.vocab[tokenizer.wordpiece_tokenizer.unk_token]})
        return _word_pieces(tokenizer.vocab, "##", unknown)
    raise UnsupportedTokenizerError(tokenizer, "it is a slow tokenizer of a kind not known here")


def _mistral_common(tokenizer: Any) -> Any | None:
    """The Tekken or SentencePiece tokenizer inside transformers' `MistralCommonBackend`."""
    instruct = getattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer", None)
    return getattr(instruct, "tokenizer", None)


def _tiktoken(tokenizer: Any) -> Any | None:
    """The `tiktoken.Encoding` that tokenizers loaded with `trust_remote_code` (Qwen-1, Kimi) keep in an attribute."""
    return next((value for value in vars(tokenizer).values() if hasattr(value, "token_byte_values")), None)


def _sentencepiece(model: Any, pieces: dict[int, str]) -> _Pieces:
    """`model`: a `SentencePieceProcessor`; `pieces`: the tokenizer's pieces, by its own numbering."""
    spelled, unknown = {}, set()
    for i, piece in pieces.items():
        row = model.piece_to_id(piece)
        if model.id_to_piece(row) != piece:  # an added token, which the model does not have
            continue
        if model.is_unknown(row):
            unknown.add(i)
        is_text = not (model.is_control(row) or model.is_unknown(row) or model.is_unused(row))
        spelled[i] = _spaced(piece, [("▁", " ")], model.is_byte(row)) if is_text else b""
    return _Pieces(spelled, frozenset(unknown))


def _word_pieces(vocabulary: dict[str, int], prefix: str, unknown: frozenset[int]) -> _Pieces:
    starts = {i for piece, i in vocabulary.items() if not piece.startswith(prefix)}
    return _Pieces({i: piece.removeprefix(prefix).encode() for piece, i in vocabulary.items()}, unknown, starts)


def _spaced(piece: str, replacements: list[tuple[str, str]], byte_fallback: bool) -> bytes:
    if byte_fallback and (byte := _BYTE_ROW.fullmatch(piece)):
        return bytes([int(byte[1], 16)])
    for old, new in replacements:
        piece = piece.replace(old, new)
    return piece.encode()


def _byte_level(piece: str) -> bytes:
    """Each character of GPT-2's alphabet is a byte. A piece with any other character is plain UTF-8, as in the library."""
    try:
        return piece.translate(_BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:
        return piece.encode()


def _byte_level_alphabet() -> dict[int, str]:
    """Maps a code point to the Latin-1 character of its byte (the inverse of GPT-2's `bytes_to_unicode`).

    Printable Latin-1 characters stand for themselves, U+0100 onwards for the other 68 bytes. Latin-1 characters outside
    the alphabet map to one that cannot be encoded, so that encoding fails.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict.fromkeys(others, "\uffff") | {256 + n: chr(byte) for n, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()
