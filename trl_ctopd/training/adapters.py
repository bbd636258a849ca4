"""Adapters in checkpoints: a run takes them up again as they are."""

from pathlib import Path

import torch
from peft import PeftModel, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from torch import nn
from transformers import Trainer

from ..models.sharding import SHARDING
from .checkpoints import folder_of


_ENCODER = "prompt_encoder.pt"


class ResumedAdapters(Trainer):
    """
    A `Trainer` that goes on with the adapters of a checkpoint, of any name and in their own dtype, and with what makes their virtual tokens.

    transformers 5.23 reads those in half precision as float32 (findings/resumed_adapters_become_float32.sh), looks for the best ones only in the
    checkpoint's own folder, where PEFT saves "default" alone, and leaves one of several switched on, with all of its weights trained. PEFT
    saves virtual tokens without what makes them (findings/p_tuning_resumes_as_another_model.sh). Sharded ones are left to the two.
    """

    def _save_checkpoint(self, model, trial):
        if self.args.should_save and self._encoder is not None:
            save_encoder(self._encoder, folder_of(self._get_output_dir(trial), self.state.global_step))
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, checkpoint: str, *args, **kwargs):
        if not self._load_adapters(checkpoint):
            super()._load_from_checkpoint(checkpoint, *args, **kwargs)

    def _load_best_model(self):
        if not self._load_adapters(self.state.best_model_checkpoint):
            super()._load_best_model()

    def _load_adapters(self, checkpoint: str) -> bool:
        """Whether they are read here."""
        if self.accelerator.distributed_type in SHARDING or not isinstance(self.model, PeftModel):
            return False
        if self._encoder is not None:
            load_encoder(self._encoder, checkpoint)
        else:
            load_adapters(self.model, checkpoint)
        return True

    @property
    def _encoder(self) -> nn.Module | None:
        return None if self.accelerator.distributed_type in SHARDING else encoder_of(self.model)


def _folder_of_adapter(checkpoint: str, name: str) -> Path | None:
    """Where PEFT has saved the adapter `name`; None where `checkpoint` has none of that name."""
    folder = Path(checkpoint, "" if name == "default" else name)
    files = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    return folder if any((folder / file).is_file() for file in files) else None


def load_adapters(model: PeftModel, checkpoint: str):
    """
    Reads the weights of the adapters that `checkpoint` has. Which are on, which weights are trained, and their dtype stay as they are.

    Raises:
        ValueError: where an adapter that is on is not there.
    """
    folders = {name: _folder_of_adapter(checkpoint, name) for name in model.peft_config}
    if lacking := [name for name in model.active_adapters if folders[name] is None]:
        raise ValueError(
            f"{checkpoint} has no adapter named {lacking[0]!r}, which the student has switched on: switch on those of the run that was saved "
            "(`set_adapter`), or begin a new run."
        )
    training = model.training
    for name, folder in folders.items():
        if folder is not None:
            model.load_adapter(folder, name, autocast_adapter_dtype=False)
    model.train(training)


def encoder_of(model: nn.Module) -> nn.Module | None:
    """What makes the virtual tokens of an adapter, where PEFT saves only what it makes, and reads that as what it makes them of; else None."""
    if not isinstance(model, PeftModel):
        return None
    config = model.active_peft_config
    projects = config.peft_type in (PeftType.P_TUNING, PeftType.CPT) or getattr(config, "prefix_projection", False)
    return model.prompt_encoder[model.active_adapter] if projects else None


def save_encoder(encoder: nn.Module, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(encoder.state_dict(), folder / _ENCODER)


def load_encoder(encoder: nn.Module, checkpoint: str):
    """Raises `ValueError` for a checkpoint without the encoder."""
    file = Path(checkpoint) / _ENCODER
    if not file.exists():
        raise ValueError(
            f"{checkpoint} has no {_ENCODER}: it holds the adapter's virtual tokens, and not the {type(encoder).__name__} that makes them, "
            "so that training cannot go on from it. Begin a new run."
        )
    encoder.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
