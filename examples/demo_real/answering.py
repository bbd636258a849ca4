"""Greedy or sampled answers of a model to conversations, through its own chat template."""

from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[list[dict[str, str]]],
    max_new_tokens: int,
    samples: int = 0,
    batch_size: int = 32,
    seed: int = 0,
) -> list[tuple[str, int, bool]]:
    """
    For each conversation its answer, or `samples` answers in a row at temperature 1: the text, its length in tokens, and
    whether it ended within `max_new_tokens`.
    """
    texts = tokenizer.apply_chat_template(list(conversations), add_generation_prompt=True, tokenize=False)
    prompts = [ids for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] for _ in range(max(1, samples))]
    stop = model.generation_config.eos_token_id
    stop_ids = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    config = GenerationConfig(
        do_sample=bool(samples),
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids),
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        top_k=0 if samples else None,
    )
    found: list[tuple[str, int, bool]] = [("", 0, False)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    was_training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = config  # otherwise `generate` fills gaps from the model's own: penalties, top_p
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = max(len(prompts[row]) for row in rows)
            ids = torch.full((len(rows), width), config.pad_token_id)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, width - len(prompts[row]) :] = torch.tensor(prompts[row])
                mask[place, width - len(prompts[row]) :] = 1
            ids, mask = ids.to(model.device), mask.to(model.device)
            written = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
            for row, own in zip(rows, written, strict=True):
                end = next((place for place, token in enumerate(own) if token in stop_ids), None)
                own = own[:end]
                found[row] = (tokenizer.decode(own, skip_special_tokens=True), len(own), end is not None)
    model.generation_config = own_config
    model.train(was_training)
    return found
