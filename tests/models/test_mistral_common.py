"""With mistral-common installed, a model's own chat template and special tokens are used, or it is refused."""

import base64
import json

import pytest
from toys import prompts, student_model
from transformers import AutoTokenizer

from trl_ctopd.models.loading import load_tokenizer
from trl_ctopd.text.chat import Conversation, Speaker


pytest.importorskip("mistral_common", reason="needs mistral-common: pip install mistral-common")

WORDS = [b"wh", b"at", b"what", b" p", b" pl", b" plus", b"an", b"swer", b"me", b"el", b"mel"]
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
QUESTION = [{"role": "user", "content": "what plus"}]


@pytest.fixture
def tekken(tmp_path):
    """A folder as mistral-common knows it."""
    words = [bytes([n]) for n in range(256)] + WORDS
    config = {
        "pattern": PATTERN,
        "num_vocab_tokens": len(words),
        "default_vocab_size": 1000 + len(words),
        "default_num_special_tokens": 1000,
        "version": "v3",
    }
    vocab = [
        {"rank": n, "token_bytes": base64.b64encode(word).decode(), "token_str": word.decode(errors="ignore")}
        for n, word in enumerate(words)
    ]
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    return tmp_path


@pytest.fixture
def both(tekken):
    """A folder with a tokenizer for transformers besides."""
    tokenizer = AutoTokenizer.from_pretrained(tekken, mistral_format=False, fix_mistral_regex=True)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tekken)
    return tekken


def test_the_own_template_turn_ends_and_special_tokens_are_used_where_there_are_some(both):
    common = AutoTokenizer.from_pretrained(both)
    assert type(common).__name__ == "MistralCommonBackend"
    side = Speaker(load_tokenizer(None, str(both), None, False))
    ids = side.prompt_ids(Conversation(QUESTION))
    assert ids == common.apply_chat_template(QUESTION)["input_ids"]
    assert side.tokenizer.decode(ids) == "<s>[INST]what plus[/INST]"
    assert side.turn_end == side.stop_ids() == [common.eos_token_id]


def test_a_tokenizer_for_mistral_common_alone_is_refused_with_the_way_out(tekken):
    with pytest.raises(ValueError, match="for mistral-common alone.*pass as processing class"):
        load_tokenizer(None, str(tekken), None, False)


def test_mistral_commons_own_tokenizer_is_refused_with_the_way_out(both, build):
    common = AutoTokenizer.from_pretrained(both)
    for argument in ("processing_class", "teacher_processing_class"):
        with pytest.raises(TypeError, match="MistralCommonBackend writes prompts without .*mistral_format=False"):
            build(**{argument: common})


def test_two_tokenizers_that_read_a_text_differently_are_refused(both):
    file = both / "tokenizer.json"
    said = json.loads(file.read_text())
    said["model"]["merges"] = []
    file.write_text(json.dumps(said))
    with pytest.raises(ValueError, match="the two read one text differently"):
        load_tokenizer(None, str(both), None, False)


def test_a_student_with_both_tokenizers_trains(both, build):
    tokenizer = load_tokenizer(None, str(both), None, False)
    trainer = build(model=student_model(vocab_size=len(tokenizer)), processing_class=tokenizer, dataset=prompts(4))
    trainer.train()
    assert trainer.state.log_history[0]["alignment/masked_fraction"] < 1
