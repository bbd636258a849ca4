"""Tokenizers as they come with models, and whether the two fit: vocabulary, pad token, context."""

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(tokenizer, model_id, revision, trust_remote_code) -> PreTrainedTokenizerBase:
    """`tokenizer`, or the one saved with the model where it is None. Raises `TypeError` for anything but a
    tokenizer.
    """
    if tokenizer is None:
        return AutoTokenizer.from_pretrained(model_id, revision=revision, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"A processing class must be a text tokenizer, got {type(tokenizer).__name__}: pass its `.tokenizer`."
        )
    return tokenizer


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, pad_token: str | None):
    """Gives `tokenizer` a pad token: the one asked for, its own, or its EOS. Raises `ValueError` where there is
    none.
    """
    pad_token = pad_token or tokenizer.pad_token or tokenizer.eos_token
    if pad_token is None or pad_token not in tokenizer.get_vocab():
        missing = "no pad token and no eos_token to pad with" if pad_token is None else f"no token {pad_token!r}"
        raise ValueError(
            f"{type(tokenizer).__name__} has {missing}: set `pad_token` in the config to a token of its vocabulary."
        )
    tokenizer.pad_token = pad_token


def check_vocabulary(side: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
    """Raises `ValueError` where the tokenizer has ids that the model does not embed."""
    if any(type(module).__name__ == "TrainableTokensLayer" for module in model.modules()):
        raise ValueError(
            f"The {side} has `trainable_token_indices`, whose rows are no part of its embedding's own weight: choose "
            "`modules_to_save=['embed_tokens', 'lm_head']` instead."
        )
    embeddings = model.get_input_embeddings()
    rows = (embeddings.get_base_layer() if isinstance(embeddings, BaseTunerLayer) else embeddings).num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ValueError(
            f"The {side}'s tokenizer has ids up to {highest}, but its model embeds {rows} tokens: this is not the model's "
            "tokenizer, or `model.resize_token_embeddings(len(tokenizer))` is missing."
        )
