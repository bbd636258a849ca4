"""Shows one completion under two tokenizers: in a notebook, in a browser, in a terminal.

`TextAlignment` shows itself (`alignment` as the last line of a notebook cell, `.to_html(path)`, `.print()`). So does
`ScoredRollout`: the same with both models' log-probs and each student token's credit. The command line is `ctopd align`.
Modules here are loaded on first use.
"""

__all__ = ["ScoredRollout", "alignment_of", "as_compared", "stylesheet", "with_turn_end"]


def __getattr__(name):
    if name == "stylesheet":
        from .html import stylesheet as value
    elif name in __all__:
        from . import scored

        value = getattr(scored, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return value


def __dir__():
    return sorted({*globals(), *__all__})
