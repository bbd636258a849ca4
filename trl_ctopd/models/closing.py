"""Log-probs of given tokens, and in the same pass over the vocabulary how likely some others are not to be drawn.

TRL's kernel (`trl.kernels.ChunkedLogProbFunction`) visits every logit of a position once, tile by tile. What a position needs
besides is the probability of a few thousand of them, so they are read off each tile while it is there: no second projection,
no tensor of size (n, V).
"""

from collections.abc import Sequence

import numpy as np
import torch
from trl.kernels import chunked_logprob as trl_kernels
from trl.trainer.utils import maybe_gather_lm_head_ctx

from .products import multiply


def in_tile_order(places: Sequence[np.ndarray], ids: Sequence[np.ndarray]) -> torch.Tensor:
    """(2, K) `rows` and `ids` of [`ClosingLogProbFunction`], from arrays of both, in the order that it reads them."""
    rows, tokens = (np.concatenate([np.zeros(0, dtype=np.int64), *parts]) for parts in (places, ids))
    order = np.argsort((tokens >> 4).astype(np.uint16), kind="stable")
    return torch.from_numpy(np.stack([rows[order], tokens[order]]))


class ClosingLogProbFunction(torch.autograd.Function):
    """
    The naive equivalent, with logits (n, V) of softmax and scale as the model has them:

        log_probs = logits.log_softmax(-1)
        log_probs.gather(-1, targets[:, None]), entropy, log1p(-zeros(n).index_add(0, rows, log_probs.exp()[rows, ids]))

    The last is at least the target's own log-prob, which must not be among the `ids` of its row.

    Args:
        hidden (n, H), weight (V, H), bias (V,) or None, targets (n,).
        rows, ids (K,): positions and tokens, each pair once, ordered by `ids >> 4` (see `in_tile_order`).
        temperature, columns (a multiple of 16, of a tile), softcap, scale: as for TRL's function.

    Returns:
        (n,) log-probs of the targets, (n,) entropies, without gradient, and (n,) log-probs that none of the `ids` is drawn.
        All float32, in nats.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, rows, ids, temperature, columns, softcap, scale):
        device, count = hidden.device, len(hidden)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
        ctx.settings = dtype, columns, softcap, scale, temperature
        ctx.bounds = _bounds(ids, len(weight), columns)
        statistics = [torch.zeros(count, device=device) for _ in range(7)]
        running_max, sum_exp, x_sum_exp, sq_sum_exp, z_sum, before_target, target_logit = statistics
        running_max.fill_(-torch.inf)
        before_target.fill_(-torch.inf)
        logits = torch.zeros(len(ids), device=device)
        for top, bottom, start, end, tile in _tiles(hidden, weight, bias, dtype, columns):
            fold = trl_kernels._forward_tile
            if trl_kernels._use_triton(device):
                fold = trl_kernels._forward_kernel[(bottom - top,)]
            fold(
                tile,
                tile.stride(0),
                targets[top:bottom],
                *(part[top:bottom] for part in statistics),
                start,
                end - start,
                BLOCK_SIZE=trl_kernels._BLOCK_SIZE,
                HAS_ENTROPY=True,
                HAS_LOG_SUM_SQ_PROBS=False,
                HAS_MEAN_LOGITS=False,
                HAS_IS_TOP1=False,
                **_kernel_settings(softcap, scale, temperature),
            )
            where, at = _entries(ctx.bounds, start // columns, rows, top, bottom, count)
            read = tile[rows[where] - top, ids[where] - start].float() * scale
            if softcap is not None:
                read = softcap * torch.tanh(read / softcap)
            logits[at] = read / temperature
        log_z = running_max + sum_exp.log()
        log_probs, entropy = target_logit - log_z, log_z - x_sum_exp / sum_exp
        chances = (logits - log_z[rows]).exp()
        open_mass = torch.zeros(count, dtype=torch.float64, device=device).index_add(0, rows, chances.double())
        close = torch.maximum((-open_mass.clamp(max=1)).log1p().float(), log_probs)
        ctx.save_for_backward(hidden, weight, bias, targets, rows, ids, log_z, log_probs, entropy, close, logits)
        ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return log_probs, entropy, close

    @staticmethod
    def backward(ctx, grad_log_probs, _, grad_close):
        hidden, weight, bias, targets, rows, ids, log_z, log_probs, entropy, close, logits = ctx.saved_tensors
        dtype, columns, softcap, scale, temperature = ctx.settings
        nothing = torch.zeros_like(log_z)
        closing_alone = grad_log_probs is None
        grad_log_probs, grad_close = (
            nothing if grad is None else grad.float() for grad in (grad_log_probs, grad_close)
        )
        # d log p_close / dz_j = p_j (1[j closed] / p_close - 1): what all j have in common goes with the log-probs' -p_j
        ratio = grad_close * torch.exp(-close)
        common = ratio - grad_close
        chances = (logits - log_z[rows]).exp()
        extra = -ratio[rows] * chances * _slope(logits, softcap, scale, temperature)
        target_extra = common * _slope(log_probs + log_z, softcap, scale, temperature)
        dense = grad_log_probs - common

        all_hidden, kept = hidden, None
        if closing_alone:  # few rows have a gradient then, and no others are projected again
            kept = grad_close.nonzero()[:, 0]
            place = torch.full_like(targets, -1).index_copy(0, kept, torch.arange(len(kept), device=kept.device))
            entries = (place[rows] >= 0).nonzero()[:, 0]
            rows, ids, extra = place[rows[entries]], ids[entries], extra[entries]
            hidden, targets, log_z, entropy, dense, target_extra, nothing = (
                part[kept] for part in (hidden, targets, log_z, entropy, dense, target_extra, nothing)
            )
        bounds = ctx.bounds if kept is None else _bounds(ids, len(weight), columns)
        with maybe_gather_lm_head_ctx(weight, bias):
            found = [
                torch.zeros(part.shape, device=part.device) if needed else None
                for part, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
            ]
            grad_hidden, grad_weight, grad_bias = found
            for top, bottom, start, end, tile in _tiles(hidden, weight, bias, dtype, columns):
                n, width = bottom - top, end - start
                fold = trl_kernels._backward_tile
                if trl_kernels._use_triton(hidden.device):
                    fold = trl_kernels._backward_kernel[(n, -(-width // trl_kernels._BLOCK_SIZE))]
                fold(
                    tile,
                    tile.stride(0),
                    targets[top:bottom],
                    log_z[top:bottom],
                    entropy[top:bottom],
                    dense[top:bottom],
                    nothing[top:bottom],
                    start,
                    width,
                    HAS_LOGPROB_GRAD=True,
                    HAS_ENTROPY_GRAD=False,
                    BLOCK_SIZE=trl_kernels._BLOCK_SIZE,
                    **_kernel_settings(softcap, scale, temperature),
                )
                where, at = _entries(bounds, start // columns, rows, top, bottom, len(hidden))
                place = rows[where] - top, ids[where] - start
                tile[place] = (tile[place].float() + extra[at]).to(tile.dtype)
                local = targets[top:bottom] - start
                place = torch.arange(n, device=tile.device), local.clamp(0, width - 1)
                own = target_extra[top:bottom].masked_fill((local < 0) | (local >= width), 0)
                tile[place] = (tile[place].float() + own).to(tile.dtype)
                if grad_hidden is not None:
                    trl_kernels._addmm_fp32(grad_hidden[top:bottom], tile, weight[start:end].to(dtype))
                if grad_weight is not None:
                    trl_kernels._addmm_fp32(grad_weight[start:end], tile.t(), hidden[top:bottom].to(dtype))
                if grad_bias is not None:
                    grad_bias[start:end] += tile.sum(dim=0, dtype=torch.float32)
        if grad_hidden is not None and kept is not None:
            found[0] = grad_hidden.new_zeros(all_hidden.shape).index_copy_(0, kept, grad_hidden)
        grads = [
            None if grad is None else grad.to(part.dtype)
            for grad, part in zip(found, (hidden, weight, bias), strict=True)
        ]
        return *grads, *[None] * 7


def _bounds(ids: torch.Tensor, size: int, columns: int) -> list[int]:
    """Where each tile's ids begin among `ids`, which are ordered by `ids >> 4`; last, how many there are."""
    blocks = torch.arange(0, size + columns, columns, device=ids.device) >> 4
    return torch.searchsorted(ids >> 4, blocks).tolist()


