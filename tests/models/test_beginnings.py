"""Which texts begin alike, and are worth reading together."""

import random

import pytest

from trl_ctopd.models.beginnings import begin_alike, families


def test_with_how_many_tokens_two_texts_begin_alike():
    assert begin_alike((1, 2, 3), (1, 2, 4)) == 2
    assert begin_alike((1, 2), [1, 2, 4]) == 2
    assert begin_alike((), (1,)) == begin_alike((2,), (1,)) == 0


@pytest.mark.parametrize("seed", range(50))
def test_a_family_shares_its_beginning_goes_on_after_it_and_saves_more_than_a_call(seed):
    draw = random.Random(seed)
    texts, worth = {(draw.randrange(3),)}, draw.choice([0, 1, 5, 20])
    while len(texts) < 12:
        own = draw.choice(sorted(texts))
        texts.add(own[: draw.randint(0, len(own))] + tuple(draw.randrange(3) for _ in range(draw.randint(1, 6))))
    texts, seen = sorted(texts), set()
    for places, length in families(texts, worth):
        assert len({texts[place][:length] for place in places}) == 1
        assert all(len(texts[place]) > length for place in places)
        assert (len(places) - 1) * length > worth
        assert not seen & {*places}
        seen |= {*places}


def test_texts_of_two_kinds_are_two_families_and_what_is_like_none_is_left_out():
    texts = sorted([(1, *range(50), n) for n in range(3)] + [(2, *range(20), n) for n in range(4)] + [(3,), (1, 7, 7)])
    assert [(len(places), length) for places, length in families(texts, 16)] == [(3, 51), (4, 21)]
    assert [(len(places), length) for places, length in families(texts, 70)] == [(3, 51)]
    assert families(texts, 200) == families(texts[:1], 0) == families([], 0) == []
