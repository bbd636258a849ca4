"""`ctopd`: the package's commands, one in each file. None of them loads torch to print its help."""

import argparse
import sys
from collections.abc import Sequence

from .. import __version__


_ABOUT = """On-policy distillation of language models across tokenizers.

  ctopd distill   train a student on its own completions, scored by a teacher with another tokenizer
  ctopd prefer    train a student on pairs of answers, with a teacher with another tokenizer as the reference
  ctopd align     how two tokenizers cut a text, or how much they differ over a file
  ctopd plan      estimate the GPU memory of a run before it starts

`ctopd COMMAND --help` explains each one."""


def _distill(arguments: Sequence[str]) -> None:
    from .distill import main

    main(arguments)


def _prefer(arguments: Sequence[str]) -> None:
    from .prefer import main

    main(arguments)


def _align(arguments: Sequence[str]) -> None:
    from ..looking.viewer.cli import main

    main(arguments, prog="ctopd align")


def _plan(arguments: Sequence[str]) -> None:
    from ..looking.plan.cli import main

    main(arguments)


COMMANDS = {"distill": _distill, "prefer": _prefer, "align": _align, "plan": _plan}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in COMMANDS:
        COMMANDS[arguments[0]](arguments[1:])
        return
    parser = argparse.ArgumentParser(
        prog="ctopd", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    parser.add_argument("--version", action="version", version=__version__)
    parser.parse_args(arguments)
