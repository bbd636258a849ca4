"""Whole completions through pairs of tokenizers, toy and real, against a slow reference, and the known hard cases."""

import gzip
import itertools
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers
from tokenizers_for_tests import (
    ANY_TEXT,
    LOSSLESS,
    REAL,
    REAL_LOSSLESS,
    byte_level,
    gemma_like,
    legacy_llama,
    metaspace_bpe,
    slow_sentencepiece,
    unigram,
    word_piece,
)
from transformers import PreTrainedTokenizerFast
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy
from two_pointers import two_pointers

from trl_ctopd import TextAligner, align_text, token_bytes
from trl_ctopd.text.aligner import MaskedStretch
from trl_ctopd.text.token_bytes import token_table


PAIRS = list(itertools.product(LOSSLESS, LOSSLESS))


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def token_spans(ids, tokenizer, text: str, written: bytes | None = None) -> list[tuple[int, int]]:
    """Slow and independent: the bytes start:end of `text` that each token covers, for tokens that spell it.

    `written`: the bytes as they were, where `text` has U+FFFD for invalid ones.
    """
    place = range(len(text.encode()) + 1)
    if written is not None:
        place = [at + n for _, source, at in replaced(written) for n in range(len(source))] + [len(text.encode())]
    written = text.encode() if written is None else written
    table = token_table(tokenizer)
    rows = [table.rows[i] for i in ids]
    if b"".join(rows) != written:  # a dummy prefix has no width
        first = next(n for n, row in enumerate(rows) if row)
        rows[first] = rows[first].removeprefix(b" ")
        assert table.prefix_space != "never"
    assert b"".join(rows) == written
    return [(place[start], place[end]) for start, end in itertools.pairwise([0, *itertools.accumulate(map(len, rows))])]


def replaced(written: bytes):
    """Each character of the text, the written bytes that it stands for (found by trying 4, 3, 2, 1) and its offset."""
    done = at = 0
    while done < len(written):
        sources = (written[done : done + size] for size in (4, 3, 2, 1))
        source = next(source for source in sources if len(source.decode(errors="replace")) == 1)
        character = source.decode(errors="replace")
        yield character, source, at
        done, at = done + len(source), at + len(character.encode())


def check(alignment, student, teacher, written: bytes | None = None):
    """Everything that holds for a teacher whose tokens spell the text: the reference's chunks and nothing else."""
    data = alignment.text.encode()
    assert alignment.teacher_ids == encode(teacher, alignment.text)
    masked = [(stretch.start, stretch.end) for stretch in alignment.masked]
    ours = token_spans(alignment.student_ids, student, alignment.text, written)
    theirs = token_spans(alignment.teacher_ids, teacher, alignment.text)
    chunks, student_chunks, teacher_chunks = two_pointers(ours, theirs, len(data), masked)
    rows = token_bytes(student)
    silent = {n for n, i in enumerate(alignment.student_ids) if not rows[i]}
    assert alignment.student_chunks == [-1 if n in silent else chunk for n, chunk in enumerate(student_chunks)]
    assert alignment.teacher_chunks == teacher_chunks
    assert alignment.chunk_bytes == [data[start:end] for start, end in chunks]
    assert alignment.student_widths == [end - start for start, end in ours]
    if not masked:
        assert b"".join(alignment.chunk_bytes) == data


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@given(text=ANY_TEXT)
@settings(max_examples=20, deadline=None)
def test_any_text_between_any_two_families_gives_the_reference_chunks(student, teacher, text):
    student, teacher = LOSSLESS[student](), LOSSLESS[teacher]()
    alignment = align_text(encode(student, text), student, teacher)
    assert alignment.text == text.removeprefix(" ") or alignment.text == text
    assert not alignment.masked
    check(alignment, student, teacher)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_ids_at_all_give_the_reference_chunks_around_what_is_no_utf8(student, teacher, data):
    student, teacher = LOSSLESS[student](), LOSSLESS[teacher]()
    rows = token_bytes(student)
    ids = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=25))
    written = b"".join(rows[i] for i in ids)
    if token_table(student).prefix_space != "never":
        written = written.removeprefix(b" ")
    alignment = align_text(ids, student, teacher)
    assert alignment.student_ids == ids
    assert alignment.text == written.decode(errors="replace")
    invalid = [at for character, source, at in replaced(written) if source.decode(errors="ignore") != character]
    assert alignment.masked == [MaskedStretch(at, at + 3, "invalid_utf8") for at in invalid]
    check(alignment, student, teacher, written)


