"""The student's completions from vLLM, through TRL's `VLLMGeneration`: at a server, or on the training GPU.

Decisions
- Before it writes a step's completions, the engine gets the student's current weights, with an adapter merged.
- The engine's kernels are not the trainer's, so it samples from a slightly different distribution. It returns the log-prob of
  each token it sampled, after temperature and truncation (top-p and so on). Each token's advantage is weighted by
  min(exp(log p of the trainer − log p of the engine), `vllm_importance_sampling_clip_max`), as TRL's GRPO does with
  `token_truncate`. The difference between the two is logged.
- TRL needs the same number of prompts on all processes. Missing ones are filled up with prompts whose completions are dropped.
- With `async_rollouts=1` a thread of the main process sends the prompts of all processes to the server. TRL's own call would use
  collectives there, while other threads use them too.

Left out: sampling that a checkpoint could repeat (the engine has its own random state), structured outputs, images.
"""

import logging
import threading
import warnings
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from torch import nn
from trl.generation.vllm_generation import VLLMGeneration

from ..config import CrossTokenizerGKDConfig
from ..losses import Metrics, ScoredChunks
from ..models.activated import invocation_of
from ..models.forwards import base_model
from ..models.merging import adapted_where_tied, bases_kept
from .cache import has_virtual_tokens
from .generation import Written, up_to_stop
from .pairing import Prompt


logger = logging.getLogger(__name__)

MODES = ("server", "colocate")


def check_vllm(model: nn.Module, args: CrossTokenizerGKDConfig):
    """Raises `ValueError` for settings that vLLM cannot write with."""
    if args.vllm_mode not in MODES:
        raise ValueError(f"Unknown vllm_mode {args.vllm_mode!r}: choose one of {', '.join(MODES)}.")
    if args.generation_backend not in ("auto", "transformers") or args.generation_batch_size is not None:
        raise ValueError(
            f"use_vllm=True writes in place of generation_backend={args.generation_backend!r} and batches by itself: leave "
            "generation_backend and generation_batch_size at their defaults."
        )
    if further := sorted(set(args.generation_kwargs or {}) - {"repetition_penalty"}):
        raise ValueError(
            f"generation_kwargs has {', '.join(further)}, which use_vllm=True does not know: repetition_penalty alone can be "
            "set there."
        )
    if has_virtual_tokens(model):
        raise ValueError(
            "use_vllm=True gives the engine the weights with the adapter merged, and a prompt-learning adapter cannot be "
            "merged: choose LoRA, or use_vllm=False."
        )
    if (invocation := invocation_of(model)) is not None:
        raise ValueError(
            f"use_vllm=True gives the engine the weights with the adapter merged, and an activated LoRA (alora_invocation_tokens={invocation}) "
            "cannot be merged: choose a plain LoRA, or use_vllm=False."
        )
    if tied := adapted_where_tied(model):
        raise ValueError(
            f"use_vllm=True gives the engine the weights with the adapter merged, and {', '.join(tied)} shares its weight with another layer, "
            "which would get what is trained too: leave it out of target_modules, give modules_to_save ensure_weight_tying=True, untie the model "
            "(tie_word_embeddings=False), or set use_vllm=False."
        )
    if isinstance(model, PeftModel):
        _check_merges(model)
    if args.vllm_mode == "server" and args.vllm_enable_sleep_mode:
        raise ValueError("vllm_enable_sleep_mode is for an engine on the training GPU: set vllm_mode='colocate'.")
    if args.vllm_mode == "colocate" and not model.name_or_path:
        raise ValueError(
            "vllm_mode='colocate' first loads the student from its folder or hub name, and this model was created in memory: "
            "save it, and pass the folder."
        )
    experts = [name for name, _ in base_model(model).named_parameters() if ".experts." in name]
    if experts and args.vllm_mode == "colocate" and args.device.type == "cpu":
        raise ValueError(
            f"vllm_mode='colocate' on a CPU, and the student has experts ({experts[0]}): vLLM brings these into the order of its kernel when it loads "
            "them, and not when it gets those of a step, so that it would write with scrambled experts (findings/experts_are_scrambled_by_a_sync.sh). "
            "Set use_vllm=False, or train on a GPU."
        )


