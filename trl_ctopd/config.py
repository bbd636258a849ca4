"""The settings: those of `GKDConfig` and those that a second tokenizer needs, with the paper's defaults."""

import copy
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from transformers import GenerationConfig, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from .gkd import GKDConfig
from .losses import AUTO, LOSSES, loaded_loss, loss_name, saved_loss
from .losses.baseline import BASELINES
from .losses.compass import COMPASS_SHARES
from .losses.credit import CREDITS
from .losses.dpca import EVENTS
from .losses.prefix_credit import PREFIX_CREDITS
from .redact import HIDDEN, redacted


EOS_POLICIES = ("bridge", "mask")
THOUGHT_POLICIES = ("mask", "text")
EARLY_STOPS = ("kat", "random", "growing")
GENERATION_BACKENDS = ("auto", "transformers", "transformers_compiled", "transformers_continuous")
# how the names of evaluation figures end that are the better the lower they are
LOWER_IS_BETTER = (
    "nats_per_byte", "completions/truncated_fraction", "completions/empty_fraction", "tools/failure_frequency",
    "tools/unanswered_fraction", "teacher/failed_fraction",
)  # fmt: skip
_COUNTED_WITH = {
    "max_steps": int, "num_train_epochs": float, "per_device_train_batch_size": int, "per_device_eval_batch_size": int,
    "gradient_accumulation_steps": int, "logging_steps": float, "save_steps": float, "eval_steps": float | None, "eval_delay": float,
    "warmup_steps": float, "save_total_limit": int | None, "learning_rate": float, "weight_decay": float, "seed": int,
}  # fmt: skip
_OWNED_BY_TRAINER = {
    "max_new_tokens", "max_length", "temperature", "top_p", "top_k", "min_p", "do_sample", "num_beams", "use_cache",
    "eos_token_id", "pad_token_id", "num_return_sequences", "return_dict_in_generate",
}  # fmt: skip


