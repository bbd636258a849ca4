"""Which tokens touch the characters that a gate calls wrong."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers_for_tests import byte_level, gemma_like, legacy_llama, unigram
from toys import student_tokenizer, teacher_tokenizer

from trl_ctopd.rollouts.rewards import Judges
from trl_ctopd.text.token_bytes import token_bytes


ARGS = SimpleNamespace(reward_weights=None)
TEXT = "What is 12 plus 5?\n 17 — naïve 北京, 🙂🙂 two and the sum; Ольга é"


def judges(tokenizer):
    return Judges(None, None, lambda **_: [], ARGS, tokenizer)


def encoded(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("make", [student_tokenizer, teacher_tokenizer])
@pytest.mark.parametrize("seed", range(5))
def test_a_token_touches_a_range_if_a_byte_of_it_is_in_the_bytes_of_the_characters(make, seed):
    rng, tokenizer = random.Random(seed), make()
    text = "".join(rng.choice(TEXT) for _ in range(60)).strip()
    ids, table = encoded(tokenizer, text), token_bytes(tokenizer)
    ranges = [sorted(rng.sample(range(len(text) + 1), 2)) for _ in range(3)]
    found = judges(tokenizer)._touching(ids, ranges)
    owner = [place for place, token in enumerate(ids) for _ in table[token]]  # the token of each byte
    owner = owner[len(owner) - len(text.encode()) :]
    wanted = set()
    for start, stop in ranges:
        begin = len(text[:start].encode())
        wanted |= set(owner[begin : begin + len(text[start:stop].encode())])
    assert set(np.flatnonzero(found).tolist()) == wanted


def test_the_text_is_decoded_once_however_long_it_is():
    tokenizer, calls = student_tokenizer(), []
    ids = encoded(tokenizer, TEXT * 40)
    own = judges(tokenizer)
    decode = own._text
    own._text = lambda ids: calls.append(len(ids)) or decode(ids)
    assert own._touching(ids, [(0, 3), (900, 950)]).sum() > 10
    assert calls == [len(ids)]


@pytest.mark.parametrize("make", [legacy_llama, gemma_like, unigram, byte_level])
def test_a_text_that_is_cut_within_a_character_loses_that_one_alone(make):
    """With byte fallback, `decode` loses all that are spelled in bytes beside it."""
    tokenizer, text = make(), "so: ቀቐበተነአከ"
    ids = encoded(tokenizer, text)
    own = judges(tokenizer)
    assert own._text(ids) == text
    cut = own._text(ids[:-1])
    assert cut == text[:-1] + "�"
    found = own._touching(ids[:-1], [(len(text) - 2, len(text) - 1)])
    assert 1 <= found.sum() < len(ids) / 2 and not found[0]


@pytest.mark.parametrize("make", [byte_level, gemma_like])
def test_functions_read_added_tokens_as_they_were_added(make):
    """A byte-level decoder takes "é" for the name of a byte."""
    tokenizer = copy.deepcopy(make())
    tokenizer.add_tokens(["<réponse>", "</réponse>"])
    tokenizer.add_special_tokens({"eos_token": "<fin é>"})
    text = "<réponse>two</réponse>"
    ids = encoded(tokenizer, text)
    assert judges(tokenizer)._text([*ids, tokenizer.eos_token_id]) == text


@pytest.mark.parametrize("make", [student_tokenizer, teacher_tokenizer])
def test_text_that_is_no_utf_8_has_its_tokens_found_by_what_they_decode_to(make):
    tokenizer = make()
    whole, broken = encoded(tokenizer, "one two"), encoded(tokenizer, "北")
    ids = [*whole, *broken[:-1], *encoded(tokenizer, "three")]
    own = judges(tokenizer)
    text = own._text(ids)
    assert "�" in text
    found = own._touching(ids, [(text.index("three"), len(text))])
    first = len(whole) + len(broken) - 1
    assert found[first + 1 :].all() and not found[: len(whole)].any()
