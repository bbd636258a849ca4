"""Activated LoRA (PEFT's aLoRA): an adapter that is on from the last invocation in a prompt to the end of the text.

Left alone, PEFT looks for the last invocation in the ids of each call. In a prompt with its completion that could be one that the model wrote
itself, and what stands before it would be scored with the adapter off, though it was written with it on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn


def invocation_of(model: nn.Module) -> list[int] | None:
    """The ids at which the active adapter of `model` begins; `None` where it is on throughout, or there is none."""
    return getattr(getattr(model, "active_peft_config", None), "alora_invocation_tokens", None) or None


def is_activated(model: nn.Module) -> bool:
    """Whether any of its adapters, active or not, is an activated one."""
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    return any(getattr(config, "alora_invocation_tokens", None) for config in adapters)


def active_tokens(invocation: Sequence[int], prompt: Sequence[int]) -> int:
    """The tokens of `prompt` from its last `invocation` on; 0 where it has none."""
    for count in range(len(invocation), len(prompt) + 1):
        start = len(prompt) - count
        if prompt[start] == invocation[0] and list(prompt[start : start + len(invocation)]) == list(invocation):
            return count
    return 0


def activation(
    invocation: Sequence[int] | None, prompts: Sequence[Sequence[int]], after: Sequence[int]
) -> dict[str, list[int]]:
    """What PEFT takes beside rows that begin with `prompts`, each with so many tokens `after` it: with how many at its end the adapter is on."""
    if invocation is None:
        return {}
    own = [active_tokens(invocation, prompt) for prompt in prompts]
    return {"alora_offsets": [count and count + more for count, more in zip(own, after, strict=True)]}


def activation_of_rows(
    invocation: Sequence[int] | None, ids: torch.Tensor, starts: torch.Tensor
) -> dict[str, list[int]]:
    """`activation` for padded rows `ids` (B, L), each with its prompt before `starts` (B,)."""
    if invocation is None:
        return {}
    ends = starts.tolist()
    prompts = [row[:end] for row, end in zip(ids.tolist(), ends, strict=True)]
    return activation(invocation, prompts, [ids.shape[1] - end for end in ends])


@contextmanager
def without_backward(model: nn.Module) -> Iterator[None]:
    """For forward passes that no backward pass follows. Beside layers that are checkpointed PEFT would leave hooks with the places of their rows,
    which a backward pass alone takes off."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
