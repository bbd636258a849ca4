"""`CrossTokenizerDPOTrainer`: DPO on preference pairs, with a teacher that has another tokenizer as the reference."""

import hashlib
import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer
from trl.data_utils import extract_prompt
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .config import (
    EOS_POLICIES,
    CrossTokenizerGKDConfig,
    check_choices,
    check_counts,
    check_dicts,
    check_numbers,
    set_bf16,
    with_kwargs_as_json,
)
from .looking.best_effort import best_effort
from .looking.card import name_models
from .losses.ctpd import chunk_sums, chunk_weights, columns
from .models.activated import activation_of_rows, invocation_of, without_backward
from .models.forwards import base_model, forget_preparation, left_unprepared, prepare_anew, unbind_forward
from .models.heads import context_of
from .models.loading import by_name, check_goes_on, check_vocabulary, disable_dropout, load_tokenizer, warn_of_experts
from .models.products import faster_products
from .models.quantized import prepare_quantized
from .models.sharding import keep_scores_in_float32
from .models.trials import check_causal
from .rollouts.pairing import Prompt, Rollout
from .rollouts.prompts import COLUMNS, check_datasets, render_row, rendered_fingerprint, warn_of_plain_prompts
from .teachers.local import LocalTeacher, load_teacher
from .teachers.panel import Panel
from .teachers.readings import arrived
from .text.chat import Speaker
from .training.adapters import ResumedAdapters
from .training.checkpoints import asked_for
from .training.checks import check_apart, check_offloading, check_parallelism, check_tied
from .training.ended import EndedRun
from .training.student import check_invoked, check_new_adapter, name_of_student, warn_of_default_rate, warn_of_slow_half
from .training.watch import FiniteWeights


logger = get_logger(__name__)
_SIDES = ("chosen", "rejected")
_OF_A_FILE = {"_name_or_path", "transformers_version"}  # in a config
_LOSSES_OF_TOKENS = {"sft", "sigmoid_norm", "ipo"}


@dataclass
class CrossTokenizerDPOConfig(DPOConfig):
    r"""
    Configuration of [`CrossTokenizerDPOTrainer`]. It lists only fields that are new or have another default than in
    [`~trl.DPOConfig`]. The teacher's settings have the names that they have in [`CrossTokenizerGKDConfig`].
    """

    _VALID_DICT_FIELDS = DPOConfig._VALID_DICT_FIELDS + [
        "chat_template_kwargs",
        "teacher_chat_template_kwargs",
        "teacher_model_init_kwargs",
    ]

    # Other defaults
    precompute_ref_log_probs: bool = field(
        default=True,
        metadata={"help": "Always True: the teacher's columns are computed once, before training, and cached."},
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest prompt plus completion in student tokens; never beyond the student's own context. A longer row is an error: "
            "a completion that is cut has no reference."
        },
    )

    # The weights
    weight_mu: float = field(
        default=1.0, metadata={"help": "Sharpness of the chunks' weights: mu in chosen, -mu in rejected completions."}
    )
    weight_low: float = field(default=-0.5, metadata={"help": "Lower bound of a chunk's log-ratio, in nats."})
    weight_high: float = field(default=1.5, metadata={"help": "Upper bound of a chunk's log-ratio, in nats."})
    weight_scale: float = field(default=1.0, metadata={"help": "Factor of all weights (k in the paper)."})

    # The two conversations
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Variables for the student's chat template. A row's own column wins."}
    )
    teacher_chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Variables for the teacher's chat template. None: the student's."}
    )
    eos_policy: str = field(
        default="bridge", metadata={"help": "The end of a turn: bridge (one chunk) or mask (takes no part)."}
    )

    # The teacher
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of `from_pretrained` for teachers given by name."}
    )
    teacher_batch_size: int | None = field(
        default=None, metadata={"help": "Completions in one teacher forward pass. None: two for each pair of a batch."}
    )

    def __post_init__(self):
        set_bf16(self)
        check_numbers(self, CrossTokenizerDPOConfig)
        super().__post_init__()
        check_choices(self, eos_policy=EOS_POLICIES)
        check_counts(self, "max_length", "teacher_batch_size")
        check_dicts(self, CrossTokenizerDPOConfig)
        if not self.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs=False: the reference is the teacher, whose columns are computed once. Leave it True."
            )
        if unfit := sorted(
            _LOSSES_OF_TOKENS & {*([self.loss_type] if isinstance(self.loss_type, str) else self.loss_type)}
        ):
            raise ValueError(
                f"loss_type {', '.join(unfit)} counts tokens, but here chunks have weights: choose another, such as 'sigmoid'."
            )
        for name in ("ld_alpha", "use_weighting"):
            if getattr(self, name):
                raise ValueError(f"{name} weights tokens, and here the chunks have weights: leave it at its default.")
        if self.weight_low > self.weight_high:
            raise ValueError(f"weight_low={self.weight_low} is above weight_high={self.weight_high}.")

    def to_dict(self):
        return super(CrossTokenizerDPOConfig, with_kwargs_as_json(self)).to_dict()


