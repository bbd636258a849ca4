"""Models whose weights are quantized: how a saved one was, and whether what lies below its layers can be trained.

Decision: no list of libraries says which kernels have a backward pass. It depends on the device, the precision and the version, and
where there is none the loss still falls, by what lies above. So each kind of layer is run once.
"""

import json
from contextlib import nullcontext

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import cached_file


_ADAPTER = "lora_"


def saved_config(name: str, revision: str | None = None) -> dict:
    """The config.json of a saved model; empty where it is not found."""
    try:
        file = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return {}
    if file is None:
        return {}
    with open(file, encoding="utf-8") as opened:
        return json.load(opened)


def saved_quantization(name: str, revision: str | None = None) -> dict | None:
    """What the config.json of a saved model says of its quantization; None for a plain model, and for one that is not found."""
    config = saved_config(name, revision)
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")


def with_quantization_config(kwargs: dict) -> dict:
    """`kwargs` of `from_pretrained`, with a `quantization_config` that is a dict (from JSON, as a command line gives it) made
    into transformers' class: beside the config of a model that was saved quantized it takes nothing else. One that is None is left
    out: with it, transformers' auto classes read what was saved quantized as plain weights, which are noise."""
    given = kwargs.get("quantization_config")
    if given is None:
        return {name: value for name, value in kwargs.items() if name != "quantization_config"}
    if not isinstance(given, dict):
        return kwargs
    return {**kwargs, "quantization_config": AutoQuantizationConfig.from_dict(dict(given))}


def dequantizes(quantization_config) -> bool:
    """Whether a `quantization_config` of `from_pretrained`, a dict or transformers' class, makes plain weights of what is saved quantized."""
    if isinstance(quantization_config, dict):
        return bool(quantization_config.get("dequantize"))
    return bool(getattr(quantization_config, "dequantize", False))


def _keep_dtype(module: ModulesToSaveWrapper):
    weight = getattr(module.original_module, "weight", None)
    if weight is not None and weight.is_floating_point():
        module.modules_to_save.to(weight.dtype)


def prepare_quantized(model: PreTrainedModel, autocast=nullcontext):
    """
    Makes a student that is quantized one that adapters can be trained on, and does nothing to a plain one. On a CPU that computes in
    bfloat16, bitsandbytes packs 4-bit weights for inference at the first pass in eval mode, which is the first rollout, and from then
    on no gradient passes: they stay unpacked. Modules that PEFT trains whole keep the dtype of the model's own: TRL makes all that is
    trained of a quantized student bfloat16, and such a module multiplies the model's states, in generation without autocast.

    Raises `ValueError` where a layer of a quantized `model` passes another gradient to its input than its output depends on it by:
    adapters below such a layer would learn nothing, or something else, while those above learn. One of each kind is tried.

    The layer is affine up to rounding: with v = (y(x) - y(-x)) / 2, the gradient g of <y(x), v> has <g, x> = <v, v>.
    """
    if getattr(model, "hf_quantizer", None) is None and not any(map(_of_own_class, model.parameters())):
        return
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        if isinstance(layer, ModulesToSaveWrapper):
            _keep_dtype(layer)
    known = set()
    head = model.get_output_embeddings()
    for name, layer in model.named_modules():
        kind = _kind(layer)
        if kind is None or layer is head or _ADAPTER in name or kind in known:
            continue
        known.add(kind)
        share = _share_of_gradient(layer, model.get_input_embeddings().weight.dtype, autocast)
        if share is not None and not abs(share - 1) < 0.3:
            way = (
                "bitsandbytes has packed it for inference, at a pass in eval mode on this CPU: load the student again, and run nothing before."
                if hasattr(layer, "support_avx512bf16_for_cpu")
                else "Load its plain weights, dequantize it (`quantization_config` with `dequantize=True`, where its method has that), take "
                "a quantization that bitsandbytes makes, or try float32 weights (bf16=False)."
            )
            raise ValueError(
                f"The student is quantized, and its {type(layer).__name__} {name.removesuffix('.base_layer')} gives its input {share:.0%} of "
                f"the gradient: what lies below would not be trained. {way}"
            )


def _of_own_class(weight: torch.Tensor) -> bool:
    return type(weight.data) is not torch.Tensor and not isinstance(weight, DTensor)


def _kind(layer: nn.Module) -> tuple | None:
    """What layers that compute alike have in common; None for a plain layer, and where it is none of a matrix product."""
    sizes = tuple(getattr(layer, name, None) for name in ("in_features", "out_features"))
    if not all(isinstance(size, int) for size in sizes) or hasattr(layer, "base_layer"):
        return None
    own, weight = "forward" in vars(layer), getattr(layer, "weight", None)
    kept_as = type(weight.data if isinstance(weight, nn.Parameter) else weight)
    if type(layer) is nn.Linear and not own and kept_as is torch.Tensor:
        return None
    return type(layer), own, kept_as, sizes


def _share_of_gradient(layer: nn.Module, dtype: torch.dtype, autocast) -> float | None:
    """<g, x> / <v, v> of a layer as it is trained, after it has written; None where it is not here, or gives more than a tensor."""
    parts = [*layer.parameters(), *layer.buffers()]
    if not parts or any(
        isinstance(part, DTensor) or hasattr(part, "ds_id") or part.device.type == "meta" for part in parts
    ):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, layer.in_features, generator=generator).to(parts[0].device, dtype).requires_grad_()
    training = layer.training
    try:
        with torch.no_grad(), autocast():
            layer.eval()(x.detach())
        layer.train()
        with torch.enable_grad(), autocast():
            y, opposite = layer(x), layer(-x)
            if not isinstance(y, torch.Tensor):
                return None
            v = ((y - opposite) / 2).detach().double()
            product = (y.double() * v).sum()
        if not product.requires_grad:
            return 0.0
        (gradient,) = torch.autograd.grad(product, x, allow_unused=True)
    finally:
        layer.train(training)
    if gradient is None:
        return 0.0
    return ((gradient.double() * x.detach().double()).sum() / v.square().sum()).item()
