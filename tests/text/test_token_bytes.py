"""The byte tables against independent truths: the text that was encoded, the library's decoding, a second backend."""

import copy
import gc
import json
import re
import sys
import weakref
from collections import Counter
from pathlib import Path

import pytest
import tiktoken
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers_for_tests import (
    ANY_TEXT,
    CORPUS,
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
from transformers import AutoTokenizer, ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from trl_ctopd import UnsupportedTokenizerError, align_text, token_bytes
from trl_ctopd.text.token_bytes import token_table


PREFIX_SPACE = {"llama-2", "mistral-v3", "phi-3-mini"}


def joined(tokenizer, ids) -> bytes:
    rows = token_bytes(tokenizer)
    return b"".join(rows[i] for i in ids)


def spelled(tokenizer, text: str) -> bytes:
    return joined(tokenizer, tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


@pytest.mark.parametrize("family", LOSSLESS)
@given(text=ANY_TEXT)
@settings(max_examples=60, deadline=None)
def test_the_rows_of_an_encoded_text_spell_it(family, text):
    tokenizer = LOSSLESS[family]()
    space = b" " if token_table(tokenizer).prefix_space != "never" else b""
    assert spelled(tokenizer, text) in {text.encode(), space + text.encode()}


@pytest.mark.parametrize("name", REAL_LOSSLESS)
def test_the_rows_of_real_text_spell_it(name, real_tokenizer, assets):
    tokenizer = real_tokenizer(name)
    lines = (assets / "datasets/multilingual/sample.jsonl").read_text().splitlines()[::25]
    for text in (json.loads(line)["text"] for line in lines):
        text = tokenizer.backend_tokenizer.normalizer.normalize_str(text) if name == "qwen2.5" else text  # NFC
        space = b" " if name in PREFIX_SPACE and not text.startswith(" ") else b""
        assert spelled(tokenizer, text) == space + text.encode()


@pytest.mark.parametrize("name", REAL_LOSSLESS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_rows_of_any_ids_spell_what_the_library_decodes(name, real_tokenizer, data):
    """Non-canonical ids too. Only whole text: for broken UTF-8 ByteFallback writes another number of U+FFFD."""
    tokenizer = real_tokenizer(name)
    plain = st.integers(0, len(tokenizer) - 1).filter(lambda i: i not in tokenizer.added_tokens_decoder)
    ids = data.draw(st.lists(plain, min_size=1, max_size=20))
    text = joined(tokenizer, ids)
    text = text.removeprefix(b" ") if name in PREFIX_SPACE else text
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if "\ufffd" in decoded:
        assume(name not in PREFIX_SPACE)
    assert decoded == text.decode(errors="replace")


@pytest.mark.parametrize("name", REAL_LOSSLESS)
def test_single_bytes_have_rows_of_their_own(name, real_tokenizer):
    """GPT-2's alphabet and `<0x00>` to `<0xFF>` alike; SmolLM2 was trained without some, and drops them from a text."""
    missing = {bytes([byte]) for byte in range(256)} - set(token_bytes(real_tokenizer(name)))
    unseen = b"\x04\x06\x13\x14\x16\x1d\xc0\xc1\xf1\xf2\xf5\xf6\xf7\xf8\xf9\xfa\xfb\xfc\xfd\xfe\xff"
    assert b"".join(sorted(missing)) == (unseen if name == "smollm2-instruct" else b"")


@pytest.mark.parametrize("name", REAL)
def test_the_table_covers_every_id(name, real_tokenizer):
    tokenizer = real_tokenizer(name)
    assert len(token_bytes(tokenizer)) == max(tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize("name", ["bert-base-uncased", "gpt2", "llama-2", "t5-small"])
def test_the_table_costs_a_handful_of_calls_for_each_id(name, real_tokenizer):
    tokenizer, calls = PreTrainedTokenizerFast(tokenizer_object=real_tokenizer(name).backend_tokenizer), Counter()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        rows = token_bytes(tokenizer)
    finally:
        sys.setprofile(None)
    assert calls["call"] + calls["c_call"] < 5 * len(rows)


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        ("gpt2", "Ġthe", b" the"),
        ("gpt2", "Ċ", b"\n"),
        ("gpt2", "<|endoftext|>", b""),  # special
        ("qwen2.5", "<tool_call>", b"<tool_call>"),  # added, not special: text
        ("qwen2.5", "<|im_end|>", b""),
        ("deepseek-v3", "<｜User｜>", "<｜User｜>".encode()),  # added, not special, and outside the byte alphabet
        ("deepseek-v3", "<｜end▁of▁sentence｜>", b""),
        ("llama-2", "▁the", b" the"),
        ("llama-2", "<0x0A>", b"\n"),  # byte fallback
        ("llama-2", "<unk>", b""),
        ("phi-3-mini", "</s>", b"</s>"),  # Phi-3 has it as a plain added token
        ("mistral-v3", "[INST]", b""),
        ("t5-small", "▁the", b" the"),
        ("t5-small", "<extra_id_0>", b""),
        ("bert-base-uncased", "##ing", b"ing"),
        ("bert-base-uncased", "the", b"the"),  # its space is lost
        ("bert-base-uncased", "[UNK]", b""),
    ],
)
def test_a_known_token_has_the_bytes_it_is_known_for(name, token, expected, real_tokenizer):
    tokenizer = real_tokenizer(name)
    assert token_bytes(tokenizer)[tokenizer.get_vocab()[token]] == expected


def test_a_byte_piece_is_six_characters_where_the_model_has_no_byte_fallback():
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("<0x0A>", -1.0)], 0, byte_fallback=False))
    backend.decoder = decoders.Metaspace()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend)) == [b"", b" a", b"<0x0A>"]


