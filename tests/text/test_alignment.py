"""The vectorised intersection against two pointers walked one boundary at a time."""

import itertools
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from two_pointers import Text, Token, two_pointers

from trl_ctopd.text.chunks import Side, synchronized_chunks


def vectorised(texts: list[Text]):
    """`synchronized_chunks` on a batch, as one answer a text in the reference's form."""
    lengths = np.array([text[2] for text in texts], dtype=np.int64)
    bases = [0, *itertools.accumulate(lengths.tolist())]
    sides = [
        Side(
            np.array([base + end for base, text in zip(bases, texts, strict=False) for _, end in text[side]], np.int64),
            np.array([end - start for text in texts for start, end in text[side]], dtype=np.int64),
            np.array([len(text[side]) for text in texts], dtype=np.int64),
        )
        for side in (0, 1)
    ]
    masked = [(base + start, base + end) for base, text in zip(bases, texts, strict=False) for start, end in text[3]]
    chunks = synchronized_chunks(*sides, lengths, np.array(masked, dtype=np.int64).reshape(-1, 2))
    intervals = zip(chunks.start.tolist(), chunks.end.tolist(), strict=True)
    numbers = [iter(numbers.tolist()) for numbers in (chunks.student, chunks.teacher)]
    answers = [
        (
            list(itertools.islice(intervals, count)),
            *(list(itertools.islice(own, len(text[side]))) for side, own in enumerate(numbers)),
        )
        for text, count in zip(texts, chunks.counts.tolist(), strict=True)
    ]
    assert not [*intervals, *itertools.chain(*numbers)]
    return answers


@st.composite
def sides(draw, length: int, masked: list[Token]) -> list[Token]:
    """Tokens that tile the text, some without width; masked ones may be missing."""
    ends = sorted(draw(st.lists(st.integers(0, length), max_size=12)) + ([length] if length else []))
    tokens = list(pairwise([0, *ends]))
    missing = [
        any(low <= start and end <= high for low, high in masked) and draw(st.booleans()) for start, end in tokens
    ]
    return [token for token, gone in zip(tokens, missing, strict=True) if not gone]


@st.composite
def batches(draw) -> list[Text]:
    texts = []
    for _ in range(draw(st.integers(0, 5))):
        length = draw(st.integers(0, 16))
        bounds = draw(st.lists(st.tuples(st.integers(0, length), st.integers(0, length)), max_size=3))
        masked = [(min(pair), max(pair)) for pair in bounds if pair[0] != pair[1]]
        texts.append((draw(sides(length, masked)), draw(sides(length, masked)), length, masked))
    return texts


@settings(max_examples=200, deadline=None)
@given(batches())
def test_a_batch_gives_what_two_pointers_give_text_by_text(texts):
    assert vectorised(texts) == [two_pointers(*text) for text in texts]


def test_chunks_are_the_intervals_between_neighbouring_shared_boundaries():
    student, teacher = [(0, 3), (3, 5), (5, 9)], [(0, 1), (1, 5), (5, 7), (7, 9)]
    assert vectorised([(student, teacher, 9, [])]) == [([(0, 5), (5, 9)], [0, 0, 1], [0, 0, 1, 1])]


def test_a_token_without_width_belongs_to_the_chunk_that_follows_it():
    student, teacher = [(0, 2), (2, 4)], [(0, 0), (0, 2), (2, 2), (2, 4)]
    assert vectorised([(student, teacher, 4, [])]) == [([(0, 2), (2, 4)], [0, 1], [0, 0, 1, 1])]


def test_a_token_without_width_takes_no_part_at_the_end_of_a_text_or_before_a_masked_one():
    end = ([(0, 2), (2, 2)], [(0, 2)], 2, [])
    before_masked = ([(0, 0), (0, 2), (2, 4)], [(0, 2), (2, 4)], 4, [(0, 2)])
    assert vectorised([end, before_masked]) == [([(0, 2)], [0, -1], [0]), ([(2, 4)], [-1, -1, 0], [-1, 0])]


def test_a_boundary_inside_a_masked_stretch_is_none_and_its_edges_are():
    tokens = [(0, 2), (2, 4), (4, 6)]
    ((chunks, student, _),) = vectorised([(tokens, tokens, 6, [(1, 3)])])
    assert chunks == [(4, 6)] and student == [-1, -1, 0]
    ((chunks, student, _),) = vectorised([(tokens, tokens, 6, [(2, 4)])])
    assert chunks == [(0, 2), (4, 6)] and student == [0, -1, 1]


def test_texts_without_tokens_and_empty_batches_have_no_chunks():
    assert vectorised([]) == []
    assert vectorised([([], [], 0, []), ([(0, 1)], [(0, 1)], 1, []), ([], [], 0, [])]) == [
        ([], [], []),
        ([(0, 1)], [0], [0]),
        ([], [], []),
    ]
