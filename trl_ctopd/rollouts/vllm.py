"""The student's completions from vLLM, by TRL's `VLLMGeneration`: at a server, or beside the training on its GPU.

Decisions
- Before a step's completions the engine is given the student's weights as they are, an adapter's merged.
- The engine's kernels are not the trainer's, so it samples from a distribution that differs a little. It tells the
  log-prob of each token it drew, after temperature and cuts, and each token's advantage is weighed by
  min(exp(log p of the trainer − log p of the engine), `vllm_importance_sampling_clip_max`), as TRL's GRPO does with
  `token_truncate`; how far apart the two are is logged.
- What TRL needs of all processes alike, the same number of prompts, is filled up with prompts that are thrown away.

Left out: draws that a checkpoint could repeat (the engine has its own), structured outputs, images.
"""

import logging

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn
from trl.generation.vllm_generation import VLLMGeneration

from ..config import CrossTokenizerGKDConfig
from ..losses import Metrics, ScoredChunks
from .generation import Written
from .pairing import Prompt


logger = logging.getLogger(__name__)

MODES = ("server", "colocate")


def check_vllm(model: nn.Module, args: CrossTokenizerGKDConfig):
    """Raises `ValueError` for settings that vLLM cannot write under."""
    if args.vllm_mode not in MODES:
        raise ValueError(f"Unknown vllm_mode {args.vllm_mode!r}: choose one of {', '.join(MODES)}.")
    if args.generation_backend != "transformers" or args.generation_batch_size is not None:
        raise ValueError(
            f"use_vllm=True writes in place of generation_backend={args.generation_backend!r} and batches by itself: leave "
            "generation_backend and generation_batch_size as they come."
        )
    if further := sorted(set(args.generation_kwargs or {}) - {"repetition_penalty"}):
        raise ValueError(
            f"generation_kwargs has {', '.join(further)}, which use_vllm=True does not know: repetition_penalty alone can be "
            "set there."
        )
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            "use_vllm=True gives the engine the weights with the adapter merged, and a prompt-learning adapter has none to "
            "merge: choose LoRA, or use_vllm=False."
        )
    if args.vllm_mode == "server" and args.vllm_enable_sleep_mode:
        raise ValueError("vllm_enable_sleep_mode is for an engine beside the training: set vllm_mode='colocate'.")
    if args.vllm_mode == "colocate" and not model.name_or_path:
        raise ValueError(
            "vllm_mode='colocate' loads the student from its folder or hub name before it is given the weights, and this model "
            "was made in place: save it, and pass the folder."
        )


class VLLMWriter:
    """
    A [`Writer`] by vLLM.

    Args:
        model: the student, an adapter included, before it is wrapped.
        stop_ids: student ids that end a turn.
    """

    def __init__(self, model: nn.Module, accelerator, tokenizer, args: CrossTokenizerGKDConfig, stop_ids: list[int]):
        check_vllm(model, args)
        self._stop_ids = set(stop_ids)
        self._accelerator = accelerator
        self._step = None  # whose weights the engine has
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
            logprobs=0,  # of the sampled token alone
            generation_kwargs={"stop_token_ids": list(stop_ids)},
        )
        if args.vllm_mode == "server" and accelerator.is_main_process:
            mode = self._engine.vllm_client.get_server_info()["model_config"]["logprobs_mode"]
            if mode != "processed_logprobs":
                raise ValueError(
                    f"The student's vLLM server runs with `--logprobs-mode {mode}`, and its log-probs would not be those it "
                    "sampled with: start it with `--logprobs-mode processed_logprobs`."
                )

    def __call__(self, model: nn.Module, prompts: list[Prompt], step: int) -> list[Written]:
        """See [`Writer`]; the log-probs are those that the engine drew with. `model` is the one that it was built with."""
        if step != self._step:
            self._engine.sync_weights()
            self._step = step
        most = max(gather_object([len(prompts)]))
        if not most:
            return []
        filled = [prompt.student_ids for prompt in prompts] + [[next(iter(self._stop_ids))]] * (most - len(prompts))
        _, completions, log_probs, _ = self._engine.generate(prompts=filled, images=None, num_generations=1)
        written = []
        for ids, scores in zip(completions[: len(prompts)], log_probs[: len(prompts)], strict=True):
            end = next((n for n, token in enumerate(ids, start=1) if token in self._stop_ids), len(ids))
            drawn = [float("nan") if score[0] is None else score[0] for score in scores[:end]]
            written.append((list(ids[:end]), drawn))
        return written


@torch.no_grad()
def importance(batch: ScoredChunks, sampled: torch.Tensor, clip_max: float) -> tuple[torch.Tensor, Metrics]:
    """
    min(exp(log p − log q), `clip_max`) of shape (B, S), for the log-probs p of `batch`'s policy and q = `sampled` (B, S), those
    its tokens were drawn with; 1 where q is not known. And how far apart they are, over the scored tokens.
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
