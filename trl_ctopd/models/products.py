"""Matrix products of a CPU, by the faster of the two libraries that torch is built with.

torch takes MKL for a linear layer in float32. No setting of torch's changes that, so layers are switched to oneDNN here where it is faster, in
float32 as before: results differ by rounding.

- On an AMD processor with AVX-512, MKL (2024.2, in torch 2.13) uses AVX2 alone, and has half of oneDNN's speed
  (findings/amd_products_at_half_speed.sh): all products are oneDNN's.
- On an Intel processor with AVX-512 the two are alike, but for 4 to some 30 rows, as many as are written at the same time: MKL takes twice as long for
  four rows as for three, and oneDNN with packed weights half to two thirds of MKL's time (findings/four_rows_cost_twice.sh). Only these are oneDNN's.
"""

import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from .sharding import SHARDING


LEAST = 2**20  # multiplications in a product; a call of oneDNN takes 10 µs more, which a smaller one does not win back
_LEAST_PACKED = 2**16  # weights of a layer; an adapter's own are fewer
_FEWEST = 4  # rows that MKL multiplies at half speed on an Intel processor


def onednn_packs() -> bool:
    """Whether this is a processor with AVX-512, where packed weights are faster for few rows, and torch has both libraries."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


@functools.cache
def onednn_is_faster() -> bool:
    """Whether all products are faster by oneDNN: on an AMD processor with AVX-512."""
    return onednn_packs() and "AuthenticAMD" in _processor()


def packing_is_faster(rows: int) -> bool:
    """Whether packed weights are faster where so many rows are written, and fewer once some have ended."""
    return onednn_is_faster() or onednn_packs() and rows >= _FEWEST


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8", errors="replace") if info.exists() else platform.processor()


class OneDnnLinear(nn.Linear):
    """
    A linear layer that multiplies by oneDNN where its input and weight are plain float32 tensors on the CPU and this is faster, and as
    `nn.Linear` else.

    Attributes:
        packed: for a while, what it multiplies by in the place of `weight`, in oneDNN's own layout. Without gradients. Not where a weight
            is made for each pass (parametrizations, such as PEFT's `target_parameters`, weight and spectral norm).
    """

    packed: torch.Tensor | None = None

    def pack(self):
        """Few rows take half of the time with weights that are packed."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.data)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.packed is not None and "weight" in self._parameters:
            if _fits(input, self.weight, self.bias):
                return product(input, self.packed, self.bias)
            return nn.functional.linear(input, self.packed.to_dense(), self.bias)
        plain = torch.compiler.is_compiling() or type(self.weight) is not nn.Parameter
        if plain or not onednn_is_faster() or not _pays(input, self.weight, self.bias):
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias)


def _pays(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Whether oneDNN can take this product of (..., K) and (N, K), and it is large enough."""
    return _fits(input, weight, bias) and input.numel() * len(weight) >= LEAST


def _fits(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether oneDNN can take this product. Of a bias it reads N numbers in a row, whatever its shape and strides."""
    return (
        input.dtype == weight.dtype == torch.float32
        and input.device.type == weight.device.type == "cpu"
        and type(input) is torch.Tensor
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and (bias is None or bias.shape == weight.shape[:1] and bias.is_contiguous())
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, bias):
        # a frozen weight's gradient would be all that needs the input
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        return product(input, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        by = nn.functional.linear if torch.is_grad_enabled() else product  # torch's has a second derivative
        return (
            by(grad, weight.t()) if wanted[0] else None,
            _outer(rows, input.reshape(-1, input.shape[-1]), by) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


def _outer(left: torch.Tensor, right: torch.Tensor, by: Callable) -> torch.Tensor:
    """leftᵀ right (N, K) of (n, N) and (n, K), `by` this product. oneDNN copies its first factor if it is transposed, so that the narrower one comes first."""
    if left.shape[1] > right.shape[1]:
        return by(right.t(), left.t()).t()
    return by(left.t(), right.t())


def product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., K) and (N, K) to (..., N), as `torch.nn.functional.linear`, by oneDNN. The result is no view, so that it can be changed in place."""
    rows = input.reshape(-1, input.shape[-1])
    made = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return torch.ops.aten._unsafe_view(made, (*input.shape[:-1], made.shape[-1]))


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` by the faster library, with its gradients."""
    if onednn_is_faster() and _pays(input, weight, bias):
        return _Linear.apply(input, weight, bias)
    return nn.functional.linear(input, weight, bias)


def multiply(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor):
    """(n, K) and (N, K) to (n, N) in `out`, by the faster library. Nothing is recorded for a gradient."""
    if onednn_is_faster() and _pays(rows, weight):
        out.copy_(product(rows, weight))
    else:
        torch.mm(rows, weight.t(), out=out)


def use_faster_products(model: nn.Module, accelerator) -> list[nn.Linear]:
    """
    Switches `model`'s linear layers on the CPU in place, where that is faster, and returns those it has switched. Layers of other
    classes, quantized ones among them, stay, and so do all where DeepSpeed or FSDP splits weights over processes.
    """
    if not onednn_packs() or accelerator.distributed_type in SHARDING:
        return []
    plain = [own for own in model.modules() if type(own) is nn.Linear and own.weight.device.type == "cpu"]
    for own in plain:
        own.__class__ = OneDnnLinear
    return plain


@contextmanager
def faster_products(model: nn.Module, accelerator) -> Iterator[None]:
    """`use_faster_products` for a while: afterwards the layers are `nn.Linear` again, as other libraries look for them."""
    switched = use_faster_products(model, accelerator)
    try:
        yield
    finally:
        for own in switched:
            own.__class__ = nn.Linear


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Within, `model`'s layers that multiply by oneDNN do so by packed copies of their weights, which take the memory of these once more."""
    layers = [own for own in model.modules() if isinstance(own, OneDnnLinear) and own.packed is None]
    layers = [own for own in layers if own.weight.dtype == torch.float32 and own.weight.numel() >= _LEAST_PACKED]
    try:
        for own in layers:
            own.pack()
        yield
    finally:
        for own in layers:
            own.packed = None
