"""The student as it was at the start, to be kept near: the base model under its adapter, or a frozen copy of the whole."""

import copy
from contextlib import nullcontext

import torch
from peft import PeftModel
from torch import nn

from .sharding import SHARDING


class Reference:
    """
    Args:
        model: the student before it is wrapped, with `add_token_scores`.
        accelerator: the run's.

    Raises:
        ValueError: for a student without an adapter that is to be sharded, of which a copy would not be.
    """

    def __init__(self, model: nn.Module, accelerator):
        self._accelerator, self._copy = accelerator, None
        if isinstance(model, PeftModel):
            return
        if accelerator.distributed_type in SHARDING:
            raise ValueError(
                f"reference_kl or reference_teacher with a student whose whole weights are trained under {accelerator.distributed_type.value}: its copy "
                "would stand whole on every device. Train an adapter (`peft_config`), or leave them out."
            )
        self._copy = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def log_probs(self, model: nn.Module, **inputs) -> torch.Tensor:
        """(n,) log-probs of `add_token_scores` under the start; `model` is the student as it is wrapped for training."""
        if self._copy is not None:
            with self._accelerator.autocast():
                return self._copy.to(inputs["input_ids"].device)(**inputs).log_probs
        student = self._accelerator.unwrap_model(model)
        with student.disable_adapter() if isinstance(student, PeftModel) else nullcontext():
            return model(**inputs).log_probs
