"""Rows packed for one forward pass: completions share their prompt, prompts share what they begin with alike (a system message, tools,
examples), and short rows share the space that padding took.

A packed row is a tree of texts, written depth first: a token comes after those before it in its text, and what continues it follows
before anything else does. Every token keeps the position that it has in its own text, and sees that text alone, so that its hidden
state and the gradients are those of padded rows.

Decisions
- What is packed, and how tightly, is decided by counts alone (`Packer`): the products of a forward pass, of which attention grows
  with the square of a packed row's length and is not skipped where a mask hides it.
- Only the forward pass is packed. Whatever reads its scores asks by row and column of the padded grid.
- A model is packed for only if a trial at the start gives the hidden states of padded rows, under an adapter also once it has learned.

Left out: kernels that read rows of unlike length without padding (flash attention's), and completions that begin alike.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypedDict

import numpy as np
import torch
from accelerate.logging import get_logger
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .activated import is_activated
from .beginnings import begin_alike
from .forwards import base_model
from .heads import hidden_states
from .sharding import SHARDING
from .trials import stirred, tokens_read


logger = get_logger(__name__)

# of products and of tokens, below which rows are padded: with a mask, a token takes up to a fifth more memory, for keys and values
# that are repeated for every head, and counts say no more of a machine's time
_LEAST_SAVED = 0.2
_WIDER = 0.95  # of the products of narrower rows: what is less than that saved, counts cannot tell
_TRIAL = 7  # tokens of the longest row of a trial
_ALIGNED = 8  # CUDA's kernel would copy a mask of another width in every layer
# of hidden states, relative: in bfloat16 two pretrained models differ by 0.04, and by 0.8 where tokens see another's completion
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}


class Packed(TypedDict):
    """
    B rows as P packed ones of width W.

    Keys:
        input_ids, position_ids (P, W): each token, and its position in its own text; 0 where nothing is left to pack.
        ends (P, W): the column after the last token that sees this one. What sees a token lies between the two.
        places (B, L): index of each token of the padded rows into the flattened packed ones; 0 for padding.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    ends: torch.Tensor
    places: torch.Tensor


