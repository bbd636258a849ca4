"""Writing with a compiled decode step: a static KV cache, for which transformers compiles the forward pass of a token.

Decisions
- transformers compiles, where its own criteria allow. Ours are the shapes: rows are filled up to a power of two and the cache's length
  to a step of a ladder, so that a run has few shapes. Each is compiled when it is first met, and never again. The shape follows
  from the call alone, not from earlier ones, so that a resumed run computes what the run would have.
- Prompts are read without compiling, at the width they have, once each (`reading.begun`), and their keys and values are copied in.
- The cache of a shape is kept: its addresses are part of a recorded CUDA graph. So are those of the weights, so an adapter is merged in
  their place.
- Layers with a sliding window keep all keys, and the mask hides what is outside the window. transformers' static sliding layer counts
  tokens in Python, and with fixed shapes each count would be compiled anew.
- What transformers compiled is taken off the model between calls. It is bound to that model, and a deep copy would write with the
  original's weights.
- On a CPU compiling takes longer than a run saves, so "auto" compiles on CUDA alone.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch._dynamo.callback import callback_handler
from torch._dynamo.utils import counters
from torch.utils._triton import has_triton
from transformers import (
    Cache,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, StaticLayer, StaticSlidingWindowLayer
from transformers.generation import GenerateDecoderOnlyOutput

from ..config import CrossTokenizerGKDConfig
from ..models.forwards import base_model
from ..models.sharding import shards_student
from .cache import CACHE, has_virtual_tokens


logger = logging.getLogger(__name__)

COMPILED = "transformers_compiled"
FEWEST_ROWS = 8  # fewer cost a GPU as much: the weights are read all the same
SHORTEST = 64  # tokens of a cache
_MOST_SHAPES = 64  # torch's own limit is 8; what goes past it runs uncompiled
# new tokens: that of the prompt, one of a compiled step that runs, one of a step that is recorded as a CUDA graph, two that replay it
_TRIED = 5
_COMPILED_PARTS = ("_compiled_call", "_last_compile_config")  # of a model, where `generate` keeps them
_OWN_SETTINGS = {"cache_implementation", "compile_config", "disable_compile", "prefill_chunk_size"}


def rows_of(rows: int) -> int:
    """Rows of the batch that `rows` are filled up to."""
    return max(FEWEST_ROWS, 1 << (rows - 1).bit_length())


def length_of(tokens: int) -> int:
    """Length of the cache that holds `tokens`: 64, 128, 192, 256, 384, 512, 768, ..."""
    power = 1 << (max(tokens, SHORTEST) - 1).bit_length()
    return 3 * power // 4 if tokens <= 3 * power // 4 and power > 2 * SHORTEST else power


def compile_config(device: torch.device) -> CompileConfig:
    """How transformers compiles: on CUDA with its own default, which records CUDA graphs."""
    if device.type == "cuda":
        return CompileConfig(dynamic=False)
    config = CompileConfig(dynamic=False, mode="default")
    config._compile_all_devices = True
    return config


def chosen_backend(model: PreTrainedModel, args: CrossTokenizerGKDConfig, accelerator) -> str:
    """`args.generation_backend`; for "auto", what it stands for here, which is logged."""
    if args.generation_backend != "auto":
        return args.generation_backend
    if accelerator.device.type == "cuda":
        reason = why_not_compiled(model, args, accelerator)
    else:
        reason = f"on a {accelerator.device.type.upper()}, compiling takes longer than it saves"
    backend = COMPILED if reason is None else "transformers"
    if accelerator.is_main_process:
        because = reason or "each new shape of a batch takes a while to compile, and is used from then on"
        logger.info(f"generation_backend='auto' is {backend!r} here: {because}.")
    return backend


def check_compiled(model: PreTrainedModel, args: CrossTokenizerGKDConfig, accelerator):
    """Raises `ValueError` where `args` ask for a compiled decode step, and there cannot be one."""
    if args.generation_backend != COMPILED:
        return
    reason = why_not_compiled(model, args, accelerator)
    if reason is not None:
        raise ValueError(
            f"generation_backend={COMPILED!r} cannot be used: {reason}. Choose 'transformers', or 'auto', which compiles wherever it can."
        )


def why_not_compiled(model: PreTrainedModel, args: CrossTokenizerGKDConfig, accelerator) -> str | None:
    """What stands against a compiled decode step of `model`; `None` if nothing is known to."""
    base, device = base_model(model), accelerator.device
    name, kwargs = type(base).__name__, args.generation_kwargs or {}
    quantizer, attention = getattr(base, "hf_quantizer", None), getattr(base.config, "_attn_implementation", None)
    if shards_student(accelerator):
        return "the student is sharded over processes"
    if len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1:
        return "the student is spread over several devices"
    if base.is_remote_code():
        return f"{name} is code from the hub, which may keep a state that transformers does not know"
    if has_virtual_tokens(model):
        return "the adapter learns a prompt"
    if not getattr(base, "_can_compile_fullgraph", False) or "llama4" in base.config.model_type:
        return f"transformers does not compile {name}"
    if any(hasattr(module, "rope_deltas") for module in base.modules()):
        return f"{name} keeps positions beside its cache"
    kinds = {type(layer) for layer in StaticCache(base.config, SHORTEST).layers}
    if not kinds <= {StaticLayer, StaticSlidingWindowLayer}:
        return f"{name} keeps more than keys and values, of which rows could not leave"
    if attention not in ("sdpa", "eager"):
        return f"attn_implementation={attention!r} does not read a static cache by a mask alone, as 'sdpa' does"
    if quantizer is not None and not quantizer.is_compileable:
        return f"transformers does not compile a model quantized with {type(quantizer).__name__}"
    if own := sorted(_OWN_SETTINGS & set(kwargs)):
        return f"generation_kwargs has {', '.join(own)}, which this backend sets itself"
    if device.type not in ("cuda", "cpu"):
        return f"a decode step is compiled for CUDA or a CPU, and this is a {device.type} device"
    if device.type == "cuda" and not has_triton():
        return "torch compiles for a GPU with Triton, which is not installed or does not know this one"
    if device.type == "cpu" and not _has_cpp_compiler():
        return "torch compiles for a CPU with a C++ compiler, and finds none"
    return None


def _has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@contextmanager
def while_compiling(context: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Whatever torch compiles or records within is done within `context()`."""
    stack = ExitStack()
    begin = callback_handler.register_start_callback(lambda _: stack.enter_context(context()))
    end = callback_handler.register_end_callback(lambda _: stack.close())
    try:
        yield
    finally:
        callback_handler.remove_start_callback(begin)
        callback_handler.remove_end_callback(end)


