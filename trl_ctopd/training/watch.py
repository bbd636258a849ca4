"""Watches for silent failures: weights that are not finite, and text drawn from another distribution than the one scored."""

import math

import torch
from accelerate.logging import get_logger
from accelerate.utils import reduce
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..config import CrossTokenizerGKDConfig
from ..losses import Metrics, ScoredChunks


logger = get_logger(__name__)

DIFFERENCE = "sampling/entropy_difference"
_LOGS = 10  # before it judges
_DEVIATIONS = 8.0  # standard errors from 0; by Student's t, one run in 10⁵ is that far off by chance
_NATS = 0.02  # a smaller difference is rounding
ENGINE_DIFFERENCE = "sampling/log_prob_difference"
# beyond this vLLM writes as another model: bfloat16 costs 0.03 nats a token in a model of 135M parameters, 8 bits in weights and activations 0.13
_ENGINE_NATS = 0.3


class FiniteWeights(TrainerCallback):
    """Ends a run whose student has NaN or infinite weights, before a checkpoint of it replaces the last good one."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        when = "before the first step" if state.global_step == 0 else f"at step {state.global_step}"
        self._check(model, args.device, when)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._check(model, args.device, f"after step {state.global_step}")

    def _check(self, model: nn.Module, device: torch.device, when: str):
        if reduce(torch.tensor(float(not are_finite(model)), device=device), "sum").item():
            raise FloatingPointError(
                f"Weights of the student are NaN or infinite {when}, and nothing can be learned from there. No checkpoint of them was "
                "saved: resume_from_checkpoint=True goes on from the last good one. Lower learning_rate, clip gradients "
                "(max_grad_norm), or train in bf16 rather than fp16."
            )


@torch.no_grad()
def are_finite(model: nn.Module) -> bool:
    """Whether all trained weights that this process holds are finite."""
    held = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            local = (
                parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)
            )
            held += [local.detach()] if local.numel() else []
    return not held or bool(torch.isfinite(nn.utils.get_total_norm(held, norm_type=math.inf)))


@torch.no_grad()
def sampling_metrics(batch: ScoredChunks, entropy: torch.Tensor) -> Metrics:
    """
    Of text that the student has just drawn: −log p of its tokens minus the entropy (B, S) of the distributions they were drawn
    from, in nats a token. Its expectation is 0, by the definition of entropy. Tokens that take no part are in neither. A stop token
    counts for itself, as it does in the entropy.
    """
    scored = batch.student_chunks >= 0
    return {DIFFERENCE: (((-batch.drawn_log_probs - entropy) * scored).sum(), scored.sum())}


class SamplingWatch:
    """Warns once where `sampling/entropy_difference` of training stays away from 0 by more than chance and what is masked explain, and once
    where vLLM's log-probs of what it wrote are further from the student's than rounding explains (`sampling/log_prob_difference`)."""

    def __init__(self, args: CrossTokenizerGKDConfig):
        self._bent = args.top_p < 1 or args.top_k > 0 or args.min_p is not None or args.generation_kwargs
        self._bent = self._bent or args.early_stop in ("kat", "random")  # what is kept depends on what was drawn
        self._bent = self._bent or args.async_rollouts  # the text is an older student's
        self._engine_nats = None
        if args.use_vllm and 0 < args.top_p <= 1 and args.top_k <= 0 and not args.min_p and not args.generation_kwargs:
            self._engine_nats = _ENGINE_NATS - math.log(args.top_p)  # its log-probs are of the tokens that top_p leaves
        self._async = bool(args.async_rollouts)
        self._seen: list[float] = []
        self._masked: list[float] = []
        self._said = False

    def read(self, figures: dict[str, float]):
        """Of one log."""
        self._read_engine(figures)
        if DIFFERENCE not in figures or self._said or self._bent:  # the user has asked for another distribution
            return
        self._seen.append(figures[DIFFERENCE])
        self._masked.append(figures.get("alignment/masked_fraction", 0.0))
        count = len(self._seen)
        if count < _LOGS:
            return
        mean = sum(self._seen) / count
        error = math.sqrt(sum((value - mean) ** 2 for value in self._seen) / (count - 1) / count)
        by_masking = 10 * sum(self._masked) / count  # which tokens are masked depends on what was drawn
        if abs(mean) > max(_DEVIATIONS * error, _NATS + by_masking):
            self._said = True
            logger.warning(
                f"{DIFFERENCE} is {mean:+.3f} nats a token over {count} logs (standard error {error:.3f}), and should be 0: the "
                f"student's text is {'less' if mean > 0 else 'more'} likely to the student than what it should draw. It is drawn from "
                "another distribution than the one that is scored: look for a penalty in the generation settings, an engine with "
                "other weights or kernels, an adapter that is switched off or dropout that is on while one of the two is done."
            )

    def _read_engine(self, figures: dict[str, float]):
        found = figures.get(ENGINE_DIFFERENCE)
        if found is None or self._engine_nats is None or not found > self._engine_nats:
            return
        older = " (or learning_rate is far too high, since the text is the student's of one update before)"
        logger.warning(
            f"{ENGINE_DIFFERENCE} is {found:.2f} nats a token: so far from the student's are vLLM's log-probs of what it has just written, on average. "
            f"bfloat16 costs some 0.03 and 8-bit kernels some 0.13; more than {self._engine_nats:.2f} is not rounding. vLLM writes as another model than the "
            f"one that is trained{older if self._async else ''}, and the student learns from text that it would not write. Either vLLM was started with another "
            "model or with 4 bits, or it does not compute with the weights that each step gives it, as where it brings experts into an order of its own. "
            "Start it as the student was loaded, or set use_vllm=False."
        )
        self._engine_nats = None