def check_spelling(alignment, student, teacher):
    """What holds for any pair: each chunk's tokens, on both sides, spell the chunk's bytes, in order."""
    for ids, chunks, tokenizer in (
        (alignment.student_ids, alignment.student_chunks, student),
        (alignment.teacher_ids, alignment.teacher_chunks, teacher),
    ):
        table = token_table(tokenizer)
        spelled = [b""] * len(alignment.chunk_bytes)
        for i, chunk in zip(ids, chunks, strict=True):
            if chunk >= 0:
                spelled[chunk] += table.rows[i]
        if spelled and table.prefix_space != "never" and spelled[0] != alignment.chunk_bytes[0]:
            spelled[0] = spelled[0].removeprefix(b" ")
        assert spelled == alignment.chunk_bytes
        part = [chunk for chunk in chunks if chunk >= 0]
        assert part == sorted(part) and set(part) == set(range(len(spelled)))
    masked = {at for stretch in alignment.masked for at in range(stretch.start, stretch.end)}
    assert sum(map(len, alignment.chunk_bytes)) <= len(alignment.text.encode()) - len(masked)


@pytest.fixture(scope="module")
def real_texts(assets) -> list[str]:
    """Mathematics, code, twelve languages and emoji, in NFC."""
    folder = assets / "datasets"
    texts = [json.loads(line)["answer"] for line in (folder / "gsm8k/test.jsonl").open()][::300]
    with gzip.open(folder / "humaneval/HumanEval.jsonl.gz", "rt") as lines:
        texts += [row["prompt"] + row["canonical_solution"] for row in map(json.loads, lines)][::30]
    texts += [json.loads(line)["code"] for line in (folder / "mbpp/mbpp.jsonl").open()][::200]
    rows = [json.loads(line) for line in (folder / "multilingual/sample.jsonl").open()][::90]
    assert {"zh", "ar", "hi", "th", "ja", "bn", "te", "ru"} <= {row["lang"] for row in rows}
    return [
        unicodedata.normalize("NFC", text) for text in [*texts, *(row["text"] for row in rows), "🏴‍☠️ 👩🏽‍🚀 🇰🇷 다람쥐"]
    ]


def share_of(texts: list[str], *names: str) -> list[str]:
    """A quarter of the texts: each pair reads every fourth, and all four quarters are read by many pairs."""
    return texts[sum(map(REAL.index, names)) % 4 :: 4]


@pytest.mark.parametrize(("student", "teacher"), list(itertools.product(REAL_LOSSLESS, REAL_LOSSLESS)))
def test_real_text_between_real_tokenizers_gives_the_reference_chunks_and_loses_nothing(
    student, teacher, real_tokenizer, real_texts
):
    texts = share_of(real_texts, student, teacher)
    student, teacher = real_tokenizer(student), real_tokenizer(teacher)
    alignments = TextAligner(student, teacher)([encode(student, text) for text in texts])
    for text, alignment in zip(texts, alignments, strict=True):
        assert alignment.text == text
        assert not alignment.masked
        check(alignment, student, teacher)


@pytest.mark.parametrize(
    ("student", "teacher"), [pair for pair in itertools.permutations(REAL, 2) if not set(pair) <= set(REAL_LOSSLESS)]
)
def test_real_text_is_masked_only_where_a_lossy_tokenizer_changed_it(student, teacher, real_tokenizer, real_texts):
    texts = share_of(real_texts, student, teacher)
    student, teacher = real_tokenizer(student), real_tokenizer(teacher)
    normalizer = teacher.backend_tokenizer.normalizer
    for alignment in TextAligner(student, teacher)([encode(student, text) for text in texts]):
        check_spelling(alignment, student, teacher)
        data = alignment.text.encode()
        for stretch in alignment.masked:
            text = data[stretch.start : stretch.end].decode()
            if stretch.reason == "normalized":
                # Half of a composed character is unchanged by itself.
                text = data[: stretch.start].decode()[-1:] + text + data[stretch.end :].decode()[:1]
                assert any(map(str.isspace, text)) or normalizer.normalize_str(text) != text
            elif stretch.reason == "unknown_token":
                assert teacher.unk_token_id in teacher.encode(text, add_special_tokens=False)
            else:
                assert (stretch.reason, text) == ("whitespace", " ") and token_table(student).word_starts


