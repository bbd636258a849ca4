"""Gap and share of every token, against loops over dictionaries in Python floats."""

import math

import pytest
import torch
from chunk_rows import BAD, as_tensors, by_chunk, random_rows, reference_budgets, reference_shares

from trl_ctopd.losses.credit import CREDITS, chunk_sum, closing, gaps, previous_gaps, shares, spread


SHARED = [credit for credit in CREDITS if credit not in ("macro", "previous")]


def share_of(credit, log_probs, chunks=None, widths=None, dtype=torch.float32):
    """Shares of one row as a list."""
    chunks = [0] * len(log_probs) if chunks is None else chunks
    widths = [1] * len(log_probs) if widths is None else widths
    tensors = torch.tensor([log_probs], dtype=dtype), torch.tensor([chunks]), torch.tensor([widths])
    return shares(credit, *tensors, max(1, max(chunks) + 1))[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.long])
def test_chunk_sum_adds_each_chunks_tokens_and_no_other(dtype):
    generator = torch.Generator().manual_seed(0)
    chunks = torch.randint(-1, 5, (4, 17), generator=generator)
    values = torch.randint(-50, 50, (4, 17), generator=generator).to(dtype)
    sums = chunk_sum(values, chunks, 6)
    assert sums.dtype == dtype
    for row in range(4):
        for chunk in range(6):
            inside = [values[row, i].item() for i in range(17) if chunks[row, i] == chunk]
            assert sums[row, chunk] == sum(inside)


@pytest.mark.parametrize("bad", BAD)
def test_a_token_without_part_adds_nothing_whatever_its_value_and_gets_no_gradient(bad):
    values = torch.tensor([[1.0, bad, 2.0, bad]], requires_grad=True)
    chunk_sum(values, torch.tensor([[0, -1, 1, -1]]), 2).sum().backward()
    assert chunk_sum(values, torch.tensor([[0, -1, 1, -1]]), 2).tolist() == [[1.0, 2.0]]
    assert values.grad.tolist() == [[1.0, 0.0, 1.0, 0.0]]


def test_spread_gives_each_token_its_own_chunks_value_and_zero_without_part():
    per_chunk = torch.tensor([[5.0, 7.0], [math.nan, 3.0]])
    chunks = torch.tensor([[1, -1, 0, 0], [-1, 1, -1, 1]])
    assert spread(per_chunk, chunks).tolist() == [[7.0, 0.0, 5.0, 5.0], [0.0, 3.0, 0.0, 3.0]]


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("seed", range(5))
def test_shares_equal_a_loop_over_chunks(credit, seed):
    rows = random_rows(seed)
    log_probs, _, chunks, _, widths, num_chunks = as_tensors(rows)
    result = shares(credit, log_probs, chunks, widths, num_chunks)
    for row, (student, _) in enumerate(rows):
        assert result[row, : len(student)].tolist() == pytest.approx(reference_shares(credit, student), abs=1e-14)
        assert not result[row, len(student) :].any()


