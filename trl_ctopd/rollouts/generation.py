"""How a model writes: prompts in, completions out, by transformers' own generation with a KV cache.

Decisions
- All prompts are written for in one call, sorted by length, unless `generation_batch_size` splits them.
- Only the run's own settings shape the distribution.
- Rows that have ended leave the batch. Whenever half of the rows have ended, the call ends, and the others continue in a
  new call: from their KV cache or, where a model keeps more than plain keys and values, after reading their text again.
- Equal prompts, and what unlike ones begin with alike, are read once, and their cache is copied to all their rows. On a CPU prompts of
  like length are read together.
- A LoRA adapter is merged while the student writes (`merge_adapter_for_generation`). In half precision the merged weights are
  rounded otherwise than the two parts that are scored. The log-probs that tokens were sampled with are then recorded, so that the
  difference is logged and weighs the advantages, as with vLLM. This needs sampling that only a temperature shapes.
- A text is told of once its row has left and others are still to be written (`ended`), so that a server can score it meanwhile. To
  tell of it at its last token would wait for the device at each token.
- A text's draws can come from a function of the caller's (`choose`), so that they do not depend on what else draws in the process.
- Rows stay where the model stays sharded (`gather_for_generation=False`), since every process must then make the same calls,
  and with `generation_kwargs`, some of which count from the start of a call.
"""

import copy
import math
import warnings
from collections.abc import Callable, Container, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Protocol

import peft
import torch
import transformers
from accelerate.logging import get_logger
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import ContinuousBatchingConfig
from trl.models.utils import unwrap_model_for_generation

from ..config import CrossTokenizerGKDConfig
from ..models.activated import activation, invocation_of
from ..models.forwards import base_model
from ..models.heads import context_of
from ..models.merging import mergeable, merged
from ..models.products import packed, packing_is_faster
from ..models.sharding import gathered_under_fsdp, is_sharded
from ..models.trials import can_run, trial_ids
from .cache import CACHE, embeds_virtual_tokens, growing_cache, has_virtual_tokens, selected
from .pairing import Prompt, pad_rows
from .reading import begun, greedy


logger = get_logger(__name__)

Written = tuple[list[int], list[float] | None]
Choose = Callable[[torch.Tensor], torch.Tensor]
Ended = Callable[[int, list[int]], None]
# of logits, relative: pretrained models round by 0.02 in half precision, by less with TF32, and positions that count padding change 0.4 and more
_ROUNDED, _ROUNDED_HALF = 0.05, 0.2
_OFF, _OFF_HALF = 0.01, 0.3  # nats by which a written token's log-prob is off beyond rounding
_STRIDE = 1_000_003  # between the seeds of two steps; processes take the seeds between


class Writer(Protocol):
    """Writes as the student. All processes call it, each with its own prompts, of which there may be none."""

    def __call__(self, model: nn.Module, prompts: list[Prompt], step: int) -> list[Written]:
        """
        Args:
            model: the student, wrapped for training.
            step: number of optimizer steps taken.

        Returns:
            For each prompt, the student ids of a completion up to and including its first stop token; and the log-probs in
            nats that they were sampled with, where the writer samples from another distribution than `model`'s.
        """


class TransformersWriter:
    """A [`Writer`] by the student's own `generate`, under `config` and `args`. `record`: always tells the log-probs that it sampled
    with, which only a temperature may have shaped. `decode`: as of `write`."""

    def __init__(
        self,
        config: GenerationConfig,
        accelerator,
        args: CrossTokenizerGKDConfig,
        record: bool = False,
        decode: Callable | None = None,
    ):
        self._config, self._accelerator, self._args, self._record = config, accelerator, args, record
        self._decode = decode

    def __call__(
        self, model: nn.Module, prompts: list[Prompt], step: int, limit: int | None = None, ended: Ended | None = None
    ) -> list[Written]:
        """`limit`: in place of the config's `max_new_tokens`. `ended`: as of `write`."""
        ids, config, args = [prompt.student_ids for prompt in prompts], self._config, self._args
        if limit is not None:
            config = copy.deepcopy(config)
            config.max_new_tokens = limit
        options = {"merge": True, "record": self._record, "decode": self._decode, "ended": ended}
        return write(model, ids, config, self._accelerator, args, args.generation_backend, **options)


