"""On-policy distillation of language models across tokenizers, as a Hugging Face TRL trainer.

The maths (`token_bytes`, `align`, `alignment`, `credit`, `losses`) imports without TRL; the trainer, its config and
its report are loaded on first use, and so is `align`, which is also a command (`python -m trl_ctopd.align`).
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .token_bytes import UnsupportedTokenizerError, token_bytes


if TYPE_CHECKING:
    from .align import TextAligner, TextAlignment, align_text
    from .config import CrossTokenizerGKDConfig
    from .report import DistillationReportCallback
    from .trainer import CrossTokenizerGKDTrainer

__version__ = "0.1.0"

__all__ = [
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
    "CrossTokenizerGKDConfig": "config",
    "CrossTokenizerGKDTrainer": "trainer",
    "DistillationReportCallback": "report",
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
