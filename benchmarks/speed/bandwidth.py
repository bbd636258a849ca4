"""The least time that writing can take: in a decode step every weight and the cache so far are read once from memory."""

import time

import torch
from transformers import PreTrainedModel


def bandwidth(device: str, mebibytes: int = 1024) -> float:
    """Bytes a second at which `device` reads a tensor too large for its caches: the best of nine sums. On a CPU by processor time,
    which other work on the machine does not count in."""
    numbers, seconds = torch.ones(mebibytes * 2**18, device=device), []
    clock, threads = (time.process_time, torch.get_num_threads()) if device == "cpu" else (time.perf_counter, 1)
    for _ in range(10):
        start = clock()
        numbers.sum().item()
        seconds.append((clock() - start) / threads)
    return numbers.nbytes / min(seconds[1:])


def bytes_read(model: PreTrainedModel) -> tuple[int, int]:
    """Of its weights, an embedding that is not also the head left out; and of one token's keys and values."""
    config, head, embedding = model.config, model.get_output_embeddings().weight, model.get_input_embeddings().weight
    weights = sum(part.nbytes for part in model.parameters()) - (embedding.nbytes if embedding is not head else 0)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return weights, 2 * config.num_hidden_layers * config.num_key_value_heads * size * head.itemsize


def writing_limit(model: PreTrainedModel, rows: int, prompt: float, new: int, speed: float) -> float:
    """Seconds for `new` tokens after `prompt` ones (means of a row), at `speed` bytes a second."""
    weights, of_token = bytes_read(model)
    return new * (weights + rows * (prompt + new / 2) * of_token) / speed