def step_seed(seed: int, step: int, process: int = 0) -> int:
    """What the text of optimizer step `step` (-1: of an evaluation) in process `process` of a run with `seed` is drawn from."""
    return seed + _STRIDE * (step + 1) + process


def sampling_config(args: CrossTokenizerGKDConfig, stop_ids: list[int], pad_token_id: int) -> GenerationConfig:
    """The generation config of a run with `args`."""
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
    args: CrossTokenizerGKDConfig,
    backend: str = "transformers",
    merge: bool = False,
    record: bool = False,
    decode: Callable | None = None,
    ended: Ended | None = None,
) -> list[Written]:
    """
    Completions of `prompts` (token ids) in the same order, each up to and including its first stop token.

    `model` may be wrapped (DDP, DeepSpeed) and have gradient checkpointing on; its state is restored afterwards. `backend`:
    one of `GENERATION_BACKENDS`. `merge`: whether its adapter is merged meanwhile, where `args` and the model allow it. `record`:
    whether the log-probs are returned in any case, which continuous batching does not tell. `decode`: a `compiled.CompiledDecode`, in
    the place of `model.generate`. `ended`: called with the place of a prompt and its completion, where that is known before others are.
    """
    if not prompts:
        return []
    sharded = is_sharded(model, accelerator)
    together = sharded and not args.gather_for_generation
    generate: Callable[..., list[list[int]]] = partial(
        _generate,
        rows_leave=not (together or args.generation_kwargs),
        together=together,
        device=accelerator.device if sharded else None,
        decode=decode,
    )
    if backend == "transformers_continuous":
        generate = partial(_generate_continuously, settings=args.transformers_continuous_batching_config or {})
    layers, recorded, rows = [], False, _at_the_same_time(prompts, args)
    if merge and not sharded:
        layers, recorded = _merging(model, config, accelerator, args, backend)
    with (
        _old_names_of_checkpointing(),
        _no_further_hooks(model, accelerator),
        unwrap_model_for_generation(
            model,
            accelerator,
            gather_deepspeed3_params=args.gather_for_generation,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        ) as unwrapped,
        gathered_under_fsdp(unwrapped) if sharded and not together else nullcontext(),
        _ready_to_generate(unwrapped, config),
        _weights_to_write_with(unwrapped, layers, accelerator, rows, in_place=decode is not None),
    ):
        return _by_length(generate, unwrapped, prompts, config, args, recorded or record, ended)


@torch.no_grad()
def write_with_copy(
    model: nn.Module, prompts: list[list[int]], config: GenerationConfig, accelerator, args, choose: Choose
) -> list[Written]:
    """
    As `write`, by a module in this process that nothing else uses: it touches no state of the process, so that another thread can
    train meanwhile. Log-probs are always returned. `config` must shape the distribution by a temperature alone.

    Args:
        choose: (B, V) logits to the (B, 1) ids that are drawn.
    """
    if not prompts:
        return []
    layers, _ = _merging(model, config, accelerator, args, "transformers")
    generate = partial(_generate, rows_leave=True, choose=choose)
    rows = _at_the_same_time(prompts, args)
    with _ready_to_generate(model, config), _weights_to_write_with(model, layers, accelerator, rows):
        return _by_length(generate, model, prompts, config, args, recorded=True)


def _by_length(
    generate: Callable[..., list[list[int]]],
    model: nn.Module,
    prompts: list[list[int]],
    config: GenerationConfig,
    args: CrossTokenizerGKDConfig,
    recorded: bool,
    ended: Ended | None = None,
) -> list[Written]:
    """Completions of `prompts` in the same order, written the longest prompts first, and without padding where padding would part them from
    an adapter's virtual tokens."""
    order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
    alike = [order]
    if embeds_virtual_tokens(model):
        alike = [list(rows) for _, rows in groupby(order, key=lambda row: len(prompts[row]))]
    size = _at_the_same_time(prompts, args)
    batches = [rows[start : start + size] for rows in alike for start in range(0, len(rows), size)]
    stop_ids, completions, told = set(config.eos_token_id), [([], None)] * len(prompts), set()

    def tell(row: int, ids: list[int]):
        if row not in told:
            told.add(row)
            ended(row, up_to_stop(ids, stop_ids))

    for rows in batches:
        recorder = {"recorder": _SampledLogProbs(len(rows), config)} if recorded else {}
        leaves = {} if ended is None else {"left": lambda place, ids, rows=rows: tell(rows[place], ids)}
        with _logits_are_finite():
            written = generate(model, [prompts[r] for r in rows], config, **recorder, **leaves)
        scores = recorder["recorder"].of_tokens.tolist() if recorded else [None] * len(rows)
        for row, ids, own in zip(rows, written, scores, strict=True):
            ids = up_to_stop(ids, stop_ids)
            completions[row] = ids, None if own is None else own[: len(ids)]
            if ended is not None and rows is not batches[-1]:
                tell(row, ids)
    return completions


