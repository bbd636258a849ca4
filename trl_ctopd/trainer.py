"""`CrossTokenizerGKDTrainer`: the wiring between TRL's GKD trainer and the maths of this package."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device, set_seed
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import is_in_notebook
from trl.trainer.utils import disable_dropout_in_model, get_config_model_id

from .config import CrossTokenizerGKDConfig, GKDTrainer
from .looking import card, provenance
from .looking.compare import compare
from .looking.history import evaluation_prefix
from .looking.ornaments import ornament
from .looking.report import DistillationReportCallback
from .looking.samples import Sample, Samples, show
from .losses import Distributions, ScoredChunks
from .models.heads import add_token_scores, base_model, check_head, hidden_states, lm_head
from .models.loading import check_vocabulary, ensure_pad_token, load_tokenizer
from .models.sharding import keep_scores_in_float32, own_rows
from .rollouts.generation import sampling_config, write
from .rollouts.pairing import Prompt, Rollout, collate, grouped_by_length, on_columns, on_grid, pad_scores
from .rollouts.prompts import COLUMNS, RepeatedWindows, check_room, collate_prompts, render_row
from .rollouts.vllm import VLLMWriter, importance
from .teachers.local import LocalTeacher
from .teachers.panel import Awaited, Model, Panel, settled
from .teachers.remote import RemoteTeacher
from .text.aligner import align_text
from .text.chat import Speaker
from .text.vocabulary import CACHE_DIR, VocabularyPair
from .training import checkpoints
from .training.checks import (
    check_arguments,
    check_signal,
    check_strategy,
    context_length,
    losses_by_text,
    signal_of,
)
from .training.metrics import Meter, chunk_metrics, rollout_metrics
from .training.timing import PhaseTimer


logger = get_logger(__name__)

_MUCH_MASKED = 0.2  # the real tokenizers' own share on random text is under 0.03
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_STRIDE = 1_000_003  # between the seeds of two steps; processes take the seeds between


class CrossTokenizerGKDTrainer(GKDTrainer):
    """
    On-policy distillation from a teacher with another tokenizer and another chat template.

    Each optimizer step, the student writes a completion for every prompt of the step, the teacher scores their text in
    its own tokens, and the loss maps the scores back onto the student's tokens (DPCA, arXiv 2606.09456, by default).

    Overrides of `GKDTrainer`: building (`__init__`, `_prepare_dataset`), where rollouts enter (`get_batch_samples`,
    `prediction_step`), the loss (`compute_loss`, `training_step`), what is logged (`log`) and the model card. All else
    is inherited from `GKDTrainer`, `SFTTrainer` and `Trainer`.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): the student.
        teacher_model (`str`, `list` of `str`, `PreTrainedModel`, or `dict` of them): the teacher, by name, as
            `http://host:port` of a server that has it (or several), or as a module, which is frozen and put in eval mode;
            the one that `args` name when `None`. A `dict` holds several by name, of which each row's `teacher` column
            chooses one.
        args ([`CrossTokenizerGKDConfig`], *optional*): the settings.
        train_dataset (`Dataset` or `IterableDataset`): rows with `prompt`, `prompt` and `completion`, or `messages`,
            each conversational or (the first two) plain text; optional `tools` and `chat_template_kwargs`.
        eval_dataset (`Dataset`, `IterableDataset` or `dict` of them, *optional*): prompts to evaluate on, on-policy.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the student's tokenizer; loaded from the model when
            `None`.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*): the teacher's; loaded from the teacher when
            `None`; a `dict` of them for several.
        callbacks (`list` of `TrainerCallback`, *optional*), optimizers (`tuple`): as in `Trainer`.
        peft_config (`PeftConfig`, *optional*): train an adapter instead of the whole student.
    """

    _tag_names = ["trl", "ctopd", "on-policy-distillation"]
    _name = "DPCA"
    _paper = {"title": card.PAPERS["dpca"].title, "id": card.PAPERS["dpca"].arxiv}
    loss_is_scaled_for_ga = True  # every loss is a sum divided by the step's own token count

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher_model: Model | Mapping[str, Model] | None = None,
        args: CrossTokenizerGKDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        args = CrossTokenizerGKDConfig(f"{Path(model_id).name}-ctopd") if args is None else args
        if teacher_model is None:
            teacher_model = args.teacher_server_url or args.teacher_model_name_or_path
        check_arguments(model, teacher_model, args, train_dataset, peft_config)

        revision = (args.model_init_kwargs or {}).get("revision")
        processing_class = load_tokenizer(processing_class, model_id, revision, args.trust_remote_code)
        ensure_pad_token(processing_class, args.pad_token)
        self.panel = Panel(teacher_model, teacher_processing_class, args)
        self.args = args  # the dataset is rendered before Trainer sets it
        self.distillation_loss, self.off_policy_loss = losses_by_text(args)
        self.student_context = context_length(model, args)
        self._meters = {"train": Meter(), "eval": Meter()}
        self._timers = {mode: PhaseTimer(meter) for mode, meter in self._meters.items()}
        self._window: list[dict] = []  # the optimizer step's micro-batches, and the next steps' with `rollout_reuse`
        self._old_log_probs: dict[int, torch.Tensor] = {}  # of those micro-batches, as the student wrote them
        self._samples = Samples()
        self._card: card.Written | None = None  # the last one

        self._init_without_shared_vocabulary(
            model,
            args=args,
            data_collator=collate_prompts,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[
                self._timers["train"],
                *([DistillationReportCallback()] if args.report else []),
                *(callbacks or []),
            ],
            optimizers=optimizers,
            peft_config=peft_config,
        )
        check_strategy(args, self.accelerator)
        keep_scores_in_float32(self.accelerator)
        self._finish_student()
        self.panel.sit(self.accelerator, self.student_side, self.stop_ids)
        self._finish_losses()
        # What GKDTrainer's own methods and callers read
        self.lmbda, self.beta, self.temperature, self.seq_kd = args.lmbda, args.beta, args.temperature, args.seq_kd
        set_seed(args.seed, device_specific=True)
        if is_in_notebook():
            from .looking.notebook import show_figures  # needs IPython

            show_figures(self)

    def _init_without_shared_vocabulary(self, model, **kwargs):
        """`GKDTrainer.__init__` refuses two vocabularies, and what else it sets up is replaced here; so its own parent,
        `SFTTrainer`, is built instead."""
        super(GKDTrainer, self).__init__(model, **kwargs)

    def _finish_student(self):
        student = base_model(self.model)
        check_vocabulary("student", student, self.processing_class)
        if self.args.disable_dropout:
            disable_dropout_in_model(self.model)
        add_token_scores(student, self.args.temperature, entropy=True)  # what was drawn at it is scored at it
        pad_token_id = self.processing_class.pad_token_id
        student.config.get_text_config().pad_token_id = pad_token_id
        student.generation_config.pad_token_id = pad_token_id
        # Trainer counts a step's tokens only for models that take loss kwargs; the loss here always needs the count
        self.model_accepts_loss_kwargs = True
        self.stop_ids = self.student_side.stop_ids(student.generation_config)
        if not self.stop_ids:
            raise ValueError(
                f"Nothing ends the student's turn: {type(self.processing_class).__name__} has no eos_token and its "
                "generation config no eos_token_id. Set one of them."
            )
        self.generation_config = sampling_config(self.args, self.stop_ids, pad_token_id)
        self._vllm = None
        if self.args.use_vllm:
            self._vllm = VLLMWriter(self.model, self.accelerator, self.processing_class, self.args, self.stop_ids)
        student.generation_config.eos_token_id = self.stop_ids  # the saved student stops where it learned to

    def _finish_losses(self):
        """What the losses read of the two vocabularies, built before any training time is spent."""
        losses = [self.distillation_loss, *([self.off_policy_loss] if self.args.lmbda < 1 else [])]
        for loss in losses:
            check_signal(loss, self.panel.signals)
            for structure in getattr(loss, "structures", ()):
                getattr(self.vocabulary, structure)
        check_head("student", base_model(self.model))
        for seat in self.panel.seats.values():
            if not seat.remote:
                check_head("teacher", seat.teacher.base_model)

    # The two conversations

    @cached_property
    def student_side(self) -> Speaker:
        return Speaker(self._tokenizer, self.args.chat_template_kwargs)

    @property
    def teacher(self) -> LocalTeacher | RemoteTeacher:
        """The only one."""
        return self.panel.only.teacher

    @property
    def teacher_model(self) -> nn.Module:
        """The only teacher's, in this process."""
        return self.teacher.model

    @property
    def teacher_processing_class(self) -> PreTrainedTokenizerBase:
        """The only teacher's."""
        return self.panel.only.tokenizer

    @cached_property
    def vocabulary(self) -> VocabularyPair:
        student, teacher = base_model(self.model), self.teacher.base_model
        turn_end_is_one_token = all(len(ids) == 1 for ids in self.panel.only.turn_ends.values())
        return VocabularyPair(
            self._tokenizer,
            self.teacher_processing_class,
            student_size=student.get_output_embeddings().out_features,
            teacher_size=teacher.get_output_embeddings().out_features,
            student_stops=self.stop_ids,
            teacher_stops=self.panel.only.stop_ids if turn_end_is_one_token else (),
            device=self.accelerator.device,
            cache_dir=CACHE_DIR,
        )

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Renders and tokenizes every row for both models, once; a dataset that has been through it comes back as it
        is.
        """
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError(f"The {dataset_name} dataset is empty.")
        if dataset.column_names is not None and set(COLUMNS) <= set(dataset.column_names):
            return dataset
        options = {}
        if isinstance(dataset, Dataset):
            options = {"num_proc": args.dataset_num_proc, "desc": f"Rendering {dataset_name} dataset for both models"}
        with args.main_process_first(local=True, desc="dataset rendering"):
            rendered = dataset.map(
                render_row,
                with_indices=True,
                fn_kwargs={
                    "student": self.student_side,
                    "teachers": self.panel.sides,
                    "longest_prompt": None
                    if self.student_context is None
                    else self.student_context - args.max_new_tokens,
                    "needs_reference": args.lmbda < 1 and not args.seq_kd and dataset_name == "train",
                    "dataset_name": dataset_name,
                },
                remove_columns=dataset.column_names or list(next(iter(dataset))),
                **options,
            )
        if isinstance(rendered, Dataset):
            check_room(rendered, self.panel.contexts_of_servers, args.max_new_tokens, dataset_name)
        return rendered

    def _set_signature_columns_if_needed(self):
        self._signature_columns = COLUMNS

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        """The prompts of each optimizer step come `rollout_reuse` times, so that steps, epochs and resuming count as ever."""
        reuse, args = self.args.rollout_reuse, self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        if reuse == 1:
            # else Accelerate's sampler takes the process's own seed, and each would share out another order of the rows
            self.accelerator.dataloader_config.data_seed = seed
            return super()._get_train_sampler(train_dataset)
        rows = len(self.train_dataset if train_dataset is None else train_dataset)
        seed = None if args.train_sampling_strategy == "sequential" else seed
        return RepeatedWindows(rows, self.get_total_train_batch_size(args), reuse, seed)

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if self.args.rollout_reuse > 1:
            loader.set_sampler(self._get_train_sampler())  # where a resumed run looks for it, to tell it the epoch
        return loader

    # Rollouts

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """One optimizer step's micro-batches: prompts in, rollouts scored by the teacher out, and the number of scored
        student tokens over all micro-batches and processes."""
        self._timers["train"].begin()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        step = self.state.global_step
        if step % self.args.rollout_reuse == 0 or not self._window:
            self._window, self._old_log_probs = [], {}
            window = [batch["prompts"] for batch in batches]
            if self.args.rollout_reuse == 1:  # else the sampler deals whole steps alone
                window[-1] = self._without_fillers(window[-1])
            with self._rollout_seed(step):
                self._window = self._roll_out(self.model_wrapped, window, "train")
        return self._window, self._get_num_items_in_batch(self._window, device)

    def _without_fillers(self, prompts: list[Prompt]) -> list[Prompt]:
        """`prompts`, read last, with those marked that are of another batch."""
        own = own_rows(self.accelerator, len(prompts))
        return [*prompts[:own], *(replace(prompt, filler=True) for prompt in prompts[own:])]

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        found = checkpoints.to_resume_from(resume_from_checkpoint, self.args.output_dir)
        self._meters["train"].clear()  # of a run before that was interrupted
        return super().train(found, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        if self.args.should_save:
            checkpoints.clear(checkpoints.folder_of(self._get_output_dir(trial), self.state.global_step))
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str):
        super()._save_rng_state(output_dir)
        if self.state.global_step % self.args.rollout_reuse:
            window = [settled(batch) for batch in self._window]
            torch.save((self._window_layout(), window, self._old_log_probs), self._pending(output_dir))
        self.accelerator.wait_for_everyone()  # what marks a whole checkpoint comes next

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._pending(checkpoint).exists():
            return
        layout, window, old_log_probs = torch.load(self._pending(checkpoint), "cpu")
        if layout == self._window_layout():
            self._window, self._old_log_probs = window, old_log_probs
        else:
            logger.warning(
                f"{checkpoint} keeps completions of other settings than these (then {layout}, now "
                f"{self._window_layout()}): they are left, and the student writes anew."
            )

    def _window_layout(self) -> dict[str, int]:
        names = (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_generations",
            "rollout_reuse",
            "world_size",
        )
        return {name: getattr(self.args, name) for name in names}

    def _pending(self, checkpoint: str) -> Path:
        """Where a checkpoint keeps the completions that this process has yet to train on."""
        return Path(checkpoint) / f"rollouts_{self.args.process_index}.pt"

    def _roll_out(self, model: nn.Module, window: list[list[Prompt]], mode: str) -> list[dict]:
        """Completions for all prompts of `window` in one go, scored by the teacher and cut into micro-batches again."""
        self._samples.clear()
        phase, repeats = self._timers[mode], self.args.num_generations if mode == "train" else 1
        window = [[prompt for prompt in prompts for _ in range(repeats)] for prompts in window]
        on_policy = [mode == "eval" or draw < self.args.lmbda for draw in self._lmbda_draws(len(window))]
        with phase("generation"):
            completions, sampled = zip(*self._draw(model, window, on_policy), strict=True)
        with phase("alignment"):
            rollouts = self.panel.pair([prompt for prompts in window for prompt in prompts], completions)
        with phase("teacher"):
            with_hidden = any(signal_of(self._loss_for(on)) == "logits" for on in on_policy)
            readings = self.panel.read(rollouts, with_hidden)
        self._meters[mode].add(rollout_metrics(rollouts))
        self._meters[mode].add({"off_policy_fraction": (on_policy.count(False), len(on_policy))})

        batches, names = [], list(self.panel.seats)
        for index, (rows, on) in enumerate(
            zip(self._micro_batches(rollouts, window, on_policy), on_policy, strict=True)
        ):
            batch = collate(
                [rollouts[r] for r in rows], self.processing_class.pad_token_id, self.args.pad_to_multiple_of
            )
            batch["teacher_places"] = torch.tensor([names.index(rollouts[r].prompt.teacher) for r in rows])
            teacher_length = batch["teacher_chunks"].shape[1]
            batch["teacher_log_probs"] = readings.log_probs(rows, teacher_length)
            if signal_of(self._loss_for(on)) == "logits":
                batch["teacher_hidden"] = pad_scores([readings.hidden[r] for r in rows], teacher_length)
            if on and self._vllm is not None:
                batch["sampled_log_probs"] = on_columns([sampled[r] for r in rows], batch)
            batches.append({**batch, "on_policy": on, "index": index})
        return batches

    def align_completions(
        self, completions: Sequence[list[int]], teachers: Sequence[int] | None = None
    ) -> list[Rollout]:
        """Of completions alone, and the places of their teachers in the panel: prompts bear on nothing but the teacher's
        context."""
        names = list(self.panel.seats)
        prompts = [Prompt([], [], teacher=names[place]) for place in teachers or [0] * len(completions)]
        return self.panel.pair(prompts, completions)

    def _micro_batches(
        self, rollouts: list[Rollout], window: list[list[Prompt]], on_policy: list[bool]
    ) -> list[list[int]]:
        """The rows of each micro-batch; text of the student never shares one with text of another."""
        ends = [*accumulate(map(len, window), initial=0)]
        batches = [list(range(start, end)) for start, end in pairwise(ends)]
        if not self.args.length_grouped:
            return batches
        lengths = [len(rollout.prompt.student_ids) + len(rollout.student_ids) for rollout in rollouts]
        own, given = (
            iter(grouped_by_length(lengths, [rows for rows, on in zip(batches, on_policy, strict=True) if on == kind]))
            for kind in (True, False)
        )
        return [next(own if on else given) for on in on_policy]

    def _loss_for(self, on_policy: bool) -> Callable:
        return self.distillation_loss if on_policy else self.off_policy_loss

    def _draw(
        self, model: nn.Module, window: list[list[Prompt]], on_policy: list[bool]
    ) -> list[tuple[list[int], list[float] | None]]:
        """A completion for each prompt of `window`, in its order: the student's own, with the log-probs that vLLM drew it
        with where that wrote it, or one the student did not write."""
        groups = list(zip(window, on_policy, strict=True))
        own = [prompt for prompts, on in groups if on for prompt in prompts]
        if self._vllm is not None:
            written = iter(self._vllm.write([prompt.student_ids for prompt in own], self.state.global_step))
        else:
            written = ((ids, None) for ids in self._write(model, own))
        others = [prompt for prompts, on in groups if not on for prompt in prompts]
        given = ((ids, None) for ids in self._references(others))
        return [next(written if on else given) for prompts, on in groups for _ in prompts]

    def _write(self, model: nn.Module, prompts: list[Prompt]) -> list[list[int]]:
        """The student's completions, up to and including the first stop token."""
        return write(
            model,
            [prompt.student_ids for prompt in prompts],
            self.generation_config,
            self.accelerator,
            self.args,
            self.args.generation_backend,
        )

    def _references(self, prompts: list[Prompt]) -> list[list[int]]:
        """Completions the student did not write, in student ids: the dataset's, or the teacher's with `seq_kd`."""
        limit = self.args.max_new_tokens
        if not self.args.seq_kd or not prompts:
            return [prompt.reference_ids[:limit] for prompt in prompts]
        seat = self.panel.only
        stop_ids, pad_token_id = seat.stop_ids, seat.tokenizer.pad_token_id
        config = sampling_config(self.args, stop_ids, stop_ids[0] if pad_token_id is None else pad_token_id)
        longest = max(len(prompt.teacher_ids) for prompt in prompts)
        if seat.context is not None:
            if longest >= seat.context:
                raise ValueError(
                    f"seq_kd: a prompt of {longest} teacher tokens leaves the teacher no room to write in its context of "
                    f"{seat.context}. Filter such rows out."
                )
            config.max_new_tokens = min(limit, seat.context - longest)
        written = write(
            self.teacher.model, [prompt.teacher_ids for prompt in prompts], config, self.accelerator, self.args
        )
        return [self._respell(ids)[:limit] for ids in written]

    def _respell(self, teacher_ids: list[int]) -> list[int]:
        """What the student would write for the teacher's completion."""
        ended = bool(teacher_ids) and teacher_ids[-1] in self.panel.only.stop_ids
        tokenizer = self.teacher_processing_class
        text = align_text(teacher_ids[:-1] if ended else teacher_ids, tokenizer, tokenizer).text
        ids = self.processing_class.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids + self.student_side.turn_end[-1:] if ended else ids

    def _lmbda_draws(self, count: int) -> list[float]:
        """The same on every process: all of them write, or none does."""
        generator = torch.Generator().manual_seed(self.args.seed + _STRIDE * self.state.global_step)
        return torch.rand(count, generator=generator).tolist()

    @contextmanager
    def _rollout_seed(self, step: int):
        """Draws within depend on seed, step and process alone, so that evaluating or resuming changes no rollout."""
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed + _STRIDE * (step + 1) + self.accelerator.process_index)
            yield

    # Loss

    def _prepare_input(self, data):
        """On the device, in the precision it has: Trainer's own rounds to DeepSpeed's, log-probs too."""
        return send_to_device(data, self.args.device)

    def training_step(self, *args, **kwargs):
        with self._timers["train"]("student"):
            return super(GKDTrainer, self).training_step(*args, **kwargs)  # GKDTrainer's own would generate here

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch of scored rollouts. `num_items_in_batch` is the step's N; without it, the batch's
        own.
        """
        if return_outputs:
            raise ValueError("The logits are never built, so compute_loss has no outputs to return.")
        mode = "train" if model.training else "eval"
        with self._timers[mode]("loss"):
            batch, entropy = self._score(model, inputs)
            num_items = batch.scored_tokens if num_items_in_batch is None else num_items_in_batch
            result = self._loss_for(inputs["on_policy"])(batch, torch.as_tensor(num_items).clamp(min=1))
            if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
                raise TypeError(
                    "A loss returns (value, metrics), with metrics a dict of name: (sum, weight); this one returned a "
                    f"{type(result).__name__}."
                )
            loss, metrics = result
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # N counts every process, and DDP averages over them

            self._meters[mode].add(metrics)
            if batch.old_log_probs is None:  # text of the student as it is now
                self._meters[mode].add(chunk_metrics(batch, entropy, inputs["filler"]))
                if model.training and self.args.rollout_reuse > 1:
                    self._old_log_probs[inputs["index"]] = batch.policy_log_probs
                if self.args.log_completions or self._reports:
                    micro_batches = self.current_gradient_accumulation_steps if model.training else 1
                    self._samples.keep(inputs, batch, -(-self.args.num_completions_to_print // micro_batches))
            return loss

    def _score(self, model: nn.Module, inputs: dict) -> tuple[ScoredChunks, torch.Tensor]:
        """The student's forward pass: what the loss reads, and the entropy (B, S) of the student's distributions."""
        mode = "train" if model.training else "eval"
        on_distributions = signal_of(self._loss_for(inputs["on_policy"])) == "logits"
        student, scored = base_model(self.accelerator.unwrap_model(model)), inputs["scored"]
        with (
            self._timers[mode]("student"),
            hidden_states(student) if on_distributions else nullcontext() as states,
        ):
            scores = model(
                input_ids=inputs["input_ids"],
                scored=scored,
                targets=inputs["input_ids"][scored[0], scored[1] + 1],
            )
        log_probs, entropy = (on_grid(values, scored, inputs["input_ids"]) for values in scores)
        old = self._old_log_probs.get(inputs["index"]) if model.training else None
        batch = ScoredChunks(
            student_log_probs=log_probs,
            teacher_log_probs=self._settled(inputs["teacher_log_probs"], mode),
            student_chunks=inputs["student_chunks"],
            teacher_chunks=inputs["teacher_chunks"],
            student_widths=inputs["student_widths"],
            num_chunks=inputs["num_chunks"],
            student_ids=inputs["input_ids"][:, 1:],
            teacher_ids=inputs["teacher_ids"],
            old_log_probs=None if old is None else old.to(log_probs.device),
        )
        if "sampled_log_probs" in inputs:
            clip_max = self.args.vllm_importance_sampling_clip_max
            batch.importance, metrics = importance(batch, inputs["sampled_log_probs"].to(log_probs.device), clip_max)
            self._meters[mode].add(metrics)
        if on_distributions:
            length = log_probs.shape[1]  # prompt-learning adapters put virtual tokens in front
            self._add_distributions(batch, student, states[0][:, :-1][:, -length:], inputs["teacher_hidden"])
        return batch, entropy.detach()

    def _settled(self, scores: torch.Tensor | Awaited, mode: str) -> torch.Tensor:
        """The teacher's log-probs; waits for those that a server still works on."""
        if not isinstance(scores, Awaited):
            return scores
        with self._timers[mode]("teacher_wait"):
            log_probs = scores.log_probs
        self._meters[mode].add(scores.metrics)
        return log_probs

    def _add_distributions(self, batch: ScoredChunks, student: PreTrainedModel, hidden, teacher_hidden):
        """Gives `batch` what a loss on whole distributions reads, from the hidden states of both sides, projected in the
        precision that the sampled log-probs are computed in."""
        sides = []
        for model, states, output in (
            (student, hidden, batch.student_log_probs),
            (self.teacher.base_model, teacher_hidden, None),
        ):
            dtype = _AUTOCAST.get(self.accelerator.mixed_precision, states.dtype)
            sides.append(Distributions(states, lm_head(model, dtype, self.args.temperature, output)))
        batch.student, batch.teacher = sides
        batch.vocabulary, batch.tile_tokens = self.vocabulary, self.args.logit_tile_tokens

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """On-policy evaluation: the student answers the prompts and the teacher scores the answers."""
        timer = self._timers["eval"]
        timer.begin()
        [batch] = self._roll_out(model, [self._without_fillers(inputs["prompts"])], "eval")
        with timer("student"), torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(batch))
        tokens = batch["scored"].shape[1]
        self._meters["eval"].add({"loss": (loss * tokens, torch.tensor(tokens))})  # Trainer's own mean is one over rows
        timer.end()
        return loss.detach(), None, None

    def predict(self, test_dataset, *args, **kwargs):
        """As `evaluate`, it takes rows as they come."""
        rendered = self._prepare_dataset(test_dataset, self.processing_class, self.args, False, None, "test")
        return super().predict(rendered, *args, **kwargs)

    def evaluation_loop(self, *args, **kwargs):
        self._meters["eval"].clear()  # of one before that was interrupted, or that nothing was logged of
        with self._rollout_seed(-1):  # the same draws at every evaluation, so that two of them compare
            return super().evaluation_loop(*args, **kwargs)

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        figures = self._meters[mode].read(self.accelerator)
        if figures.get("alignment/masked_fraction", 0) > _MUCH_MASKED:
            logger.warning(
                f"{figures['alignment/masked_fraction']:.0%} of the student's tokens take no part (why: masked_bytes/* "
                "and alignment/teacher_context_exceeded_fraction). "
                "Masked text costs the student nothing, and the gap says nothing of it: look at the completions "
                "(log_completions=True), and lower the learning rate if the share grows."
            )
        prefix = evaluation_prefix(logs) if mode == "eval" else ""
        logs.update({f"{prefix}{name}": value for name, value in figures.items()})
        super().log(logs, start_time)
        if self.is_world_process_zero():
            samples = self._samples_to_show()
            if samples and self.args.log_completions:
                shown_by, rows = self.callback_handler.callbacks, self.args.num_completions_to_print
                with ornament("The table of completions"):
                    show(samples, self.processing_class, shown_by, rows, f"{prefix}completions")
            for report in self._reports:
                report.update(self, prefix, samples)
        self._samples.clear()

    def _samples_to_show(self) -> list[Sample]:
        with ornament("The samples of completions"):
            return self._samples.take(self.state.global_step, self.processing_class, self.align_completions)
        return []

    @property
    def _reports(self) -> list[DistillationReportCallback]:
        return [own for own in self.callback_handler.callbacks if isinstance(own, DistillationReportCallback)]

    def compare(
        self, prompts: Sequence[str | list[dict] | Mapping], max_new_tokens: int | None = None
    ) -> list[dict[str, str | list[dict]]]:
        """
        Prints the greedy answers of the student before its training, of the student now and of the teacher side by side.

        Args:
            prompts: plain texts, conversations (lists of messages) or dataset rows, rendered as in training.
            max_new_tokens: of each answer; as in training when `None`. Never past a model's context.

        Returns:
            A `dict` a prompt: `prompt`, `student_before` (with an adapter only, which is switched off for it),
            `student_now`, `teacher`. Every process of a distributed run must call it.
        """
        return compare(self, prompts, max_new_tokens)

    # Card

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ):
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else list(tags or [])
            self._write_card(self.args.output_dir, model_name, dataset_name, tags)

    def _save(self, output_dir: str | None = None, state_dict=None):
        folder = output_dir or self.args.output_dir
        if self.args.should_save:  # every process comes here under DDP
            card.remove_unreadable(folder)  # PEFT would read it, before it has saved a weight
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # over the placeholder card that PEFT leaves, which names the base model's folder
            self._write_card(folder)

    def _write_card(
        self, folder: str, model_name: str | None = None, dataset_name: str | None = None, tags: Sequence[str] = ()
    ):
        with ornament("The model card"):
            folder_of_run = Path(self.args.hub_model_id or self.args.output_dir)
            model_name = model_name or folder_of_run.name or folder_of_run.resolve().name
            key = (len(self.state.log_history), model_name, dataset_name, *tags)
            if self._card is None or self._card.key != key:  # a checkpoint has the card of the output folder
                self._card = self._make_card(key, model_name, dataset_name, tags)
            self._card.write(folder)

    def _make_card(self, key: tuple, model_name: str, dataset_name: str | None, tags: Sequence[str]) -> card.Written:
        student, seats = get_config_model_id(self.model.config), self.panel.seats.values()
        history, dataset = self.state.log_history, self.train_dataset
        picture = command = None
        with ornament("The run's command"):
            command = provenance.command()  # asks for the working folder, which may be gone
        with ornament("The picture of the learning curve"):
            picture = card.learning_curve(history)
        made = card.model_card(
            model_name=model_name,
            hub_model_id=self.hub_model_id,
            student=student,
            teachers=[(seat.name, seat.tokenizer) for seat in seats],
            student_tokenizer=self.processing_class,
            args=self.args,
            adapter=isinstance(self.model, PeftModel),
            dataset_name=dataset_name or provenance.dataset_source(dataset),
            tags=[*self._tag_names, *tags],
            log_history=history,
            prompts=len(dataset) if isinstance(dataset, Dataset) else None,
            licenses=[provenance.license_of(name) for name in (student, *(seat.name for seat in seats))],
            command=command,
            picture=None if picture is None else card.PICTURE,
        )
        return card.Written(key, made, picture)