@dataclass
class CrossTokenizerGKDConfig(GKDConfig):
    r"""
    Configuration of [`CrossTokenizerGKDTrainer`]. It lists only fields that are new or have another default than in
    [`~trl.experimental.gkd.GKDConfig`]; all others are inherited. The method is `distillation_loss`. `loss_type` belongs to
    SFT and has no effect; `beta` belongs to GKD's own loss, and another than the default is refused. Without effect are also
    `completion_only_loss`, `dataset_kwargs`, `dataset_text_field`, `eval_packing`, `packing_strategy` and `truncation_mode`, which say what
    SFT makes of a dataset's own text; and `label_names`, `batch_eval_metrics` and `eval_accumulation_steps`, since an evaluation keeps no
    labels and no predictions.

    A prompt is never truncated. `per_device_train_batch_size` counts prompts: a micro-batch holds
    `per_device_train_batch_size * num_generations` completions.
    """

    _VALID_DICT_FIELDS = GKDConfig._VALID_DICT_FIELDS + [
        "distillation_loss_kwargs",
        "off_policy_loss_kwargs",
        "early_stop_kwargs",
        "teacher_models",
        "teacher_weights",
        "generation_kwargs",
        "transformers_continuous_batching_config",
        "chat_template_kwargs",
        "teacher_chat_template_kwargs",
    ]

    # Other defaults
    learning_rate: float = field(
        default=1e-6,
        metadata={
            "help": "Initial learning rate of AdamW. The paper's 1e-6 is for full fine-tuning; LoRA takes 1e-4 to 3e-4, with "
            "target_modules='all-linear'."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Sampling temperature of the student. Both models' log-probs are taken at the same temperature, so "
            "that the scored distribution is the sampled one. At 1.0 the gap is the reverse KL itself."
        },
    )
    lmbda: float = field(
        default=1.0,
        metadata={
            "help": "Share of micro-batches that the student writes itself (1.0: all, fully on-policy). The others use "
            "the dataset's completions, or with `seq_kd` the teacher's, and are trained with `off_policy_loss`."
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt plus completion in student tokens. None: the student's context. A prompt that leaves "
            "no room for `max_new_tokens` is an error (or see `overlong_prompts`); prompts are never truncated."
        },
    )

    greater_is_better: bool | None = field(
        default=None,
        metadata={
            "help": "Whether `metric_for_best_model` is the better the higher it is. None: False for the gap, other figures in nats a "
            "byte, and shares of what failed, was cut off or is empty; else as in transformers, False for names that end in 'loss'."
        },
    )

    # Inherited, with a more exact help text
    seq_kd: bool = field(
        default=False,
        metadata={
            "help": "Let the teacher write the completions of the micro-batches that the student does not write (`lmbda` < 1), "
            "instead of taking the dataset's."
        },
    )
    max_new_tokens: int = field(
        default=128,
        metadata={
            "help": "Longest completion in tokens. A longer one is cut off, has no turn end to learn from, and counts in "
            "completions/truncated_fraction. References are cut off there too (given/completions/truncated_fraction)."
        },
    )
    beta: float = field(
        default=0.5,
        metadata={
            "help": "Belongs to GKD's own loss, which this trainer does not use: leave it out. That of gold or bpm goes to "
            "`distillation_loss_kwargs`."
        },
    )
    loss_type: str = field(
        default="nll", metadata={"help": "Belongs to SFT, not used here: no effect. The method is `distillation_loss`."}
    )

    # The method
    distillation_loss: str = field(
        default="auto",
        metadata={
            "help": f"Method: one of {', '.join(LOSSES)}; in Python also a callable `loss(batch, num_items) -> (value, "
            "metrics)`. auto: reverse_kl with one teacher in this process; dpca, whose expected gradient is the same, with a server, "
            "several teachers, or a setting that is dpca's alone (event, credit, baseline, reference_teacher, rollout_reuse, or one in distillation_loss_kwargs)."
        },
    )
    event: str | None = field(
        default=None,
        metadata={
            "help": "For dpca only: the event that a chunk's score is the log-prob of. closed: the chunk's tokens, and that the "
            "teacher's last token ends there; a student that equals its teacher stays as it is. open: the chunk's tokens only, as "
            "in the paper. None: closed, but open with credit previous."
        },
    )
    credit: str | None = field(
        default=None,
        metadata={
            "help": "For dpca only: how a chunk's gap is shared among its student tokens. semantic (by log-prob, as in the "
            "paper), uniform, byte_length, last, macro (each token gets the whole gap: the chunk is one action; without a clip, "
            "this is the unbiased gradient of each chunk's reverse KL given the text before it), previous (macro, and a "
            "chunk's first token also gets the gap of the chunk before: open chunks with less drift, from log-probs alone), or by the teacher's distributions over the beginnings of a chunk: remaining (macro's gradient with less noise) "
            "or prefix (each token gets what it changed; the least noise, another gradient). None: macro with closed chunks, "
            "semantic with open ones."
        },
    )
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "For dpca only: kl adds to each chunk's gap the KL of the two models' next tokens where the chunk begins, which is "
            "minus its expectation (vOPD). It reads distributions, and changes the noise alone with closed chunks and credit macro or "
            "remaining. None: no baseline."
        },
    )
    baseline_top_k: int | None = field(
        default=None,
        metadata={
            "help": "With baseline kl: how many of the teacher's likeliest tokens it reads. A server has to tell as many. None: the "
            "whole distribution, of a teacher in this process."
        },
    )
    advantage_clip: float | None = field(
        default=10.0,
        metadata={
            "help": "Bound in nats on each token's advantage in dpca, reverse_kl and strict_sampled. A lower bound is steadier "
            "and slower. None: no bound."
        },
    )
    distillation_loss_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further settings of `distillation_loss`. An unknown one is an error that lists the known ones."
        },
    )
    off_policy_loss: str = field(
        default="alm",
        metadata={
            "help": "Loss for text that the student did not write (`lmbda` < 1), where a policy gradient would be wrong. A "
            "`distillation_loss` that is valid on any text is used there too."
        },
    )
    off_policy_loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further settings of `off_policy_loss`."}
    )
    logit_tile_tokens: int = field(
        default=1024,
        metadata={
            "help": "Memory of the losses on whole distributions, given as a number of tokens: as much as the float32 logits of "
            "both models take for so many tokens, however long the texts are. Changes no result."
        },
    )
    eos_policy: str = field(
        default="bridge",
        metadata={
            "help": "The end of a turn: bridge (the student's stop token and the teacher's turn end are one chunk, so the "
            "student learns when to stop) or mask (the end is not scored)."
        },
    )
    markup_policy: str = field(
        default="bridge",
        metadata={
            "help": "The markup between a completion's sections (thought, answer, calls): bridge (the student's markup and the "
            "teacher's at the same place are one chunk) or mask (it is not scored; always so under losses on whole distributions other than "
            "reverse_kl)."
        },
    )
    mask_strings: list[str] | None = field(
        default=None,
        metadata={
            "help": "Strings that are not scored wherever the student writes them, such as </think>, with the tokens that hold them; "
            "counted in masked_bytes/markup. Markup that only one of the two templates has is masked anyway, but for that at the beginning of a "
            "turn that may be an answer, a thought or a call."
        },
    )
    thought_policy: str = field(
        default="mask",
        metadata={
            "help": "A thought that the teacher's template has no place for: mask (the teacher does not read it) or text (the "
            "teacher reads it as the beginning of the answer)."
        },
    )

    # Generation
    num_generations: int = field(
        default=1,
        metadata={
            "help": "Completions for each prompt. More of them lower the gradient's variance, at proportional cost."
        },
    )
    top_p: float = field(
        default=1.0,
        metadata={"help": "Nucleus sampling. Below 1, rollouts no longer follow the policy that is scored."},
    )
    top_k: int = field(
        default=0, metadata={"help": "Sample only among the k most likely tokens; 0: all. Same cost as `top_p`."}
    )
    min_p: float | None = field(
        default=None,
        metadata={
            "help": "Drop tokens with less than this share of the most likely token's probability. Same cost as `top_p`."
        },
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further `GenerationConfig` fields, e.g. repetition_penalty or bad_words_ids. Same cost as `top_p`."
        },
    )

    generation_backend: str = field(
        default="transformers",
        metadata={
            "help": "How the student generates: transformers (one `generate` call a step; rows that have ended leave it), "
            "transformers_compiled (the same with a static cache and a compiled decode step), transformers_continuous "
            "(`generate_batch`: paged cache and continuous batching, for a GPU and many completions of uneven length) or auto "
            "(compiled on a CUDA GPU where the student allows it, else transformers; the log says which, and why). Compiling has "
            "not been tried on a GPU yet."
        },
    )
    gather_for_generation: bool = field(
        default=True,
        metadata={
            "help": "Gather a student that ZeRO-3 or FSDP2 has sharded on every device for generation, and with `seq_kd` the "
            "teacher too: much faster. False: for models too large for one device. (Elsewhere in TRL: `ds3_gather_for_generation`.)"
        },
    )
    merge_adapter_for_generation: bool | None = field(
        default=None,
        metadata={
            "help": "Merge a LoRA adapter into its weights while the student writes, which is faster, and put the weights back. "
            "It takes the memory of the adapted weights once more. None: where the result is the same distribution (float32), or "
            "where the difference can be weighed (half precision, sampling at a temperature alone; logged as "
            "`sampling/log_prob_difference`). Quantized, sharded and shared weights keep their adapter apart."
        },
    )
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions that are generated at the same time, prompts of similar length together: a memory setting. "
            "None: all of an optimizer step."
        },
    )
    transformers_continuous_batching_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Fields of transformers' `ContinuousBatchingConfig`, e.g. max_batch_tokens, num_blocks. max_memory_percent "
            "is 0.5 here, to leave room for training."
        },
    )

    async_rollouts: int = field(
        default=0,
        metadata={
            "help": "1: write the completions of step k + 1 while step k is learned, on a device of its own: a vLLM server "
            '(`use_vllm`, `vllm_mode="server"`) or a copy of the student (`generation_device`). They are the student\'s of one step '
            "before, and dpca, reverse_kl and strict_sampled weight each token by the ratio to it, up to "
            "`vllm_importance_sampling_clip_max`. 0: off."
        },
    )
    generation_device: list[str] | None = field(
        default=None,
        metadata={
            "help": "With `async_rollouts`: where the copy of the student stands, such as cuda:1. Several: one for each process of a "
            "machine, in turns."
        },
    )

    use_vllm: bool = field(
        default=False,
        metadata={
            "help": "Let vLLM generate the student's completions, through TRL's `VLLMGeneration`. Installation: "
            "docs/remote_teacher.md."
        },
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "Where vLLM runs: colocate (in the training processes, on their GPUs) or server (`vllm serve`, on GPUs "
            "of its own, with the flags that TRL's vLLM guide names)."
        },
    )
    vllm_server_base_url: str | None = field(
        default=None, metadata={"help": "http://host:port of the student's vLLM server. None: http://0.0.0.0:8000."}
    )
    vllm_server_timeout: float = field(
        default=240.0, metadata={"help": "Seconds to wait for the student's vLLM server at the start."}
    )
    vllm_group_port: int = field(
        default=51216, metadata={"help": "Port over which the student's weights are sent to that server."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the GPU's memory for a colocated engine."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs that share a colocated engine."})
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Longest prompt plus completion of a colocated engine. None: the model's own."}
    )
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Free a colocated engine's memory during the training step."}
    )
    vllm_importance_sampling_clip_max: float = field(
        default=3.0,
        metadata={
            "help": "vLLM's kernels sample from a slightly different distribution than the one that is trained. dpca and "
            "strict_sampled weight each token by the ratio of the two, up to this bound. Also for `async_rollouts`."
        },
    )

    max_tool_calling_iterations: int | None = field(
        default=None,
        metadata={
            "help": "With `tools`: how often calls of one completion are executed at most. None: as long as `max_new_tokens`, "
            "which also counts results, leaves room."
        },
    )
    tools_in_evaluation: bool = field(
        default=False,
        metadata={
            "help": "Execute calls in evaluation too. False: in evaluation a completion ends with its first call."
        },
    )

    # Rewards beside the teacher
    reward_weight: float = field(
        default=1.0,
        metadata={
            "help": "With `reward_funcs`: what a completion's reward, normalised within its prompt's completions, counts beside its "
            "chunks' gaps in nats. For dpca, reverse_kl and strict_sampled."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each of `reward_funcs` in their sum. None: 1 each."}
    )
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "group (a reward's distance from the mean of its prompt's completions is divided by their standard deviation) "
            "or none (it is not)."
        },
    )
    rewards_in_evaluation: bool = field(
        default=False, metadata={"help": "Call `reward_funcs` in evaluation too, where they are logged alone."}
    )

    # Use of the rollouts
    length_grouped: bool = field(
        default=True,
        metadata={
            "help": "Distribute a step's completions over its micro-batches by length, the longest first: less padding, the same "
            "gradient. Completions of one prompt may end up in different micro-batches, unless the student reads them with one copy "
            "of it (docs/speed.md)."
        },
    )
    rollout_reuse: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps on the same completions and scores. Above 1, dpca and strict_sampled weight each token by "
            "its probability ratio to the policy that wrote it, within PPO's bounds (`clip_ratio_low`, `clip_ratio_high`). A "
            "checkpoint between two of these steps keeps the completions."
        },
    )
    clip_ratio_low: float = field(
        default=0.2,
        metadata={"help": "PPO's lower bound of that ratio is 1 - clip_ratio_low. For rollout_reuse above 1."},
    )
    clip_ratio_high: float = field(
        default=0.28,
        metadata={"help": "PPO's upper bound of that ratio is 1 + clip_ratio_high. For rollout_reuse above 1."},
    )

    reference_kl: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the KL from the student to what it was at the start (the base model under a new adapter, otherwise a "
            "frozen copy), on text that it writes: keeps what no prompt shows, at the cost of one more forward pass. 0: off."
        },
    )

    # Rollouts that end early
    early_stop: str | None = field(
        default=None,
        metadata={
            "help": "Where a completion ends before its turn does: kat (where the student has for long agreed with the teacher), random "
            "(as much of it as by kat, at random), growing (max_new_tokens grows). What follows takes no part in the loss."
        },
    )
    early_stop_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Settings of `early_stop`. kat, random: window, patience, quantile, memory, warmup_steps, warmup_rollouts, exempt; "
            "growing: start, steps."
        },
    )
    early_stop_tokens: int | None = field(
        default=None,
        metadata={
            "help": "For early_stop kat: write so many tokens at a time (256 is usual), and do not go on where it ends a completion, "
            "which saves generation. None: write whole completions, and mask what follows the cut."
        },
    )

    reference_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Hub name, folder or http://host:port of a weak model of the teacher's family, with its tokenizer. dpca then learns "
            "from the difference of the two instead of from the teacher's distance (CompassOPD), held to the student's start by "
            "`reference_teacher_alpha`. None: off."
        },
    )
    reference_teacher_alpha: float = field(
        default=0.5,
        metadata={
            "help": "With `reference_teacher`: weight of the student's distance from its start. The student is led to its start times "
            "exp(difference / alpha)."
        },
    )
    reference_teacher_share: str = field(
        default="mean",
        metadata={
            "help": "With `reference_teacher`: each student token of a chunk gets the mean of the difference over the chunk's teacher "
            "tokens (mean, as in the paper), or an even part of its sum (even)."
        },
    )

    # The two conversations
    overlong_prompts: str = field(
        default="error",
        metadata={
            "help": "What to do with rows whose prompts leave no room for a completion (`max_length` with `max_new_tokens`; the "
            "context of the teacher's server): error, or drop, with a log line that counts and names them."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Variables for the student's chat template, e.g. enable_thinking. A row's own column wins."},
    )
    teacher_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Variables for the teacher's chat template; they override a row's own. None: the student's, row by row too."
        },
    )

    # The teacher
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub name or folder of the teacher, or http://host:port of a server that has it; used if the trainer is given "
            "no `teacher_model`. Together with `teacher_server_url`: the served model, whose tokenizer is loaded here."
        },
    )
    teacher_server_url: list[str] | None = field(
        default=None,
        metadata={
            "help": "http://host:port of a server with the teacher (vLLM, SGLang, or completions with `echo` as at Fireworks), "
            "or of several servers, which share the work. For losses on log-probs, at temperature 1."
        },
    )
    teacher_models: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several teachers by name: a hub name, folder or address of each; used if the trainer is given no `teacher_model`."
        },
    )
    teacher_weights: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "With several teachers, for rows without a column `teacher`, `teachers` or `teacher_weights`: the weight of each in "
            "the mixture that reads the row."
        },
    )
    teacher_server_model: str | None = field(
        default=None,
        metadata={
            "help": "The model's name at the server, if it is not `teacher_model_name_or_path` and not the only model there."
        },
    )
    teacher_server_api_key_env: str = field(
        default="TEACHER_SERVER_API_KEY",
        metadata={
            "help": "Name of the environment variable with the server's API key. Not the key itself, which is never stored."
        },
    )
    teacher_server_concurrency: int = field(
        default=32, metadata={"help": "Completions at the server at the same time, for each process."}
    )
    teacher_server_timeout: float = field(
        default=120.0,
        metadata={"help": "Seconds that one request to the server may take in all, before it is tried again."},
    )
    teacher_server_retries: int = field(
        default=8,
        metadata={
            "help": "Failures in a row that a server may have after the first, with pauses of half a second up to 30 between "
            "them. When every server has failed so often, training ends with an error and can resume from the last checkpoint."
        },
    )
    teacher_server_patience: float = field(
        default=600.0,
        metadata={
            "help": "Seconds without an answer from any server, while completions wait for one, until training ends, "
            "however many tries are left."
        },
    )
    teacher_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions in one teacher forward pass: a memory setting that changes no result. None: as many as in a "
            "student micro-batch."
        },
    )
    teacher_overlap: bool | None = field(
        default=None,
        metadata={
            "help": "Whether a teacher in this process reads in a thread of its own, on a CUDA stream of its own, while the student "
            "reads and learns what is scored already. None: where the teacher has a device of its own "
            "(`teacher_model_init_kwargs`, `device_map`). On one device both compete for it, and its memory holds both passes."
        },
    )

    # Logging
    log_completions: bool = field(
        default=False,
        metadata={
            "help": "Print a table of sampled completions with their gaps at each logging step, and send it to those of "
            "TensorBoard, wandb and trackio that `report_to` names."
        },
    )
    num_completions_to_print: int = field(
        default=4, metadata={"help": "Rows of that table, and samples in the report."}
    )
    report: bool = field(
        default=False,
        metadata={
            "help": "Keep a page `report.html` in output_dir up to date: curves, sample completions with their credit, "
            "settings, and warnings in words. It shows prompts, and is uploaded by `push_to_hub`."
        },
    )

    def __post_init__(self):
        set_bf16(self)
        check_numbers(self, CrossTokenizerGKDConfig)
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(LOWER_IS_BETTER):
            self.greater_is_better = False  # transformers would say True
        super().__post_init__()
        check_choices(
            self,
            credit=(*CREDITS, *PREFIX_CREDITS),
            event=EVENTS,
            baseline=BASELINES,
            eos_policy=EOS_POLICIES,
            markup_policy=EOS_POLICIES,
            overlong_prompts=("error", "drop"),
            thought_policy=THOUGHT_POLICIES,
            generation_backend=GENERATION_BACKENDS,
            scale_rewards=("group", "none"),
            reference_teacher_share=COMPASS_SHARES,
            early_stop=EARLY_STOPS,
        )
        check_counts(
            self,
            "max_new_tokens",
            "num_generations",
            "logit_tile_tokens",
            "rollout_reuse",
            "teacher_server_concurrency",
            "teacher_batch_size",
            "generation_batch_size",
            "max_tool_calling_iterations",
            "early_stop_tokens",
        )
        if not 0 <= self.reward_weight < float("inf"):
            raise ValueError(f"reward_weight must be finite and not negative, got {self.reward_weight}.")
        strings = () if self.mask_strings is None else self.mask_strings
        if not isinstance(strings, list | tuple | set) or not all(isinstance(own, str) and own for own in strings):
            raise ValueError(f"mask_strings must be a list of strings that are not empty, got {self.mask_strings!r}.")
        for name in ("teacher_server_url", "generation_device"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if self.async_rollouts not in (0, 1):
            raise ValueError(
                f"async_rollouts must be 0 (off) or 1 (text of one step before), got {self.async_rollouts}: older text is not supported."
            )
        if not 0 <= self.reference_kl < float("inf"):
            raise ValueError(f"reference_kl must be a weight of at least 0, got {self.reference_kl}.")
        if not 0 <= self.reference_teacher_alpha < float("inf"):
            raise ValueError(
                f"reference_teacher_alpha must be a weight of at least 0, got {self.reference_teacher_alpha}."
            )
        if not self.vllm_importance_sampling_clip_max > 0:
            raise ValueError(
                f"vllm_importance_sampling_clip_max must be positive, got {self.vllm_importance_sampling_clip_max}."
            )
        if not (
            self.teacher_server_timeout > 0 and self.teacher_server_retries >= 0 and self.teacher_server_patience > 0
        ):
            raise ValueError(
                "teacher_server_timeout must be positive, teacher_server_retries not negative and teacher_server_patience "
                f"positive, got {self.teacher_server_timeout}, {self.teacher_server_retries} and {self.teacher_server_patience}."
            )
        check_dicts(self, CrossTokenizerGKDConfig)
        if self.transformers_continuous_batching_config and self.generation_backend != "transformers_continuous":
            raise ValueError(
                "transformers_continuous_batching_config has no effect with "
                f"generation_backend={self.generation_backend!r}: set it to 'transformers_continuous'."
            )
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "accelerator_config has dispatch_batches=True, with which one process would split its batches among the others, and "
                "prompts are not tensors: leave it out."
            )
        self.accelerator_config.dispatch_batches = False  # a stream's default is True
        self._check_generation_kwargs()
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            kwargs = _with_dtype(name, getattr(self, name))
            if kwargs and kwargs.get("quantization_config", ...) is None:
                # transformers would read what was saved quantized as plain weights
                kwargs = {key: value for key, value in kwargs.items() if key != "quantization_config"}
            setattr(self, name, kwargs)
        if self.teacher_overlap and self.torch_compile:
            raise ValueError(
                "teacher_overlap=True with torch_compile=True: while a model is compiled, transformers keeps what layers return in a "
                "variable of the whole process, and the teacher's thread would write there too. Leave one of the two out."
            )
        if self.seq_kd and self.lmbda == 1.0:
            raise ValueError(
                "seq_kd=True lets the teacher write what the student does not, and with lmbda=1.0 the student writes all: set lmbda "
                "below 1."
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be finite and positive, got {self.temperature}: on-policy distillation samples; for greedy "
                "evaluation call `model.generate` yourself."
            )
        if isinstance(self.distillation_loss, str) and self.distillation_loss not in (AUTO, *LOSSES):
            raise ValueError(
                f"Unknown distillation_loss {self.distillation_loss!r}: choose {AUTO}, one of {', '.join(LOSSES)}, or pass a callable."
            )
        allowed = [name for name, loss in LOSSES.items() if loss.policy != "on"]
        if self.off_policy_loss not in allowed:
            known = isinstance(self.off_policy_loss, str) and self.off_policy_loss in LOSSES
            problem = "cannot learn from text the student did not write" if known else "is not the name of a loss"
            raise ValueError(f"off_policy_loss {self.off_policy_loss!r} {problem}: choose one of {', '.join(allowed)}.")
        self._check_beta()

    def _check_beta(self):
        if self.beta == type(self).__dataclass_fields__["beta"].default:
            return
        able = [name for name, loss in LOSSES.items() if "beta" in {knob.name for knob in fields(loss)}]
        own = [name for name in ("distillation_loss", "off_policy_loss") if getattr(self, name) in able]
        way = f"leave it out ({' and '.join(able)} have a beta of their own, in distillation_loss_kwargs)"
        if own:
            way = f"give that of {getattr(self, own[0])} as {own[0]}_kwargs={{'beta': {self.beta}}}"
        raise ValueError(
            f"beta={self.beta} has no effect: it is a setting of GKD's own loss, which this trainer does not use. Instead, {way}."
        )

    def _check_generation_kwargs(self):
        asked = {name for name, value in (self.generation_kwargs or {}).items() if value is not None}
        if "stop_strings" in asked:
            raise ValueError(
                f"generation_kwargs has stop_strings={self.generation_kwargs['stop_strings']!r}: a completion that ends at a "
                "string has no turn end that the teacher could score. The student's turn ends at its stop tokens: add a token "
                "to `eos_token_id` of its generation config instead."
            )
        if owned := sorted(asked & _OWNED_BY_TRAINER):
            raise ValueError(
                f"generation_kwargs cannot set {', '.join(owned)}: these have fields of their own, or follow from the models."
            )
        if assisted := sorted(asked & {"prompt_lookup_num_tokens", "assistant_early_exit"}):
            raise ValueError(
                f"generation_kwargs has {', '.join(assisted)}: with a draft, transformers writes one text at a time, and here a batch is "
                "written."
            )
        if unknown := sorted(asked - set(GenerationConfig().to_dict())):
            raise ValueError(
                f"generation_kwargs has {', '.join(map(repr, unknown))}, which `GenerationConfig` does not know."
            )

    def to_dict(self):
        """The settings without secrets, since they go to loggers, to the model card and to the report."""
        shown = with_kwargs_as_json(self)
        return redacted(
            {**super(CrossTokenizerGKDConfig, shown).to_dict(), "distillation_loss": loss_name(self.distillation_loss)}
        )

    def __str__(self):
        shown = ",\n".join(f"{name}={value!r}" for name, value in sorted(self.to_dict().items()))
        return f"{type(self).__name__}(\n{shown},\n)"

    __repr__ = __str__

    def __getstate__(self):
        # pickled beside checkpoints, where a notebook's function or a closure could not be, and uploaded with the weights,
        # where secrets must not be
        shown = {name: redacted(value, name) for name, value in self.__dict__.items()}
        shown = {name: None if value == HIDDEN else value for name, value in shown.items()}
        return {**shown, "distillation_loss": saved_loss(self.distillation_loss)}

    def __setstate__(self, state):
        self.__dict__.update(state, distillation_loss=loaded_loss(state["distillation_loss"]))

    def __copy__(self):
        return self._copied(self.__dict__)

    def __deepcopy__(self, memo):
        return self._copied(copy.deepcopy(self.__dict__, memo))

    def _copied(self, values: dict) -> "CrossTokenizerGKDConfig":
        other = type(self).__new__(type(self))
        other.__dict__.update(values)
        return other