def _at_the_same_time(prompts: list[list[int]], args: CrossTokenizerGKDConfig) -> int:
    """Rows of one call."""
    return min(len(prompts), args.generation_batch_size or len(prompts))


def _merging(model, config: GenerationConfig, accelerator, args: CrossTokenizerGKDConfig, backend: str):
    """The layers whose adapter is merged, and whether the log-probs are recorded that tokens are sampled with."""
    wanted = args.merge_adapter_for_generation
    layers = [] if wanted is False else mergeable(model)
    full = (torch.float32, torch.float64)
    if accelerator.mixed_precision == "no" and all(own.get_base_layer().weight.dtype in full for own in layers):
        return layers, False
    recorded = bool(layers) and _by_temperature_alone(config, args) and backend != "transformers_continuous"
    return layers if recorded or wanted else [], recorded


def _by_temperature_alone(config: GenerationConfig, args: CrossTokenizerGKDConfig) -> bool:
    """Whether nothing else shapes the distribution that is sampled from."""
    return config.do_sample and not any((args.generation_kwargs, args.top_k, args.min_p)) and args.top_p == 1


@contextmanager
def _weights_to_write_with(
    model: nn.Module, layers: Sequence[nn.Module], accelerator, rows: int, in_place: bool = False
):
    """Within, the adapter of `layers` is merged, and weights are packed where they are multiplied by as they are, if that is faster for so many
    rows; `in_place`: none changes its address."""
    half = accelerator.mixed_precision != "no" or torch.is_autocast_enabled("cpu")
    pack = packing_is_faster(rows) and not in_place and not half
    with merged(layers, in_place, pack), packed(model) if pack else nullcontext():
        yield


def up_to_stop(ids: Sequence[int], stop_ids: Container[int]) -> list[int]:
    """`ids` up to and including the first stop token; all of them where there is none."""
    return list(ids[: next((n for n, token in enumerate(ids, start=1) if token in stop_ids), len(ids))])


class _SampledLogProbs(LogitsProcessor):
    """
    Records what each token was sampled with, where only a temperature shapes the distribution.

    Attributes:
        of_tokens (rows, max_new_tokens): log-probs in nats; what follows a row's stop token means nothing.
    """

    def __init__(self, rows: int, config: GenerationConfig):
        self.of_tokens = torch.full((rows, config.max_new_tokens), torch.nan)
        self._temperature = config.temperature
        self._rows, self._column, self._log_probs = None, 0, None

    def begin(self, rows: torch.Tensor, column: int):
        """The next call writes these rows from this column on."""
        self._rows, self._column, self._log_probs, self._found = rows.cpu(), column, None, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._take(input_ids)
        self._log_probs = (scores.float() / self._temperature).log_softmax(-1)
        return scores

    def end(self, sequences: torch.Tensor):
        self._take(sequences)
        found = torch.stack(self._found, 1).cpu()
        self.of_tokens[self._rows, self._column : self._column + found.shape[1]] = found

    def _take(self, input_ids: torch.Tensor):
        if self._log_probs is not None:
            self._found.append(self._log_probs.gather(1, input_ids[: len(self._rows), -1:])[:, 0])


class _Chosen(LogitsProcessor):
    """Leaves the tokens that `choose` draws as the only possible ones."""

    def __init__(self, choose: Choose):
        self._choose = choose

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).scatter_(1, self._choose(scores), 0.0)


