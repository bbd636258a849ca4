"""Writing: prompts in, completions out, by transformers' own `generate` with a KV cache.

Decisions: one call for all prompts it is given, left-padded; nothing shapes the distribution but the run's own
settings.
"""

from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig
from trl.models.utils import unwrap_model_for_generation

from .config import CrossTokenizerGKDConfig


def sampling_config(args: CrossTokenizerGKDConfig, stop_ids: list[int], pad_token_id: int) -> GenerationConfig:
    """How a model writes under `args`."""
    settings = {
        "do_sample": True,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "use_cache": True,
        "eos_token_id": stop_ids,
        "pad_token_id": pad_token_id,
    }
    return GenerationConfig(**{**settings, **(args.generation_kwargs or {})})


@torch.no_grad()
def write(
    model: nn.Module,
    prompts: list[list[int]],
    config: GenerationConfig,
    accelerator,
    gradient_checkpointing_kwargs: dict | None = None,
) -> list[list[int]]:
    """
    Completions of `prompts` (token ids) in their order, each up to and including its first stop token.

    `model` may be wrapped (DDP, DeepSpeed) and have gradient checkpointing on; it comes back as it was.
    """
    if not prompts:
        return []
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), config.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    with (
        unwrap_model_for_generation(
            model, accelerator, gradient_checkpointing_kwargs=gradient_checkpointing_kwargs
        ) as unwrapped,
        _ready_to_generate(unwrapped, config),
    ):
        device = unwrapped.get_input_embeddings().weight.device
        sequences = unwrapped.generate(
            input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=config
        )
    stop_ids = set(config.eos_token_id)
    assert len(sequences) == len(prompts), "one completion a prompt"
    completions = []
    for ids in sequences[:, width:].tolist():
        end = next((n for n, token in enumerate(ids, start=1) if token in stop_ids), len(ids))
        completions.append(ids[:end])
    return completions


@contextmanager
def _ready_to_generate(model: nn.Module, config: GenerationConfig):
    """Eval mode, and no generation setting but ours: transformers fills gaps from the model's own generation config,
    where a repetition penalty may hide that the scored distribution knows nothing of."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    training, original = model.training, base.generation_config
    model.eval()
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = original
        model.train(training)
