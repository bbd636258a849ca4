"""On-policy distillation of language models across tokenizers, as a Hugging Face TRL trainer.

The maths (`token_bytes`, `align`, `alignment`, `credit`, `losses`) imports without TRL; the trainer and its config are
loaded on first use.
"""

from .align import TextAligner, TextAlignment, align_text
from .token_bytes import UnsupportedTokenizerError, token_bytes


__version__ = "0.1.0"

__all__ = [
    "CrossTokenizerGKDConfig",
    "CrossTokenizerGKDTrainer",
    "TextAligner",
    "TextAlignment",
    "UnsupportedTokenizerError",
    "align_text",
    "token_bytes",
]


def __getattr__(name):
    if name == "CrossTokenizerGKDConfig":
        from .config import CrossTokenizerGKDConfig as value
    elif name == "CrossTokenizerGKDTrainer":
        from .trainer import CrossTokenizerGKDTrainer as value
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return value


def __dir__():
    return sorted({*globals(), *__all__})
