"""What goes on after a teacher's token, against what the teacher's tokenizer makes of the whole text."""

import json
import random

import pytest
from needs import assets, tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers_for_tests import CORPUS, byte_level, gemma_like, metaspace_bpe, unigram, word_piece
from transformers import PreTrainedTokenizerFast

from trl_ctopd import token_bytes
from trl_ctopd.text import continuations as module
from trl_ctopd.text.aligner import encode_as_text
from trl_ctopd.text.continuations import Continuations, later_digits_undo


def encoded(tokenizer, texts):
    return [tokens.ids for tokens in encode_as_text(tokenizer, texts)]


def contexts(tokenizer, texts, count, rng):
    """(text before, the teacher's last token of it), where that is what the tokenizer makes of the text before alone."""
    rows, found = token_bytes(tokenizer), []
    for text in texts:
        [ids] = encoded(tokenizer, [text])
        for end in rng.sample(range(1, len(ids)), min(count, len(ids) - 1)):
            before = b"".join(rows[i] for i in ids[:end]).decode(errors="replace")
            before = before[1:] if before.startswith(" ") and not text.startswith(" ") else before
            if encoded(tokenizer, [before]) == [ids[:end]] and text.startswith(before):
                found.append((before, ids[end - 1]))
    return found


def disagreements(student, teacher, texts, count=4, tried=40, seed=0):
    """(how many questions, those that the table answers wrongly): half of them about tokens that go on, by the table."""
    rng, rows = random.Random(seed), token_bytes(student)
    table = Continuations(student, teacher)
    readable = [i for i, row in enumerate(rows) if row and row.decode(errors="ignore").encode() == row]
    asked, wrong = 0, []
    for before, token in contexts(teacher, texts, count, rng):
        going_on = set(table.of(token).tolist())
        some = [i for i in readable if i in going_on]
        chosen = rng.sample(some, min(tried, len(some))) + rng.sample(readable, min(tried, len(readable)))
        [base] = encoded(teacher, [before])
        longer = encoded(teacher, [before + rows[i].decode() for i in chosen])
        for i, ids in zip(chosen, longer, strict=True):
            asked += 1
            if (ids[: len(base)] != base) != (i in going_on):
                wrong.append((before[-12:], token_bytes(teacher)[token], rows[i], i in going_on))
    return asked, wrong


WORDS = CORPUS[:6]
TOYS = {
    "byte-level BPE": byte_level(600),
    "byte-level BPE, three digits": byte_level(600, digits=3),
    "SentencePiece-like BPE": metaspace_bpe(),
    "Gemma-like BPE": gemma_like(),
}


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("student", [byte_level(330), byte_level(600, digits=1)], ids=["pieces", "words"])
def test_of_bpe_the_table_says_what_the_tokenizer_makes_of_the_whole_text(name, student):
    asked, wrong = disagreements(student, TOYS[name], WORDS)
    assert asked > 300
    assert not wrong


@pytest.mark.parametrize("teacher", [unigram(), word_piece()], ids=["Unigram", "WordPiece"])
def test_of_other_families_it_does_but_for_a_few_that_hang_on_the_text_before(teacher):
    words = ["quickbrown", "foxjumps", "overlazy", "dogtimes", "thedoesn", "carequick", "printadd"]
    asked, wrong = disagreements(byte_level(330), teacher, words, 9)
    assert asked > 200
    assert len(wrong) <= 0.05 * asked  # a letter that WordPiece has no piece for takes its whole word


PAIRS = [
    ("smollm2-instruct", "gpt2"),
    *(
        pytest.param(*pair, marks=pytest.mark.slow)
        for pair in (
            ("smollm2-instruct", "llama-3.2"),
            ("qwen2.5", "deepseek-v3"),
            ("llama-3.2", "mistral-v3"),
            ("smollm2-instruct", "qwen2.5"),
        )
    ),
]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_of_published_tokenizers_it_says_what_they_make_of_real_text(student, teacher):
    folder = assets()
    lines = (folder / "datasets/gsm8k/test.jsonl").read_text().splitlines()[:12]
    code = (folder / "datasets/mbpp/mbpp.jsonl").read_text().splitlines()[:6]
    texts = [json.loads(line)["answer"] for line in lines] + [json.loads(line)["code"] for line in code]
    student, teacher = tokenizer(student), tokenizer(teacher)
    asked, wrong = disagreements(student, teacher, texts, 4, 20)
    assert asked > 1000
    assert len(wrong) <= 0.003 * asked, wrong[:10]


