"""Which tokens of a completion its tokenizer would not have made of the text."""

import random

import numpy as np
import pytest
from tokenizers_for_tests import byte_level, metaspace_bpe
from toys import fix_rollouts, student_tokenizer

from trl_ctopd import token_bytes
from trl_ctopd.rollouts.spelling import other_spellings


TEXTS = ["What is 42 plus 94?\n\n the lazy dog", "def add(a, b):\n    return 96", "敏捷的棕色狐狸 hundred thousand été"]


def cut(text: bytes, rows: list[bytes], rng: random.Random) -> list[int]:
    """The text in any of the tokenizer's tokens."""
    ids = []
    while text:
        ids.append(rng.choice([v for v, row in enumerate(rows) if row and text.startswith(row)]))
        text = text[len(rows[ids[-1]]) :]
    return ids


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("text", TEXTS)
def test_a_token_is_another_spelling_where_the_texts_own_encoding_has_none_of_its_bytes_there(text, seed):
    tokenizer, rng = byte_level(400, digits=1), random.Random(seed)
    rows = token_bytes(tokenizer)
    ids = cut(text.encode(), rows, rng)
    [found] = other_spellings([ids], tokenizer)
    own = tokenizer.encode(text)
    begins = [sum(len(rows[token]) for token in own[:i]) for i in range(len(own))]
    for place, token in enumerate(ids):
        begin = sum(len(rows[before]) for before in ids[:place])
        same = [len(rows[other]) for other, at in zip(own, begins, strict=True) if at == begin] == [len(rows[token])]
        assert found[place] == (not same)
    assert found.any()


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_its_own_tokens_has_none_and_its_end_is_no_spelling(text):
    tokenizer = student_tokenizer()
    assert not other_spellings([[*tokenizer.encode(text), tokenizer.eos_token_id]], tokenizer)[0].any()


def test_text_on_both_sides_of_a_control_token_or_of_what_was_given_is_not_one_text():
    tokenizer = student_tokenizer()
    rows, eos = token_bytes(tokenizer), tokenizer.eos_token_id
    pair = next(row for row in rows if len(row) == 2 and row.isalpha() and len(tokenizer.encode(row.decode())) == 1)
    one, other = (rows.index(pair[i : i + 1]) for i in range(2))
    assert other_spellings([[one, other]], tokenizer)[0].all()
    assert not other_spellings([[one, eos, other]], tokenizer)[0].any()
    assert not other_spellings([[one, other, one]], tokenizer, [[(1, 2)]])[0].any()


def test_what_cannot_be_encoded_as_it_is_is_not_judged():
    tokenizer = byte_level(400, digits=1)
    rows = token_bytes(tokenizer)
    letters = [rows.index(letter.encode()) for letter in "the lazy dog"]
    assert other_spellings([letters], tokenizer)[0].any()
    assert not other_spellings([[rows.index(b"\xff"), *letters], [], [10**6]], tokenizer)[0].any()
    with_prefix = metaspace_bpe()
    assert not other_spellings([with_prefix.encode(" the dog", add_special_tokens=False)], with_prefix)[0].any()


def test_the_share_is_logged_and_each_row_has_its_marks_in_its_own_place(build):
    def letter_by_letter(trainer, rows):
        write, tokenizer = fix_rollouts(trainer).rollouts.write, trainer.processing_class
        table = token_bytes(tokenizer)
        by_bytes = {row: token for token, row in reversed(list(enumerate(table)))}

        def spelled(number, ids):
            if number not in rows:
                return ids
            return [one for token in ids for one in ([by_bytes[bytes([b])] for b in table[token]] or [token])]

        trainer.rollouts.write = lambda *given: [(spelled(n, ids), None) for n, (ids, _) in enumerate(write(*given))]
        return trainer

    settings = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", "length_grouped": False}
    none, some = (letter_by_letter(build(**settings), rows) for rows in ((), (1, 3)))
    for trainer in (none, some):
        trainer.train()
    assert none.state.log_history[0]["spelling/other_fraction"] == 0
    assert 0 < some.state.log_history[0]["spelling/other_fraction"] < 1
    prompts = some.data_collator(list(some.train_dataset))["prompts"][:4]
    [batch] = some._roll_out(some.model, [prompts], "train")
    assert np.array_equal(batch["other_spelling"].any(1), [False, True, False, True])
    wrong = letter_by_letter(build(teacher_gate=lambda prompts, **_: [False] * len(prompts), **settings), (1, 3))
    prompts = wrong.data_collator(list(wrong.train_dataset))["prompts"][:4]
    [batch] = wrong._roll_out(wrong.model, [prompts], "train")
    assert not batch["other_spelling"].any()  # none of them takes part
