"""The methods, one a file, behind one call: `loss(batch, num_items) -> (value, metrics)`."""

from collections.abc import Callable

from .alm import ALM
from .base import Loss, Metrics, ScoredChunks
from .bpm import BPM
from .cdm import CDM
from .distributions import Distributions
from .dpca import DPCA
from .escd import ESCD
from .gold import GOLD
from .multi_level_ot import MultiLevelOT
from .sft import SFT
from .simct import SimCT
from .strict_sampled import StrictSampled
from .strict_topk import StrictTopK
from .uld import ULD
from .xtoken import XToken


LOSSES: dict[str, type[Loss]] = {
    "dpca": DPCA,
    "strict_sampled": StrictSampled,
    "strict_topk": StrictTopK,
    "simct": SimCT,
    "bpm": BPM,
    "escd": ESCD,
    "alm": ALM,
    "uld": ULD,
    "multi_level_ot": MultiLevelOT,
    "gold": GOLD,
    "xtoken": XToken,
    "cdm": CDM,
    "sft": SFT,
}

__all__ = [*(loss.__name__ for loss in LOSSES.values()), "LOSSES", "Distributions", "Loss", "Metrics", "ScoredChunks"]
__all__ += ["build_loss", "loss_name"]


def build_loss(loss: str | Callable, **kwargs) -> Callable:
    """
    The loss of that name with its knobs set; a callable with the same signature is taken as it is.

    Raises:
        ValueError: for an unknown name or knob, naming the known ones.
    """
    if isinstance(loss, type):
        raise ValueError(f"A loss is a function or an object that can be called, not a class: {loss.__name__}(...).")
    if callable(loss):
        if kwargs:
            raise ValueError(f"A callable loss sets its own knobs; got {', '.join(sorted(kwargs))} beside it.")
        return loss
    if loss not in LOSSES:
        raise ValueError(f"Unknown loss {loss!r}: choose one of {', '.join(LOSSES)}, or pass a callable.")
    return LOSSES[loss].build(loss, kwargs)


def loss_name(loss: str | Callable) -> str:
    """What a loss is called: by its name in the config, by that of its own function or class."""
    return loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__qualname__)