def test_one_batch_gives_what_each_completion_gives_alone(real_tokenizer, real_texts):
    student, teacher = real_tokenizer("gpt2"), real_tokenizer("t5-small")
    completions = [[], *(encode(student, text) for text in real_texts[::8]), [], [220, 30325, 50256]]
    assert TextAligner(student, teacher)(completions) == [align_text(ids, student, teacher) for ids in completions]


def test_no_completions_give_no_alignments():
    assert TextAligner(byte_level(), unigram())([]) == []


def ids_of(tokenizer, *pieces: str) -> list[int]:
    return [tokenizer.get_vocab()[piece] for piece in pieces]


def reasons(alignment) -> list[tuple[str, str]]:
    data = alignment.text.encode()
    return [(data[m.start : m.end].decode(), m.reason) for m in alignment.masked]


class TestHardCases:
    """Real tokenizers; each case's reason in its name."""

    def test_a_students_dummy_prefix_is_no_text(self, real_tokenizer):
        llama, gpt2 = real_tokenizer("llama-2"), real_tokenizer("gpt2")
        alignment = align_text(ids_of(llama, "▁Hello", "▁world"), llama, gpt2)
        assert alignment.text == "Hello world"
        assert (alignment.student_chunks, alignment.teacher_chunks) == ([0, 1], [0, 1])
        assert alignment.student_widths == [5, 6]

    def test_a_lone_dummy_prefix_belongs_to_the_first_chunk_on_both_sides(self, real_tokenizer):
        """Else a student that is its own teacher would have a gap: the `▁` would count on one side only."""
        llama = real_tokenizer("llama-2")
        alignment = align_text(ids_of(llama, "▁", "中", "国"), llama, llama)
        assert alignment.text == "中国"
        assert alignment.student_chunks == alignment.teacher_chunks == [0, 0, 1]
        assert alignment.student_ids == alignment.teacher_ids

    def test_two_spaces_at_the_start_are_the_dummy_prefix_and_one_written_space(self, real_tokenizer):
        llama, gpt2 = real_tokenizer("llama-2"), real_tokenizer("gpt2")
        alignment = align_text(ids_of(llama, "▁▁", "Hello"), llama, gpt2)
        assert (alignment.text, alignment.chunk_bytes) == (" Hello", [b" Hello"])

    def test_a_text_that_begins_with_a_space_keeps_it_for_a_teacher_with_a_dummy_prefix(self, real_tokenizer):
        llama, gpt2 = real_tokenizer("llama-2"), real_tokenizer("gpt2")
        alignment = align_text(ids_of(gpt2, "ĠHello"), gpt2, llama)
        assert (alignment.text, alignment.chunk_bytes) == (" Hello", [b" Hello"])
        assert alignment.teacher_ids == ids_of(llama, "▁Hello")

    def test_ids_that_no_encoder_would_write_are_kept(self, real_tokenizer):
        gpt2, llama3 = real_tokenizer("gpt2"), real_tokenizer("llama-3.2")
        ids = ids_of(gpt2, "t", "h", "e", "Ġ", "c", "at")
        alignment = align_text(ids, gpt2, llama3)
        assert alignment.student_ids == ids
        assert alignment.student_chunks == [0, 0, 0, 1, 1, 1]
        assert alignment.chunk_bytes == [b"the", b" cat"]

    def test_a_character_cut_in_bytes_on_one_side_is_one_chunk(self, real_tokenizer):
        gpt2, qwen = real_tokenizer("gpt2"), real_tokenizer("qwen2.5")
        alignment = align_text(encode(gpt2, "你"), gpt2, qwen)
        assert len(alignment.student_ids) > 1 == len(alignment.teacher_ids)
        assert alignment.chunk_bytes == ["你".encode()]

    def test_one_bad_byte_costs_its_own_chunk_and_not_the_rest(self, real_tokenizer):
        gpt2, qwen = real_tokenizer("gpt2"), real_tokenizer("qwen2.5")
        alignment = align_text(ids_of(gpt2, "Hello", "à", "Ġworld", "!"), gpt2, qwen)
        assert alignment.text == "Hello\ufffd world!"
        assert reasons(alignment) == [("\ufffd", "invalid_utf8")]
        assert alignment.student_chunks == [0, -1, 1, 2]
        assert alignment.chunk_bytes == [b"Hello", b" world", b"!"]

    def test_a_replacement_character_that_the_student_wrote_itself_is_text(self, real_tokenizer):
        gpt2, qwen = real_tokenizer("gpt2"), real_tokenizer("qwen2.5")
        alignment = align_text(encode(gpt2, "a\ufffdb"), gpt2, qwen)
        assert not alignment.masked
        assert b"".join(alignment.chunk_bytes) == "a\ufffdb".encode()

    def test_a_completion_cut_inside_a_character_masks_its_end(self, real_tokenizer):
        gpt2, deepseek = real_tokenizer("gpt2"), real_tokenizer("deepseek-v3")
        alignment = align_text(ids_of(gpt2, "ok", "Ġ", "ð", "Ł"), gpt2, deepseek)
        assert reasons(alignment) == [("\ufffd", "invalid_utf8")]
        assert alignment.student_chunks[0] == 0 and alignment.student_chunks[-2:] == [-1, -1]

    def test_nfc_masks_the_decomposed_letters_only(self, real_tokenizer):
        gpt2, qwen = real_tokenizer("gpt2"), real_tokenizer("qwen2.5")
        alignment = align_text(encode(gpt2, "un cafe\u0301 noir"), gpt2, qwen)
        assert alignment.text == "un cafe\u0301 noir"
        assert "".join(text for text, _ in reasons(alignment)).endswith("e\u0301")
        assert alignment.chunk_bytes[0] == b"un" and alignment.chunk_bytes[-1] == b" noir"

    def test_bytes_that_the_teachers_vocabulary_lacks_are_masked(self, real_tokenizer):
        """SmolLM2 has no token for the byte 0x06 and drops it silently."""
        gpt2, smollm = real_tokenizer("gpt2"), real_tokenizer("smollm2-instruct")
        alignment = align_text(encode(gpt2, "ab\x06 cd"), gpt2, smollm)
        assert reasons(alignment) == [("\x06", "normalized")]
        assert alignment.chunk_bytes == [b"ab", b" cd"]

    def test_an_unknown_word_is_masked_and_its_neighbours_are_not(self, real_tokenizer):
        gpt2, t5 = real_tokenizer("gpt2"), real_tokenizer("t5-small")
        alignment = align_text(encode(gpt2, "the 你好 house"), gpt2, t5)
        assert [reason for _, reason in reasons(alignment)] == ["unknown_token"]
        assert alignment.chunk_bytes[0] == b"the" and alignment.chunk_bytes[-1] == b" house"

    def test_collapsed_whitespace_is_masked_and_a_single_space_is_not(self, real_tokenizer):
        gpt2, t5 = real_tokenizer("gpt2"), real_tokenizer("t5-small")
        alignment = align_text(encode(gpt2, "one two\nthree\n"), gpt2, t5)  # T5's token is " three"
        assert reasons(alignment) == [("\nthree", "normalized"), ("\n", "normalized")]
        assert alignment.chunk_bytes == [b"one", b" two"]

    def test_word_pieces_are_aligned_inside_words_and_masked_at_their_spaces(self, real_tokenizer):
        gpt2, bert = real_tokenizer("gpt2"), real_tokenizer("bert-base-uncased")
        alignment = align_text(encode(gpt2, "unwanted,running fast"), gpt2, bert)
        assert b"," in alignment.chunk_bytes and b" fast" not in alignment.chunk_bytes
        assert reasons(alignment) == [(" ", "normalized")]

    def test_a_word_piece_student_is_read_with_spaces_between_its_words(self, real_tokenizer):
        bert, gpt2 = real_tokenizer("bert-base-uncased"), real_tokenizer("gpt2")
        alignment = align_text(ids_of(bert, "play", "##ing", "games"), bert, gpt2)
        assert alignment.text == "playing games"
        assert reasons(alignment) == [(" ", "whitespace")]
        assert alignment.chunk_bytes == [b"playing"]
        assert alignment.student_widths == [4, 3, 5]

    def test_special_tokens_and_ids_past_the_vocabulary_take_no_part(self, real_tokenizer):
        qwen, llama3 = real_tokenizer("qwen2.5"), real_tokenizer("llama-3.2")
        ids = [*ids_of(qwen, "Yes", "<|im_end|>"), 151_900, *ids_of(qwen, "!")]
        alignment = align_text(ids, qwen, llama3)
        assert (alignment.text, alignment.student_chunks) == ("Yes!", [0, -1, -1, 1])

    def test_only_special_tokens_are_an_empty_text(self, real_tokenizer):
        qwen, llama2 = real_tokenizer("qwen2.5"), real_tokenizer("llama-2")
        alignment = align_text(ids_of(qwen, "<|im_end|>"), qwen, llama2)
        assert (alignment.text, alignment.teacher_ids, alignment.student_chunks) == ("", [], [-1])

    @pytest.mark.parametrize(
        ("teacher", "literal"),
        [
            ("qwen2.5", "<|im_end|>"),
            ("llama-3.2", "<|eot_id|>"),
            ("deepseek-v3", "<｜end▁of▁sentence｜>"),
            ("mistral-v3", "[/INST]"),
            ("phi-3-mini", "<|end|>"),
            ("llama-2", "</s>"),
            ("t5-small", "</s>"),  # a Unigram model finds the piece in plain text
            ("bert-base-uncased", "[SEP]"),
        ],
    )
    def test_a_literal_control_string_never_becomes_the_teachers_control_token(self, teacher, literal, real_tokenizer):
        gpt2, teacher = real_tokenizer("gpt2"), real_tokenizer(teacher)
        alignment = align_text(encode(gpt2, f"say {literal}{literal} now"), gpt2, teacher)
        assert not set(alignment.teacher_ids) & token_table(teacher).special
        check_spelling(alignment, gpt2, teacher)

    @pytest.mark.parametrize(
        ("teacher", "literal"), [("deepseek-v3", "<｜User｜>"), ("phi-3-mini", "</s>"), ("qwen2.5", "<tool_call>")]
    )
    def test_a_control_token_that_is_not_special_is_kept_out_too(self, teacher, literal, real_tokenizer):
        gpt2, teacher = real_tokenizer("gpt2"), real_tokenizer(teacher)
        (control,) = ids_of(teacher, literal)
        ids = encode(gpt2, f"a{literal} b {literal}{literal}")
        assert control in align_text(ids, gpt2, teacher).teacher_ids
        (alignment,) = TextAligner(gpt2, teacher, teacher_control_ids=[control])([ids])
        assert control not in alignment.teacher_ids
        assert not alignment.masked
        assert b"".join(alignment.chunk_bytes) == f"a{literal} b {literal}{literal}".encode()
        assert alignment.teacher_chunks.count(-1) == 0


