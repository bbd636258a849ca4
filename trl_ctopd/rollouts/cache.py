"""The KV cache that a model writes with: transformers' own, grown in blocks, so that a token is not paid for with a copy of all
keys and values before it."""

import inspect
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput


# its name in what `generate` takes and returns: transformers 5.24 renamed it
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else "past_key_values"
CACHED_PROMPTS = ("PREFIX_TUNING", "CARTRIDGE")  # PEFT's adapters whose prompt is keys and values; others embed it


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values are the beginning of larger tensors, which are replaced when they are full."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._rooms = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, added = self.get_seq_length(), (key_states, value_states)
        length = before + key_states.shape[-2]
        if not self._has_room(length):
            old, size = (self.keys, self.values), length + max(64, length // 4)
            self._rooms = tuple(new.new_empty(*new.shape[:-2], size, new.shape[-1]) for new in added)
            if before:
                for room, part in zip(self._rooms, old, strict=True):
                    room[..., :before, :] = part
        for room, new in zip(self._rooms, added, strict=True):
            room[..., before:length, :] = new
        self.keys, self.values = (room[..., :length, :] for room in self._rooms)
        return self.keys, self.values

    def _has_room(self, length: int) -> bool:
        """False also where rows were selected or repeated, which leaves the rooms with what was there before."""
        return (
            bool(self._rooms)
            and length <= self._rooms[0].shape[-2]
            and self.keys.data_ptr() == self._rooms[0].data_ptr()
        )


def growing_cache(model: PreTrainedModel) -> Cache | None:
    """An empty cache for `model`; `None` where its cache is not plain keys and values, or its forward pass takes none (GPT-1's)."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if CACHE not in inspect.signature(base.forward).parameters or not base._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=base.config)
    if not is_plain(model, cache):
        return None
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_join(cache: Cache) -> bool:
    """Whether rows of `cache` can be padded."""
    return all(type(layer) is GrowingLayer for layer in cache.layers)


def continued(cache: Cache, beginning: Cache, gaps: Sequence[int]) -> Cache:
    """The empty `cache` with the first columns of rows that begin with the one row of `beginning`, each after a gap of padding. There are as many
    columns as it has tokens."""
    columns = torch.arange(beginning.get_seq_length())
    tokens = (columns - torch.tensor(gaps)[:, None]).clamp(min=0)
    for layer, begun in zip(cache.layers, beginning.layers, strict=True):
        places = tokens.to(begun.keys.device)
        layer.update(*(part[0][:, places].transpose(0, 1) for part in (begun.keys, begun.values)))
    return cache


def joined(caches: list[Cache]) -> Cache:
    """The rows of all caches that `can_join`, one after the other, padded on the left. It is the first one, changed."""
    if len(caches) == 1:
        return caches[0]
    width = max(cache.get_seq_length() for cache in caches)
    for layer, *others in zip(*(cache.layers for cache in caches), strict=True):
        parts = [(own.keys, own.values) for own in (layer, *others)]
        padded = [[nn.functional.pad(part, (0, 0, width - part.shape[-2], 0)) for part in own] for own in parts]
        layer.reset()
        layer.update(*(torch.cat(own) for own in zip(*padded, strict=True)))
    return caches[0]


def selected(model: nn.Module, cache: Cache | None, rows: torch.Tensor) -> Cache | None:
    """The cache of these rows; `None` where the model keeps any other state of a batch, in the cache or outside it."""
    if not is_plain(model, cache):
        return None
    cache.batch_select_indices(rows.cpu())  # layers may be on different devices
    return cache


def is_plain(model: nn.Module, cache: Cache | None) -> bool:
    """Whether `cache` is all that `model` keeps of a batch, and rows of it can be selected and repeated."""
    plain = (GrowingLayer, DynamicLayer, DynamicSlidingWindowLayer)
    return (
        type(cache) is DynamicCache
        and bool(cache.layers)
        and all(type(layer) in plain for layer in cache.layers)
        and not has_virtual_tokens(model)
        and not any(hasattr(module, "rope_deltas") for module in model.modules())
    )


def has_virtual_tokens(model: nn.Module) -> bool:
    """Of an adapter that learns a prompt."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def embeds_virtual_tokens(model: nn.Module) -> bool:
    """Of an adapter that embeds its prompt in front of a row's padding and passes no positions on (PEFT 0.21.2): padding then stands between
    that prompt and the text."""
    return has_virtual_tokens(model) and model.active_peft_config.peft_type not in CACHED_PROMPTS