class CompiledDecode:
    """
    Takes the place of `model.generate` in `generation._generate`, for one model.

    The cache that it takes and returns is a plain one, of the rows of the call. Its keys and values are copied into a static cache of
    more rows and greater length. What is returned is a view of that, valid until the next call.

    Args:
        falls_back (`bool`): whether to write without compiling, with a warning, from the first failure of torch to compile on. Otherwise
            `RuntimeError` is raised.
    """

    def __init__(self, falls_back: bool):
        self._falls_back, self._failed = falls_back, False
        self._caches: dict[tuple[int, int], StaticCache] = {}  # by rows and length, each tried out
        self._seconds = 0.0
        self._compiled: dict[str, Any] = {}

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        **kwargs,
    ) -> GenerateDecoderOnlyOutput:
        rows, size = len(input_ids), rows_of(len(input_ids))
        length = length_of(input_ids.shape[1] + generation_config.max_new_tokens)
        fill = torch.arange(size, device=input_ids.device).clamp(max=rows - 1)  # the last row over and over
        config = copy.deepcopy(generation_config)
        config.compile_config = compile_config(input_ids.device)
        with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES), self._compiled_parts(base_model(model)):
            if not self._failed and (size, length) not in self._caches:
                self._try(model, input_ids[fill, -1:], config, length)
            if self._failed:
                given = {
                    "input_ids": input_ids,
                    "attention_mask": attention_mask,
                    "generation_config": generation_config,
                }
                return model.generate(**given, stopping_criteria=stopping_criteria, **kwargs)
            cache = self._caches[size, length]
            _fill(cache, kwargs.pop(CACHE), fill)
            leave = None if size == FEWEST_ROWS else stopping_criteria  # there is no smaller batch to go on in
            if (offsets := kwargs.get("alora_offsets")) is not None:
                kwargs["alora_offsets"] = [*offsets, *offsets[-1:] * (size - rows)]
            output = model.generate(
                input_ids=input_ids[fill],
                attention_mask=attention_mask[fill],
                generation_config=config,
                stopping_criteria=StoppingCriteriaList([_OfRows(rows, leave)]),
                **kwargs,
                **{CACHE: cache},
            )
        output.sequences = output.sequences[:rows]
        output[CACHE] = _view(cache, rows, output.sequences.shape[1] - 1)
        return output

    @contextmanager
    def _compiled_parts(self, base: PreTrainedModel) -> Iterator[None]:
        """Within, `base` has what was compiled for it here, and afterwards what it had before."""
        before = {name: base.__dict__.pop(name) for name in _COMPILED_PARTS if name in base.__dict__}
        base.__dict__.update(self._compiled)
        try:
            yield
        finally:
            self._compiled = {name: base.__dict__.pop(name) for name in _COMPILED_PARTS if name in base.__dict__}
            base.__dict__.update(before)

    def _try(self, model: PreTrainedModel, input_ids: torch.Tensor, config: GenerationConfig, length: int):
        """Compiles for the rows of `input_ids` (B, 1) and a cache of `length` by writing a few tokens, which are thrown away."""
        cache, config, begin = _new_cache(base_model(model), length), copy.deepcopy(config), time.perf_counter()
        config.update(max_new_tokens=_TRIED, eos_token_id=None)
        graphs, name = counters["stats"]["unique_graphs"], type(base_model(model)).__name__
        try:
            with torch.random.fork_rng([input_ids.device] if input_ids.device.type == "cuda" else []):
                given = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), CACHE: cache}
                model.generate(**given, generation_config=config)
        except Exception as error:  # compilers raise whatever they like
            reason, shape = str(error).split("\n\n")[0], f"{len(input_ids)} rows and a cache of {length} tokens"
            what = f"torch could not compile a decode step of {name} for {shape} ({type(error).__name__}: {reason})"
            if not self._falls_back:
                raise RuntimeError(f"{what}. generation_backend='transformers' writes without compiling.") from error
            self._failed = True
            self._caches.clear()
            logger.warning(f"{what}, so that generation_backend='auto' is 'transformers' from here on.")
            return
        self._caches[len(input_ids), length] = cache
        seconds, graphs = time.perf_counter() - begin, counters["stats"]["unique_graphs"] - graphs
        self._seconds += seconds
        logger.info(
            f"Compiled a decode step of {name} for {len(input_ids)} rows and a cache of {length} tokens: {seconds:.1f} s, {graphs} "
            f"graphs; {self._seconds:.1f} s for all {len(self._caches)} shapes so far."
        )


