"""One completion through two tokenizers, made to be looked at: in a notebook, in a browser, in a terminal.

`TextAlignment` shows itself (`alignment` as a notebook cell's last line, `.to_html(path)`, `.print()`), and so does a
`ScoredRollout`: the same with both models' log-probs and each student token's credit. `ctopd align` is the command
line. Nothing here is loaded before it is asked for.
"""

__all__ = ["ScoredRollout", "alignment_of", "stylesheet", "with_turn_end"]


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