@pytest.mark.parametrize("text", ["</s>", "a</s>b", "say </s></s> now", "</s> one", "two  </s>\n</s>", "<</s>/s>"])
def test_no_part_of_a_text_that_is_cut_at_control_strings_gets_a_dummy_prefix_of_its_own(text):
    """A Unigram model finds `</s>` in plain text, so that the text is encoded in parts; only the first begins a text."""
    teacher = unigram()
    table = token_table(teacher)
    assert table.special & set(encode(teacher, text))  # what the cut is for
    alignment = align_text(encode(byte_level(), text), byte_level(), teacher)
    assert not table.special & set(alignment.teacher_ids) and not alignment.masked
    read = b"".join(table.rows[i] for i in alignment.teacher_ids)
    assert read in (text.encode(), b" " + text.encode())
    assert b"".join(alignment.chunk_bytes) == text.encode()
    for chunk, spelled in enumerate(alignment.chunk_bytes):
        theirs = b"".join(
            table.rows[i] for i, c in zip(alignment.teacher_ids, alignment.teacher_chunks, strict=True) if c == chunk
        )
        assert theirs == spelled or (chunk == 0 and theirs == b" " + spelled)


def test_every_occurrence_of_a_masked_string_is_masked_overlapping_ones_too():
    aligner = TextAligner(byte_level(), gemma_like(), masked_strings=["aa", "<tool_call>"])
    (alignment,) = aligner([encode(byte_level(), "aaa b <tool_call> c")])
    assert reasons(alignment) == [("aa", "markup"), ("aa", "markup"), ("<tool_call>", "markup")]
    assert b"".join(alignment.chunk_bytes) == b" b  c"