def _tiles(hidden, weight, bias, dtype, columns):
    """The logits before scale and temperature, in the order of tokens, then of the vocabulary, each tile in the place of the
    one before."""
    most = trl_kernels.TOKEN_CHUNK_SIZE
    buffer = torch.empty((min(len(hidden), most), columns), device=hidden.device, dtype=dtype)
    for top in range(0, len(hidden), most):
        own = hidden[top : top + most].to(dtype)
        for start in range(0, len(weight), columns):
            part = weight[start : start + columns].to(dtype)
            tile = buffer[: len(own), : len(part)]
            multiply(own, part, out=tile)
            if bias is not None:
                tile.add_(bias[start : start + columns].to(dtype))
            yield top, top + len(own), start, start + len(part), tile


def _entries(bounds, block, rows, top, bottom, count):
    """Which of the K pairs are in a tile, twice: to read their rows and ids by, and to write by."""
    entries = slice(bounds[block], bounds[block + 1])
    if bottom - top == count:
        return entries, entries
    own = rows[entries]
    found = ((own >= top) & (own < bottom)).nonzero()[:, 0] + bounds[block]
    return found, found


def _kernel_settings(softcap, scale, temperature):
    return {
        "logit_scale": scale,
        "softcap": softcap or 1.0,
        "inv_t": 1 / temperature,
        "HAS_SOFTCAP": softcap is not None,
    }


def _slope(logits, softcap, scale, temperature):
    """Of the logits in what the matrix product gives."""
    slope = scale / temperature
    return slope if softcap is None else slope * (1 - (logits * temperature / softcap) ** 2)