def packed_inputs(packed: Packed, scored: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `add_token_scores` takes, for `scored` (2, n) of the padded rows: row, and column counted from the end."""
    width, places = packed["input_ids"].shape[1], packed["places"][tuple(scored)]
    rows = {name: packed[name] for name in ("input_ids", "position_ids", "ends")}
    return {**rows, "scored": torch.stack([places // width, places % width - width])}


def unpacked(packed: Packed, states: torch.Tensor) -> torch.Tensor:
    """(B, L, H) the hidden `states` of packed rows as they lie in the padded ones; at padding, those of any token."""
    return states.flatten(0, 1)[packed["places"].to(states.device)]


class Packer:
    """
    Packs rows of prompt + completion, for a model of hidden size `hidden_size`, where none is longer than `reach`.

    A token costs about 12 H² products a layer in the linear layers (H: hidden size), and in attention 2 H for each token of its row,
    half of which the causal mask of padded rows skips. Rows are packed to the width at which that is least, if products and tokens are
    at least a fifth fewer than those of padded rows, and if the mask takes no more memory than a layer's own tensors for the tokens that
    are left out (some 8 H of each).
    """

    def __init__(self, hidden_size: int, reach: float = math.inf):
        self._hidden_size, self._reach = hidden_size, reach

    def __call__(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], length: int, multiple: int = 1
    ) -> Packed | None:
        """`None` where the padded rows, of `length` tokens, are as good. `multiple`: of which the packed width is to be one."""
        layout = self._layout([(tuple(p), len(c)) for p, c in zip(prompts, completions, strict=True)], length, multiple)
        return None if layout is None else _filled(*layout, prompts, completions, length)

    def _layout(self, rows: list[tuple[tuple[int, ...], int]], length: int, multiple: int):
        """The packed rows, each as a list of rows that share a prompt, and their width."""
        multiple = math.lcm(multiple, _ALIGNED)
        linear, longest = 12 * self._hidden_size, max(len(prompt) + count for prompt, count in rows)
        if longest > self._reach:
            return None
        least = (1 - _LEAST_SAVED) * len(rows) * length * (linear + length)
        prompts = _Prompts([prompt for prompt, _ in rows], [count for _, count in rows])
        found = None
        for capacity in prompts.capacities(longest):
            bins = prompts.bins(capacity)
            width = -(-max(size for size, _ in bins) // multiple) * multiple
            cells = len(bins) * width
            saved = len(rows) * length - cells
            products = cells * (linear + 2 * width)
            fits = saved >= _LEAST_SAVED * len(rows) * length and cells * width <= 8 * self._hidden_size * saved
            if products <= least and fits:
                found, least = ([own for _, own in bins], width), _WIDER * products
        return found


class _Prompts:
    """
    The different prompts of rows, in alphabetical order.

    Attributes:
        rows: of each prompt, those that have it, the longest completion first.
        shared (n, n): with how many tokens two of them begin alike.
    """

    def __init__(self, prompts: Sequence[tuple[int, ...]], counts: Sequence[int]):
        own: dict[tuple[int, ...], list[int]] = {}
        for row in sorted(range(len(prompts)), key=lambda row: -counts[row]):
            own.setdefault(prompts[row], []).append(row)
        order = sorted(own)
        self.rows, self._lengths, self._counts = [own[prompt] for prompt in order], list(map(len, order)), counts
        alike = [begin_alike(one, other) for one, other in pairwise(order)]
        self.shared = np.diag(self._lengths)
        for place in range(len(alike)):
            self.shared[place, place + 1 :] = self.shared[place + 1 :, place] = np.minimum.accumulate(alike[place:])

    def capacities(self, longest: int) -> list[int]:
        """Widths to try: from the longest row's to that of all rows in one, with those in which a prompt has all its completions."""
        all_of_one = max(
            length + sum(self._counts[row] for row in rows)
            for length, rows in zip(self._lengths, self.rows, strict=True)
        )
        together = sum(self._counts) + sum(self._lengths) - int(np.diag(self.shared, 1).sum())
        widths = {
            *range(longest, max(all_of_one, 2 * longest) + 1, max(1, longest // 2)),
            all_of_one,
            max(together, longest),
        }
        width = 2 * longest
        while width < together:
            widths.add(width)
            width = width * 3 // 2
        return sorted(widths)

    def bins(self, capacity: int) -> list[tuple[int, list[list[int]]]]:
        """
        Rows of equal prompts, put into as few bins of `capacity` tokens as is easily found: the largest first, each where there is room,
        beside the prompt with which it shares most. A prompt whose completions do not fit into one bin is read again. Each bin with its size.
        """
        parts = []
        for prompt, rows in enumerate(self.rows):
            shares: list[list] = []
            for row in rows:
                share = next((own for own in shares if own[0] + self._counts[row] <= capacity), None)
                if share is None:
                    shares.append(share := [self._lengths[prompt], [], prompt])
                share[0] += self._counts[row]
                share[1].append(row)
            parts += shares
        bins: list[list] = []
        for size, rows, prompt in sorted(parts, key=lambda part: -part[0]):
            alike = [int(self.shared[prompt, prompts].max()) for _, _, prompts in bins]
            room = [place for place, own in enumerate(bins) if own[0] + size - alike[place] <= capacity]
            if not room:
                bins.append([size, [rows], [prompt]])
                continue
            place = max(room, key=lambda place: alike[place])
            bins[place][0] += size - alike[place]
            bins[place][1].append(rows)
            bins[place][2].append(prompt)
        return [(size, own) for size, own, _ in bins]


def _filled(bins: list[list[list[int]]], width: int, prompts, completions, length: int) -> Packed:
    ids, positions = np.zeros((2, len(bins), width), dtype=np.int64)
    ends = np.tile(np.arange(1, width + 1), (len(bins), 1))
    places = np.zeros((len(prompts), length), dtype=np.int64)
    for number, groups in enumerate(bins):
        end, before, path = 0, (), np.zeros(0, dtype=np.int64)  # the prompt before, and the columns of its tokens
        for rows in sorted(groups, key=lambda rows: tuple(prompts[rows[0]])):
            prompt = tuple(prompts[rows[0]])
            alike = begin_alike(before, prompt)
            ends[number, path[alike:]] = end
            for text, start, row in [
                (prompt[alike:], alike, None),
                *((completions[row], len(prompt), row) for row in rows),
            ]:
                columns = np.arange(end, end + len(text))
                ids[number, columns] = text
                positions[number, columns] = np.arange(start, start + len(text))
                end += len(text)
                if row is None:
                    before, path = prompt, np.concatenate([path[:alike], columns])
                else:
                    ends[number, columns] = end
                    places[row, : start + len(text)] = number * width + np.concatenate([path, columns])
        ends[number, path] = end
    ids, positions, ends, places = map(torch.from_numpy, (ids, positions, ends, places))
    return Packed(input_ids=ids, position_ids=positions, ends=ends, places=places)


def packer_for(side: str, model: nn.Module, accelerator) -> Packer | None:
    """A packer for `model`, with `add_token_scores`, not yet wrapped and with an adapter or without; `None` where it has to read padded rows,
    with the reason logged."""
    inner, reason = base_model(model), None
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    if accelerator.distributed_type in SHARDING:
        reason = "it may be sharded"
    elif any(config.is_prompt_learning for config in adapters):
        reason = "its adapter has virtual tokens"
    elif is_activated(model):
        reason = "its adapter begins after the last invocation of a row"
    else:
        reason = _unlike(inner) or _trial(model)
    if reason is not None:
        logger.info(f"The {side} reads padded rows, each with its own prompt: {reason}.")
        return None
    return Packer(inner.get_input_embeddings().weight.shape[1], _reach(inner.config.get_text_config()))


def _unlike(model: PreTrainedModel) -> str | None:
    """Why packed rows would not give what padded ones do, as far as it is known without a trial."""
    config = model.config.get_text_config()
    if config._attn_implementation != "sdpa":  # "eager" would hold the scores of whole packed rows
        return f"its attention is {config._attn_implementation}, not sdpa"
    if _reach(config) < _TRIAL:
        return "not all its layers see the whole text"
    return None


def turning_length(config: PreTrainedConfig) -> float:
    """The longest row whose positions are encoded as a short one's. With longrope (Phi-3) transformers encodes all rows of a pass as long ones
    where one of them is longer."""
    given = getattr(config, "rope_parameters", None) or {}
    for rope in (given, *given.values()):  # some models have one for each kind of layer
        if isinstance(rope, Mapping) and rope.get("rope_type") == "longrope":
            return rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return math.inf


def _reach(config: PreTrainedConfig) -> float:
    """The longest row that is read alike in whatever company, and in which every layer sees all that comes before; 0 where that is unknown.
    The mask that is given takes the place of the model's own windows."""
    layers, window = set(getattr(config, "layer_types", None) or ()), getattr(config, "sliding_window", None)
    if layers:
        limited = layers - {"full_attention"}
    else:
        limited = {name for name, value in config.to_dict().items() if value and ("window" in name or "chunk" in name)}
    turns = turning_length(config)
    if not limited:
        return turns
    return min(window, turns) if limited in ({"sliding_attention"}, {"sliding_window"}) and window else 0


@torch.no_grad()
def _trial(model: nn.Module) -> str | None:
    """Why the model fails a trial, on the way that rows take in training: two prompts that begin alike, of which one has two completions,
    packed and each by itself."""
    inner = base_model(model)
    embeddings, kind = inner.get_input_embeddings().weight, type(inner).__name__
    if embeddings.device.type == "meta":
        return "its weights are offloaded"
    ids = (torch.arange(1, 17) * 7919 % len(embeddings)).tolist()
    prompts, completions = [ids[:3], ids[:3], [ids[0], ids[3]]], [ids[4:8], ids[8:10], ids[10:15]]
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    packed = _filled([[[0, 1], [2]]], 16, prompts, completions, _TRIAL)
    last = torch.tensor([[0], [-1]])
    inputs = [*({"input_ids": torch.tensor([row]), "scored": last} for row in rows), packed_inputs(packed, last)]
    inputs = [{name: value.to(embeddings.device) for name, value in own.items()} for own in inputs]
    inputs = [{**own, "targets": own["input_ids"][0, -1:]} for own in inputs]
    # of the second completion, which comes after the first one of its prompt
    text = torch.zeros(packed["input_ids"].numel(), dtype=torch.bool)
    text[packed["places"][1, : len(rows[1])]] = True
    text = text.view_as(packed["input_ids"])
    training = model.training
    model.eval()
    try:
        with stirred(model), hidden_states(inner) as states:
            for own in inputs:
                model(**own)
        # in half precision an adapter may move hidden states by less than rounding does
        leaks = isinstance(model, PeftModel) and (tokens_read(model, inputs[-1], text).cpu() & ~text).any()
    except Exception as error:  # of any kind: what code of others says of a mask of four dimensions
        return f"{kind} does not take packed rows ({type(error).__name__}: {error})"
    finally:
        model.train(training)
    *alone, together = (own.flatten(0, 1) for own in states)
    found = torch.cat([together[packed["places"][row, : len(own)].to(together.device)] for row, own in enumerate(rows)])
    found, alone = found.double(), torch.cat(alone).double()
    difference = (found - alone).norm(dim=-1) / alone.norm(dim=-1)
    if leaks or not difference.max() <= _TOLERANCE.get(embeddings.dtype, 0.2):
        return f"{kind} gives other hidden states for packed rows"
    return None