def test_an_empty_masked_string_is_refused():
    with pytest.raises(ValueError, match="empty string"):
        TextAligner(byte_level(), byte_level(), masked_strings=[""])


def test_padding_among_the_ids_is_refused():
    with pytest.raises(ValueError, match="token id -100"):
        align_text([5, -100], byte_level(), byte_level())


def test_a_literal_of_one_character_that_is_a_control_token_is_left_out_and_masked():
    """It cannot be cut; the teacher must not read it."""
    teacher = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_level().backend_tokenizer.to_str()))
    teacher.add_tokens([AddedToken("§", normalized=False)])
    control = ids_of(teacher, "§")
    (alignment,) = TextAligner(byte_level(), teacher, teacher_control_ids=control)([encode(byte_level(), "the § dog")])
    assert control[0] not in alignment.teacher_ids
    assert reasons(alignment) == [("§", "normalized")]


@pytest.mark.parametrize("teacher", [metaspace_bpe, legacy_llama, gemma_like, slow_sentencepiece])
def test_a_literal_metaspace_is_masked_since_the_teacher_reads_a_space(teacher):
    alignment = align_text(encode(byte_level(), "the ▁ dog"), byte_level(), teacher())
    assert "".join(text for text, _ in reasons(alignment)).strip() == "▁"
    assert alignment.chunk_bytes[-1] == b" dog"


