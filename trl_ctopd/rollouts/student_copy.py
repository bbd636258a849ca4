"""A copy of the student on a device of its own, which writes while the student itself is trained.

Decisions
- Only what is trained is copied before each step's text: of an adapter the adapter alone, which the copy then merges as the student
  would (`merge_adapter_for_generation`). What has been trained and is frozen by now is copied on, with its last update.
- The copy writes as the student's `generate` would with the same seed, through a random generator of its own.

Left out: students that are quantized, sharded or spread over devices, and a decode step that is compiled, since compiling in one
thread would disturb the other.
"""

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from transformers import GenerationConfig

from ..config import CrossTokenizerGKDConfig
from ..models.forwards import base_model
from ..models.heads import AUTOCAST
from ..models.products import use_faster_products
from ..models.sharding import shards_student
from .ahead import Cancelled
from .generation import Written, step_seed, write_with_copy
from .pairing import Prompt


def device_of(args: CrossTokenizerGKDConfig) -> torch.device:
    """Where the copy of this process stands: processes of a machine take `generation_device` in turns. Raises `ValueError` where there
    is no such device."""
    name = args.generation_device[args.local_process_index % len(args.generation_device)]
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"generation_device={name!r} cannot be used: {str(error).splitlines()[0]}") from error


def check_copied(model: nn.Module, args: CrossTokenizerGKDConfig, accelerator):
    """Raises `ValueError` for a student of which no copy could write."""
    base, spread = base_model(model), getattr(base_model(model), "hf_device_map", None)
    reason = None
    if shards_student(accelerator):
        reason = "the student is sharded over processes (ZeRO-3, FSDP), and its copy would stand whole on one device"
    elif getattr(base, "is_quantized", False):
        reason = "the student is quantized, which does not move to another device alike in all libraries"
    elif spread is not None and len(set(spread.values())) > 1:
        reason = f"the student is spread over {len(set(spread.values()))} devices"
    if reason is not None:
        raise ValueError(
            f"async_rollouts=1 with generation_device={args.generation_device}: {reason}. Set async_rollouts=0, or let a server write "
            "(use_vllm=True, vllm_mode='server')."
        )


class StudentCopy:
    """
    A [`Background`] in this process.

    Args:
        model: the student, an adapter included, before it is wrapped.
        config: how it writes: at a temperature alone.
    """

    ends_soon = True

    def __init__(self, model: nn.Module, accelerator, config: GenerationConfig, args: CrossTokenizerGKDConfig):
        check_copied(model, args, accelerator)
        self._student, self._config, self._accelerator, self._args = model, config, accelerator, args
        self._device = device_of(args)
        self._trained: set[str] = set()
        self._copy = copy.deepcopy(model)
        self._copy.to(self._device)
        use_faster_products(self._copy, accelerator)

    def begin(
        self, model: nn.Module, prompts: list[Prompt], step: int, taken: int
    ) -> tuple[Callable[[threading.Event], list[Written]], Callable[[list[Written] | None], list[Written] | None]]:
        """See [`Background`]. `model` must be the one given to `__init__`, wrapped or not."""
        self._hand_over()
        return partial(self._write, [prompt.student_ids for prompt in prompts], step), lambda written: written

    @torch.no_grad()
    def _hand_over(self):
        own = dict(self._copy.named_parameters())
        for name, parameter in self._student.named_parameters():
            if parameter.requires_grad:
                self._trained.add(name)
            if name in self._trained:
                own[name].copy_(parameter)

    def _write(self, prompts: list[list[int]], step: int, cancelled: threading.Event) -> list[Written]:
        kind, generator = self._device.type, torch.Generator(self._device)
        generator.manual_seed(step_seed(self._args.seed, step, self._accelerator.process_index))

        def choose(logits: torch.Tensor) -> torch.Tensor:
            if cancelled.is_set():
                raise Cancelled
            return torch.multinomial((logits / self._config.temperature).softmax(-1), 1, generator=generator)

        dtype = AUTOCAST.get(self._accelerator.mixed_precision)
        with (
            torch.cuda.device(self._device) if kind == "cuda" else nullcontext(),
            nullcontext() if dtype is None else torch.autocast(kind, dtype),
        ):
            return write_with_copy(self._copy, prompts, self._config, self._accelerator, self._args, choose)
