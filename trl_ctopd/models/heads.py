"""The two halves of a causal language model: the backbone's hidden states, and the LM head alone.

Log-probs of given tokens come from TRL's kernel, inside the model's forward pass, so that every wrapper (PEFT, DDP,
ZeRO-3, FSDP) sees an ordinary call. Unlike in TRL's own `add_fused_lm_head`, the caller gives the positions. So no other
position is projected, nothing waits for the device to count positions, and a tile is small beside the hidden states.

What else the head does besides the matrix product (scaling, soft-capping) is read from the config, as in TRL's fused
head. Under ZeRO-3 and FSDP2 its weight is gathered once for a micro-batch, not once a tile.
"""

import functools
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .closing import ClosingLogProbFunction
from .forwards import of_any
from .products import linear


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # what Accelerate's mixed precision computes in
_TILE_COLUMNS = {"cuda": 8192, "xpu": 8192}  # of the vocabulary; on other devices a tile takes some 36 bytes an element
_SMALL_TILE_COLUMNS = 1024


class TokenScores(NamedTuple):
    """
    Scores of n tokens, in nats:
    log-probs (n,) float32, with gradient;
    entropies (n,) of the distributions that they are from;
    where asked for, a mixture of experts' load-balancing loss, a scalar with gradient;
    where asked for, (n,) log-probs that no continuing token is drawn, with gradient.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor | None
    imbalance: torch.Tensor | None = None
    close_log_probs: torch.Tensor | None = None


def context_of(config: PreTrainedConfig) -> int | None:
    """Tokens that a model of this config can read, None for no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


@contextmanager
def hidden_states(model: PreTrainedModel):
    """Yields a list that collects the (B, L, H) hidden states that each forward pass in the block gives to the LM head."""
    states: list[torch.Tensor] = []
    handle = model.base_model.register_forward_hook(
        lambda module, args, output: states.append(output.last_hidden_state)
    )
    try:
        yield states
    finally:
        handle.remove()


def add_token_scores(model: PreTrainedModel, temperature: float = 1.0, entropy: bool = False):
    """
    Makes `model(input_ids=..., scored=positions, targets=ids)` return the [`TokenScores`] of `ids` (n,) after
    the tokens at `positions` (2, n): row, and column counted from the end of the row (-1 is the last), because
    prompt-learning adapters put virtual tokens in front. The naive equivalent:

        (model(...).logits[rows, columns] / temperature).log_softmax(-1).gather(-1, ids[:, None])

    With `routed` (B, L), True for the tokens that count, a mixture of experts also returns its own auxiliary loss for load
    balancing (Switch Transformers, arXiv 2101.03961, equations 4 to 6). With `going_on=(rows, ids)` (2, K), the scores also
    hold the log-prob that none of `ids` is drawn at its row among the n (see [`ClosingLogProbFunction`]). With `ends` and
    `position_ids` the rows are packed (see `packing.Packed`). All other calls work as before. Call this before the model is wrapped.

    Args:
        model (`PreTrainedModel`): a causal language model.
        temperature (`float`): the logits are divided by it.
        entropy (`bool`): whether entropies are computed too.

    A call with `scored` may have a `temperature` and an `entropy` of its own: a model that two trainers share has been made ready twice.
    """
    original = of_any(model.forward)

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against the signature
    def forward(
        self,
        *args,
        scored=None,
        targets=None,
        routed=None,
        going_on=None,
        ends=None,
        temperature=temperature,
        entropy=entropy,
        **kwargs,
    ):
        if scored is None:
            return original(self, *args, **kwargs)
        kwargs["use_cache"] = False
        if routed is not None:
            kwargs["output_router_logits"] = True
        if ends is not None:
            autocast = torch.is_autocast_enabled(ends.device.type)
            own = self.get_input_embeddings().weight.dtype
            dtype = torch.get_autocast_dtype(ends.device.type) if autocast else own
            kwargs["attention_mask"] = attention_mask_of(ends, dtype)
        output = self.base_model(*args, **kwargs)
        states, imbalance = output.last_hidden_state, None
        if routed is not None:
            imbalance = _imbalance(self, output.router_logits, routed)
        hidden = states[tuple(scored.to(states.device))]  # the layers may be on different devices
        head, (softcap, scale) = self.get_output_embeddings(), _softcap_and_scale(self)
        weight, bias = (part.full_tensor() if isinstance(part, DTensor) else part for part in (head.weight, head.bias))
        sharded = [part for part in (weight, bias) if hasattr(part, "ds_id")]  # a quantized model's are not sharded
        with maybe_gather_lm_head_ctx(*sharded):
            if going_on is not None:
                rows, ids = going_on.to(weight.device)
                columns = _TILE_COLUMNS.get(weight.device.type, _SMALL_TILE_COLUMNS)
                tokens = hidden.to(weight.device), weight, bias, targets.to(weight.device), rows, ids
                log_probs, own_entropy, close = ClosingLogProbFunction.apply(
                    *tokens, temperature, columns, softcap, scale
                )
                return TokenScores(log_probs, own_entropy, imbalance, close)
            return TokenScores(
                *ChunkedLogProbFunction.apply(
                    hidden.to(weight.device),
                    weight,
                    bias,
                    targets.to(weight.device),
                    temperature,
                    _TILE_COLUMNS.get(weight.device.type, _SMALL_TILE_COLUMNS),
                    softcap,
                    scale,
                    ("entropy",) if entropy else (),
                )[:2],
                imbalance,
            )

    model.forward = types.MethodType(forward, model)