def test_a_space_put_before_every_text_has_no_width_where_another_stretch_was_altered():
    """The legacy Llama tokenizer writes `▁▁dog` for " dog": one space is its own, the other the text's."""
    alignment = align_text(encode(byte_level(), " dog ▁ dog"), byte_level(), legacy_llama())
    assert alignment.chunk_bytes[0] == b" dog"


def test_a_cell_that_spells_more_than_its_text_takes_none_of_the_text_before_it():
    """The altered "b" spells what stands before it too: those bytes are other tokens'."""
    state = json.loads(byte_level(256 + 1).backend_tokenizer.to_str())
    teacher = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
    teacher.backend_tokenizer.normalizer = normalizers.Replace("b", "aab")
    alignment = align_text(encode(byte_level(), "aab"), byte_level(), teacher)
    check_spelling(alignment, byte_level(), teacher)
    assert reasons(alignment) == [("b", "normalized")]


def test_a_null_byte_is_text():
    alignment = align_text(encode(byte_level(), "a\x00"), byte_level(), unigram())
    assert alignment.chunk_bytes == [b"a", b"\x00"]


def test_the_space_a_tokenizer_puts_after_an_added_token_masks_what_it_is_joined_to():
    teacher = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(legacy_llama().backend_tokenizer.to_str()))
    teacher.add_tokens([AddedToken("<tool>", normalized=False)])
    alignment = align_text(encode(byte_level(), "a<tool>b c"), byte_level(), teacher)
    check_spelling(alignment, byte_level(), teacher)
    assert [reason for _, reason in reasons(alignment)] == ["normalized"]


