"""A LoRA adapter merged into its base weights for a while, as generation wants it: an adapter beside the weights costs two more
matrix products a layer and token.

Decisions
- PEFT merges, into a copy of each weight. The weights themselves are kept, and put back afterwards: nothing drifts, however often
  it is done. Its `safe_merge` would copy too, and look at every weight three times more. It takes the memory of the adapted weights once more while it lasts.
- A layer whose weights are quantized, sharded, shared with another layer, or adapted otherwise than by plain LoRA stays as it is.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .products import OneDnnLinear


_PLAIN = (Linear, Embedding, Conv1d, Conv2d, Conv3d)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def mergeable(model: nn.Module) -> list[LoraLayer]:
    """The LoRA layers of `model` that `merged` merges: unquantized, unshared, with plain LoRA that is switched on and not merged."""
    uses = _uses(model)
    return [module for module in model.modules() if type(module) in _PLAIN and _is_plain(module, uses)]


def adapted_where_tied(model: nn.Module) -> list[str]:
    """The names of layers with an adapter whose weight another layer has too. Merged, the adapter is in both; with PEFT's `ensure_weight_tying`
    it is so twice (findings/adapters_of_tied_weights_are_merged_twice.sh). And of layers that are trained whole (`modules_to_save`) where
    the other keeps the old weight (findings/the_engine_ties_what_was_trained_apart.sh)."""
    uses = _uses(model)

    def shared(module: nn.Module) -> int:
        return max((uses[id(weight)] for weight in module._parameters.values() if weight is not None), default=0)

    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, BaseTunerLayer) and shared(module.get_base_layer()) > 1)
        or (
            isinstance(module, ModulesToSaveWrapper)
            and any(shared(module.original_module) > shared(trained) for trained in module.modules_to_save.values())
        )
    ]


def _uses(model: nn.Module) -> Counter:
    """In how many modules each weight is, by its `id`."""
    return Counter(
        id(weight)
        for _, module in model.named_modules(remove_duplicate=False)
        for weight in module._parameters.values()
    )


def _is_plain(layer: LoraLayer, uses: Counter) -> bool:
    base = layer.get_base_layer()
    weight, bias = base.weight, getattr(base, "bias", None)
    return (
        type(weight) is nn.Parameter
        and weight.dtype in _DTYPES
        and weight.device.type != "meta"
        and weight.numel() > 0
        and uses[id(weight)] == 1
        and not layer.lora_variant
        and not (bias is None and any(layer.lora_bias.values()))  # there is none to merge the adapter's into
        and not layer.merged
        and not layer.disable_adapters
    )


@contextmanager
def bases_kept(model: nn.Module) -> Iterator[None]:
    """Within, adapters of any kind may be merged in place and taken out again, which rounds; afterwards the weights are what they were before, to
    the bit, and as many adapters are merged. Takes the memory of the adapted weights once more."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    states = [layer.merged_adapters[:] for layer in layers]
    bases = dict.fromkeys(layer.get_base_layer() for layer in layers)
    # a merge into quantized weights makes other parameters
    kept = [(base, name, p, p.data.clone()) for base in bases for name, p in base._parameters.items() if p is not None]
    try:
        yield
    finally:
        for base, name, parameter, data in kept:
            base._parameters[name] = parameter
            parameter.data.copy_(data)
        for layer, before in zip(layers, states, strict=True):
            layer.merged_adapters[:] = before


@contextmanager
def merged(layers: Sequence[LoraLayer], in_place: bool = False, pack: bool = False) -> Iterator[None]:
    """Within, these layers of `mergeable` are merged. `in_place`: no weight changes its address, which a CUDA graph has recorded. `pack`: where
    layers multiply by oneDNN, the merged weights are packed ([`OneDnnLinear`])."""
    bases = [layer.get_base_layer() for layer in layers]
    packed = {base for base in bases if pack and isinstance(base, OneDnnLinear)}
    parameters = [p for base in bases for p in base.parameters(recurse=False)]
    kept = [(p, p.data.clone() if in_place else p.data) for p in parameters]
    try:
        for layer, base in zip(layers, bases, strict=True):
            weight = base.weight.data
            if not in_place:
                for parameter in base.parameters(recurse=False):
                    parameter.data = parameter.data.clone()
            layer.merge()
            if base in packed:
                base.pack()
                base.weight.data = weight
        yield
    finally:
        for base in packed:
            base.packed = None
        for parameter, data in kept:
            if in_place:
                parameter.data.copy_(data)
            else:
                parameter.data = data
        for layer in layers:
            layer.merged_adapters.clear()
