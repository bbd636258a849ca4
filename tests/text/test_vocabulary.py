"""What two vocabularies have in common, against dictionaries of byte strings filled by trying every token."""

import functools
import random
import time
from collections import Counter
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers_for_tests import LOSSLESS, byte_level, unigram, word_piece
from transformers import PreTrainedTokenizerFast

from trl_ctopd import token_bytes
from trl_ctopd.text import vocabulary
from trl_ctopd.text.vocabulary import VocabularyPair


NO_TEXT = -1


# --- pairs of tokenizers


@dataclass(frozen=True, eq=False)
class Side:
    """A tokenizer under a head of `size` rows."""

    tokenizer: Any
    size: int
    stops: tuple[int, ...]

    @functools.cached_property
    def rows(self) -> list[bytes]:
        rows = token_bytes(self.tokenizer)
        return rows + [b""] * (self.size - len(rows))

    @functools.cached_property
    def texts(self) -> dict[int, bytes]:
        """The ids that stand for text."""
        return {token: row for token, row in enumerate(self.rows) if row and token not in self.stops}

    @functools.cached_property
    def ids(self) -> dict[bytes, list[int]]:
        found: dict[bytes, list[int]] = {}
        for token, text in self.texts.items():
            found.setdefault(text, []).append(token)
        return found


@dataclass(frozen=True, eq=False)
class Case:
    student: Side
    teacher: Side

    @functools.cached_property
    def pair(self) -> VocabularyPair:
        return pair_of(self)

    @property
    def bridged(self) -> bool:
        return bool(self.student.stops) and bool(self.teacher.stops)


def pair_of(case: Case, **settings) -> VocabularyPair:
    return VocabularyPair(
        case.student.tokenizer,
        case.teacher.tokenizer,
        student_size=case.student.size,
        teacher_size=case.teacher.size,
        student_stops=case.student.stops,
        teacher_stops=case.teacher.stops,
        **settings,
    )


FAMILIES = {**LOSSLESS, "NFKC unigram without bytes": lambda: unigram(False, nfkc=True), "WordPiece": word_piece}
# A ring, walked both ways: every family is a student twice and a teacher twice.
RING = list(FAMILIES)
PAIRS = [pair for one, other in zip(RING, RING[1:] + RING[:1], strict=True) for pair in ((one, other), (other, one))]


def stops_of(tokenizer: Any) -> tuple[int, ...]:
    """The greatest and the least of the special ids."""
    return tuple({max(tokenizer.all_special_ids): None, min(tokenizer.all_special_ids): None})


@functools.cache
def toys(student: str, teacher: str, stops: str = "both") -> Case:
    """Heads with rows beyond the tokenizers. `stops`: which sides have any; the student's are those of `stops_of` and
    a token that has text."""
    sides = []
    for name, extra in ((student, 3), (teacher, 7)):
        tokenizer = FAMILIES[name]()
        sides.append(Side(tokenizer, len(token_bytes(tokenizer)) + extra, stops_of(tokenizer)))
    comma = token_bytes(sides[0].tokenizer).index(b",")
    sides[0] = Side(sides[0].tokenizer, sides[0].size, (*sides[0].stops, comma) if stops == "both" else ())
    return Case(*sides)


every_pair = pytest.mark.parametrize(("student", "teacher"), PAIRS)
every_stop = pytest.mark.parametrize("stops", ["both", "only the teacher's"])


def spelled_by(rows: list[bytes]) -> PreTrainedTokenizerFast:
    """A tokenizer with these rows, as far as GPT-2's alphabet and plain text can spell one twice; it merges nothing."""
    alphabet = {byte: character for character, byte in byte_alphabet().items()}
    pieces: dict[str, int] = {"the end": 0}
    for row in rows:
        plain = row.decode(errors="replace")
        piece = "".join(alphabet[byte] for byte in row)
        piece = plain if piece in pieces and " " in plain and "\ufffd" not in plain else piece
        pieces.setdefault(piece, len(pieces))
    backend = Tokenizer(models.BPE(pieces, []))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="the end")


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable characters stand for themselves, U+0100 onwards for the other bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