def _check_merges(model: PeftModel):
    """Raises `ValueError` for an adapter that PEFT cannot merge and take out again. No adapter is merged to find out."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of each layer, that nothing is merged
            model.merge_adapter(adapter_names=[])
            model.unmerge_adapter()
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"use_vllm=True gives the engine the weights with the adapter merged, and PEFT cannot merge {model.active_peft_config.peft_type.value} and "
            f"take it out again ({error}): choose LoRA, or use_vllm=False."
        ) from error


def _behaviour(kind: type) -> tuple:
    """What an engine in this process changes of a class that it shares (findings/students_lose_their_forward_pass.sh)."""
    return kind.__bases__, kind.__init__, kind.__call__


class VLLMWriter:
    """
    A [`Writer`] by vLLM, and with a server a [`Background`].

    Args:
        model: the student, an adapter included, before it is wrapped.
        stop_ids: student ids that end a turn.
    """

    ends_soon = False  # a server goes on

    def __init__(self, model: nn.Module, accelerator, tokenizer, args: CrossTokenizerGKDConfig, stop_ids: list[int]):
        check_vllm(model, args)
        self._stop_ids = set(stop_ids)
        self._model, self._accelerator = model, accelerator
        self._step = None  # the step whose weights the engine has
        classes = {type(module): _behaviour(type(module)) for module in model.modules()}
        self._engine = VLLMGeneration(
            model=model,
            accelerator=accelerator,
            processing_class=tokenizer,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_timeout=args.vllm_server_timeout,
            group_port=args.vllm_group_port,
            tensor_parallel_size=args.vllm_tensor_parallel_size,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            trust_remote_code=args.trust_remote_code,
            repetition_penalty=(args.generation_kwargs or {}).get("repetition_penalty", 1.0),
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p or 0.0,
            max_completion_length=args.max_new_tokens,
            logprobs=0,  # only of the sampled token
            generation_kwargs={"stop_token_ids": list(stop_ids)},
        )
        if changed := [kind.__name__ for kind, before in classes.items() if _behaviour(kind) != before]:
            raise ValueError(
                f"vLLM runs this family by transformers' own code, and has changed {', '.join(changed)} for it in this process: the student's own "
                "forward pass would raise. Set vllm_mode='server' (a server is a process of its own), or use_vllm=False."
            )
        if args.vllm_mode == "server" and accelerator.is_main_process:
            mode = self._engine.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
            if mode != "processed_logprobs":
                raise ValueError(
                    f"The student's vLLM server runs with `--logprobs-mode {mode}`, so its log-probs would not be those that it "
                    "samples with: start it with `--logprobs-mode processed_logprobs`."
                )

    def __call__(self, model: nn.Module, prompts: list[Prompt], step: int) -> list[Written]:
        """See [`Writer`]. The log-probs are those that the engine sampled with. `model` must be the one given to `__init__`."""
        self._hand_over(step)
        most = max(gather_object([len(prompts)]))
        if not most:
            return []
        filled = [prompt.student_ids for prompt in prompts] + [[next(iter(self._stop_ids))]] * (most - len(prompts))
        _, completions, log_probs, _ = self._engine.generate(prompts=filled, images=None, num_generations=1)
        return self._cut(completions[: len(prompts)], log_probs[: len(prompts)])

    def begin(
        self, model: nn.Module, prompts: list[Prompt], step: int, taken: int
    ) -> tuple[Callable[[threading.Event], Any], Callable[[Any], list[Written] | None]]:
        """See [`Background`]."""
        self._hand_over(taken)
        ends = [*accumulate(gather_object([len(prompts)]), initial=0)]
        asked = gather_object([prompt.student_ids for prompt in prompts])
        own = slice(*list(pairwise(ends))[self._accelerator.process_index])

        def run(cancelled: threading.Event):
            return self._ask(asked) if asked and self._accelerator.is_main_process else ([], [])

        def end(result) -> list[Written] | None:
            [result] = broadcast_object_list([result])
            return None if result is None else self._cut(*(part[own] for part in result))

        return run, end

    def _hand_over(self, taken: int):
        """Gives the engine the weights after `taken` steps."""
        if taken != self._step:
            with bases_kept(self._model):  # TRL merges an adapter in place
                self._engine.sync_weights()
            self._step = taken

    def _ask(self, prompts: list[list[int]]) -> tuple[list, list]:
        """What the server writes for them, with TRL's settings."""
        engine = self._engine
        output = engine.vllm_client.generate(
            prompts=prompts,
            n=1,
            repetition_penalty=engine.repetition_penalty,
            temperature=engine.temperature,
            top_p=engine.top_p,
            top_k=engine.top_k,
            min_p=engine.min_p,
            max_tokens=engine.max_completion_length,
            logprobs=engine.logprobs,
            generation_kwargs=engine.generation_kwargs,
        )
        return output["completion_ids"], output["logprobs"]

    def _cut(self, completions: list, log_probs: list) -> list[Written]:
        """Each up to its first stop token."""
        written = []
        for ids, scores in zip(completions, log_probs, strict=True):
            own = up_to_stop(ids, self._stop_ids)
            drawn = [float("nan") if score[0] is None else score[0] for score in scores[: len(own)]]
            written.append((own, drawn))
        return written


@torch.no_grad()
def importance(batch: ScoredChunks, sampled: torch.Tensor, clip_max: float) -> tuple[torch.Tensor, Metrics]:
    """
    min(exp(log p − log q), `clip_max`) of shape (B, S), where p is `batch`'s policy and q = `sampled` (B, S) are the log-probs
    that its tokens were sampled with; 1 where q is not known. Also metrics of their difference over the scored tokens.
    """
    known = (batch.student_chunks >= 0) & torch.isfinite(sampled)
    difference = (batch.policy_log_probs - sampled).masked_fill(~known, 0)
    ratio = difference.exp()
    count = known.sum()
    return ratio.clamp(max=clip_max), {
        "sampling/log_prob_difference": (difference.abs().sum(), count),
        "sampling/importance_ratio": ((ratio * known).sum(), count),
        "sampling/truncated_fraction": ((ratio > clip_max).sum(), count),
    }