def attention_mask_of(ends: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(P, 1, W, W) what to add to the attention scores of packed rows, whose tokens are seen up to `ends` (P, W) (see `packing.Packed`): 0
    where a token is seen, else the least number of `dtype`, in which all layers share it."""
    places = torch.arange(ends.shape[1], device=ends.device)
    hidden = (places[:, None] >= ends[:, None, :]).logical_or_(places[:, None] < places)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, torch.finfo(dtype).min)[
        :, None
    ]


def has_imbalance(model: PreTrainedModel) -> bool:
    """Whether the model class has a load-balancing loss. DeepSeek-V3's kind balances its experts otherwise."""
    return hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")


def _imbalance(
    model: PreTrainedModel, router_logits: tuple[torch.Tensor, ...], routed: torch.Tensor
) -> torch.Tensor | None:
    """The load-balancing loss, by the function in the model class's own module; None for a model of such a class without experts."""
    if not router_logits:
        return None
    balance = sys.modules[type(model).__module__].load_balancing_loss_func
    virtual = router_logits[0].numel() // router_logits[0].shape[-1] // len(routed) - routed.shape[1]
    mask = nn.functional.pad(routed.long(), (virtual, 0), value=1)  # an adapter's virtual tokens come first
    return balance(router_logits, model.num_experts, model.num_experts_per_tok, mask)


def head_rows(model: PreTrainedModel) -> int:
    """How many tokens the LM head of `model` tells of."""
    head = model.get_output_embeddings()
    # of a copy that PEFT ties to a trained embedding (ensure_weight_tying), `out_features` is the number of its columns
    return getattr(head, "original_module", head).out_features


def lm_head(
    model: PreTrainedModel, dtype: torch.dtype, temperature: float, output: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    The model's LM head as a function: hidden states (n, H) of `dtype` to logits / `temperature` (n, V), on the head's own
    device. It uses the current weight. Gradients reach the weight; under ZeRO-3 this needs `output`, a tensor that the
    model's forward pass returned.
    """
    head, (softcap, scale) = model.get_output_embeddings(), _softcap_and_scale(model)
    weight, bias = (None if part is None else _whole(part, output).to(dtype) for part in (head.weight, head.bias))

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            found = linear(hidden.to(weight.device, dtype), weight, bias)
            found = found.to(torch.promote_types(dtype, torch.float32))
            found = found if scale == 1 else found * scale  # each is a pass over the whole vocabulary
            if softcap is not None:
                found = softcap * torch.tanh(found / softcap)
            return found if temperature == 1 else found / temperature

    return logits


@torch.no_grad()
def check_head(side: str, model: PreTrainedModel):
    """Raises `ValueError` where `lm_head` does not reproduce the logits of `model` from its `hidden_states`. Log-probs of given
    tokens depend on that too."""
    unfit = (
        f"The {side}'s {type(model).__name__} does more to its logits than a matrix product, a scale and a soft cap, so "
        "that its head cannot be used apart from its backbone: choose another model."
    )
    if model.base_model is model:
        raise ValueError(
            f"transformers knows no backbone of the {side}'s {type(model).__name__}, apart from which its head is read: choose another model."
        )
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            f"The {side}'s LM head has an adapter, and the head is read apart from the model, without it: give the {side} with the adapter "
            "merged (`merge_and_unload()`)."
        )
    if model.get_output_embeddings().weight.device.type == "meta":
        raise ValueError(
            f"The {side}'s LM head is offloaded, and it is read apart from its model: give it a device in `device_map`."
        )
    if any(hasattr(part, "ds_id") or isinstance(part, DTensor) for part in model.parameters()):
        return  # sharded: it cannot run outside of its wrapper
    ids = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
    with hidden_states(model) as states:
        logits = model(input_ids=ids, use_cache=False).logits.float()
    if not torch.isfinite(logits).all():
        dtype = next(model.parameters()).dtype
        raise ValueError(
            f"The {side}'s logits are not finite: weights of its {type(model).__name__} are NaN or infinite, or overflow in {dtype}. "
            "Load it in bfloat16 or float32, and look at its weights."
        )
    if states:
        if states[0].shape[-1] != model.get_output_embeddings().weight.shape[-1]:
            raise ValueError(unfit)  # a layer lies between, as in Electra
        found = lm_head(model, states[0].dtype, 1.0)(states[0]).to(logits)
        tolerance = 0.001 if states[0].dtype == torch.float32 else 0.02
        if not (found - logits).abs().max() <= tolerance * logits.abs().max():
            raise ValueError(unfit)


def _softcap_and_scale(model: PreTrainedModel) -> tuple[float | None, float]:
    config = model.config.get_text_config()
    names = "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"  # of Gemma, RecurrentGemma and xLSTM
    softcap = next((cap for name in names if (cap := getattr(config, name, None)) is not None), None)
    return softcap, _logit_scale(config)


def _logit_scale(config) -> float:
    """The factor of the logits, under each model family's name for it: Cohere, Muse Glimmer, Falcon-H1. Granite and MiniCPM3
    divide by `logits_scaling`; HyperCLOVA X multiplies by it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def _whole(parameter: torch.Tensor, output: torch.Tensor | None) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):
        with maybe_gather_lm_head_ctx(parameter):
            return _Gathered.apply(parameter, output if parameter.requires_grad else None)
    return parameter


class _Gathered(torch.autograd.Function):
    """
    A copy of a parameter that ZeRO-3 has gathered. The parameter gets the copy's gradient. ZeRO-3 accepts a gradient only for
    a parameter that is gathered for the backward pass. The model read the head in its own forward pass, so ZeRO-3 gathers it
    when the backward pass reaches the model's output. A gradient of zero for `output` makes the backward pass go there.
    """

    @staticmethod
    def forward(ctx, parameter, output):
        ctx.save_for_backward(output)
        return parameter.detach().clone()

    @staticmethod
    def backward(ctx, gradient):
        [output] = ctx.saved_tensors
        return gradient, None if output is None else torch.zeros_like(output)