@contextmanager
def _logits_are_finite():
    """Explains logits that are not finite. torch's own error speaks of a probability tensor."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise FloatingPointError(
            "The model that writes has NaN or infinite logits, though its weights are finite: they overflow in its dtype. "
            "Load it in bfloat16 or float32, lower learning_rate, or clip gradients (max_grad_norm). "
            "resume_from_checkpoint=True continues from the last checkpoint."
        ) from error


@contextmanager
def _old_names_of_checkpointing():
    """TRL calls `gradient_checkpointing_enable` and the like, which transformers has renamed: three warnings a step that the
    user can do nothing about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield


@contextmanager
def _no_further_hooks(model: nn.Module, accelerator):
    """
    TRL switches gradient checkpointing off and on again around generation, and each time transformers hangs one more hook on the
    embeddings. Without the last ones before, their number stays. Otherwise every step would be slower than the one before it, and
    would be compiled anew.
    """
    base = base_model(accelerator.unwrap_model(model))
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    if checkpointing and getattr(base, "_require_grads_hook", None) is not None:
        base.disable_input_require_grads()
    yield


def _generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    config: GenerationConfig,
    rows_leave: bool,
    together: bool = False,
    device: torch.device | None = None,
    recorder: _SampledLogProbs | None = None,
    decode: Callable | None = None,
    choose: Choose | None = None,
    left: Ended | None = None,
) -> list[list[int]]:
    """Completions, with whatever follows their first stop token. `together`: every process makes the same number of forward
    passes. `decode`: takes the place of `model.generate`; `choose`: of its draws, as in `write_with_copy`. `left`: called with the place
    and the completion of each row that leaves before the others have ended."""
    width, limit = max(map(len, prompts)), config.max_new_tokens
    device = device or model.get_input_embeddings().weight.device
    flipped = [prompt[::-1] for prompt in prompts]  # for padding on the left
    sequences = pad_rows(flipped, width, config.pad_token_id).flip(1).to(device)
    mask = pad_rows([[1] * len(prompt) for prompt in prompts], width, 0).flip(1).to(device)
    written = torch.full((len(prompts), limit), config.pad_token_id, device=device)
    rows = torch.arange(len(prompts), device=device)  # the rows that are still being written
    stop_ids = torch.tensor(config.eos_token_id, device=device)
    if isinstance(model, PeftModel):
        check_prompt_learning(model.active_peft_config)
    cache, criteria, generate = None, None, partial(decode, model) if decode else model.generate
    processors = [recorder] if recorder is not None else []
    processors += [_Chosen(choose)] if choose is not None else []
    if rows_leave:
        cache = begun(model, prompts, config, device)
    while True:
        if rows_leave:
            criteria = StoppingCriteriaList([_HalfHaveEnded(stop_ids, len(rows))])
        call = greedy(config) if choose else copy.deepcopy(config)
        call.update(max_new_tokens=width + limit - sequences.shape[1], return_dict_in_generate=True)
        if recorder is not None:
            recorder.begin(rows, sequences.shape[1] - width)
        own_prompts = [prompts[row] for row in rows.tolist()]
        output = generate(
            input_ids=sequences,
            attention_mask=mask,
            generation_config=call,
            stopping_criteria=criteria,
            synced_gpus=together,
            logits_processor=LogitsProcessorList(processors) or None,
            **activation(invocation_of(model), own_prompts, [sequences.shape[1] - width] * len(rows)),
            **{CACHE: cache},
        )
        if recorder is not None:
            recorder.end(output.sequences)
        own = output.sequences[:, width:]
        written[rows, : own.shape[1]] = own
        has_ended = torch.isin(own, stop_ids).any(1)
        [stay] = (~has_ended).nonzero(as_tuple=True)
        if not len(stay) or own.shape[1] == limit:
            return written.tolist()
        if left is not None:
            for place, ids in zip(rows[has_ended].tolist(), own[has_ended].tolist(), strict=True):
                left(place, ids)
        rows, sequences = rows[stay], output.sequences[stay]
        mask = torch.cat([mask[stay], mask.new_ones(len(stay), sequences.shape[1] - mask.shape[1])], 1)
        cache = selected(model, getattr(output, CACHE, None), stay)


class _HalfHaveEnded(StoppingCriteria):
    """Ends the call for all rows once half of them have written a stop token, without waiting for the device."""

    def __init__(self, stop_ids: torch.Tensor, rows: int):
        self._stop_ids = stop_ids
        self._ended = torch.zeros(rows, dtype=torch.bool, device=stop_ids.device)

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        self._ended |= torch.isin(input_ids[:, -1], self._stop_ids)
        return self._ended | (2 * self._ended.sum() >= len(self._ended))