def test_holes_in_the_numbering_are_empty_rows():
    backend = Tokenizer(models.BPE({"a": 0, "b": 5}, []))
    backend.decoder = decoders.ByteLevel()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend)) == [b"a", b"", b"", b"", b"", b"b"]


def test_an_added_token_that_the_model_has_too_keeps_the_models_bytes():
    """Gemma lists `▁▁` among its added tokens; it still stands for two spaces."""
    tokenizer = gemma_like()
    (added,) = [i for i, token in tokenizer.added_tokens_decoder.items() if token.content == "▁▁"]
    assert token_bytes(tokenizer)[added] == b"  "


def test_tokens_added_after_the_first_call_are_seen():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(byte_level().backend_tokenizer.to_str()))
    before = len(token_bytes(tokenizer))
    tokenizer.add_tokens(["<later>"])
    assert token_bytes(tokenizer)[before] == b"<later>"
    tokenizer.add_special_tokens({"eos_token": "<later>"})
    assert token_bytes(tokenizer)[before] == b""


@pytest.mark.parametrize("make", [byte_level, legacy_llama, unigram, word_piece])
@pytest.mark.parametrize("role", ["pad", "eos"])
def test_a_token_of_text_with_a_role_is_refused_and_one_that_was_added_is_not(make, role):
    """`pad_token_id = 0` is copied from one model's scripts to another's, where 0 is text."""
    tokenizer = copy.deepcopy(make())
    text = tokenizer.encode("money", add_special_tokens=False)[-1]
    setattr(tokenizer, f"{role}_token_id", text)
    with pytest.raises(ValueError, match=rf"{role}_token is .* \(id {text}\), a token of text.*add_special_tokens"):
        token_bytes(tokenizer)
    tokenizer.add_special_tokens({f"{role}_token": "<of its own>"})
    assert (
        token_bytes(tokenizer)[text] and token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids("<of its own>")] == b""
    )


def test_a_pad_token_that_was_text_when_it_was_saved_is_read_as_text(tmp_path):
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="pad_token is '!'.*a token of text that was saved as a special one"):
        rows = token_bytes(loaded)
    ids = loaded.encode("so! it costs", add_special_tokens=False)
    assert b"".join(rows[i] for i in ids) == b"so! it costs"
    assert loaded.pad_token_id not in token_table(loaded).special


def test_a_callers_change_to_the_table_stays_the_callers():
    token_bytes(byte_level()).clear()
    assert token_bytes(byte_level())


