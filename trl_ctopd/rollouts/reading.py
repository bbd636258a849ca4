"""How prompts are read before a model writes: equal ones, and what unlike ones begin with alike, once; on a CPU those of like length
together."""

import copy
from collections.abc import Sequence

import torch
from transformers import Cache, GenerationConfig, PreTrainedModel

from ..models.activated import is_activated
from ..models.beginnings import families
from ..models.forwards import base_model
from ..models.packing import turning_length
from .cache import CACHE, can_join, continued, growing_cache, joined, selected
from .pairing import of_like_length


# tokens of a prompt that are read in the time of a further call; on a GPU an estimate, which has not been measured
CALL, CALL_ELSEWHERE = 32, 8192


def begun(
    model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig, device: torch.device
) -> Cache | None:
    """
    The cache to begin with. It holds all but the last token of each prompt, padded on the left, where what prompts have in common is thus
    read once, or, on a CPU, prompts of unlike length without most of their padding; otherwise it is empty, and so it is for an adapter that
    has to be shown the whole prompt. `None` where the model keeps other state.
    """
    cache, texts = growing_cache(model), sorted({tuple(prompt[:-1]) for prompt in prompts})
    if cache is None or not texts[0] or is_activated(model):
        return cache
    parts = _parts(model, texts, can_join(cache), device)
    if parts == [([*range(len(prompts))], 0)]:  # `generate` would read them so by itself
        return cache
    call, caches, order, beginnings = greedy(config), [], [], {}
    call.update(max_new_tokens=1, return_dict_in_generate=True)
    for rows, shared in parts:
        beginning = texts[rows[0]][:shared]
        if beginning and beginning not in beginnings:
            beginnings[beginning] = _read(model, [beginning], None, call, device)
        caches.append(_read(model, [texts[row] for row in rows], beginnings.get(beginning), call, device))
        order += rows
    place = {texts[row]: number for number, row in enumerate(order)}
    return selected(model, joined(caches), torch.tensor([place[tuple(prompt[:-1])] for prompt in prompts]))


def _parts(model: PreTrainedModel, texts: list, joins: bool, device: torch.device) -> list[tuple[list[int], int]]:
    """Places in `texts` that are read in one call, and with how many tokens these begin alike that are read before. `joins`: whether there
    may be several calls."""
    if not joins:
        return [([*range(len(texts))], 0)]
    on_cpu = device.type == "cpu"
    worth = CALL if on_cpu else CALL_ELSEWHERE
    # a longer text is encoded otherwise from its first token on
    is_short = max(map(len, texts)) <= turning_length(base_model(model).config.get_text_config())
    alike = families(texts, worth) if is_short else []
    others = sorted({*range(len(texts))}.difference(*(rows for rows, _ in alike)))
    parts = []
    for rows, shared in [*alike, *([(others, 0)] if others else [])]:
        groups = [range(len(rows))]
        if on_cpu:  # elsewhere padding is cheaper than further calls
            groups = of_like_length([worth + len(texts[row]) - shared for row in rows])
        parts += [([rows[place] for place in group], shared) for group in groups]
    return parts


def _read(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    beginning: Cache | None,
    call: GenerationConfig,
    device: torch.device,
) -> Cache:
    """The cache of `texts`, padded on the left, which all go on from `beginning`."""
    width, cache = max(map(len, texts)), growing_cache(model)
    gaps = [width - len(text) for text in texts]
    ids = [[*[call.pad_token_id] * gap, *text] for gap, text in zip(gaps, texts, strict=True)]
    mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
    output = model.generate(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=call,
        # by default true where weights are sharded, and processes have unlike numbers of calls
        synced_gpus=False,
        **{CACHE: cache if beginning is None else continued(cache, beginning, gaps)},
    )
    return getattr(output, CACHE)


def greedy(config: GenerationConfig) -> GenerationConfig:
    """`config` without anything that is drawn."""
    call = copy.deepcopy(config)
    call.update(do_sample=False, temperature=1.0, top_p=1.0, top_k=50, min_p=None)
    return call