# Few letters, so that tokens begin alike: two that sort last, half a character, the space that has two spellings.
SMALL_ROWS = st.lists(
    st.lists(st.sampled_from([b"a", b"b", b" ", b"\xfe", b"\xff", "é".encode(), b"\xc3"]), min_size=1, max_size=4).map(
        b"".join
    ),
    min_size=1,
    max_size=14,
).map(lambda rows: [b"a", *rows])


@st.composite
def small_cases(draw) -> Case:
    """Every token may be a stop, but for one that both sides share."""
    sides = []
    for _ in range(2):
        tokenizer = spelled_by(draw(SMALL_ROWS))
        shared = tokenizer.get_vocab()["a"]
        stops = draw(st.sets(st.integers(0, len(tokenizer) - 1).filter(lambda token, a=shared: token != a), max_size=3))
        sides.append(Side(tokenizer, len(tokenizer) + draw(st.integers(0, 2)), tuple(stops)))
    return Case(*sides)


# --- shared outcomes


def shared_classes(case: Case) -> dict[bytes | None, tuple[list[int], list[int]]]:
    """The student's and the teacher's ids of each text that both have; of the end of a turn under None."""
    classes: dict[bytes | None, tuple[list[int], list[int]]] = {
        text: (ids, case.teacher.ids[text]) for text, ids in case.student.ids.items() if text in case.teacher.ids
    }
    if case.bridged:
        classes[None] = sorted(case.student.stops), sorted(case.teacher.stops)
    return classes


def check_shared(case: Case):
    shared, classes = case.pair.shared, shared_classes(case)
    found = []
    for side, name in enumerate(("student", "teacher")):
        class_of, least, repeated, members, rest = (
            getattr(shared, f"{name}_{part}").tolist() for part in ("class", "ids", "repeated", "members", "rest")
        )
        ids_of = [[token for token, number in enumerate(class_of) if number == c] for c in range(len(least))]
        found.append(ids_of)
        assert len(class_of) == (case.student, case.teacher)[side].size
        assert set(class_of) <= {NO_TEXT, *range(len(least))}
        assert least == [min(ids) for ids in ids_of]
        assert repeated == [c for c, ids in enumerate(ids_of) if len(ids) > 1]
        assert [sorted(set(ids) - {-1}) for ids in members] == [ids_of[c] for c in repeated]
        assert all(len(set(ids)) == len(ids) - max(0, ids.count(-1) - 1) for ids in members)
        assert rest == [token for token, number in enumerate(class_of) if number == NO_TEXT]
    assert sorted(zip(*found, strict=True)) == sorted(classes.values())
    assert case.pair.bridged == case.bridged


@every_pair
@every_stop
def test_shared_outcomes_are_the_texts_that_both_sides_have(student, teacher, stops):
    check_shared(toys(student, teacher, stops))


@given(case=small_cases())
@settings(max_examples=60, deadline=None)
def test_shared_outcomes_of_any_small_vocabularies_are_the_texts_that_both_sides_have(case):
    check_shared(case)


@pytest.mark.parametrize(("student", "teacher"), [("metaspace BPE", "byte-level"), ("byte-level", "Gemma-like")])
def test_probabilities_of_ids_that_spell_the_same_bytes_add_up(student, teacher):
    case = toys(student, teacher)
    shared, generator = case.pair.shared, torch.Generator().manual_seed(0)
    classes = list(shared_classes(case).values())
    for name, size, side in (("student", case.student.size, 0), ("teacher", case.teacher.size, 1)):
        full = torch.randn(3, size, generator=generator, dtype=torch.float64).log_softmax(-1)
        outcomes = getattr(shared, f"{name}_log_probs")(full)
        number_of = getattr(shared, f"{name}_class")
        for ids in (pair[side] for pair in classes):
            torch.testing.assert_close(outcomes[:, number_of[ids[0]]].exp(), full[:, ids].exp().sum(-1))
    assert any(len(ids) > 1 for pair in classes for ids in pair)


