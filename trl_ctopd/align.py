"""`python -m trl_ctopd.align`: how two tokenizers cut a text, from a shell (`ctopd align` is the same)."""

from .looking.viewer.shown import TextAlignment
from .text.aligner import TextAligner, align_text


__all__ = ["TextAligner", "TextAlignment", "align_text"]

if __name__ == "__main__":
    from .looking.viewer.cli import main

    main()
