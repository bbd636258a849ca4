"""On-policy distillation of language models across tokenizers, as a Hugging Face TRL trainer.

Imports run one way: text -> losses, models -> config -> rollouts -> teachers -> training -> looking -> trainer. The maths
(`text`, `losses`) imports without TRL. Every public name but `token_bytes` is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .text.token_bytes import UnsupportedTokenizerError, token_bytes


if TYPE_CHECKING:
    from .config import CrossTokenizerGKDConfig
    from .looking.report import DistillationReportCallback
    from .preference import CrossTokenizerDPOConfig, CrossTokenizerDPOTrainer
    from .text.aligner import TextAligner, TextAlignment, align_text
    from .trainer import CrossTokenizerGKDTrainer

__version__ = "0.1.0"

__all__ = [
    "CrossTokenizerDPOConfig",
    "CrossTokenizerDPOTrainer",
    "CrossTokenizerGKDConfig",
    "CrossTokenizerGKDTrainer",
    "DistillationReportCallback",
    "TextAligner",
    "TextAlignment",
    "UnsupportedTokenizerError",
    "align_text",
    "token_bytes",
]

_MODULES = {
    "CrossTokenizerDPOConfig": "preference",
    "CrossTokenizerDPOTrainer": "preference",
    "CrossTokenizerGKDConfig": "config",
    "CrossTokenizerGKDTrainer": "trainer",
    "DistillationReportCallback": "looking.report",
    "TextAligner": "align",
    "TextAlignment": "align",
    "align_text": "align",
}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *__all__})