def test_an_outcome_of_several_ids_that_are_all_impossible_is_impossible():
    case = toys("metaspace BPE", "byte-level")
    shared = case.pair.shared
    impossible = torch.isin(torch.arange(case.student.size), shared.student_members[0])
    outcomes = shared.student_log_probs(torch.zeros(1, case.student.size).masked_fill(impossible, -torch.inf))
    assert outcomes[0, shared.student_repeated[0]] == -torch.inf
    assert not outcomes.isnan().any()


# --- prefixes


def longest_beginning(side: Side, text: bytes) -> int:
    """The least id of the longest token that the text begins with, as many as the head has rows if there is none."""
    fitting = [token for token, row in side.texts.items() if text.startswith(row)]
    return min(fitting, key=lambda token: (-len(side.texts[token]), token), default=side.size)


def check_entries(case: Case, teacher_ids: list[int], every_byte: bool = True):
    """All that `Prefixes` says of some teacher tokens, at every byte of theirs or at one."""
    prefixes, student, teacher = case.pair.prefixes, case.student, case.teacher
    rng = random.Random(0)
    for token in teacher_ids:
        text = teacher.texts.get(token, b"")
        assert prefixes.length[token] == len(text)
        stop = min(student.stops) if case.bridged and token in teacher.stops else student.size
        assert prefixes.first_outcome[token] == (longest_beginning(student, text) if text else stop)
        for k in range(len(text)) if every_byte or not text else [rng.randrange(len(text))]:
            written, rest = text[:k], text[k:]
            entry = prefixes.entries(torch.tensor([k]))[0, token]
            assert prefixes.outcome[entry] == longest_beginning(student, rest)
            completing = prefixes.order[prefixes.completing_low[entry] : prefixes.completing_high[entry]]
            assert sorted(completing.tolist()) == [v for v, row in student.texts.items() if row.startswith(rest)]
            left = {w for w, row in teacher.texts.items() if row.startswith(written) and row != written}
            going_on = prefixes.going_on(torch.tensor([token]), torch.tensor([k]))
            assert set(going_on[0].nonzero()[:, 0].tolist()) == (left if k else set(range(teacher.size)))


def check_order(case: Case):
    prefixes, student, teacher = case.pair.prefixes, case.student, case.teacher
    in_order = [student.texts[token] for token in prefixes.order.tolist()]
    assert in_order == sorted(student.texts.values())
    place = prefixes.place.tolist()
    at = sorted(teacher.texts, key=place.__getitem__)
    assert [teacher.texts[token] for token in at] == sorted(teacher.texts.values())
    assert [place[token] for token in at] == list(range(len(at)))
    assert all(place[token] >= len(at) for token in range(teacher.size) if token not in teacher.texts)
    outcome = {token: student.ids[text][0] for token, text in student.texts.items()}
    if case.bridged:
        outcome |= dict.fromkeys(student.stops, min(student.stops))
    outcomes = [outcome.get(token, student.size) for token in range(student.size)]
    assert prefixes.student_outcome.tolist() == outcomes
    values = torch.arange(2 * student.size, dtype=torch.float64).view(2, -1)
    sums = torch.zeros(2, student.size + 1, dtype=torch.float64)
    for token, own in enumerate(outcomes):
        sums[:, own] += values[:, token]
    assert torch.equal(prefixes.by_outcome(values), sums)
    assert torch.equal(prefixes.by_student_token(sums.clone()), sums[:, outcomes])


@every_pair
def test_prefixes_of_any_teacher_token_at_any_byte_are_those_found_by_trying_every_token(student, teacher):
    case = toys(student, teacher)
    check_order(case)
    longest = sorted(case.teacher.texts, key=lambda token: len(case.teacher.texts[token]))[-3:]
    some = random.Random(1).sample(range(case.teacher.size), 25)
    check_entries(case, [*longest, *some, *case.teacher.stops, case.teacher.size - 1])


