"""The parts of a run that must never stop it: card, learning curve, licenses, report, table of completions.

Decisions: a failure in one of them is logged with its reason, and training continues. `Exception` is caught here, and nowhere
else.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.logging import get_logger
from accelerate.state import PartialState


logger = get_logger(__name__)


@contextmanager
def best_effort(name: str) -> Iterator[None]:
    """If the block fails, `name` is left out, and the log says so in one line."""
    try:
        yield
    except Exception as error:
        PartialState()  # the logger needs it to find out whether this is the main process
        logger.warning(f"{name} is left out, and the run goes on without it: {type(error).__name__}: {error}")
