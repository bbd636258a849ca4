"""What is planned for; apart from the counting, so that the command's help needs no torch."""

from dataclasses import dataclass


STRATEGIES = ("ddp", "zero2", "zero3", "zero3_offload", "fsdp2")
DTYPES = ("bfloat16", "float16", "float32")
GIB = 2**30


@dataclass(frozen=True)
class Work:
    """One device's part of an optimizer step. Lengths are of the longest row; `batch` is in prompts."""

    prompt_tokens: int = 512
    new_tokens: int = 1024
    batch: int = 4
    accumulation: int = 1
    teacher_batch: int | None = None
    lora_rank: int | None = None
    activation_checkpointing: bool = False
    dtype: str = "bfloat16"  # of both models' weights
    autocast: bool = True  # to bfloat16, as `bf16=True` does
    cuda: bool = True