def test_the_kept_table_does_not_keep_the_tokenizer_alive():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    token_bytes(tokenizer)
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (byte_level, "never"),
        (gemma_like, "never"),
        (word_piece, "never"),
        (metaspace_bpe, "unless_space"),
        (unigram, "unless_space"),
        (LOSSLESS["byte-level, prefix space"], "unless_space"),
        (LOSSLESS["legacy Llama"], "always"),
        (slow_sentencepiece, "always"),
    ],
)
def test_the_dummy_prefix_is_found_by_trying(family, expected):
    assert token_table(family()).prefix_space == expected


class TiktokenTokenizer(PreTrainedTokenizer):
    """As the tokenizers that come with `trust_remote_code` wrap tiktoken."""

    def __init__(self, **kwargs):
        ranks = {bytes([byte]): byte for byte in range(256)} | {b" a": 256, b"\xe4\xbd": 257}
        self.model = tiktoken.Encoding(
            "toy", pat_str=r"\s?\S+|\s+", mergeable_ranks=ranks, special_tokens={"<end>": 258}
        )
        super().__init__(eos_token="<end>", **kwargs)

    @property
    def vocab_size(self):
        return self.model.n_vocab

    def get_vocab(self):
        return {str(row): i for i, row in enumerate(self.model.token_byte_values())} | {"<end>": 258}

    def _convert_token_to_id(self, token):
        return 258 if token == "<end>" else int(token)

    def _tokenize(self, text, **kwargs):
        return [str(i) for i in self.model.encode_ordinary(text)]


def test_a_tiktoken_backend_gives_its_own_bytes():
    tokenizer = TiktokenTokenizer()
    rows = token_bytes(tokenizer)
    assert rows[256:] == [b" a", b"\xe4\xbd", b""]
    assert spelled(tokenizer, "b a 你") == "b a 你".encode()


def test_byt5_gives_single_bytes():
    tokenizer = ByT5Tokenizer()
    assert token_bytes(tokenizer)[:4] == [b"", b"", b"", b"\x00"]
    assert spelled(tokenizer, "é\n") == "é\n".encode()


