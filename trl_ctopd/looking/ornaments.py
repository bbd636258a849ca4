"""What a run is looked at by, and never stopped by: the card, its picture, the licences, the report, the table of completions.

Decisions: whatever goes wrong in one is said with its reason, and training goes on; so `Exception` is caught here, and nowhere
else.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.logging import get_logger
from accelerate.state import PartialState


logger = get_logger(__name__)


@contextmanager
def ornament(name: str) -> Iterator[None]:
    """What fails within costs the run `name`, and one line in its log."""
    try:
        yield
    except Exception as error:
        PartialState()  # which the logger asks whether this is the main process
        logger.warning(f"{name} is left out, and the run goes on without it: {type(error).__name__}: {error}")
