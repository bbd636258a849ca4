"""What a short trial at the start tells of a model: whether it is an autoregressive policy, and whether it draws noise while it learns.

An adapter that has learned nothing yet changes nothing, and would pass any trial: in a trial its weights are moved ([`stirred`]).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from .activated import invocation_of, without_backward
from .forwards import base_model
from .heads import hidden_states


_STEP = 0.05  # by which weights are moved at most
_ROWS, _LENGTH = 2, 16


@contextmanager
def stirred(model: nn.Module) -> Iterator[None]:
    """Within, the weights that are trained beside an adapter's frozen base are others, the same ones in every process. No random number is
    drawn. Afterwards they are what they were, to the bit."""
    trained = [own for own in model.parameters() if own.requires_grad] if isinstance(model, PeftModel) else []
    kept = [own.data for own in trained]
    try:
        for own, data in zip(trained, kept, strict=True):
            moved = _STEP * torch.arange(data.numel(), device=data.device).sin()
            own.data = data + moved.view_as(data).to(data.dtype)
        yield
    finally:
        for own, data in zip(trained, kept, strict=True):
            own.data = data


def tokens_read(model: nn.Module, inputs: dict, at: torch.Tensor) -> torch.Tensor:
    """
    (B, L) the tokens of `inputs` on which the hidden states of those `at` (B, L) depend in a model that is [`stirred`]: where they have a
    derivative. Elsewhere it is 0, however the model rounds.
    """
    inner, training, embedded = base_model(model), model.training, []

    def watch(module, args, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    model.eval()
    handle = inner.get_input_embeddings().register_forward_hook(watch)
    try:
        with stirred(model), torch.enable_grad():
            with hidden_states(inner) as states, without_backward(model):
                model(**inputs)
            found = states[0][:, -at.shape[1] :][at.to(states[0].device)].float()  # virtual tokens come first
            weights = torch.arange(found.numel(), device=found.device).view_as(found).cos()
            derivatives = torch.autograd.grad(found, embedded, weights, allow_unused=True)
    finally:
        handle.remove()
        model.train(training)
    return torch.stack([own.abs().amax(-1) > 0 for own in derivatives if own is not None]).any(0)


@contextmanager
def _backbone_alone(model: nn.Module) -> Iterator[None]:
    """Within, a call of `model`, with its adapter, is one of its backbone, as where it is scored: the own forward passes of some (OPT, Bart's
    decoder) go round it."""
    inner = base_model(model)
    own = vars(inner).get("forward")

    @functools.wraps(type(inner).forward)
    def forward(*args, **kwargs):
        return inner.base_model(*args, **kwargs)

    inner.forward = forward
    try:
        yield
    finally:
        if own is None:
            del inner.forward
        else:
            inner.forward = own


def can_run(model: nn.Module) -> bool:
    """Whether the backbone of `model` can be run as it is: there is one (`check_head` tells where there is none), neither sharded nor offloaded."""
    inner = base_model(model)
    return inner.base_model is not inner and not any(
        isinstance(own, DTensor) or hasattr(own, "ds_id") or own.device.type == "meta" for own in model.parameters()
    )


def trial_ids(model: nn.Module, rows: int, length: int) -> torch.Tensor:
    """(`rows`, `length`) ids of unlike rows, where the embeddings of `model` are."""
    embeddings = base_model(model).get_input_embeddings().weight
    return torch.arange(rows * length, device=embeddings.device).view(rows, length) * 7919 % len(embeddings)


def trial_inputs(model: nn.Module) -> dict:
    """Two unlike rows, with an adapter that is on throughout."""
    ids = trial_ids(model, _ROWS, _LENGTH)
    begins = {} if invocation_of(model) is None else {"alora_offsets": [_LENGTH] * _ROWS}
    return {"input_ids": ids, "use_cache": False, **begins}


def check_causal(side: str, model: nn.Module):
    """
    Raises `ValueError` where a token's probability depends on what follows it, or on the other rows of its batch: in the model itself (BERT and
    its kin, unless their config has `is_decoder`), or by an adapter (Lily's routers take a mean over all of their tokens). Such a model is no
    policy: it writes a text by other probabilities than it has of it.
    """
    if not can_run(model):
        return
    inputs = trial_inputs(model)
    is_adapted = isinstance(model, PeftModel)
    if is_adapted:
        first = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        first[0, : _LENGTH // 2] = True
        with _backbone_alone(model):
            read = tokens_read(model, inputs, first)
        if not (read & ~first).any():
            return
    with model.disable_adapter() if is_adapted else nullcontext():
        alone = _looks_ahead(base_model(model), inputs["input_ids"])
    no_policy = (
        "a token's probability depends on what follows it, or on the other rows of its batch, so that a text is not scored by the probabilities "
        "that it was written with"
    )
    if alone:
        raise ValueError(
            f"In the {side}'s {type(base_model(model)).__name__} {no_policy}: choose a causal language model. Some, like BERT, are causal with "
            "is_decoder=True in their config."
        )
    if is_adapted:
        kinds = ", ".join(sorted({config.peft_type.value for config in model.peft_config.values()}))
        raise ValueError(f"With the {side}'s adapter ({kinds}) {no_policy}: take another adapter, such as LoRA.")


@torch.no_grad()
def _looks_ahead(model: nn.Module, ids: torch.Tensor) -> bool:
    """Whether most hidden states of the first half of the first row are others once all tokens but those are others. Most, since rounding may
    send a single token to other experts. Without derivatives, which not all models have."""
    half, training = ids.shape[1] // 2, model.training
    others = torch.stack([torch.cat([ids[0, :half], ids[1, :half]]), ids[0]])
    model.eval()
    try:
        passes = (model.base_model(input_ids=own, use_cache=False).last_hidden_state for own in (ids, others))
        one, other = (states[0, :half] for states in passes)
    finally:
        model.train(training)
    differ = (one - other).float().norm(dim=-1) > _tolerance(one) * one.float().norm(dim=-1)
    return bool(2 * differ.sum() > half)


@torch.no_grad()
def draws_noise(model: nn.Module) -> bool:
    """Whether two passes over one text in training mode differ. False where that cannot be tried."""
    if not can_run(model):
        return False
    inner, training, inputs = base_model(model), model.training, trial_inputs(model)
    model.train()
    try:
        with stirred(model), _backbone_alone(model), hidden_states(inner) as states, without_backward(model):
            for _ in range(2):
                model(**inputs)
    finally:
        model.train(training)
    one, other = states
    return bool((one - other).float().norm() > _tolerance(one) * one.float().norm())


def _tolerance(states: torch.Tensor) -> float:
    """What rounding may change of hidden states, relative."""
    return 0.02 if states.dtype in (torch.bfloat16, torch.float16) else 0.001