def test_digits_go_on_while_the_teacher_takes_three_at_a_time():
    teacher = byte_level(600, digits=3)
    student = byte_level(330, digits=1)
    table, rows = Continuations(student, teacher), token_bytes(student)
    ids = {row: i for i, row in enumerate(token_bytes(teacher)) if row}
    digits = {i for i, row in enumerate(rows) if row.isdigit()}
    known = [row for row in ids if row.isdigit() and len(row) == 3]
    assert known
    for number in known:
        assert digits.isdisjoint(table.of(ids[number]).tolist())
    start = known[0][:2]
    if start in ids:
        going_on = {rows[i] for i in table.of(ids[start]).tolist()}
        assert {row[2:] for row in known if row[:2] == start} <= going_on


def numbers_by_merges(*merges: tuple[str, str]) -> PreTrainedTokenizerFast:
    """BPE of digits alone."""
    tokens = [*"0123456789", *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, list(merges)))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


THREE_DIGITS = byte_level(600, digits=3)
NUMBERS = {
    "123 is 1 and 23": (numbers_by_merges(("2", "3"), ("1", "2")), True),
    "123 is 12 and 3": (numbers_by_merges(("1", "2"), ("2", "3")), False),
    "1234 is 12 and 34": (numbers_by_merges(("1", "2"), ("3", "4")), False),
    "123 is one token": (numbers_by_merges(("1", "2"), ("12", "3")), False),
    "groups of three": (THREE_DIGITS, False),
    "no numbers": (byte_level(600, digits=1), False),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_whether_a_later_digit_undoes_what_the_next_one_decided(name):
    teacher, undone = NUMBERS[name]
    table, rows = Continuations(byte_level(330, digits=1), teacher), token_bytes(teacher)
    assert table.later_digits_undo == undone
    assert table.undecided(rows.index(b"7")) == undone
    assert not table.undecided(len(rows) + 5)
    assert b"e" not in rows or not table.undecided(rows.index(b"e"))


@pytest.mark.parametrize(("name", "undone"), [("gpt2", True), ("llama-3.2", False), ("qwen2.5", False)])
def test_of_published_tokenizers_gpt2s_is_one_of_them(name, undone):
    assert later_digits_undo(tokenizer(name)) == undone


def test_what_stands_for_no_text_neither_goes_on_nor_is_gone_on_with():
    student, teacher = byte_level(330), byte_level(600)
    end = teacher.convert_tokens_to_ids("<|end|>")
    stop = next(i for i, row in enumerate(token_bytes(student)) if row == b"e")
    table = Continuations(student, teacher, stops=[stop])
    assert not len(table.of(end)) and not len(table.of(len(token_bytes(teacher)) + 5))
    silent = {i for i, row in enumerate(token_bytes(student)) if not row} | {stop}
    assert silent.isdisjoint(i for token in range(600) for i in table.of(token).tolist())


def test_the_bytes_of_a_character_go_on_within_it():
    student, teacher = byte_level(330), byte_level(600)
    rows, table = token_bytes(teacher), Continuations(student, teacher)
    longer = [row for row in rows if len(row) == 3 and len(row.decode(errors="ignore")) == 1]
    assert longer
    own = token_bytes(student)
    for row in longer:
        for cut in (1, 2):
            if row[:cut] in rows and row[cut:] in own:
                assert own.index(row[cut:]) in table.of(rows.index(row[:cut])).tolist()


def test_rows_lists_each_place_with_its_ids_once():
    student, teacher = byte_level(330), byte_level(600)
    table = Continuations(student, teacher)
    tokens = [400, 300, 400, 598]
    places, ids = table.rows(tokens)
    assert [ids[places == place].tolist() for place in range(4)] == [table.of(token).tolist() for token in tokens]
    assert all(len(set(table.of(token).tolist())) == len(table.of(token)) for token in tokens)


def test_kept_merges_are_those_that_were_built(monkeypatch):
    student, teacher = byte_level(330), byte_level(600)
    built = Continuations(student, teacher)
    monkeypatch.setattr(module, "build_merges", None)
    kept = Continuations(student, teacher, merges=built.merges)
    assert all(kept.of(token).tolist() == built.of(token).tolist() for token in range(300, 600))


def test_what_the_pre_tokenizer_joins_hangs_on_more_than_the_last_character():
    """`.com` is one word to it, and ` .` and `com` are two."""
    tokens = ["c", "o", "m", ".", "Ġ", "om", "com", ".com", "Ġ."]
    merges = [("o", "m"), ("c", "om"), (".", "com"), ("Ġ", ".")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    words = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+"), "isolated")  # as Qwen's
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence([words, as_bytes]), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    table = Continuations(tokenizer, tokenizer)
    for before, goes_on in ((".", True), (" .", False)):
        [whole], [[last]] = encoded(tokenizer, [before + "com"]), encoded(tokenizer, [before])
        assert (whole[0] != last) == goes_on == (tokens.index("com") in table.of(last))