class TestSlowTeachers:
    """Tokenizers that give no offsets: what they changed is found by comparing bytes."""

    def test_an_unchanged_text_needs_no_comparison(self):
        student, teacher = byte_level(), slow_sentencepiece()
        alignment = align_text(encode(student, "the lazy  dog\n你好"), student, teacher)
        assert not alignment.masked
        check(alignment, student, teacher)

    @pytest.mark.parametrize(
        ("text", "altered"),
        [
            ("the ﬁne dog", "ﬁ"),
            ("the dog  over the fox", " "),
            ("the dog\u3000over", "\u3000"),
            ("the dog jumps ", " "),
        ],
    )
    def test_nfkc_masks_the_altered_stretch_and_its_tokens_only(self, text, altered):
        student, teacher = byte_level(), slow_sentencepiece("unigram", "nmt_nfkc")
        alignment = align_text(encode(student, text), student, teacher)
        check_spelling(alignment, student, teacher)
        assert altered in "".join(masked for masked, _ in reasons(alignment))
        assert sum(len(masked) for masked, _ in reasons(alignment)) <= len(altered) + 6
        assert {reason for _, reason in reasons(alignment)} == {"normalized"}

    @given(text=st.text(st.sampled_from("ab ﬁ\u3000½éÅ\n你Ａ"), max_size=30))
    @settings(max_examples=150, deadline=None)
    def test_whatever_nfkc_does_both_sides_spell_every_chunk(self, text):
        student, teacher = byte_level(), slow_sentencepiece("unigram", "nmt_nfkc")
        check_spelling(align_text(encode(student, text), student, teacher), student, teacher)

    def test_a_slow_word_piece_masks_what_the_fast_one_does(self, tmp_path):
        vocabulary = sorted(word_piece().get_vocab(), key=word_piece().get_vocab().get)
        (tmp_path / "vocab.txt").write_text("\n".join([*vocabulary, "[PAD]", "[CLS]", "[MASK]"]))
        slow = BertTokenizerLegacy(tmp_path / "vocab.txt")
        student = byte_level()
        for text in ("the quick, brown-fox", "The Dog [SEP] jumps", "lazy!dog"):
            alignment = align_text(encode(student, text), student, slow)
            check_spelling(alignment, student, slow)
            assert not set(alignment.teacher_ids) & token_table(slow).special
            assert alignment.chunk_bytes == align_text(encode(student, text), student, word_piece()).chunk_bytes


@given(words=st.lists(st.sampled_from(["the", "lazy", "dog", "cafe\u0301", "你好", "ᄀ\u1161", "\n"]), max_size=200))
@settings(max_examples=50, deadline=None)
def test_in_a_long_text_nfc_masks_the_decomposed_letters_and_nothing_far_from_them(words):
    """Most places are not the tokenizer's word but follow from the place of another token."""
    text = " ".join(words)
    alignment = align_text(encode(byte_level(), text), byte_level(), byte_level(nfc=True))
    check_spelling(alignment, byte_level(), byte_level(nfc=True))
    masked = {at for stretch in alignment.masked for at in range(stretch.start, stretch.end)}
    altered = {len(text[:at].encode()) for at, character in enumerate(text) if character in "\u0301\u1161"}
    assert altered <= masked <= {at + near for at in altered for near in range(-6, 6)}


@pytest.mark.parametrize("teacher", [lambda: byte_level(nfc=True), lambda: unigram(nfkc=True), unigram, word_piece])
@given(text=st.text(st.sampled_from("ab AB\n \u0301\u0323ﬁ½éÅ你Ａᄀ\u1161ᚠ"), max_size=30))
@settings(max_examples=150, deadline=None)
def test_whatever_a_normalizer_does_both_sides_spell_every_chunk(teacher, text):
    student, teacher = byte_level(), teacher()
    check_spelling(align_text(encode(student, text), student, teacher), student, teacher)


@pytest.mark.parametrize("name", ["mistral-v3", "llama-2", "phi-3-mini"])
def test_a_space_that_begins_a_completion_after_text_is_its_own(real_tokenizer, name):
    """After what opens a turn, the tokenizer has put it there; after text, it parts two words."""
    student, teacher = real_tokenizer(name), real_tokenizer("qwen2.5")
    [ids] = [student.encode("is four", add_special_tokens=False)[-1:]]
    assert token_bytes(student)[ids[0]] == b" four"
    begins, goes_on = (TextAligner(student, teacher)([ids], [own])[0] for own in (False, True))
    assert (begins.text, goes_on.text) == ("four", " four")
    other = TextAligner(teacher, student)
    for text, spelled in (("x):", b"x):"), (" four", b" four")):
        [read] = other([teacher.encode(text, add_special_tokens=False)], None, [True])
        assert b"".join(token_bytes(student)[i] for i in read.teacher_ids) == spelled
