"""The demo's task and its two tokenizers, before any training."""

import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from demo import from_nothing, models, run, task, toy_tokenizers

from trl_ctopd import align_text, token_bytes
from trl_ctopd.losses import DPCA, ScoredChunks
from trl_ctopd.losses.credit import gaps
from trl_ctopd.text.chat import Speaker


@pytest.fixture(scope="module")
def amounts():
    rng = random.Random(0)
    return [task.draw(rng) for _ in range(2000)]


@pytest.fixture(scope="module")
def teacher_tokenizer(amounts):
    return toy_tokenizers.build_teacher_tokenizer(amounts)


@pytest.fixture(scope="module")
def student_tokenizer(amounts):
    return toy_tokenizers.build_student_tokenizer(amounts)


@pytest.fixture(scope="module")
def alignments(amounts, student_tokenizer, teacher_tokenizer):
    rng = random.Random(1)
    texts = [task.answer(amount, childishness, rng) for amount in amounts[:200] for childishness in (0, 1)]
    ids = [student_tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return texts, [align_text(row, student_tokenizer, teacher_tokenizer) for row in ids]


def test_amounts_are_written_as_on_a_cheque():
    assert task.amount_in_words(41253) == "four hundred twelve euros and fifty-three cents"
    assert task.amount_in_words(101) == "one euro and one cent"
    assert task.amount_in_words(90010) == "nine hundred euros and ten cents"
    assert task.answer(1240) == "12 euros + 40 cents → twelve euros and forty cents"


def test_different_amounts_are_written_differently():
    assert len({task.in_words(number) for number in range(1000)}) == 1000


def test_only_the_right_words_are_right():
    right = task.answer(1240)
    assert task.is_right(1240, right)
    assert task.is_right(1240, "14 euros → 12 euros → twelve euros and forty cents")  # the working isn't graded
    for wrong in ("", task.answer(1241), right + " ", right.replace("forty", "fourty"), right.partition(task.ARROW)[0]):
        assert not task.is_right(1240, wrong)


def test_childish_answers_are_wrong_exactly_where_a_word_is_irregular(amounts):
    rng = random.Random(0)
    for amount in amounts:
        irregular = any(word in task.amount_in_words(amount) for word in task.CHILDISH)
        assert task.is_right(amount, task.answer(amount, 1.0, rng)) == (not irregular)


def test_a_student_of_children_starts_between_a_quarter_and_a_half(amounts):
    """What greedy decoding makes of answers that are mostly childish."""
    assert 0.25 < task.share_right(amounts, [task.answer(amount, 1.0, random.Random(0)) for amount in amounts]) < 0.5


def test_held_out_amounts_are_never_drawn_again():
    rng = random.Random(0)
    held_out = task.draw_different(600, rng)
    assert len(set(held_out)) == 600
    assert not set(held_out) & {task.draw(rng, held_out) for _ in range(2000)}


def test_both_tokenizers_spell_every_answer(alignments, student_tokenizer, teacher_tokenizer):
    for text, alignment in zip(*alignments, strict=True):
        assert alignment.text == text == b"".join(alignment.chunk_bytes).decode()
        assert not alignment.masked
        assert (
            student_tokenizer.decode(alignment.student_ids) == teacher_tokenizer.decode(alignment.teacher_ids) == text
        )


def test_chunks_have_several_tokens_on_either_side_and_on_both(alignments):
    """Student tokens by teacher tokens: many to one, one to many, and many to many where neither cuts as the other."""
    sizes = Counter()
    for alignment in alignments[1]:
        student, teacher = Counter(alignment.student_chunks), Counter(alignment.teacher_chunks)
        sizes.update((student[chunk], teacher[chunk]) for chunk in range(len(alignment.chunk_bytes)))
    total = sizes.total()
    assert sum(count for (m, _), count in sizes.items() if m > 1) > 0.3 * total
    assert sum(count for (_, k), count in sizes.items() if k > 1) > 0.1 * total
    assert sum(count for (m, k), count in sizes.items() if m > 1 and k > 1) > 0.03 * total


def test_most_tokens_of_several_bytes_are_one_sides_own(student_tokenizer, teacher_tokenizer):
    student, teacher = ({row for row in token_bytes(t) if len(row) > 1} for t in (student_tokenizer, teacher_tokenizer))
    assert len(student & teacher) < 0.5 * min(len(student), len(teacher))


def test_numbers_and_symbols_are_cut_differently(student_tokenizer, teacher_tokenizer):
    assert student_tokenizer.tokenize("412→") == ["4", "1", "2", "<0xE2>", "<0x86>", "<0x92>"]
    assert teacher_tokenizer.tokenize("412") == ["4", "12"]
    assert len(teacher_tokenizer.tokenize(" €")) == len(teacher_tokenizer.tokenize(" →")) == 1


def test_chat_templates_share_no_marker(student_tokenizer, teacher_tokenizer):
    student, teacher = (
        t.apply_chat_template(task.as_messages(41253), add_generation_prompt=True, tokenize=False)
        for t in (student_tokenizer, teacher_tokenizer)
    )
    assert student == "<s><|user|>\nWrite €412.53 in words.<|end|>\n<|assistant|>\n"
    assert teacher == "<|im_start|>user\nWrite €412.53 in words.<|im_end|>\n<|im_start|>assistant\n"


def test_each_turn_ends_with_the_eos_token_that_pretraining_teaches(student_tokenizer, teacher_tokenizer):
    for tokenizer, spelling in ((student_tokenizer, "<|end|>"), (teacher_tokenizer, "<|im_end|>")):
        assert tokenizer.convert_ids_to_tokens(Speaker(tokenizer).turn_end) == [spelling] == [tokenizer.eos_token]


def test_pretraining_learns_the_answer_and_the_end_alone(student_tokenizer):
    amounts = [102, 41253]
    answers = [task.answer(amount) for amount in amounts]
    examples = [(task.question(amount), "", answer) for amount, answer in zip(amounts, answers, strict=True)]
    batch = from_nothing.as_batch(student_tokenizer, examples)
    for row, amount in enumerate(amounts):
        learned = batch["labels"][row][batch["labels"][row] != -100]
        assert student_tokenizer.decode(learned) == answers[row] + "<|end|>"
        read = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        assert read.tolist() == models.prompt_ids(student_tokenizer, amount) + learned.tolist()


def scored(generator):
    """Two rows of scored chunks, the second a chunk shorter."""
    return ScoredChunks(
        student_log_probs=(-torch.rand(2, 4, generator=generator)).requires_grad_(),
        teacher_log_probs=-torch.rand(2, 3, generator=generator),
        student_chunks=torch.tensor([[0, 0, 1, 2], [0, 1, 1, -1]]),
        teacher_chunks=torch.tensor([[0, 1, 2], [0, 1, -1]]),
        student_widths=torch.ones(2, 4, dtype=torch.long),
        num_chunks=3,
    )


def advantages(loss, batch):
    """With a ratio of 1, each token's gradient is minus its advantage, over N."""
    return -torch.autograd.grad(loss(batch, 1)[0], batch.student_log_probs)[0]


def test_the_control_hands_the_same_gaps_to_other_chunks():
    torch.manual_seed(0)
    batch = scored(torch.Generator().manual_seed(0))
    is_chunk = torch.tensor([[True, True, True], [True, True, False]])
    own, shuffled = (
        batch.student_sum(advantages(loss, batch)) / batch.student_tokens.clamp(min=1)  # each token has its chunk's gap
        for loss in (DPCA("macro", event="open"), run.dpca_with_shuffled_gaps)
    )
    assert not torch.allclose(shuffled, own, atol=1e-3)
    torch.testing.assert_close(shuffled[is_chunk].sort().values, own[is_chunk].sort().values)
    assert (shuffled[~is_chunk] == 0).all()


def test_the_control_is_dpca_where_there_is_one_chunk_to_shuffle():
    batch = scored(torch.Generator().manual_seed(0))
    batch = replace(batch, student_chunks=batch.student_chunks.clone(), teacher_chunks=batch.teacher_chunks.clone())
    batch.student_chunks[:] = torch.tensor([[0, 0, 0, -1], [-1, -1, -1, -1]])
    batch.teacher_chunks[:] = torch.tensor([[0, 0, -1], [-1, -1, -1]])
    gap, _ = gaps(
        batch.student_log_probs.detach(), batch.teacher_log_probs, batch.student_chunks, batch.teacher_chunks, 3
    )
    torch.testing.assert_close(
        advantages(run.dpca_with_shuffled_gaps, batch), advantages(DPCA("macro", event="open"), batch)
    )
    torch.testing.assert_close(advantages(DPCA("macro", event="open"), batch)[0, :3], gap[0, 0].expand(3))
