"""Linear layers on a CPU for a few rows at a time, as decoding has them.

A decode step is limited by how fast the weights are read. The library that torch calls for float32 rearranges them for each
product of 3 to 32 rows, which takes twice the time of reading them. `few_rows.c` reads them once, where they are.

Decisions
- The machine's own C compiler builds it when it is first needed (half a second), for the processor that it is on. Where there
  is none, or the result is not torch's to rounding, layers stay torch's, and the reason is logged once.
- Only for `nn.Linear` in float32 on a CPU, outside autograd and autocast. All other layers and calls are torch's.
- It takes its threads from the OpenMP library that torch has loaded: with two of them, one's threads wait for the other's.
"""

import ctypes
import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.logging import get_logger
from torch import nn


logger = get_logger(__name__)

ROWS = range(3, 33)  # of an input, for which this is the faster way
_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")


@contextmanager
def few_rows_fast(model: nn.Module) -> Iterator[None]:
    """Within, linear layers of `model` that can are computed by `few_rows.c` where their input has few rows."""
    layers = [module for module in model.modules() if _fits(module)]
    kernel = _kernel() if layers else None
    if kernel is None:
        yield
        return
    for layer in layers:
        layer.forward = functools.partial(_forward, layer, kernel)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _fits(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):  # the latter: another library's hook
        return False
    weight, bias = module.weight, module.bias
    return (
        all(
            part is None or (part.device.type == "cpu" and part.dtype == torch.float32 and part.is_contiguous())
            for part in (weight, bias)
        )
        and isinstance(weight, nn.Parameter)
        and weight.numel() > 0
    )


def _forward(layer: nn.Linear, kernel: Callable, x: torch.Tensor) -> torch.Tensor:
    rows = x.numel() // x.shape[-1]
    if rows not in ROWS or x.dtype != torch.float32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, layer.weight, layer.bias)
    y = kernel(x, layer.weight)
    return y if layer.bias is None else y.add_(layer.bias)


def _linear(function: Callable, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x` (..., k) times the transpose of `weight` (n, k)."""
    x, (n, k) = x.contiguous(), weight.shape
    y = x.new_empty(*x.shape[:-1], n)
    function(x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // k, n, k, torch.get_num_threads())
    return y


@functools.cache
def _kernel() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    try:
        kernel = functools.partial(_linear, _built())
        _check(kernel)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning(f"The student writes by torch's own matrix products, which take up to twice as long: {said}")
        return None
    return kernel


def _built() -> Callable:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("no C compiler was found.")
    with TemporaryDirectory() as folder:  # a library that is loaded outlives its file
        part, library = Path(folder) / "few_rows.o", Path(folder) / "few_rows.so"
        # linked without -fopenmp, so that its names are found in the library that torch has loaded
        for command in ((*_FLAGS, "-c", str(_SOURCE), "-o", str(part)), ("-shared", str(part), "-o", str(library))):
            subprocess.run([*compiler.split(), *command], check=True, capture_output=True, text=True, timeout=120)
        function = ctypes.CDLL(str(library)).few_rows
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 3 + [ctypes.c_int]
    function.restype = None
    return function


def _check(kernel: Callable):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 71, generator=generator), torch.randn(13, 71, generator=generator)
    apart = (kernel(x, weight) - x @ weight.T).abs().max().item()
    if not apart < 1e-4:
        raise RuntimeError(f"what the C compiler made of few_rows.c differs from torch's product by {apart:.1e}.")