class CrossTokenizerDPOTrainer(EndedRun, ResumedAdapters, DPOTrainer):
    """
    CTPD (arXiv 2601.11865): DPO by chunks, whose reference is a teacher with another tokenizer and chat template.

    Rows have `prompt`, `chosen` and `rejected`, as for TRL's `DPOTrainer`. Both completions are cut into the chunks that both
    tokenizers share. The teacher's log-prob of a chunk replaces the reference model's. With two further teachers, one trained
    on the preference and one on its opposite, a chunk's weight depends on the difference between their log-probs.

    Overrides of `DPOTrainer`: `_prepare_dataset` (two conversations), `_precompute_ref_logps` (the teacher's columns),
    `_prepare_input` (columns keep their precision), `_compute_loss` (a weight for each token), `prediction_step` (see
    `without_backward`), `evaluation_loop` (see `left_unprepared`), `predict` (renders pairs), `ref_model` (there is none) and `train` (a
    resumed run keeps the day that its prompts write). All else is inherited from there and from [`ResumedAdapters`].

    Args:
        model (`str`, `PreTrainedModel` or `PeftModel`): the student.
        teacher_model (`str` or `PreTrainedModel`): the reference; in the paper, a teacher after SFT.
        args ([`CrossTokenizerDPOConfig`], *optional*): the settings.
        positive_teacher, negative_teacher (`str` or `PreTrainedModel`, *optional*): T⁺ and T⁻, with the tokenizer of
            `teacher_model`; both or neither. Without them all chunks have the same weight, `weight_scale`.
        processing_class, teacher_processing_class (`PreTrainedTokenizerBase`, *optional*): the two tokenizers.
        kwargs: as in `DPOTrainer`, but not `ref_model`: the teacher is the reference.
    """

    _tag_names = ["trl", "ctopd", "preference-distillation"]
    _name = "CTPD"
    _paper = {
        "title": "CTPD: Cross Tokenizer Preference Distillation",
        "id": "2601.11865",
        "citation": textwrap.dedent("""\
            @article{arxiv260111865,
                title   = {{CTPD: Cross Tokenizer Preference Distillation}},
                author  = {Truong Nguyen and Phi Van Dat and Ngan Nguyen and Linh Ngo Van and Trung Le and Thanh Hong Nguyen},
                year    = 2026,
                journal = {arXiv preprint arXiv:2601.11865},
            }"""),
    }

    def __init__(
        self,
        model,
        teacher_model: str | PreTrainedModel,
        args: CrossTokenizerDPOConfig | None = None,
        train_dataset: Dataset | None = None,
        *,
        positive_teacher: str | PreTrainedModel | None = None,
        negative_teacher: str | PreTrainedModel | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ):
        model, teacher_model = by_name(model), by_name(teacher_model)
        positive_teacher, negative_teacher = by_name(positive_teacher), by_name(negative_teacher)
        model_id = name_of_student(model)
        args = CrossTokenizerDPOConfig(f"{os.path.basename(model_id)}-ctpd") if args is None else args
        if not isinstance(args, CrossTokenizerDPOConfig):
            raise TypeError(f"`args` must be a CrossTokenizerDPOConfig, got {type(args).__name__}.")
        check_offloading(args)
        check_apart(model, teacher_model, positive_teacher, negative_teacher)
        check_new_adapter(model, kwargs.get("peft_config"))
        check_goes_on("student", model, (args.model_init_kwargs or {}).get("revision"))
        for own in (positive_teacher, negative_teacher):
            if own is not None:
                check_goes_on("teacher", own, (args.teacher_model_init_kwargs or {}).get("revision"))
        if not isinstance(model, str):
            forget_preparation(model)
        if (positive_teacher is None) != (negative_teacher is None):
            raise ValueError(
                "A chunk's weight needs both positive_teacher and negative_teacher: pass both, or neither."
            )
        if kwargs.pop("ref_model", None) is not None:
            raise ValueError("`ref_model` cannot be set, since the teacher is the reference: leave it out.")
        evaluated = kwargs.get("eval_dataset")
        check_datasets(train_dataset, evaluated)
        evaluated = evaluated.values() if isinstance(evaluated, Mapping) else [evaluated]
        if any(isinstance(dataset, IterableDataset) for dataset in [train_dataset, *evaluated]):
            raise ValueError("The teacher's columns are computed once: pass a map-style Dataset, not a stream.")
        self._student_name = model_id
        revision = (args.model_init_kwargs or {}).get("revision")
        processing_class = load_tokenizer(processing_class, model_id, revision, args.trust_remote_code)
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        self._panel = Panel(teacher_model, teacher_processing_class, _teacher_settings(args))
        self._weighing = (positive_teacher, negative_teacher) if positive_teacher is not None else ()
        self._weighers: list[LocalTeacher] = []
        [today] = broadcast_object_list([date.today()])  # processes may start around midnight
        self._side = Speaker(processing_class, args.chat_template_kwargs, day=today)
        self._given_datasets = {"train": train_dataset, "eval": kwargs.get("eval_dataset")}
        self._day = _PromptDay(self._side, *self._panel.sides.values())
        self._day.write(today)
        self._teachers_sit = False
        super().__init__(
            model,
            ref_model=nn.Module(),  # see `ref_model`
            args=args,
            data_collator=_Collator(
                pad_token_id=processing_class.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of
            ),
            train_dataset=train_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        unbind_forward(base_model(self.model))
        prepare_quantized(base_model(self.model), self.accelerator.autocast)
        check_parallelism(getattr(self.accelerator, "parallelism_config", None))
        check_tied(self.model, self.accelerator)
        check_causal("student", self.model)
        warn_of_experts(self.model)
        warn_of_slow_half(self.accelerator, self.model)
        warn_of_default_rate(args, self.model, self.optimizer, "5e-6 to 1e-4")
        if args.disable_dropout:
            disable_dropout(self.model)  # TRL's own leaves that of attention and of some adapters on
        self._invocation = invocation_of(self.model)
        if self._invocation is not None:
            check_invoked(self._invocation, self.train_dataset)
        for own in (self._day, FiniteWeights()):
            self.add_callback(own)

    @property
    def ref_model(self) -> None:
        """No model: the reference is the teacher's columns. What is set is not kept. With one given, `DPOTrainer` adds no copy of a `PeftModel`'s
        adapter, which would be saved with it, and which with PiSSA changes the student; and under FSDP it loads no second student."""
        return None

    @ref_model.setter
    def ref_model(self, given):
        pass

    # Card

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        self._name_models(self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        with best_effort("The model card"):
            card = folder / "README.md"
            drafted = card.exists() and "[More Information Needed]" not in card.read_text(encoding="utf-8")
            if folder == Path(self.args.output_dir) and not drafted:  # only PEFT's placeholder, or none
                self.create_model_card()
            else:
                self._name_models(folder)

    def _name_models(self, folder: str):
        if self.is_world_process_zero():
            own = self.hub_model_id or os.path.basename(self.args.output_dir)
            name_models(folder, own, self._student_name, self._panel.only.name)

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Renders and tokenizes every pair for both models, once."""
        if "teacher_prompt_ids" in dataset.column_names:
            return dataset
        if missing := [side for side in _SIDES if side not in dataset.column_names]:
            raise ValueError(
                f"The {dataset_name} dataset has no column {' and no column '.join(map(repr, missing))}, only "
                f"{', '.join(map(repr, dataset.column_names))}: a pair has a chosen and a rejected answer. Rename columns "
                "(`dataset.rename_column`), or train on prompts with CrossTokenizerGKDTrainer (`ctopd distill`)."
            )
        if dataset_name == "train":
            warn_of_plain_prompts(dataset, self._side, self._panel.sides)
        rendered = dataset.map(
            _render_pair,
            with_indices=True,
            fn_kwargs={"student": self._side, "teachers": self._panel.sides, "dataset_name": dataset_name},
            remove_columns=dataset.column_names,
            num_proc=args.dataset_num_proc,
            desc=f"Rendering {dataset_name} pairs for both models",
            new_fingerprint=rendered_fingerprint(dataset, self._side, self._panel.sides, ["pairs", dataset_name]),
        )
        _warn_of_equal_answers(rendered, dataset_name)
        return rendered

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, "chosen_weights", "rejected_weights"])]

    # The day in the prompts

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        resume_from_checkpoint = asked_for(resume_from_checkpoint)
        folder = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        day = _PromptDay.of(folder) if folder else None
        if self._day.written and day not in (None, self._day.day):
            logger.warning(
                f"A chat template writes the day. The run of {folder} began on {day}, so its prompts go on to say {day} and not "
                f"{self._day.day}."
            )
            self._day.write(day)
            for name, dataset in self._given_datasets.items():
                if isinstance(dataset, Mapping):
                    dataset = {key: self._with_columns(own, key) for key, own in dataset.items()}
                elif dataset is not None:
                    dataset = self._with_columns(dataset, name)
                setattr(self, f"{name}_dataset", dataset)
        prepare_anew(self.model, self.accelerator)  # another trainer may have trained it since
        with faster_products(self.model, self.accelerator):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _with_columns(self, dataset: Dataset, name: str) -> Dataset:
        rendered = self._prepare_dataset(dataset, self.processing_class, self.args, name)
        return self._precompute_ref_logps(rendered, name, self.args.per_device_train_batch_size)

    # The teacher's columns

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """`dataset` with `ref_*_logps`, one number for each completion, and `*_weights`, one for each student token; from the
        cache if it has them. Each process computes a share of the rows."""
        if set(dataset.column_names) >= {"ref_chosen_logps", "chosen_weights"}:
            return dataset
        self._check_student_reads_whole(dataset, name)
        self._seat_teachers()
        fingerprint = [Hasher.hash((dataset._fingerprint, self._fingerprint()))]
        broadcast_object_list(fingerprint, from_process=0)
        file = dataset._get_cache_file_path(fingerprint[0])
        own = None
        # rows that were made in memory have a folder of their own in each process
        if not all(gather_object([os.path.exists(file)])):
            process, processes = self.accelerator.process_index, self.accelerator.num_processes
            share = -(-len(dataset) // processes)  # the same on all processes, since sharded teachers run together
            rows = [(start * processes + process) % len(dataset) for start in range(share)]
            batches = [rows[start : start + batch_size] for start in range(0, share, batch_size)]
            self._check_teachers_read_whole(dataset, name, batches)
            found = []
            for batch in batches:
                found += zip(batch, self._columns([dataset[row] for row in batch]), strict=True)
            found = dict(gather_object(found))
            own = Dataset.from_list([found[row] for row in range(len(dataset))])
            if self.accelerator.is_main_process:
                own.map(
                    lambda row: row, new_fingerprint=fingerprint[0], cache_file_name=file, load_from_cache_file=False
                )
            self.accelerator.wait_for_everyone()
        own = Dataset.from_file(file) if os.path.exists(file) else own
        return concatenate_datasets([dataset, own], axis=1)

    def _check_student_reads_whole(self, dataset: Dataset, name: str) -> None:
        limit, own = self.args.max_length, context_of(base_model(self.model).config)
        room = min((tokens for tokens in (limit, own) if tokens is not None), default=math.inf)
        for row, pair in enumerate(dataset):
            length = len(pair["prompt_ids"]) + max(len(pair[f"{side}_ids"]) for side in _SIDES)
            if length > room:
                raise ValueError(
                    f"Row {row} of the {name} dataset has {length} student tokens, max_length is {limit} and the student's own context "
                    f"{own}. Filter such rows out, or raise max_length within the student's context."
                )

    def _check_teachers_read_whole(self, dataset: Dataset, name: str, batches: Sequence[Sequence[int]]) -> None:
        """Raises `ValueError`, in all processes, where a row of any process's `batches` is beyond a teacher's context."""
        contexts = [self._panel.only.context, *(context_of(teacher.config) for teacher in self._weighers)]
        context = min((tokens for tokens in contexts if tokens is not None), default=math.inf)
        found = set()
        for batch in batches if context < math.inf else ():
            for place, rollout in enumerate(self._paired([dataset[row] for row in batch])):
                length = len(rollout.teacher_prompt_ids) + len(rollout.teacher_ids)
                if length > context:
                    found.add((batch[place // len(_SIDES)], _SIDES[place % len(_SIDES)], length))
        if found := sorted(set(gather_object([*found]))):
            row, side, length = found[0]
            raise ValueError(
                f"Row {row} of the {name} dataset: its prompt and {side} answer are {length} tokens for the teacher, whose context is "
                f"{context} ({len({row for row, *_ in found})} such rows of {len(dataset)}). Filter them out, or take a teacher with a "
                "longer context (of a server: start it with a larger `--max-model-len`)."
            )

    def _seat_teachers(self) -> None:
        if self._teachers_sit:
            return
        keep_scores_in_float32(self.accelerator)
        stop_ids = self._side.stop_ids(base_model(self.model).generation_config)
        self._panel.sit(self.accelerator, self._side, stop_ids)
        args, seat = self.args, self._panel.only
        for model in self._weighing:
            if isinstance(model, str):
                model = load_teacher(model, args.teacher_model_init_kwargs, args.trust_remote_code, self.accelerator)
            check_vocabulary("teacher", model, seat.tokenizer)
            rows = args.teacher_batch_size or 2 * args.per_device_train_batch_size
            self._weighers.append(LocalTeacher(model, self.accelerator, batch_size=rows))
        self._teachers_sit = True

    def _fingerprint(self) -> tuple:
        """Everything that the columns depend on besides the rendered rows. Every process must call it."""
        args, seat = self.args, self._panel.only
        teachers = [*([] if seat.remote else [seat.teacher]), *self._weighers]
        models = [self.accelerator.unwrap_model(teacher.model) for teacher in teachers]
        shares = gather_object([[_digest(model) for model in models]])  # of a sharded teacher, each process has its own
        shares = sorted({tuple(own) for own in shares})
        knobs = [args.weight_mu, args.weight_low, args.weight_high, args.weight_scale, args.eos_policy]
        knobs += [self.accelerator.mixed_precision, seat.context, seat.turn_ends, seat.text_ends]
        return seat.name, shares, knobs, self.processing_class.get_vocab(), seat.tokenizer.get_vocab()

    def _columns(self, pairs: Sequence[dict]) -> list[dict]:
        rollouts = self._paired(pairs)
        readings = self._panel.read(rollouts, with_hidden=False)
        scores = [readings.log_probs([row], len(rollout.teacher_ids)) for row, rollout in enumerate(rollouts)]
        scores = [arrived(own)[0].cpu() for own in scores]
        weights = self._weights(rollouts)
        found = [
            columns(rollout.student_chunks, own, rollout.teacher_chunks, weight)
            for rollout, own, weight in zip(rollouts, scores, weights, strict=True)
        ]
        return [
            {
                "ref_chosen_logps": chosen[1],
                "ref_rejected_logps": rejected[1],
                "chosen_weights": chosen[0],
                "rejected_weights": rejected[0],
            }
            for chosen, rejected in zip(found[::2], found[1::2], strict=True)
        ]

    def _paired(self, pairs: Sequence[dict]) -> list[Rollout]:
        """Two rollouts for each pair, chosen and rejected, however long."""
        prompts = [_prompt(pair) for pair in pairs for _ in _SIDES]
        completions = [pair[f"{side}_ids"] for pair in pairs for side in _SIDES]
        return self._panel.pair(prompts, completions, within_context=False)

    def _weights(self, rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        """(C,) weights for each rollout. Rollouts alternate between chosen and rejected completions."""
        args = self.args
        if not self._weighers:
            return [torch.full((rollout.num_chunks,), args.weight_scale) for rollout in rollouts]
        texts = [r.teacher_prompt_ids for r in rollouts], [r.teacher_ids for r in rollouts]
        texts = *texts, [r.other_ends for r in rollouts]
        positive, negative = (teacher.log_probs(*texts) for teacher in self._weighers)
        weights = []
        for row, rollout in enumerate(rollouts):
            sums = (
                chunk_sums(own[row].double().cpu(), torch.as_tensor(rollout.teacher_chunks), rollout.num_chunks)
                for own in (positive, negative)
            )
            mu = args.weight_mu if row % 2 == 0 else -args.weight_mu
            weights.append(chunk_weights(*sums, mu, args.weight_low, args.weight_high, args.weight_scale))
        return weights

    def predict(self, test_dataset: Dataset, *args, **kwargs):
        """Takes pairs as they are, as `evaluate` does."""
        return super().predict(self._with_columns(test_dataset, "test"), *args, **kwargs)

    # Loss

    def _prepare_input(self, data):
        """Moves `data` to the device and keeps its precision. Trainer's own would round the teacher's columns to DeepSpeed's."""
        return send_to_device(data, self.args.device)

    def _compute_loss(self, model, inputs, return_outputs):
        weights, starts = inputs.pop("completion_weights"), inputs["completion_mask"].argmax(1)
        begins = activation_of_rows(self._invocation, inputs["input_ids"], starts)
        return super()._compute_loss(_Weighted(model, weights[:, 1:], begins), inputs, return_outputs)

    def evaluation_loop(self, *args, **kwargs):
        with left_unprepared(self.model, self.accelerator):
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, *args, **kwargs):
        with without_backward(self.model):
            return super().prediction_step(*args, **kwargs)


class _PromptDay(TrainerCallback, ExportableState):
    """The day that `sides` write in prompts, saved in the trainer's state with each checkpoint."""

    def __init__(self, *sides: Speaker):
        self.sides = sides

    @property
    def day(self) -> date:
        return self.sides[0].day

    @property
    def written(self) -> bool:
        return any(side.writes_day for side in self.sides)

    def write(self, day: date):
        for side in self.sides:
            side.day = day

    def state(self) -> dict:
        return {"args": {}, "attributes": {"day": self.day.isoformat()}}

    @classmethod
    def of(cls, checkpoint: str) -> date | None:
        """The day that was saved with a checkpoint; None where none was."""
        file = Path(checkpoint) / "trainer_state.json"
        saved = json.loads(file.read_text()).get("stateful_callbacks", {}) if file.exists() else {}
        day = saved.get(cls.__name__, {}).get("attributes", {}).get("day")
        return date.fromisoformat(day) if day else None


class _Weighted:
    """Wraps a student: its log-probs (B, L) are multiplied by `weights` (B, L). An adapter's virtual tokens come before them. `begins`: where an
    activated one begins."""

    def __init__(self, model, weights: torch.Tensor, begins: Mapping[str, list[int]]):
        self._model, self._weights, self._begins = model, weights, begins

    def __call__(self, **inputs):
        outputs = self._model(**inputs, **self._begins)
        if inputs.get("fused_lm_head"):
            own = outputs.log_probs[:, -self._weights.shape[1] :]
            outputs.log_probs = own * self._weights.to(own.dtype)
        return outputs


class _Collator(DataCollatorForPreference):
    """TRL's collator, plus `completion_weights` (2B, L), 0 on prompts and padding."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        if "chosen_weights" in examples[0]:
            weights = torch.zeros(batch["input_ids"].shape)
            for place, row in enumerate(example[f"{side}_weights"] for side in _SIDES for example in examples):
                start = len(examples[place % len(examples)]["prompt_ids"])
                weights[place, start : start + len(row)] = torch.tensor(row)
            batch["completion_weights"] = weights
        return batch


def _digest(model: PreTrainedModel | PeftModel) -> str:
    """A hash of a teacher's config, of which of its adapters are on and how, and of what this process holds of its weights: their sums over rows
    and over columns."""
    config = {name: value for name, value in base_model(model).config.to_dict().items() if name not in _OF_A_FILE}
    config["adapters"] = [
        (name, layer.active_adapters, layer.disable_adapters, layer.merged_adapters, getattr(layer, "scaling", None))
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
    ]
    held = {name: own.ds_tensor for name, own in model.named_parameters() if hasattr(own, "ds_tensor")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, value in {**model.state_dict(), **held}.items():
        value = value.to_local() if isinstance(value, DTensor) else value
        numbers = value.detach().float()
        digest.update(f"{name} {tuple(value.shape)}".encode())
        for dim in range(max(numbers.dim(), 1)):
            sums = numbers.sum(dim) if numbers.dim() > 1 else numbers
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _render_pair(example: dict, index: int, student: Speaker, teachers: dict[str, Speaker], dataset_name: str) -> dict:
    """`prompt_ids`, `chosen_ids` and `rejected_ids` of the student, and the teacher's prompt for the pairing."""
    for side in _SIDES:
        if example[side] is None or not (example[side] or "prompt" in example):
            raise ValueError(
                f"Row {index} of the {dataset_name} dataset: its `{side}` is {example[side]!r}, and a pair has a chosen and a rejected "
                "answer. Filter such rows out."
            )
    if "prompt" not in example:
        example = {**example, **extract_prompt(example)}
    others = ("tools", "chat_template_kwargs", "teacher_prompt")
    beside = {name: example[name] for name in others if example.get(name) is not None}
    found = {}
    for side in _SIDES:
        row = {"prompt": example["prompt"], "completion": example[side], **beside}
        found[side] = Prompt(
            *(
                render_row(row, index, student, teachers, None, True, f"{dataset_name} ({side})")[column]
                for column in COLUMNS
            )
        )
    chosen, rejected = (prompt.before_reference() for prompt in found.values())
    if chosen.student_ids != rejected.student_ids:
        raise ValueError(
            f"Row {index} of the {dataset_name} dataset: the student's template writes another prompt before the chosen answer than "
            "before the rejected one, and a pair has one prompt. Give both the same kind of answer."
        )
    return {
        "prompt_ids": chosen.student_ids,
        **{f"{side}_ids": prompt.reference_ids for side, prompt in found.items()},
        "teacher_prompt_ids": chosen.teacher_ids,
        "frame": chosen.frame,
    }


def _warn_of_equal_answers(rendered: Dataset, dataset_name: str):
    """Warns of pairs whose answers the student writes with the same ids. The student's margin is 0 whatever it learns, so that
    the gradient is but rounding."""
    table = rendered.select_columns([f"{side}_ids" for side in _SIDES]).with_format("arrow")[:]
    chosen, rejected = (table[f"{side}_ids"] for side in _SIDES)
    of_one_length = pc.equal(*map(pc.list_value_length, (chosen, rejected))).to_numpy()
    if alike := [row for row in np.flatnonzero(of_one_length).tolist() if chosen[row] == rejected[row]]:
        logger.warning(
            f"{len(alike)} of {len(rendered)} pairs of the {dataset_name} dataset have the same answer as `chosen` and as `rejected`, the first in row "
            f"{alike[0]}: they teach nothing. Filter them out (`dataset.filter(lambda row: row['chosen'] != row['rejected'])`)."
        )


def _prompt(pair: dict) -> Prompt:
    return Prompt(pair["prompt_ids"], pair["teacher_prompt_ids"], frame=pair["frame"])


def _teacher_settings(args: CrossTokenizerDPOConfig) -> SimpleNamespace:
    """The fields of a `CrossTokenizerGKDConfig` that a [`Panel`] reads, with its defaults for those that this trainer lacks."""
    found = {}
    for setting in fields(CrossTokenizerGKDConfig):
        default = setting.default if setting.default is not MISSING else None
        found[setting.name] = getattr(args, setting.name, default)
    return SimpleNamespace(**{**found, "temperature": 1.0, "num_generations": len(_SIDES)})