def check_numbers(args: TrainingArguments, own: type):
    """Refuses text and NaN among the numbers that the class `own` declares and those of transformers' that a run counts with, before anything
    compares them: NaN is neither too small nor too large."""
    for name, kind in {**_COUNTED_WITH, **own.__annotations__}.items():
        value = getattr(args, name)
        if value is None and kind in (int | None, float | None):
            continue
        if kind in (int, int | None) and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{name} must be a whole number, an int, got {value!r} ({type(value).__name__}).")
        if kind in (float, float | None) and (not isinstance(value, Real) or isinstance(value, bool) or value != value):
            raise ValueError(f"{name} must be a number, got {value!r} ({type(value).__name__}).")
    check_counts(args, "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def check_choices(args: TrainingArguments, **choices: Iterable[str]):
    """Refuses a setting that is none of its choices. None is one where it is the default."""
    for name, known in choices.items():
        value, default = getattr(args, name), type(args).__dataclass_fields__[name].default
        if value not in known and not (value is None and default is None):
            raise ValueError(f"Unknown {name} {value!r}: choose one of {', '.join(known)}.")


def check_counts(args: TrainingArguments, *names: str):
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def check_dicts(args: TrainingArguments, own: type):
    """Refuses all but dicts for the dicts that the class `own` declares. JSON text has become a dict before."""
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name)
        if value is not None and not isinstance(value, Mapping) and name in own.__annotations__:
            raise ValueError(f"{name} must be a dict, or the JSON text of one, got {value!r}.")