@pytest.mark.parametrize("family", ["LlamaTokenizer", "GemmaTokenizer"])
def test_a_sentencepiece_models_user_defined_symbols_are_text(family, tmp_path):
    """Loaded from `tokenizer.model` they are among `all_special_ids`, newlines too."""
    symbols = ["\n", "\n\n", "▁▁", "<tool>"]
    SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.split("\n")),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=490,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=symbols,
        minloglevel=2,
    )
    names = {"tokenizer_class": family, "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    listed = tokenizer.convert_tokens_to_ids(symbols)
    assert set(listed) <= set(tokenizer.all_special_ids)
    assert [token_bytes(tokenizer)[i] for i in listed] == [b"\n", b"\n\n", b"  ", b"<tool>"]
    assert not set(listed) & token_table(tokenizer).special
    text = "a line\n\nand two\n  more <tool> x"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert set(listed) <= set(ids)
    assert align_text(ids, tokenizer, byte_level()).text.removeprefix(" ") == text
    read = align_text(byte_level().encode(text), byte_level(), tokenizer)
    assert not read.masked and set(listed) <= set(read.teacher_ids)


def test_canines_ids_are_code_points():
    tokenizer = CanineTokenizer()
    rows = token_bytes(tokenizer)
    assert (rows[97], rows[0x20AC], rows[0x1F642]) == (b"a", "€".encode(), "🙂".encode())
    assert {rows[i] for i in tokenizer.all_special_ids} == {b""}
    assert len(rows) == len(tokenizer) and not any(rows[0xD800:0xE000])
    text = "one two — três\n  🙂"
    for student, teacher in ((tokenizer, byte_level()), (byte_level(), tokenizer)):
        alignment = align_text(student.encode(text, add_special_tokens=False), student, teacher)
        assert alignment.text == text and not alignment.masked
        assert b"".join(alignment.chunk_bytes) == text.encode()


def test_a_slow_word_piece_loses_the_same_as_the_fast_one(tmp_path):
    vocabulary = sorted(word_piece().get_vocab(), key=word_piece().get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join([*vocabulary, "[PAD]", "[CLS]", "[MASK]"]))
    slow = token_table(BertTokenizerLegacy(tmp_path / "vocab.txt"))
    fast = token_table(word_piece())
    assert slow.rows[: len(fast.rows)] == fast.rows
    assert slow.word_starts & set(range(len(fast.rows))) == fast.word_starts


def test_the_slow_sentencepiece_backend_and_the_fast_one_agree_on_a_real_model(real_tokenizer, assets):
    """Two readers of one `tokenizer.model`: the SentencePiece library, and tokenizers' JSON."""
    slow = SentencePieceBackend(
        vocab_file=str(assets / "tokenizers/mistral-v3/tokenizer.model"),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    assert token_bytes(slow) == token_bytes(real_tokenizer("mistral-v3"))


def test_mistral_commons_own_files_give_whole_texts():
    common = pytest.importorskip("mistral_common", reason="needs mistral-common: pip install mistral-common")
    from transformers.tokenization_mistral_common import MistralCommonBackend

    folder = Path(common.__file__).parent / "data"
    for name in ("tekken_240911.json", "mistral_instruct_tokenizer_240323.model.v3"):
        tokenizer = MistralCommonBackend(folder / name)
        ids = tokenizer.encode("naïve  你好 🙂\n</s>", add_special_tokens=False)
        assert joined(tokenizer, ids).lstrip(b" ") == "naïve  你好 🙂\n</s>".encode()


class Wordy(PreTrainedTokenizer):
    """A slow tokenizer that carries nothing to read bytes from."""

    vocab_size = 1

    def get_vocab(self):
        return {"word": 0}


@pytest.mark.parametrize("family", [byte_level, metaspace_bpe, unigram])
def test_a_tokenizer_without_a_decoder_is_read_by_how_it_splits_text(family):
    state = json.loads(family().backend_tokenizer.to_str())
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps({**state, "decoder": None})))
    assert token_bytes(bare)[: len(family())] == token_bytes(family())
    assert b"<0x0A>" not in token_bytes(bare)


def fast(decoder, model=None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model or models.BPE({"a": 0}, []))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (Wordy(), "Wordy: it is a slow tokenizer of a kind not known here"),
        (fast(None), "TokenizersBackend: its backend has no decoder, and its pre-tokenizer is neither"),
        (fast(decoders.CTC()), "its decoder is CTC"),
        (fast(decoders.BPEDecoder(), models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>")), "word ends by '</w>'"),
        (fast(decoders.Replace(Regex("_+"), " ")), "its decoder replaces the pattern"),
        (fast(decoders.Strip(content=" ", left=1, right=1)), "its decoder is Strip"),
        (byte_level().backend_tokenizer, "Tokenizer: it is not a transformers tokenizer"),
    ],
)
def test_a_tokenizer_whose_bytes_cannot_be_known_is_refused_by_name_and_with_the_way_out(tokenizer, reason):
    with pytest.raises(UnsupportedTokenizerError, match=re.escape(reason)) as error:
        token_bytes(tokenizer)
    assert "tokenizer.json" in str(error.value)


@pytest.mark.parametrize("special", [True, False], ids=["special", "text"])
@pytest.mark.parametrize("unused", [0, 3])
def test_added_tokens_with_the_ids_of_others_are_refused_by_both_names(special, unused):
    letters = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {*"xyz"})
    vocabulary = {letter: n for n, letter in enumerate(letters)}
    vocabulary |= {letter: len(letters) + unused + n for n, letter in enumerate("xyz")}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens(["foo", "bar"], special_tokens=special)
    if unused:
        with pytest.raises(UnsupportedTokenizerError, match=r"id 256 is both 'x' and 'foo'.*free from 259 on"):
            token_bytes(tokenizer)
    else:
        spelled = [token_bytes(tokenizer)[i] for i in tokenizer.encode("xfoo")]
        assert spelled == [b"x", b"" if special else b"foo"]
