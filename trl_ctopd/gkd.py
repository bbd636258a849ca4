"""The base classes of config and trainer: TRL's `GKDConfig` and `GKDTrainer` or, in a TRL without them, `SFTConfig` with the
same fields and `SFTTrainer`.

They are experimental in TRL, which removes such trainers without notice. Nothing that `GKDTrainer` itself does is used: the
trainer here calls the `__init__` of its parent, and replaces generation, scoring and loss. So a run is the same on either base.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig, SFTTrainer


try:
    with warnings.catch_warnings():  # a test checks what is used of it
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        from trl.experimental.gkd import GKDConfig, GKDTrainer

    BASE = "TRL's experimental.gkd"
except ImportError as error:
    if not (error.name or "").startswith("trl.experimental"):
        raise
    BASE = "SFTTrainer, since this TRL has no experimental.gkd"

    @dataclass
    class GKDConfig(SFTConfig):
        """The fields of TRL's `GKDConfig`."""

        _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["teacher_model_init_kwargs"]

        temperature: float = field(default=0.9, metadata={"help": "Temperature that the student samples at."})
        lmbda: float = field(default=0.5, metadata={"help": "Share of the micro-batches that the student writes."})
        beta: float = field(default=0.5, metadata={"help": "Of GKD's own loss: no effect."})
        max_new_tokens: int = field(default=128, metadata={"help": "Longest completion in tokens."})
        teacher_model_name_or_path: str | None = field(
            default=None, metadata={"help": "Hub name or folder of the teacher."}
        )
        teacher_model_init_kwargs: dict[str, Any] | str | None = field(
            default=None,
            metadata={"help": "Arguments of `from_pretrained` for a teacher given by name: dtype, device_map, ..."},
        )
        disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout."})
        seq_kd: bool = field(
            default=False, metadata={"help": "Let the teacher write the micro-batches that the student does not."}
        )

        def __post_init__(self):
            super().__post_init__()
            for name in ("lmbda", "beta"):
                if not 0.0 <= getattr(self, name) <= 1.0:
                    raise ValueError(f"{name} must be in the range [0.0, 1.0], got {getattr(self, name)}.")

    class GKDTrainer(SFTTrainer):
        """`SFTTrainer`, unchanged."""
