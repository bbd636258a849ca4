"""The methods, one a file, behind one call: `loss(batch, num_items) -> (value, metrics)`."""

import pickle
from collections.abc import Callable

from .alm import ALM
from .base import Loss, Metrics, ScoredChunks
from .bpm import BPM
from .cdm import CDM
from .distributions import Distributions
from .dpca import DPCA
from .escd import ESCD
from .gold import GOLD
from .gvpo import GVPO
from .multi_level_ot import MultiLevelOT
from .reverse_kl import ReverseKL
from .sft import SFT
from .simct import SimCT
from .strict_sampled import StrictSampled
from .strict_topk import StrictTopK
from .uld import ULD
from .xtoken import XToken


AUTO = "auto"  # the trainer chooses: see `training.choice.with_loss`
LOSSES: dict[str, type[Loss]] = {
    "dpca": DPCA,
    "reverse_kl": ReverseKL,
    "strict_sampled": StrictSampled,
    "strict_topk": StrictTopK,
    "simct": SimCT,
    "bpm": BPM,
    "escd": ESCD,
    "alm": ALM,
    "gvpo": GVPO,
    "uld": ULD,
    "multi_level_ot": MultiLevelOT,
    "gold": GOLD,
    "xtoken": XToken,
    "cdm": CDM,
    "sft": SFT,
}

__all__ = [
    *(loss.__name__ for loss in LOSSES.values()),
    "AUTO",
    "LOSSES",
    "Distributions",
    "Loss",
    "Metrics",
    "ScoredChunks",
]
__all__ += ["build_loss", "loss_name"]


def build_loss(loss: str | Callable, **kwargs) -> Callable:
    """
    The loss of that name with its knobs set; a callable with the same signature is taken as it is.

    Raises:
        ValueError: for an unknown name or knob, naming the known ones; for a loss that could not be saved.
    """
    if isinstance(loss, LostLoss):
        raise ValueError(str(loss))
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
    """What a loss is called: by its name in the config, by that of its own function or class, with its module where that
    could be taken for a name of the config."""
    if isinstance(loss, str):
        return loss
    named = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"{named.__module__}.{named.__qualname__}" if named.__qualname__ in LOSSES else named.__qualname__


class LostLoss:
    """Stands for a loss that was saved as something that cannot be loaded here: a function of a notebook, a closure."""

    def __init__(self, name: str):
        self.__qualname__ = name

    def __str__(self) -> str:
        return (
            f"The loss {self.__qualname__!r} of this saved config is not there: only a function or a class of a module that can "
            "be imported is saved whole. Set `distillation_loss` anew."
        )

    def __call__(self, batch, num_items):
        raise ValueError(str(self))


def saved_loss(loss: str | Callable) -> str | tuple[str, bytes | None]:
    """What a pickle can always take in, for `loaded_loss`: the name, and beside it the loss itself as far as it can be saved."""
    if isinstance(loss, str):
        return loss
    try:
        data = pickle.dumps(loss)
    except (pickle.PicklingError, AttributeError, TypeError):
        data = None
    return loss_name(loss), data


def loaded_loss(saved: str | tuple[str, bytes | None]) -> str | Callable:
    """What `saved_loss` was given; a [`LostLoss`] where that cannot be loaded in this process."""
    if isinstance(saved, str):
        return saved
    name, data = saved
    try:
        return LostLoss(name) if data is None else pickle.loads(data)
    except (pickle.UnpicklingError, AttributeError, ImportError):
        return LostLoss(name)
