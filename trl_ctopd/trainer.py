"""`CrossTokenizerGKDTrainer`: the wiring between TRL's GKD trainer and the maths of this package."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
import trl
from accelerate.logging import get_logger
from accelerate.utils import send_to_device, set_seed
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import is_in_notebook

from .config import CrossTokenizerGKDConfig
from .gkd import BASE, GKDTrainer
from .looking import card
from .looking.compare import compare
from .looking.history import evaluation_prefix, is_evaluation
from .looking.publish import publish, reports_of
from .looking.report import DistillationReportCallback
from .looking.run_card import RunCard
from .looking.samples import Samples
from .losses import Metrics, ScoredChunks
from .losses.reference_kl import reference_kl
from .models.activated import without_backward
from .models.forwards import base_model, left_unprepared, prepare_anew
from .models.heads import head_rows
from .models.loading import by_name, ensure_pad_token, load_tokenizer, warn_of_cloned_tokens
from .models.packing import packer_for
from .models.products import faster_products
from .models.reference import Reference, why_not_start
from .models.sharding import keep_scores_in_float32
from .rollouts.generation import check_window, sampling_config
from .rollouts.pairing import Prompt
from .rollouts.prompts import BLEND, COLUMNS, PADDING, ROW, collate_prompts, render_dataset
from .rollouts.rewards import Judges
from .rollouts.source import RolloutSource, ahead_of, student_writer
from .rollouts.tools import ToolLoop
from .rollouts.tools import schemas as tool_schemas
from .teachers.local import LocalTeacher
from .teachers.panel import Model, Panel
from .teachers.remote import RemoteTeacher
from .text.chat import Speaker
from .text.continuations import Continuations
from .text.vocabulary import VocabularyPair
from .training import checks, choice, student
from .training.metrics import Meter, chunk_metrics, is_unmeasured, warn_of_much_masked
from .training.resuming import ResumableTrainer
from .training.scoring import Scorer, prepare_student
from .training.timing import PhaseTimer
from .training.watch import FiniteWeights, SamplingWatch, sampling_metrics


logger = get_logger(__name__)


class CrossTokenizerGKDTrainer(ResumableTrainer):
    """
    On-policy distillation from a teacher with another tokenizer and another chat template.

    Each optimizer step, the student writes a completion for every prompt of the step, the teacher scores their text in
    its own tokens, and the loss maps the scores back onto the student's tokens (`distillation_loss`).

    Overrides; all else is inherited from [`ResumableTrainer`], `GKDTrainer`, `SFTTrainer` and `Trainer`:
    - `__init__`, `_prepare_dataset`, `predict`: there are two vocabularies, and rows are rendered for both models;
    - `get_batch_samples`, `prediction_step`, `evaluation_loop`: rollouts take the place of prompts;
    - `training_step`, `compute_loss`, `_prepare_input`: the loss reads chunks that both models have scored;
    - `_init_training_state`: an interrupted run leaves no figures to the next;
    - `log`, `_track_num_input_tokens`, `create_model_card`, `_save`: distillation's own metrics and model card.

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): the student.
        teacher_model (`str`, `list` of `str`, `PreTrainedModel`, or `dict` of them): the teacher: a hub name or folder, the
            address `http://host:port` of a server (or several), or a module, which is frozen and put in eval mode. `None`: as
            set in `args`. A `dict` holds several teachers by name, of which each row names one, or several to be blended
            (docs/blending.md).
        args ([`CrossTokenizerGKDConfig`], *optional*): the settings.
        train_dataset (`Dataset` or `IterableDataset`): rows with `prompt`, `prompt` and `completion`, or `messages`,
            each conversational or (the first two) plain text; optional `tools` and `chat_template_kwargs`.
        eval_dataset (`Dataset`, `IterableDataset` or `dict` of them, *optional*): prompts to evaluate on, on-policy.
        processing_class (`PreTrainedTokenizerBase`, *optional*): the student's tokenizer; loaded from the model when
            `None`.
        teacher_processing_class (`PreTrainedTokenizerBase`, *optional*): the teacher's tokenizer, or a `dict` for several
            teachers; loaded from the teacher when `None`.
        callbacks (`list` of `TrainerCallback`, *optional*), optimizers (`tuple`): as in `Trainer`.
        peft_config (`PeftConfig`, *optional*): train an adapter instead of the whole student.
        tools (`list` of `Callable`, *optional*): functions that the student may call during generation, with type hints and a
            docstring, as in `DistillationTrainer`; see docs/tools.md.
        reward_funcs, reward_processing_classes (*optional*): rewards beside the teacher, as in `GRPOTrainer`; see docs/rewards.md.
        teacher_gate (`Callable`, *optional*): calls completions wrong, of which the student is not to learn; see docs/rewards.md.
    """

    _tag_names = ["trl", "ctopd", "on-policy-distillation"]
    _name = "DPCA"
    _paper = {"title": card.PAPERS["dpca"].title, "id": card.PAPERS["dpca"].arxiv}
    loss_is_scaled_for_ga = True  # every loss is divided by the token count of the whole step

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
        tools: list[Callable] | None = None,
        reward_funcs: Callable | str | nn.Module | list[Callable | str | nn.Module] | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
        teacher_gate: Callable | None = None,
    ):
        model, teacher_model = by_name(model), by_name(teacher_model)
        model_id = student.name_of_student(model)
        args = CrossTokenizerGKDConfig(f"{Path(model_id).name}-ctopd") if args is None else args
        if teacher_model is None:
            teacher_model = args.teacher_models or args.teacher_server_url or args.teacher_model_name_or_path
        args = choice.with_loss(args, teacher_model)
        checks.check_arguments(model, teacher_model, args, train_dataset, peft_config, eval_dataset)
        model = student.open_student(model, args, peft_config)

        given = args.model_init_kwargs or {}
        revision, gguf_file = given.get("revision"), given.get("gguf_file")
        processing_class = load_tokenizer(processing_class, model_id, revision, args.trust_remote_code, gguf_file)
        ensure_pad_token(processing_class, args.pad_token)
        warn_of_cloned_tokens(args.chat_template_path, processing_class)
        logger.info(f"TRL {trl.__version__}: the trainer is built on {BASE}.")
        self.panel = Panel(teacher_model, teacher_processing_class, args)
        self.args = args  # the dataset is rendered before Trainer sets it
        self._tools = tool_schemas(tools or [])
        self._has_tools = bool(tools)  # or in the rows
        judges = None
        if reward_funcs or teacher_gate is not None:
            judges = Judges(reward_funcs, reward_processing_classes, teacher_gate, args, processing_class)
        self._judges, self._keeps_rows = judges, judges is not None
        self.distillation_loss, self.off_policy_loss = choice.losses_by_text(args)
        if judges is not None and judges.reward:
            choice.check_takes_rewards(self.distillation_loss)
        self.student_context = student.context_length(model, args)
        self._meters = {"train": Meter(), "eval": Meter()}
        self._unmeasured: set[str] = set()  # figures that the last evaluation of their dataset did not have
        self._timers = {mode: PhaseTimer(meter) for mode, meter in self._meters.items()}
        self._samples, self._card = Samples(), RunCard()
        self._sampling = SamplingWatch(args)
        self._prepare_to_resume(args, train_dataset, eval_dataset)

        reports = [DistillationReportCallback()] if args.report else []
        # Not GKDTrainer's own, which refuses two vocabularies; everything else that it sets up is replaced here.
        super(GKDTrainer, self).__init__(
            model,
            args=args,
            data_collator=collate_prompts,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[self._timers["train"], FiniteWeights(), *reports, *(callbacks or [])],
            optimizers=optimizers,
            peft_config=peft_config,
        )
        data = self.train_dataset, self.eval_dataset, bool(tools)
        checks.check_run(args, self.accelerator, self.model, processing_class, *data)
        student.warn_of_default_rate(args, self.model, optimizers[0], "1e-4 to 3e-4")
        keep_scores_in_float32(self.accelerator)
        # Trainer counts a step's tokens only for models that take loss kwargs. The loss here always needs the count.
        self.model_accepts_loss_kwargs = True
        self.stop_ids = prepare_student(self.model, self.student_side, args)
        self.generation_config = sampling_config(args, self.stop_ids, processing_class.pad_token_id)
        write = student_writer(self.model, self.accelerator, self.student_side, self.generation_config, args)
        ahead = ahead_of(write, self.model, self.accelerator, self.generation_config, args)
        self.panel.sit(self.accelerator, self.student_side, self.stop_ids)
        if args.seq_kd:
            check_window("teacher", self.teacher.base_model)
        sides = self.student_side, self.panel.sides
        loop = ToolLoop(tools, *sides, self.stop_ids, args, self.student_context) if tools else None
        reads = self._reads_distributions, self._tables_for
        own = args, self.accelerator, self.student_side, self.panel
        self.aux_loss_enabled = self.aux_loss_enabled and student.balances(args, self.model, self.router_aux_loss_coef)
        # noise would be drawn once for a prompt that rows share; experts are balanced over the tokens of padded rows
        packs = student.learns_as_it_writes(args, self.model) and not self.aux_loss_enabled
        packer = packer_for("student", self.model, self.accelerator) if packs else None
        self.rollouts = RolloutSource(*own, write, *reads, loop, judges, lambda: self.state, packer, ahead)
        keeps_start = args.reference_kl or getattr(self.distillation_loss, "reads_start", False)
        self.start_is_not_base = why_not_start(self.model)
        start = Reference(self.model, self.accelerator, self.start_is_not_base) if keeps_start else None
        self._scorer = Scorer(args, self.accelerator, self.panel, lambda: self.vocabulary, self.aux_loss_enabled, start)
        losses = [self.distillation_loss, *([self.off_policy_loss] if args.lmbda < 1 else [])]
        choice.check_losses(losses, self.model, self.panel, lambda: self.vocabulary)
        for on_policy in (True, False):
            self._tables_for(on_policy)  # build them before training time is spent
        # Read by GKDTrainer's own methods and by its callers
        self.lmbda, self.beta, self.temperature, self.seq_kd = args.lmbda, args.beta, args.temperature, args.seq_kd
        set_seed(args.seed, device_specific=True)
        if is_in_notebook():
            from .looking.notebook import show_figures  # imports IPython

            show_figures(self)

    # The two conversations

    @cached_property
    def student_side(self) -> Speaker:
        return Speaker(self._tokenizer, self.args.chat_template_kwargs, day=self._today)

    @property
    def teacher(self) -> LocalTeacher | RemoteTeacher:
        """The teacher, where there is only one."""
        return self.panel.only.teacher

    @property
    def teacher_model(self) -> nn.Module:
        """The teacher's module, where there is only one teacher and it is in this process."""
        return self.teacher.model

    @property
    def teacher_processing_class(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer, where there is only one teacher."""
        return self.panel.only.tokenizer

    @cached_property
    def vocabulary(self) -> VocabularyPair:
        student_size = head_rows(base_model(self.model))
        return self.panel.only.vocabulary(student_size, self.accelerator.device, self._has_tools)

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Renders and tokenizes every row for both models, once."""
        self._has_tools |= "tools" in (getattr(dataset, "column_names", None) or ())
        contexts = self.student_context, self.panel.contexts_of_servers
        sides = self.student_side, self.panel.sides
        rendered = render_dataset(dataset, args, *sides, *contexts, dataset_name, self._tools, self._keeps_rows)
        return rendered.shuffle(seed=args.seed) if args.shuffle_dataset else rendered

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [*COLUMNS, ROW, BLEND, PADDING]

    # Rollouts

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """One optimizer step's micro-batches: prompts in; rollouts scored by the teacher out, and N, the number of scored
        student tokens over all micro-batches and processes."""
        self._timers["train"].begin()
        window, following = self._windows.take(epoch_iterator, num_batches), []
        if not window:
            return [], None
        step, pending = self.state.global_step, self._pending
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # of a schedule-free optimizer: an evaluation has put its averaged weights in place
        if self.rollouts.ahead is not None and step + 1 < self.state.max_steps:
            following = self._windows.peek(epoch_iterator, self.args.gradient_accumulation_steps)
        if step % self.args.rollout_reuse == 0 or not pending.batches:
            pending.clear()
            with self.rollouts.seeded(step):
                pending.batches = self._roll_out(self.model_wrapped, window, "train", following)
        return pending.batches, self._get_num_items_in_batch(pending.batches, device)

    def _roll_out(
        self, model: nn.Module, window: list[list[Prompt]], mode: str, following: Sequence[list[Prompt]] = ()
    ) -> list[dict]:
        """Completions for all prompts of `window` in one call, scored by the teacher and split into micro-batches. Those for
        `following`, the next step's, are begun where they are written ahead."""
        self._samples.clear()
        step, timer = self.state.global_step, self._timers[mode]
        batches, metrics = self.rollouts.roll_out(model, window, step, mode, timer, following)
        self._meters[mode].add(metrics)
        return batches

    # Loss

    def train(self, *args, **kwargs):
        checks.check_callbacks(self.callback_handler.callbacks)
        prepare_anew(self.model, self.accelerator)  # another trainer may have trained it since
        self._tries = 0  # by `auto_find_batch_size`
        with faster_products(self.model, self.accelerator):
            return super().train(*args, **kwargs)

    def _init_training_state(self, *args, **kwargs):
        """Of what was interrupted no figures and no text are left: an earlier run, or this one, which an out-of-memory error begins anew with
        smaller micro-batches (`auto_find_batch_size`)."""
        taken = self.state.global_step - self._initial_global_step if self._tries else 0
        if taken:
            logger.warning(
                f"The run begins anew with smaller micro-batches, after an out-of-memory error. Its weights and its optimizer are those of the "
                f"{taken} steps that it has taken by then. For a run as if it had begun so, start it again with "
                f"per_device_train_batch_size={self._train_batch_size}."
            )
        self._tries += 1
        self._meters["train"].clear()
        self._samples.clear()
        self._pending.clear()
        self._card = RunCard()
        self.panel.fit(self._train_batch_size)
        return super()._init_training_state(*args, **kwargs)

    def _prepare_input(self, data):
        """Moves `data` to the device and keeps its precision. Trainer's own would round to DeepSpeed's, log-probs too."""
        return send_to_device(data, self.args.device)

    def training_step(self, *args, **kwargs):
        with self._timers["train"]("student"):
            return super(GKDTrainer, self).training_step(*args, **kwargs)  # GKDTrainer's own would generate first

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a micro-batch of rollouts. `num_items_in_batch`: N of the whole step; that of the batch when `None`."""
        if return_outputs:
            raise ValueError("The logits are never built, so compute_loss has no outputs to return.")
        mode = "train" if model.training else "eval"
        with self._timers[mode]("loss"):
            batch, entropy, metrics = self._score(model, inputs)
            self._meters[mode].add(metrics)
            num_items = batch.scored_tokens if num_items_in_batch is None else num_items_in_batch
            num_items = torch.as_tensor(num_items).clamp(min=1)
            loss, metrics = choice.checked(self._loss_for(inputs["on_policy"])(batch, num_items))
            if batch.reference_log_probs is not None and self.args.reference_kl:
                distance, own = reference_kl(batch, num_items)
                loss, metrics = loss + self.args.reference_kl * distance, {**metrics, **own}
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # N counts all processes, and DDP averages over them

            if batch.imbalance is not None:
                self._meters[mode].add({"aux_loss": (batch.imbalance.detach(), 1)})
                if model.training:  # a mean over micro-batches, as in SFTTrainer
                    loss = loss + self.router_aux_loss_coef * batch.imbalance / self.current_gradient_accumulation_steps
            self._meters[mode].add(metrics)
            if batch.old_log_probs is None:  # the student has not been updated since it wrote
                on_policy, closings_told = inputs["on_policy"], inputs.get("tells_closings")
                if on_policy:
                    self._meters[mode].add(sampling_metrics(batch, entropy))
                metrics = chunk_metrics(batch, entropy, inputs["padding_rows"], closings_told, on_policy)
                self._meters[mode].add(metrics)
                if model.training and self.args.rollout_reuse > 1:
                    self._pending.old_scores[inputs["index"]] = batch.policy_scores
                if self.args.log_completions or reports_of(self):
                    micro_batches = self.current_gradient_accumulation_steps if model.training else 1
                    self._samples.keep(inputs, batch, -(-self.args.num_completions_to_print // micro_batches))
            if model.training and torch.is_grad_enabled():
                choice.check_learns(loss)
            return loss

    def _score(self, model: nn.Module, inputs: dict) -> tuple[ScoredChunks, torch.Tensor, Metrics]:
        """The student's forward pass over a micro-batch: see [`Scorer`]."""
        mode = "train" if model.training else "eval"
        old = self._pending.old_scores.get(inputs["index"]) if model.training else None
        return self._scorer(model, inputs, self._reads_distributions(inputs["on_policy"]), old, self._timers[mode])

    def _loss_for(self, on_policy: bool) -> Callable:
        return self.distillation_loss if on_policy else self.off_policy_loss

    def _reads_distributions(self, on_policy: bool) -> bool:
        return choice.signal_of(self._loss_for(on_policy)) == "logits"

    def _tables_for(self, on_policy: bool) -> dict[str, Continuations | None]:
        return self._continuations if getattr(self._loss_for(on_policy), "event", "open") == "closed" else {}

    @cached_property
    def _continuations(self) -> dict[str, Continuations | None]:
        student_size = head_rows(base_model(self.model))
        return {name: seat.continuations(student_size) for name, seat in self.panel.seats.items()}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """On-policy evaluation: the student answers the prompts and the teacher scores the answers."""
        timer = self._timers["eval"]
        timer.begin()
        [batch] = self._roll_out(model, [self.rollouts.mark_padding_rows(inputs["prompts"])], "eval")
        with timer("student"), torch.no_grad(), without_backward(self.model), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(batch))
        tokens = (batch["student_chunks"] >= 0).sum().item()
        self._meters["eval"].add({"loss": (loss * tokens, torch.tensor(tokens))})  # Trainer's own is a mean over rows
        timer.end()
        return loss.detach(), None, None

    def predict(self, test_dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"):
        """Takes an unrendered dataset, as `evaluate` does, and returns its figures."""
        rendered = self._prepare_dataset(test_dataset, self.processing_class, self.args, False, None, "test")
        output = super().predict(rendered, ignore_keys, metric_key_prefix)
        figures = self._meters["eval"].read(self.accelerator)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def evaluation_loop(self, *args, **kwargs):
        self._meters["eval"].clear()  # may hold metrics of an earlier evaluation that was interrupted or not logged
        # the same seed for every evaluation, so that two of them can be compared
        faster = faster_products(self.model, self.accelerator)
        with left_unprepared(self.model, self.accelerator), self.rollouts.seeded(-1), faster:
            return super().evaluation_loop(*args, **kwargs)

    # Logging

    def _track_num_input_tokens(self, inputs):
        """`non_padding` counts by the rows' lengths. Trainer's own would take a turn end for padding where it is the pad token."""
        super()._track_num_input_tokens({**inputs, "attention_mask": inputs["lengths"]})

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        if is_unmeasured(self.args.metric_for_best_model, self._unmeasured):
            return False  # transformers would end the run
        return super()._determine_best_metric(metrics, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "eval" if is_evaluation(logs) else "train"  # a callback may have left the model in either mode
        figures = self._meters[mode].read(self.accelerator)
        warn_of_much_masked(figures)
        if mode == "train":
            self._sampling.read(figures)
        prefix = evaluation_prefix(logs) if mode == "eval" else ""
        figures = {f"{prefix}{name}": value for name, value in figures.items()}
        if mode == "eval":
            self._unmeasured |= {f"{prefix}{name}" for name in self._meters[mode].without_weight}
            self._unmeasured -= figures.keys()
        logs.update(figures)
        super().log(logs, start_time)
        publish(self, self._samples, prefix)

    def compare(
        self, prompts: Sequence[str | list[dict] | Mapping], max_new_tokens: int | None = None
    ) -> list[dict[str, str | list[dict]]]:
        """
        Prints the greedy answers of the untrained student, of the student now and of the teacher side by side.

        Args:
            prompts: plain texts, conversations (lists of messages) or dataset rows, rendered as in training. The models see the run's
                `tools`, and none is executed.
            max_new_tokens: length of each answer; as in training when `None`. Never beyond a model's context.

        Returns:
            A `dict` for each prompt: `prompt`, `student_before` (only with a new adapter, which is switched off for it; not with PiSSA's and the
            like), `student_now`, `teacher`; answers with their control tokens, but for the stop token at the end.
            Every process of a distributed run must call this method.
        """
        return compare(self, prompts, max_new_tokens)

    # Card

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
    ):
        if self.is_world_process_zero():
            tags = [tags] if isinstance(tags, str) else tags or ()
            self._card.write(self, self.args.output_dir, model_name, dataset_name, tags)

    def _save(self, output_dir: str | None = None, state_dict=None):
        folder = output_dir or self.args.output_dir
        if self.args.should_save:  # under DDP every process comes here
            card.remove_unreadable(folder)  # PEFT reads the card before it saves the weights, and would fail
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # replaces PEFT's placeholder card, which names the base model's folder
            self._card.write(self, folder)