@every_pair
def test_prefixes_know_no_end_of_turn_where_only_one_side_has_one(student, teacher):
    case = toys(student, teacher, "only the teacher's")
    check_order(case)
    check_entries(case, [*case.teacher.stops, *random.Random(2).sample(sorted(case.teacher.texts), 5)])


@given(case=small_cases())
@settings(max_examples=60, deadline=None)
def test_prefixes_of_any_small_vocabularies_are_those_found_by_trying_every_token(case):
    check_order(case)
    check_entries(case, list(range(case.teacher.size)))


def test_positions_with_different_bytes_written_are_looked_up_at_once():
    case = toys("byte-level", "metaspace BPE")
    prefixes, rng = case.pair.prefixes, random.Random(3)
    tokens = rng.sample(sorted(case.teacher.texts), 40)
    written = [rng.randrange(len(case.teacher.texts[token])) for token in tokens]
    together = prefixes.going_on(torch.tensor(tokens), torch.tensor(written))
    one_by_one = [prefixes.going_on(torch.tensor([w]), torch.tensor([k])) for w, k in zip(tokens, written, strict=True)]
    assert torch.equal(together, torch.cat(one_by_one))
    entries = prefixes.entries(torch.tensor(written))
    assert torch.equal(entries, torch.cat([prefixes.entries(torch.tensor([k])) for k in written]))


# --- projection


def projected(case: Case, token: int) -> dict[int, float]:
    """The weights of one student token."""
    student, teacher = case.student, case.teacher
    if case.bridged and token in student.stops:
        return {min(teacher.stops): 1.0}
    text = student.texts.get(token, b"")
    if text in teacher.ids:
        return {teacher.ids[text][0]: 1.0}
    weights: Counter[int] = Counter()
    for i, piece in enumerate(pieces_of(teacher, text)[:4]):
        weights[teacher.ids[piece][0]] += 0.9 * 0.1**i
    return {piece: weight / weights.total() for piece, weight in weights.items()}


def pieces_of(side: Side, text: bytes) -> list[bytes]:
    """As the tokenizer writes it, where that is the text; else the longest token that fits, again and again."""
    written = [side.rows[token] for token in encoded(side.tokenizer, text.decode(errors="replace"))]
    if b"".join(written) == text:
        return written
    pieces, rest = [], text
    while rest:
        pieces.append(max((piece for piece in side.ids if rest.startswith(piece)), key=len, default=b""))
        rest = rest[len(pieces[-1]) :]
        if not pieces[-1]:
            return []
    return pieces


