"""The methods, one a file, behind one call: `loss(batch, num_items) -> (value, metrics)`."""

from collections.abc import Callable

from .alm import ALM
from .base import Loss, Metrics, ScoredChunks
from .dpca import DPCA
from .sft import SFT


LOSSES: dict[str, type[Loss]] = {"dpca": DPCA, "alm": ALM, "sft": SFT}

__all__ = ["ALM", "DPCA", "LOSSES", "SFT", "Loss", "Metrics", "ScoredChunks", "build_loss"]


def build_loss(loss: str | Callable, **kwargs) -> Callable:
    """
    The loss of that name with its knobs set; a callable with the same signature is taken as it is.

    Raises:
        ValueError: for an unknown name or knob, naming the known ones.
    """
    if callable(loss):
        if kwargs:
            raise ValueError(f"A callable loss sets its own knobs; got {', '.join(sorted(kwargs))} beside it.")
        return loss
    if loss not in LOSSES:
        raise ValueError(f"Unknown loss {loss!r}: choose one of {', '.join(LOSSES)}, or pass a callable.")
    return LOSSES[loss].build(loss, kwargs)