def _generate_continuously(
    model: PreTrainedModel,
    prompts: list[list[int]],
    config: GenerationConfig,
    settings: dict,
    left: Ended | None = None,
) -> list[list[int]]:
    """By continuous batching, with a paged cache: when a row ends, the next prompt begins. `left` is not called: all are returned at
    once."""
    check_continuous(model)
    defaults = {
        "seed": int(torch.randint(2**31, ())),
        "max_memory_percent": 0.5,  # the rest is for training
        "drop_unsupported_processors": False,  # the user asked for them, and they shape the distribution
    }
    found = model.generate_batch(
        prompts,
        generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(**{**defaults, **settings}),
    )
    errors = [output.error for output in found.values() if output.error is not None]
    if errors or len(found) != len(prompts):
        raise RuntimeError(
            f"transformers' continuous batching wrote {len(found) - len(errors)} of {len(prompts)} completions; its own "
            f"message: {errors[0] if errors else 'see the log above'}. generation_backend='transformers' needs no "
            "paged cache."
        )
    return [output.generated_tokens for output in found.values()]


def check_continuous(model: nn.Module):
    """Raises `ValueError` for an adapter that is added in PEFT's own `generate`, which continuous batching does not call."""
    left_out = None
    if has_virtual_tokens(model):
        left_out = "the virtual tokens of a prompt-learning adapter"
    elif (invocation := invocation_of(model)) is not None:
        left_out = f"an activated LoRA (alora_invocation_tokens={invocation})"
    if left_out is not None:
        raise ValueError(
            f"generation_backend='transformers_continuous' would leave out {left_out}: choose 'transformers'."
        )


def check_virtual_tokens(model: nn.Module, args: CrossTokenizerGKDConfig, sharded: bool):
    """Raises `ValueError` where the processes of a sharded student would make unlike numbers of calls, for prompts of unlike lengths."""
    if sharded and not args.gather_for_generation and embeds_virtual_tokens(model):
        raise ValueError(
            f"{model.active_peft_config.peft_type.value} with gather_for_generation=False: PEFT embeds its virtual tokens in front of padding, so that prompts "
            "of one length alone are written for at the same time, and the processes of a sharded student would wait for each other for ever. Set "
            "gather_for_generation=True, or train a LoRA adapter."
        )


def check_prompt_learning(config: PeftConfig):
    """
    Raises `ValueError` for an adapter whose virtual tokens PEFT would leave out in generation.

    Where transformers names its cache `cache`, PEFT's `generate` (0.21.2, the newest one tested) looks for the old name and
    does not find it. The text is then not what the adapter's own forward passes would write.
    """
    if config.is_prompt_learning and CACHE == "cache":
        raise ValueError(
            f"{config.peft_type.value}: with transformers {transformers.__version__} and PEFT {peft.__version__}, a model with "
            "virtual tokens writes text that is not its own (transformers 5.24 renamed `past_key_values`, which PEFT still looks "
            "for). Install transformers<5.24, or train a LoRA adapter."
        )


def check_window(side: str, model: nn.Module):
    """Raises `ValueError` where the config of the `model` that writes ("student" or "teacher") has a window that the model does not know of:
    transformers would cut the cache by it, and attend to all that comes before in a forward pass (findings/a_stray_window_cuts_the_cache.sh)."""
    config = base_model(model).config.get_text_config()
    stray = [
        key
        for key in ("sliding_window", "attention_chunk_size")
        if not hasattr(type(config), key) and 0 < (getattr(config, key, None) or 0) < (context_of(config) or math.inf)
    ]
    if stray and type(config).__module__.startswith("transformers.") and not getattr(config, "layer_types", None):
        raise ValueError(
            f"The config of the {side} has {stray[0]}={getattr(config, stray[0])}, which {type(base_model(model)).__name__} does not know of: it would "
            "write with so many tokens in its cache, and be scored with all of them. Remove the key from its config.json."
        )