@pytest.mark.parametrize("credit", SHARED)
def test_shares_of_a_chunk_add_up_to_one_and_none_is_negative(credit):
    log_probs, _, chunks, _, widths, num_chunks = as_tensors(random_rows(7), torch.float32)
    result = shares(credit, log_probs, chunks, widths, num_chunks)
    totals, sizes = chunk_sum(result, chunks, num_chunks), chunk_sum(torch.ones_like(result), chunks, num_chunks)
    assert result.min() >= 0
    assert torch.equal(totals > 0, sizes > 0)
    assert (totals[sizes > 0] - 1).abs().max() < 3e-7


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("log_prob", [-2.5, -1e-7, 0.0, 1e-7, -80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_of_one_token_gives_it_all_exactly(credit, log_prob, dtype):
    assert share_of(credit, [log_prob], widths=[0], dtype=dtype) == [1.0]


def test_the_papers_target_spends_the_teachers_budget_in_the_students_shape():
    log_probs = [-1.0, -3.0]
    assert share_of("semantic", log_probs) == [0.25, 0.75]
    teacher_budget = -6.0  # L_S = -4: log q̂_i = 1.5 log p_i
    advantages = [(teacher_budget + 4.0) * share for share in share_of("semantic", log_probs)]
    assert [p + a for p, a in zip(log_probs, advantages, strict=True)] == [1.5 * p for p in log_probs]


def test_a_chunk_the_student_is_certain_of_is_shared_evenly():
    assert share_of("semantic", [0.0, 0.0, 0.0, 0.0]) == [0.25] * 4
    assert share_of("semantic", [1e-7, 1e-7]) == [0.5, 0.5]  # rounding above zero


def test_a_log_prob_that_rounding_left_above_zero_takes_no_share():
    assert share_of("semantic", [1e-7, -1e-7]) == [0.0, 1.0]
    assert share_of("semantic", [1e-7, -2.0, -2.0]) == [0.0, 0.5, 0.5]


def test_byte_length_gives_nothing_to_a_token_without_bytes_unless_none_has_any():
    assert share_of("byte_length", [-1.0, -1.0, -1.0], widths=[0, 3, 1]) == [0.0, 0.75, 0.25]
    assert share_of("byte_length", [-1.0, -5.0], widths=[0, 0]) == [0.5, 0.5]


def test_last_is_the_last_token_that_takes_part():
    assert share_of("last", [-1.0] * 6, chunks=[0, 0, -1, 1, 1, -1]) == [0, 1, 0, 0, 1, 0]
    assert share_of("last", [-1.0] * 4, chunks=[-1, 0, -1, 0]) == [0, 0, 0, 1]
    assert share_of("last", [-1.0] * 3, chunks=[-1, -1, -1]) == [0, 0, 0]


@pytest.mark.parametrize("credit", CREDITS)
def test_a_masked_token_within_a_chunk_changes_no_other_tokens_share(credit):
    with_it = share_of(credit, [-1.0, -9.0, -3.0], chunks=[0, -1, 0], widths=[1, 7, 2])
    assert with_it[1] == 0
    assert [with_it[0], with_it[2]] == share_of(credit, [-1.0, -3.0], widths=[1, 2])


@pytest.mark.parametrize("seed", range(5))
def test_gaps_are_teacher_budget_minus_student_budget(seed):
    rows = random_rows(seed)
    student, teacher, student_chunks, teacher_chunks, _, num_chunks = as_tensors(rows)
    gap, neutral = gaps(student, teacher, student_chunks, teacher_chunks, num_chunks)
    assert not neutral.any()
    for row, sides in enumerate(rows):
        ours, theirs = map(reference_budgets, sides)
        for chunk in range(num_chunks):
            assert gap[row, chunk].item() == pytest.approx(theirs.get(chunk, 0) - ours.get(chunk, 0), abs=1e-12)


def test_a_gap_is_positive_where_the_teacher_likes_the_text_more():
    zeros = torch.zeros(1, 1, dtype=torch.long)
    gap, _ = gaps(torch.tensor([[-3.0]]), torch.tensor([[-1.0]]), zeros, zeros, 1)
    assert gap.item() == 2.0


@pytest.mark.parametrize("bad", [*BAD, (math.inf, -math.inf)])
def test_a_budget_that_is_not_finite_neutralises_its_chunk_and_no_other(bad):
    teacher = torch.tensor([[-1.0, -2.0, -4.0, -8.0], [-1.0, -2.0, -4.0, -8.0]])
    clean = teacher.clone()
    teacher[0, 1:3] = torch.tensor(bad)
    student_chunks, teacher_chunks = torch.tensor([[0, 1, 2]] * 2), torch.tensor([[0, 1, 1, 2]] * 2)
    student = torch.full((2, 3), -0.5)
    gap, neutral = gaps(student, teacher, student_chunks, teacher_chunks, 3)
    expected, _ = gaps(student, clean, student_chunks, teacher_chunks, 3)
    assert neutral.tolist() == [[False, True, False], [False, False, False]]
    assert gap[0].tolist() == [expected[0, 0], 0.0, expected[0, 2]]
    assert torch.equal(gap[1], expected[1])


def test_an_unknown_credit_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match="'fair'.*semantic.*uniform.*byte_length.*last.*macro"):
        share_of("fair", [-1.0])


@pytest.mark.parametrize("seed", range(4))
def test_closing_is_read_where_a_chunk_begins_and_right_after_it_ends(seed):
    rows = random_rows(seed)
    _, _, chunks, _, _, num_chunks = as_tensors(rows)
    generator = torch.Generator().manual_seed(seed)
    close = -torch.rand(chunks.shape, generator=generator, dtype=torch.float64)
    before, after = closing(close, chunks, num_chunks)
    for row, (student, _) in enumerate(rows):
        inside = by_chunk(student)
        for chunk in range(num_chunks):
            first, last = (min(inside[chunk]), max(inside[chunk])) if inside.get(chunk) else (None, None)
            expected = 0.0 if first is None else close[row, first].item()
            assert before[row, chunk].item() == expected
            beyond = last is None or last + 1 == chunks.shape[1]
            assert after[row, chunk].item() == (0.0 if beyond else close[row, last + 1].item())


@pytest.mark.parametrize("seed", range(4))
def test_closed_gaps_add_up_to_the_open_ones_where_chunks_follow_each_other(seed):
    rows = [tuple([token for token in side if token[1] >= 0] for side in row) for row in random_rows(seed)]
    tensors = as_tensors(rows)
    student, teacher, chunks, teacher_chunks, _, num_chunks = tensors
    close = -torch.rand(chunks.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close[:, 0] = 0  # nothing is open before a text
    close = close.masked_fill(chunks < 0, 0)
    openly, _ = gaps(student, teacher, chunks, teacher_chunks, num_chunks)
    closed, _ = gaps(student, teacher, chunks, teacher_chunks, num_chunks, close)
    assert (openly - closed).abs().max() > 0.01
    torch.testing.assert_close(closed.sum(1), openly.sum(1))


@pytest.mark.parametrize("seed", range(4))
def test_a_chunks_first_token_alone_answers_for_the_chunk_that_ends_right_before_it(seed):
    rows = random_rows(seed)
    student, teacher, chunks, teacher_chunks, _, num_chunks = as_tensors(rows)
    gap, _ = gaps(student, teacher, chunks, teacher_chunks, num_chunks)
    found = previous_gaps(gap, chunks, num_chunks)
    expected = torch.zeros_like(found)
    for row, (tokens, _) in enumerate(rows):
        inside = by_chunk(tokens)
        for own in inside.values():
            for other, before in inside.items():
                if max(before) + 1 == min(own):
                    expected[row, min(own)] = gap[row, other]
    torch.testing.assert_close(found, expected)
