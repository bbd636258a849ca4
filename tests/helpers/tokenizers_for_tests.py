"""Toy tokenizers of every family, trained here on a few lines in many scripts. Each function caches its result.

They are the same in every process. Of the trainers in `tokenizers`, this holds only for BPE without `limit_alphabet`: the others
count in a hash map whose order is random in each process.
"""

import functools
import json
import re
import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


CORPUS = [
    "The quick brown fox jumps over the lazy dog, 1234567890 times; the dog doesn't care.",
    "def add(a, b):\n    return a + b  # 12 + 30 = 42\n\n\tprint(add(12, 30))",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Où est l'élève naïf ?",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "敏捷的棕色狐狸跳过懒狗。いろはにほへと ちりぬるを。다람쥐 헌 쳇바퀴에 타고파",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश। ปัญญาชนคือผู้มีความคิด",
    "نص حكيم له سر قاطع وذو شأن عظيم. তোমার সাথে দেখা হবে। యక్ష ప్రశ్నలు",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 ❤️ ½ ﬁ café café \u00a0\u200b",
] * 3
MORSELS = ["the ", " ", "\n", "1234", "é", "e\u0301", "你好", "ভাষা", "👩‍👩‍👧", "ไทย", "<|end|>", "<tool_call>", "\ufffd"]
# Strings that SentencePiece takes for its own spellings are tested separately.
ANY_TEXT = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(MORSELS)).map("".join)).filter(
    lambda text: not re.search("▁|</?s>|<unk>|<tool>|<0x..>", text)
)
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def _wrapped(backend: Tokenizer, **special_tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens)


@functools.cache
def byte_level(vocab_size: int = 600, digits: int = 0, nfc: bool = False) -> PreTrainedTokenizerFast:
    """GPT-2's alphabet. `digits`: numbers are cut into groups of at most this size. `nfc`: Qwen's normalizer."""
    backend = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{digits}}}"), "isolated")] if digits else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.normalizer = normalizers.NFC() if nfc else None
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("<｜User｜>", normalized=False)])
    return _wrapped(backend, eos_token="<|end|>")


@functools.cache
def prefixed_byte_level() -> PreTrainedTokenizerFast:
    """RoBERTa's kind: a space before the first word, and offsets that leave out spaces."""
    state = json.loads(byte_level().backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["special"]]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return _wrapped(backend, eos_token="<|end|>")


@functools.cache
def metaspace_bpe(vocab_size: int = 900, prepend_scheme: str = "first") -> PreTrainedTokenizerFast:
    """Llama-2's family: `▁` for a space, one before the first word, bytes where a character is unknown."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    counts = Counter("".join(CORPUS).replace(" ", "▁"))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *BYTE_PIECES],
        initial_alphabet=sorted(counts, key=lambda letter: (-counts[letter], letter))[:80],
        limit_alphabet=80,
        show_progress=False,
    )
    trained.train_from_iterator(CORPUS, trainer)
    return _wrapped(_bpe_with_bytes(trained, prepend_scheme), unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _bpe_with_bytes(trained: Tokenizer, prepend_scheme: str) -> Tokenizer:
    """Makes the byte pieces plain vocabulary. Training needed them to be special."""
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    backend.decoder = _byte_fallback_decoder()
    return backend


def _byte_fallback_decoder(strip: bool = True) -> decoders.Decoder:
    stripped = [decoders.Strip(content=" ", left=1, right=0)] if strip else []
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped])


@functools.cache
def legacy_llama() -> PreTrainedTokenizerFast:
    """Like metaspace_bpe, but by normalizers: `▁` is put before every text, even one that begins with a space."""
    backend = Tokenizer.from_str(metaspace_bpe().backend_tokenizer.to_str())
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _wrapped(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@functools.cache
def gemma_like() -> PreTrainedTokenizerFast:
    """No dummy prefix. `▁▁` is an added token that the model's vocabulary has too."""
    state = json.loads(metaspace_bpe().backend_tokenizer.to_str())
    state["model"]["vocab"]["▁▁"] = len(state["model"]["vocab"])
    state["model"]["merges"].append(["▁", "▁"])
    backend = Tokenizer.from_str(json.dumps(state))
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = _byte_fallback_decoder(strip=False)
    backend.add_tokens([AddedToken("▁▁", normalized=False)])
    return _wrapped(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@functools.cache
def unigram(byte_fallback: bool = True, nfkc: bool = False) -> PreTrainedTokenizerFast:
    """T5's family: Metaspace with a dummy prefix; with `nfkc`, its normalizer too."""
    pieces = [(piece, -20.0) for piece in ("<unk>", "</s>")]
    pieces += [(piece, -2.0 - 4 / len(piece)) for piece in _pieces(500, pre_tokenizers.Metaspace())]
    pieces += [(piece, -30.0) for piece in BYTE_PIECES] if byte_fallback else []
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    backend.normalizer = normalizers.NFKC() if nfkc else None
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = _byte_fallback_decoder() if byte_fallback else decoders.Metaspace()
    return _wrapped(backend, unk_token="<unk>", eos_token="</s>")


def _pieces(vocab_size: int, pre_tokenizer, normalizer=None) -> list[str]:
    """Letters, and the pieces that BPE makes of them, in its order."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizer
    trained.normalizer = normalizer
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    return sorted(trained.get_vocab(), key=trained.get_vocab().get)


@functools.cache
def word_piece() -> PreTrainedTokenizerFast:
    """BERT's family: lower case, no accents, whitespace lost."""
    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    pieces = [spelled for piece in _pieces(350, pre_tokenizer, normalizer) for spelled in (piece, f"##{piece}")]
    vocabulary = {piece: n for n, piece in enumerate(["[UNK]", "[SEP]", *pieces])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    return _wrapped(backend, unk_token="[UNK]", sep_token="[SEP]")


@functools.cache
def slow_sentencepiece(model_type: str = "bpe", normalization: str = "identity"):
    """transformers' SentencePiece backend, on a model trained with the sentencepiece library."""
    import sentencepiece
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    folder = Path(tempfile.mkdtemp())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.split("\n")),
        model_prefix=str(folder / "toy"),
        model_type=model_type,
        vocab_size=490,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name=normalization,
        remove_extra_whitespaces=normalization != "identity",
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    return SentencePieceBackend(
        vocab_file=str(folder / "toy.model"), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


LOSSLESS = {
    "byte-level": byte_level,
    "byte-level, single digits": lambda: byte_level(400, digits=1),
    "byte-level, three digits": lambda: byte_level(1200, digits=3),
    "byte-level, prefix space": prefixed_byte_level,
    "metaspace BPE": metaspace_bpe,
    "legacy Llama": legacy_llama,
    "Gemma-like": gemma_like,
    "unigram": unigram,
    "slow SentencePiece": slow_sentencepiece,
}


# Folders of the assets. Lossless on text in NFC, since Qwen's tokenizer normalizes.
REAL_LOSSLESS = [
    "deepseek-v3",
    "gpt2",
    "llama-2",
    "llama-3.2",
    "mistral-v3",
    "phi-3-mini",
    "qwen2.5",
    "smollm2-instruct",
]
REAL = [*REAL_LOSSLESS, "bert-base-uncased", "t5-small"]