@torch.no_grad()
def check_padding(model: nn.Module, args: CrossTokenizerGKDConfig):
    """
    Raises `ValueError` where prompts are padded so that they can be written for together, and the student does not write after padding what it
    writes without: a completion then depends on the others of its batch. Some recurrent models read padding, whatever the attention mask
    says (RWKV, RecurrentGemma); the positions of some decoders count it (Bart's, TrOCR's).
    """
    base = base_model(model)
    padded = (
        args.generation_backend != "transformers_continuous" and args.generation_batch_size != 1 and not args.use_vllm
    )
    if not padded or not can_run(base):
        return
    ids = trial_ids(base, 4, 16)
    ids[2:, 12:] = ids[:2, 12:]  # two texts, each after two paddings
    mask = (torch.arange(16, device=ids.device) >= 12).long().repeat(4, 1)
    config = GenerationConfig(max_new_tokens=1, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    call = partial(base.generate, generation_config=config, synced_gpus=False)
    with _ready_to_generate(base, config):
        [alone] = call(input_ids=ids[:2, 12:], attention_mask=mask[:2, 12:]).logits
        [padded] = call(input_ids=ids, attention_mask=mask).logits
    alone, one, other = alone.float(), *padded.float().split(2)
    is_half = _is_half(base)
    # rows of the same width round alike, so that reading is seen at less; both texts, since rounding may send one to other experts
    is_read = _all_differ(one, other, 0.02 if is_half else 1e-3)
    is_counted = _all_differ(one, alone, _ROUNDED_HALF if is_half else _ROUNDED)
    # what is not finite is `check_head`'s to tell
    if alone.isfinite().all() and (is_read or is_counted):
        raise ValueError(
            f"The student's {type(base).__name__} reads the padding of shorter prompts or counts it in its positions, whatever the attention mask "
            "says, so that what it writes depends on the others of its batch: set generation_batch_size=1."
        )


@torch.no_grad()
def off_by_its_cache(model: nn.Module) -> float:
    """
    By how many nats the log-prob of a written token differs from that of a forward pass over the text, where a model keeps other states than keys
    and values of each token (findings/written_with_other_time_steps.sh): the largest difference in a trial of a few tokens, in whichever of two
    texts it is the smaller, since rounding may send a token to other experts. 0 for all other models, and where the model cannot be tried.
    """
    base = base_model(model)
    if not can_run(base) or growing_cache(model) is not None:
        return 0.0
    ids = trial_ids(base, 2, 8)
    config = GenerationConfig(max_new_tokens=8, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    with _ready_to_generate(base, config):
        found = base.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, synced_gpus=False
        )
        read = base(input_ids=found.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    tokens = found.sequences[:, ids.shape[1] :, None]
    drawn, read = (
        own.float().log_softmax(-1).gather(2, tokens.to(own.device)) for own in (torch.stack(found.logits, 1), read)
    )
    return (drawn - read).abs().amax((1, 2)).min().item()


def recorded_for_its_cache(model: nn.Module, config: GenerationConfig, args: CrossTokenizerGKDConfig) -> bool:
    """Whether the log-probs that a student draws with are recorded because its cache changes them ([`off_by_its_cache`]), which it warns of. They
    can be where only a temperature shapes the sampling."""
    if args.generation_backend == "transformers_continuous":
        return False
    off, base = off_by_its_cache(model), base_model(model)
    if not off > _OFF or (_is_half(base) and off <= _OFF_HALF):
        return False
    can_record = _by_temperature_alone(config, args)
    done = "Sample by a temperature alone, so that the ratio of the two can weigh the advantages."
    if can_record:
        done = "The ratio of the two weighs the advantages (sampling/log_prob_difference, docs/speed.md)."
    logger.warning(
        f"The student's {type(base).__name__} writes with its cache otherwise than it reads a whole text: in a trial log-probs are off by {off:.2f} "
        f"nats. {done}"
    )
    return can_record


def _is_half(base: PreTrainedModel) -> bool:
    return base.get_input_embeddings().weight.dtype not in (torch.float32, torch.float64)


def _all_differ(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Whether all rows do, by more than `tolerance` of their length."""
    return not ((one - other).norm(dim=-1) <= tolerance * other.norm(dim=-1)).any()


@contextmanager
def _ready_to_generate(model: nn.Module, config: GenerationConfig):
    """Eval mode, and only our generation settings: transformers fills gaps from the model's own generation config, which may
    hold a repetition penalty that the scored distribution does not have."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    training, original = model.training, base.generation_config
    model.eval()
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = original
        model.train(training)