def _new_cache(base: PreTrainedModel, length: int) -> StaticCache:
    cache = StaticCache(config=base.config, max_cache_len=length)
    cache.layers = [_Layer(length) for _ in cache.layers]
    return cache


class _Layer(StaticLayer):
    """Takes values of another dtype than the keys', which autocast makes of float32 weights. `StaticLayer` raises an error on them."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        return super().update(key_states, value_states.to(key_states.dtype), *args, **kwargs)


def _fill(cache: StaticCache, before: Cache | None, rows: torch.Tensor):
    """Makes `cache` hold these rows of `before` and nothing else."""
    cache.reset()
    seen = 0 if before is None else before.get_seq_length()
    for layer, old in zip(cache.layers, before.layers if seen else [], strict=bool(seen)):
        own = rows.to(old.keys.device)
        at = slice(seen - old.keys.shape[2], seen)  # a sliding window has kept the last ones
        layer.keys[:, :, at], layer.values[:, :, at] = old.keys[own], old.values[own]
        layer.cumulative_length.fill_(seen)


def _view(cache: StaticCache, rows: int, length: int) -> DynamicCache:
    """The first `rows` and `length` tokens of `cache`, uncopied, as a cache of which rows can be selected."""
    view = DynamicCache()
    for layer in cache.layers:
        own, keys, values = DynamicLayer(), layer.keys[:rows, :, :length], layer.values[:rows, :, :length]
        own.lazy_initialization(keys, values)
        own.keys, own.values = keys, values
        view.layers.append(own)
    return view


class _OfRows(StoppingCriteria):
    """`criteria` of the first `rows`; those that fill up the batch have ended from the start."""

    def __init__(self, rows: int, criteria: StoppingCriteriaList | None):
        self._rows, self._criteria = rows, criteria

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        ended = torch.arange(len(input_ids), device=input_ids.device) >= self._rows
        if self._criteria is not None:
            ended[: self._rows] |= self._criteria(input_ids[: self._rows], scores, **kwargs)
        return ended
