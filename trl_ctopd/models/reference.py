"""The student as it was at the start, to be kept near: the base model under a new adapter, the weights to be trained as they were under
any other, or a frozen copy of the whole."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn

from .activated import without_backward
from .sharding import SHARDING
from .trials import can_run, trial_inputs


# of `init_lora_weights`: what the adapter begins with is taken out of the base weights
_TAKEN_OUT = ("pissa", "olora", "corda", "loftq")


def why_not_start(model: nn.Module) -> str | None:
    """Why `model`, which is not trained yet, is another one with its adapters switched off; None where it is the same. Every process must
    call it."""
    if not isinstance(model, PeftModel):
        return "a student whose whole weights are trained"
    return why_not_base(model) or ("the adapter adds something at the start" if _adds_at_start(model) else None)


def why_not_base(model: PeftModel) -> str | None:
    """Why `model` with its adapters switched off is not the model that they were put on; None where it is."""
    for config in (model.peft_config[name] for name in model.active_adapters):
        kind, bias = getattr(config, "init_lora_weights", True), getattr(config, "bias", "none")
        if isinstance(kind, str) and kind.startswith(_TAKEN_OUT):
            return f"init_lora_weights={kind!r} takes what the adapter begins with out of the base model's weights"
        if bias != "none":
            return f"bias={bias!r} trains biases of the base model, which stay trained when the adapter is switched off"
    if beside := trained_beside(model):
        return f"weights of the base model are trained too ({beside[0]}, ...), and stay trained when the adapter is switched off"
    return None


def trained_beside(model: PeftModel) -> list[str]:
    """The names of base weights that are trained and that no file of the adapter holds."""
    adapters, bias = {*model.peft_config}, getattr(model.active_peft_config, "bias", "none")
    return [
        name
        for name, own in model.named_parameters()
        if own.requires_grad and not adapters & {*name.split(".")} and (bias == "none" or not name.endswith(".bias"))
    ]


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """`model.disable_adapter()`, after which the weights that were frozen are frozen: PEFT 0.21 leaves all of the adapter's trainable
    (findings/frozen_adapters_thaw.sh)."""
    frozen = [own for own in model.parameters() if not own.requires_grad]
    try:
        with model.disable_adapter():
            yield
    finally:
        for own in frozen:
            own.requires_grad_(False)


def _adds_at_start(model: PeftModel) -> bool:
    """Whether the active adapters, frozen weights included, change `model` already. Of a LoRA the factors tell that begin as 0, and of copies
    of the base model's weights what they were copied from; of other kinds a trial does."""
    weights = {name: own for name, own in model.named_parameters() if _held(own).device.type != "meta"}
    originals, active = {**weights, **dict(model.named_buffers())}, {*model.active_adapters}

    def adds(name: str) -> bool | None:
        """None where it does not tell."""
        if ".lora_B." in name and name.replace(".lora_B.", ".lora_E.") in weights:  # AdaLoRA, of three factors
            return None
        if ".lora_B." in name or ".lora_embedding_A." in name:
            return bool(_held(weights[name]).any())
        module, _, part = name.partition(".modules_to_save.")
        original = f"{module}.original_module.{part.partition('.')[2]}"
        original = originals.get(original if part else name.replace("_tokens_delta.", "_tokens_original."))
        if original is not None and original is not weights[name]:
            return not torch.equal(_held(weights[name]), _held(original).to(weights[name]))
        return False if ".lora_" in name else None

    told = {adds(name) for name, own in weights.items() if own.requires_grad or active & {*name.split(".")}}
    return any(gather_object([True in told or (None in told and _adds_in_a_trial(model))]))


@torch.no_grad()
def _adds_in_a_trial(model: PeftModel) -> bool:
    """Whether a short text has other logits with the adapters than without. True where that cannot be tried."""
    if not can_run(model):
        return True
    inputs, training = trial_inputs(model), model.training
    model.eval()
    try:
        with without_backward(model):
            own = model(**inputs).logits
            with adapter_off(model):
                base = model(**inputs).logits
    finally:
        model.train(training)
    return not torch.equal(own, base)


def _held(weight: torch.Tensor) -> torch.Tensor:
    """What this process holds of `weight`."""
    return getattr(weight, "ds_tensor", weight)


class Reference:
    """
    Args:
        model: the student before it is wrapped and trained, with `add_token_scores`.
        accelerator: the run's.
        reason: `why_not_start(model)`.

    Raises:
        ValueError: for a student that is to be sharded, of which more than the base model would have to be kept.
    """

    def __init__(self, model: nn.Module, accelerator, reason: str | None):
        self._accelerator, self._copy, self._start = accelerator, None, None
        if reason is None:
            return
        if accelerator.distributed_type in SHARDING:
            raise ValueError(
                f"reference_kl or reference_teacher under {accelerator.distributed_type.value}, with {reason}: what the student was at the "
                "start would stand whole on every device. Train a new adapter with bias='none' and init_lora_weights=True (`peft_config`), "
                "or leave them out."
            )
        if isinstance(model, PeftModel):
            self._start = {name: own.detach().clone() for name, own in model.named_parameters() if own.requires_grad}
        else:
            self._copy = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def log_probs(self, model: nn.Module, **inputs) -> torch.Tensor:
        """(n,) log-probs of `add_token_scores` under the start; `model` is the student as it is wrapped for training."""
        if self._copy is not None:
            with self._accelerator.autocast():
                return self._copy.to(inputs["input_ids"].device)(**inputs).log_probs
        student = self._accelerator.unwrap_model(model)
        start = adapter_off(student) if self._start is None else self._as_at_start(student)
        with start, without_backward(student):
            return model(**inputs).log_probs

    @contextmanager
    def _as_at_start(self, student: nn.Module) -> Iterator[None]:
        own = dict(student.named_parameters())
        now = {name: own[name].data for name in self._start}
        try:
            for name, value in self._start.items():
                own[name].data = value.to(own[name].device)
            yield
        finally:
            for name, value in now.items():
                own[name].data = value