def set_bf16(args: TrainingArguments):
    """Off, unless set, where there is no GPU with bfloat16. TRL's default of True is an error there, or with `use_cpu` slower than float32
    on most CPUs."""
    if args.bf16 is None and (args.use_cpu or not is_torch_bf16_gpu_available()):
        args.bf16 = False


def with_kwargs_as_json(args):
    """A copy of the settings `args` in which what goes to `from_pretrained` is as JSON can hold it. Transformers' own `to_dict` leaves the
    teacher's quantization config, which JSON cannot hold, and puts a dict, which a model that was saved quantized does not take, in
    the place of the student's."""
    shown = copy.copy(args)
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        setattr(shown, name, json.loads(json.dumps(getattr(args, name), default=_as_json)))
    return shown


def _as_json(value):
    return value.to_dict() if hasattr(value, "to_dict") else str(value).removeprefix("torch.")


def _with_dtype(name: str, kwargs: dict | None) -> dict | None:
    """`kwargs` of `from_pretrained` with `torch_dtype` renamed to `dtype`. Beside the default for `dtype`, the old name would
    have no effect."""
    if not kwargs or "torch_dtype" not in kwargs:
        return kwargs
    kwargs = dict(kwargs)
    dtype = kwargs.pop("torch_dtype")
    if str(kwargs.get("dtype", dtype)) != str(dtype):
        raise ValueError(f"{name} has dtype={kwargs['dtype']!r} and torch_dtype={dtype!r}: set only `dtype`.")
    warnings.warn(f"{name}: `torch_dtype` is the old name of `dtype`, which is set to {dtype}.", stacklevel=4)
    return {**kwargs, "dtype": dtype}