def encoded(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def check_projection(case: Case, tokens: list[int]):
    projection = case.pair.projection
    for token in tokens:
        mine = projection.student == token
        found: Counter[int] = Counter()
        for piece, weight in zip(projection.teacher[mine].tolist(), projection.weight[mine].tolist(), strict=True):
            found[piece] += weight
        assert found == pytest.approx(projected(case, token)), case.student.rows[token]


def check_projected_rows(case: Case):
    projection = case.pair.projection
    total = torch.zeros(case.student.size, dtype=projection.weight.dtype)
    total.index_add_(0, projection.student, projection.weight)
    torch.testing.assert_close(total, total.round().clamp(0, 1))
    assert (projection.weight > 0).all()
    teacher = case.teacher
    first = {token: teacher.ids[text][0] for token, text in teacher.texts.items()}
    if case.bridged:
        first |= dict.fromkeys(teacher.stops, min(teacher.stops))
        assert projection.teacher_first.tolist() == [first.get(token, token) for token in range(teacher.size)]


@every_pair
@every_stop
def test_the_projection_sends_a_token_to_its_partner_or_to_what_the_teacher_writes_it_with(student, teacher, stops):
    case = toys(student, teacher, stops)
    check_projected_rows(case)
    check_projection(case, list(range(case.student.size)))


def test_half_a_character_is_projected_onto_the_bytes_that_it_is_made_of():
    """The middle of Devanagari and Thai characters is a token of a trained byte-level BPE; SentencePiece has bytes."""
    case = toys("byte-level, three digits", "metaspace BPE")
    halves = [
        w for w, text in case.student.texts.items() if len(text) > 1 and "\ufffd" in text.decode(errors="replace")
    ]
    assert halves
    byte_row = {bytes([byte]): case.teacher.ids[bytes([byte])][0] for byte in range(256)}
    for token in halves:
        text = case.student.texts[token]
        if not any(len(piece) > 1 for piece in pieces_of(case.teacher, text)):
            assert list(projected(case, token)) == list(
                dict.fromkeys(byte_row[text[i : i + 1]] for i in range(len(text[:4])))
            )
    check_projection(case, halves)


def test_a_teachers_dummy_prefix_space_is_no_part_of_what_a_token_is_projected_onto():
    case = toys("byte-level, three digits", "metaspace BPE")
    bare = [v for v, text in case.student.texts.items() if text not in case.teacher.ids and text[:1] != b" "]
    assert bare
    starts = {v: case.student.texts[v] for v in bare if projected(case, v)}
    projection = case.pair.projection
    for token, text in starts.items():
        pieces = projection.teacher[projection.student == token].tolist()
        assert text.startswith(b"".join(case.teacher.rows[piece] for piece in pieces))


def test_a_piece_of_the_teachers_that_is_one_of_its_stops_takes_no_share():
    """A teacher whose turn ends with a newline; the student has a token of a word and a newline."""
    teacher = byte_level(400)
    newline = token_bytes(teacher).index(b"\n")
    student = spelled_by([b"q\n", b"q"])
    pair = VocabularyPair(student, teacher, student_size=4, teacher_size=len(teacher), teacher_stops=[newline])
    projection = pair.projection
    assert newline not in projection.teacher.tolist()


# --- spellings and widths


@every_pair
@every_stop
def test_spellings_are_the_bytes_without_spaces(student, teacher, stops):
    case = toys(student, teacher, stops)
    spellings = case.pair.spellings
    for side, bytes_of, length_of in (
        (case.student, spellings.student, spellings.student_length),
        (case.teacher, spellings.teacher, spellings.teacher_length),
    ):
        bare = {token: text.replace(b" ", b"") for token, text in side.texts.items()}
        assert length_of.tolist() == [len(bare[v]) if v in bare else NO_TEXT for v in range(side.size)]
        assert bytes_of.shape == (side.size, 32)
        for token, text in bare.items():
            assert bytes(bytes_of[token].tolist()) == text[:32].ljust(32, b"\0")


def test_a_spelling_of_more_than_32_bytes_keeps_its_length():
    student, teacher = spelled_by([b" " + b"ab" * 20]), spelled_by([b"a"])
    spellings = VocabularyPair(student, teacher, student_size=2, teacher_size=2).spellings
    assert spellings.student_length.tolist() == [NO_TEXT, 40]
    assert bytes(spellings.student[1].tolist()) == b"ab" * 16


@every_pair
@every_stop
def test_widths_and_whitespace_are_those_of_the_text(student, teacher, stops):
    """Of a stop there is none."""
    case = toys(student, teacher, stops)
    texts = [case.student.texts.get(token, b"") for token in range(case.student.size)]
    assert case.pair.student_widths.tolist() == [len(text) for text in texts]
    assert case.pair.teacher_widths.tolist() == [len(case.teacher.texts.get(w, b"")) for w in range(case.teacher.size)]
    blank = [bool(text) and set(text) <= set(b" \t\n\r\x0b\x0c") for text in texts]
    assert case.pair.student_whitespace.tolist() == blank
    assert any(blank) or student == "WordPiece"


STRUCTURES = ("shared", "prefixes", "projection", "spellings")


def tensors(pair: VocabularyPair, name: str) -> list[torch.Tensor]:
    structure = getattr(pair, name)
    return [getattr(structure, field.name) for field in fields(structure)]


def test_the_structures_are_on_the_device_that_was_asked_for():
    pair = pair_of(toys("byte-level", "metaspace BPE"), device="meta")
    found = [*(tensor for name in STRUCTURES for tensor in tensors(pair, name)), pair.student_widths]
    assert {tensor.device.type for tensor in [*found, pair.teacher_widths, pair.student_whitespace]} == {"meta"}


# --- no overlap


def disjoint() -> Case:
    student, teacher = spelled_by([b"a", b"b", b"ab"]), spelled_by([b"c", b"\xff"])
    return Case(Side(student, 5, (0,)), Side(teacher, 3, (0,)))


@pytest.mark.parametrize("name", ["shared", "prefixes", "projection"])
def test_vocabularies_without_a_common_text_are_refused_with_both_tokenizers_and_the_way_out(name, tmp_path):
    """The end of a turn is none."""
    with pytest.raises(ValueError, match="share no token") as error:
        getattr(pair_of(disjoint(), cache_dir=tmp_path), name)
    message = str(error.value)
    assert message.count("TokenizersBackend") == 2
    assert "TokenizersBackend, 3 different texts" in message and "TokenizersBackend, 2)" in message
    assert "use a loss on log-probs, such as dpca or alm" in message
    assert not list(tmp_path.iterdir())


def test_vocabularies_without_a_common_text_still_have_spellings_and_widths():
    pair = pair_of(disjoint())
    assert pair.spellings.student_length.tolist() == [NO_TEXT, 1, 1, 2, NO_TEXT]
    assert pair.teacher_widths.tolist() == [0, 1, 1]


# --- built once, kept on disk


BUILDERS = {"shared": "_shared", "prefixes": "_prefixes", "projection": "_projection"}
kept_structures = pytest.mark.parametrize("name", BUILDERS)


@pytest.fixture
def builds(monkeypatch) -> Counter[str]:
    """How often each structure is built from now on."""
    count: Counter[str] = Counter()

    def counted(name, build):
        def counting(*args):
            count[name] += 1
            return build(*args)

        return counting

    for name, builder in BUILDERS.items():
        monkeypatch.setattr(vocabulary, builder, counted(name, getattr(vocabulary, builder)))
    return count


def small(added: str | None = None, stops: tuple[int, ...] = (0,), extra: int = 0) -> Case:
    """A pair that takes no time, the same at every call."""
    student, teacher = spelled_by([b"a", b" a", b"ab", b"\xc3"]), spelled_by([b"a", b"b", b"abab", b" "])
    if added:
        teacher.add_tokens([added])
    return Case(Side(student, len(student) + extra, stops), Side(teacher, len(teacher), (0,)))


def test_several_accesses_build_a_structure_once(builds, tmp_path):
    for cache_dir in (None, tmp_path):
        pair = pair_of(small(), cache_dir=cache_dir)
        builds.clear()
        for _ in range(3):
            assert pair.shared is pair.shared and pair.prefixes is pair.prefixes
            assert pair.projection is pair.projection and pair.spellings is pair.spellings
        assert builds == dict.fromkeys(BUILDERS, 1)


@kept_structures
def test_a_second_pair_with_the_same_cache_reads_what_the_first_built(name, builds, tmp_path):
    first = tensors(pair_of(small(), cache_dir=tmp_path / "new" / "folder"), name)
    assert builds[name] == 1
    second = tensors(pair_of(small(), cache_dir=tmp_path / "new" / "folder"), name)
    assert builds[name] == 1
    for one, other in zip(first, second, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ("a token more", {"added": "<more>"}),
        ("other stops", {"stops": (0, 2)}),
        ("no stops", {"stops": ()}),
        ("a longer head", {"extra": 1}),
    ],
)
@kept_structures
def test_another_pair_gets_another_file(name, change, other, builds, tmp_path):
    getattr(pair_of(small(), cache_dir=tmp_path), name)
    changed = tensors(pair_of(small(**other), cache_dir=tmp_path), name)
    assert builds[name] == 2, change
    assert len(list(tmp_path.iterdir())) == 2
    for kept, built in zip(changed, tensors(pair_of(small(**other)), name), strict=True):
        assert torch.equal(kept, built)


