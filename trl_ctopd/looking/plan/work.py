"""The workload that is planned for. A module of its own, so that the command's help does not load torch."""

from dataclasses import dataclass


STRATEGIES = ("ddp", "zero2", "zero3", "zero3_offload", "fsdp2")
DTYPES = ("bfloat16", "float16", "float32")
GIB = 2**30


@dataclass(frozen=True)
class Work:
    """One device's part of an optimizer step. Lengths are those of the longest row; `batch` counts prompts."""

    prompt_tokens: int = 512
    new_tokens: int = 1024
    batch: int = 4
    accumulation: int = 1
    teacher_batch: int | None = None
    lora_rank: int | None = None
    student_bits: int | None = None  # of a model that is quantized as it is loaded
    teacher_bits: int | None = None
    activation_checkpointing: bool = False
    dtype: str = "bfloat16"  # of both models' weights
    autocast: bool = True  # to bfloat16, as `bf16=True` does
    cuda: bool = True
    loss: str = "auto"  # as in the config, with one teacher in this process
    logit_tile_tokens: int = 1024
