"""A model's forward pass, and what trainers leave on it.

Accelerate puts the autocast of a trainer around the forward pass of its model and marks the model, where it stays when the trainer is done.
A model that several trainers of a process have, in turns, would compute in the precision of whichever came first, or last. So each of
ours takes off what another has left, and has its own put on, before it computes.
"""

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from contextlib import contextmanager

from accelerate.utils.operations import ConvertOutputsToFp32
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .sharding import SHARDING


_LAST = weakref.WeakKeyDictionary()  # the accelerator that each model has been prepared for last


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def prepare_anew(model: nn.Module, accelerator):
    """
    Makes `model` compute in the precision of `accelerator`, where another trainer's was the last to prepare it, or none. What this one has
    prepared already gets its autocast again, as it is for an evaluation; else its trainer prepares the model next. A sharded model stays
    as it is.
    """
    last = _LAST.get(model)
    if (last and last()) is accelerator:
        return
    prepared = [*accelerator._models]
    if prepared and accelerator.distributed_type in SHARDING:
        return
    forget_preparation(model)
    if prepared:
        accelerator.prepare_model(model, evaluation_mode=True)
        accelerator._models[:] = prepared
    _LAST[model] = weakref.ref(accelerator)


@contextmanager
def left_unprepared(model: nn.Module, accelerator):
    """
    An evaluation inside this block leaves a `model` that has not been trained yet as it was. For an evaluation, Trainer has
    Accelerate prepare the model without training; Accelerate would then return the same model for training, unwrapped, and
    its gradients would not be synchronised.

    Raises `ValueError` for a model that will be sharded, since that can be prepared only together with its optimizer.
    """
    first = not accelerator._models
    if first and accelerator.distributed_type in SHARDING:
        raise ValueError(
            f"Under {accelerator.distributed_type.value} the student is prepared together with its optimizer, when training begins: "
            "evaluate or predict after `train()`, or set eval_on_start=True for figures from before the first step."
        )
    prepare_anew(model, accelerator)
    try:
        yield
    finally:
        if first and model in accelerator._models:
            accelerator._models.remove(model)
            forget_preparation(model)


def forget_preparation(model: nn.Module):
    """Makes Accelerate prepare `model` as if no trainer had trained it: an earlier one leaves its autocast on the forward pass, in which a later one
    computes too, whatever its own precision, and a mark for which a later one's own autocast is left out (findings/the_first_precision_stays.sh).
    """
    _LAST.pop(model, None)
    for part in (model, base_model(model)):
        part.__dict__.pop("_is_accelerate_prepared", None)
        part.__dict__.pop("_original_forward", None)  # by which Accelerate would take its autocast off
        if "forward" not in part.__dict__:
            continue
        if hasattr(part.forward, "__func__"):
            part.forward = types.MethodType(of_any(part.forward), part)
        else:
            part.forward = _without_autocast(part.forward)


def unbind_forward(model: PreTrainedModel):
    """Makes a deep copy of `model` compute with its own weights, after TRL has added its fused head, beneath which it keeps the forward pass of
    `model` (findings/copies_compute_as_the_original.sh)."""
    model.forward = types.MethodType(of_any(model.forward), model)


def of_any(forward: Callable) -> Callable:
    """A model's `forward` as a function of the model, and so that of a deep copy too; without the autocast of an earlier trainer."""
    if not hasattr(forward, "__func__"):  # a hook of Accelerate's
        hooked = _without_autocast(forward)
        return lambda _, *args, **kwargs: hooked(*args, **kwargs)
    function = _without_autocast(forward.__func__)
    beneath = inspect.getclosurevars(function).nonlocals.get("original_forward")
    if beneath is None:
        return function
    plain = of_any(beneath)

    @functools.wraps(function)
    def own(self, *args, fused_lm_head=False, **kwargs):
        if fused_lm_head:
            return function(self, *args, fused_lm_head=True, **kwargs)
        return plain(self, *args, **kwargs)

    return own


def _without_autocast(forward: Callable) -> Callable:
    """What Accelerate has put its autocast around, as often as it has. (Its own `unwrap_model` also takes off what others put beneath.)"""
    while isinstance(outer := getattr(forward, "__wrapped__", None), ConvertOutputsToFp32):
        forward = outer.model_forward.__wrapped__
    return forward