def test_a_teacher_that_writes_the_same_tokens_otherwise_gets_another_file(builds, tmp_path):
    """The projection depends on how it encodes, which the bytes of its tokens do not tell."""
    case = small()
    tensors(pair_of(case, cache_dir=tmp_path), "projection")
    backend = Tokenizer.from_str(case.teacher.tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="the end")
    assert token_bytes(other) == token_bytes(case.teacher.tokenizer)
    tensors(pair_of(Case(case.student, Side(other, case.teacher.size, (0,))), cache_dir=tmp_path), "projection")
    assert builds["projection"] == 2


def test_a_tokenizer_that_has_been_used_for_padded_batches_still_finds_its_file(builds, tmp_path):
    """Padding and truncation are a state of the tokenizers library's object."""
    case = toys("byte-level", "byte-level, single digits")
    fresh, used = (
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(case.teacher.tokenizer.backend_tokenizer.to_str()),
            eos_token="<|end|>",
            pad_token="<|end|>",
        )
        for _ in range(2)
    )
    token_bytes(used)
    used(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    for teacher in (fresh, used):
        tensors(pair_of(Case(case.student, Side(teacher, case.teacher.size, (0,))), cache_dir=tmp_path), "shared")
    assert builds["shared"] == 1


@pytest.mark.parametrize("damage", ["empty", "one byte", "half", "all but one byte", "no archive", "a field missing"])
@kept_structures
def test_a_damaged_file_is_built_anew(name, damage, builds, tmp_path):
    expected = tensors(pair_of(small(), cache_dir=tmp_path), name)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    if damage == "a field missing":
        with np.load(path) as kept:
            kept = dict(kept)
        np.savez(path, **dict(list(kept.items())[1:]))
    else:
        length = {"empty": 0, "one byte": 1, "half": len(data) // 2, "all but one byte": len(data) - 1}
        path.write_bytes(b"not an archive" if damage == "no archive" else data[: length[damage]])
    for _ in range(2):
        found = tensors(pair_of(small(), cache_dir=tmp_path), name)
        assert all(map(torch.equal, expected, found))
    assert builds[name] == 2  # the second time it is whole again
    assert list(tmp_path.iterdir()) == [path]


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=100, deadline=None)
def test_a_flipped_bit_in_what_a_file_holds_is_noticed(kept_shared, at, bit):
    path, data, expected = kept_shared
    damaged = bytearray(data)
    damaged[int(at * data.index(b"PK\x01\x02"))] ^= 1 << bit  # before the archive's directory
    path.write_bytes(damaged)
    assert all(map(torch.equal, expected, tensors(pair_of(small(), cache_dir=path.parent), "shared")))


@pytest.fixture(scope="module")
def kept_shared(tmp_path_factory):
    """A file in the cache, what it holds, and the tensors that it stands for."""
    folder = tmp_path_factory.mktemp("cache")
    expected = tensors(pair_of(small(), cache_dir=folder), "shared")
    (path,) = folder.iterdir()
    return path, path.read_bytes(), expected


def test_pairs_that_build_and_write_at_once_leave_one_whole_file(monkeypatch, builds, tmp_path):
    """Each begins to write while the one before has its file half written."""
    expected, everyone, save = tensors(pair_of(small()), "prefixes"), [], np.savez
    builds.clear()

    def save_amid_others(path, **arrays):
        path.write_bytes(b"half a file")
        if builds["prefixes"] < 3:
            everyone.append(tensors(pair_of(small(), cache_dir=tmp_path), "prefixes"))
        save(path, **arrays)

    monkeypatch.setattr(np, "savez", save_amid_others)
    everyone.append(tensors(pair_of(small(), cache_dir=tmp_path), "prefixes"))
    assert builds["prefixes"] == len(everyone) == 3
    assert len(list(tmp_path.iterdir())) == 1
    everyone.append(tensors(pair_of(small(), cache_dir=tmp_path), "prefixes"))
    assert builds["prefixes"] == 3
    for found in everyone:
        assert all(map(torch.equal, expected, found))


def test_a_write_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    def full(path, **arrays):
        path.write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        tensors(pair_of(small(), cache_dir=tmp_path), "shared")
    assert not list(tmp_path.iterdir())


def test_a_kept_file_may_be_read_by_whoever_the_umask_lets(tmp_path):
    """A cache is shared by the people of a machine."""
    tensors(pair_of(small(), cache_dir=tmp_path), "shared")
    plain = tmp_path / "plain"
    plain.touch()
    (kept,) = tmp_path.glob("*.npz")
    assert oct(kept.stat().st_mode) == oct(plain.stat().st_mode)


# --- real vocabularies


# (student, rows, stops), (teacher, rows, stops)
SMALLER = ("smollm2-instruct", 49_152, (2, 0)), ("gpt2", 50_304, (50_256,))
LARGEST = ("llama-3.2", 128_256, (128_001, 128_009)), ("qwen2.5", 151_936, (151_643, 151_645))


@pytest.fixture(scope="module", params=[SMALLER, pytest.param(LARGEST, marks=pytest.mark.slow)], ids=["50k", "150k"])
def real(request, real_tokenizer, tmp_path_factory) -> SimpleNamespace:
    """`seconds` of each structure, `case` and `folder`."""
    case = Case(*(Side(real_tokenizer(name), size, stops) for name, size, stops in request.param))
    folder = tmp_path_factory.mktemp("real")
    seconds = {}
    case.__dict__["pair"] = pair_of(case, cache_dir=folder)
    for name in STRUCTURES:
        started = time.perf_counter()
        getattr(case.pair, name)
        seconds[name] = time.perf_counter() - started
    return SimpleNamespace(case=case, seconds=seconds, folder=folder)


def sample(side: Side, count: int, seed: int) -> list[int]:
    return random.Random(seed).sample(sorted(side.texts), count)


def test_real_vocabularies_share_the_texts_that_both_have(real, record_property):
    for name, seconds in real.seconds.items():
        record_property(f"seconds to build {name}", round(seconds, 2))
        print(f"{name}: {seconds:.2f} s")
    check_shared_sample(real.case)


def check_shared_sample(case: Case):
    """As `check_shared`, without a walk over all ids for each class."""
    shared, classes = case.pair.shared, shared_classes(case)
    expected = [[NO_TEXT] * case.student.size, [NO_TEXT] * case.teacher.size]
    found = [shared.student_class.tolist(), shared.teacher_class.tolist()]
    for ids in classes.values():
        number = found[0][ids[0][0]]
        for side in (0, 1):
            assert number == found[side][ids[side][0]]
            for token in ids[side]:
                expected[side][token] = number
    assert found == expected
    assert len(shared.student_ids) == len(classes) == len(set(shared.student_class.tolist())) - 1


def test_real_vocabularies_have_the_prefixes_found_by_trying_every_token(real):
    case = real.case
    longest = sorted(case.teacher.texts, key=lambda token: len(case.teacher.texts[token]))[-3:]
    check_entries(
        case, [*sample(case.teacher, 12, 1), *longest, case.teacher.stops[0], case.teacher.size - 1], every_byte=False
    )
    check_order(case)


def test_real_vocabularies_are_projected_as_the_teacher_writes_each_token(real):
    check_projected_rows(real.case)
    unshared = [
        token
        for token in sample(real.case.student, 1500, 2)
        if real.case.student.texts[token] not in real.case.teacher.ids
    ]
    assert len(unshared) > 50
    of_note = real.case.student.stops[0], real.case.student.size - 1
    check_projection(real.case, [*unshared[:80], *sample(real.case.student, 20, 3), *of_note])


def test_real_vocabularies_are_read_from_the_cache_the_second_time(real, builds):
    again = pair_of(real.case, cache_dir=real.folder)
    for name in BUILDERS:
        assert all(map(torch.equal, tensors(again, name), tensors(real.case.pair, name)))
        for _ in range(3):
            getattr(again, name)
    assert not builds
