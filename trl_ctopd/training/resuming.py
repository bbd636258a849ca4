"""The part of the trainer by which a run that was killed continues where it was: the order of its rows, its checkpoints, and the
date that chat templates write in its prompts."""

from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.logging import get_logger
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import SCHEDULER_NAME

from ..config import CrossTokenizerGKDConfig
from ..gkd import GKDTrainer
from ..rollouts.ahead import Windows
from ..rollouts.pairing import Prompt
from ..rollouts.prompts import RepeatedWindows, WholeBatches
from . import checkpoints
from .adapters import ResumedAdapters
from .ended import EndedRun
from .identity import identity


logger = get_logger(__name__)


class ResumableTrainer(EndedRun, ResumedAdapters, GKDTrainer):
    """
    A `GKDTrainer` whose runs resume to the weights of the uninterrupted run. docs/resuming.md says what is promised.

    Overrides:
    - `_get_train_sampler`, `get_train_dataloader`: every process and every resume reads the rows in the same order; with
      `rollout_reuse`, the prompts of a step are repeated;
    - `_get_dataloader`: several processes read a stream together, and its rows that only fill up a batch are marked;
    - `_init_training_state`, `_run_epoch`: a stream is resumed in the pass in which it was. `Trainer` does not know how long a pass
      is, and takes all steps for the first one's;
    - `_run_epoch`: tells where an epoch's rows come from, for prompts that are read before they are due;
    - `train`, `_save_checkpoint`, `_save_rng_state`, `_load_optimizer_and_scheduler`, `_load_rng_state`, `_load_from_checkpoint`: a
      run resumes from a complete checkpoint of its own, with the rollouts that were not yet used.

    A subclass calls `_prepare_to_resume` before it renders its datasets, and has `panel`, `student_side`, `rollouts` and
    `_prepare_dataset`.
    """

    def _prepare_to_resume(self, args: CrossTokenizerGKDConfig, train_dataset, eval_dataset):
        self._pending = checkpoints.PendingRollouts(args, lambda: self._train_batch_size)
        self._windows = Windows(self._marked)
        self._lineage = checkpoints.Lineage([("", None)])  # replaced when a run begins
        self._given_datasets = train_dataset, eval_dataset
        self._epoch_began = 0, 0  # its number, and the steps before it
        self._write_day(*broadcast_object_list([date.today()]))  # processes may start around midnight

    # The order of rows

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        """The prompts of each optimizer step, `rollout_reuse` times, so that steps, epochs and resuming count as usual."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        if args.rollout_reuse == 1:
            # otherwise Accelerate's sampler takes each process's own seed, and each would split the rows in another order
            self.accelerator.dataloader_config.data_seed = seed
            # torch's own draws an epoch's order from the random state, which is set back only once the rows were passed by
            self.accelerator.dataloader_config.use_seedable_sampler = True
            return super()._get_train_sampler(train_dataset)
        rows = len(self.train_dataset if train_dataset is None else train_dataset)
        seed = None if args.train_sampling_strategy == "sequential" else seed
        return RepeatedWindows(rows, self.get_total_train_batch_size(args), args.rollout_reuse, seed)

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        # A loader draws a seed for each set of workers that it starts: persistent ones are started once, and anew by a resume.
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        if self.args.rollout_reuse > 1:
            loader.set_sampler(self._get_train_sampler())  # a resumed run sets the epoch there
        return loader

    def _get_dataloader(self, dataset, description: str, batch_size: int, *args, **kwargs):
        if isinstance(dataset, IterableDataset) and self.accelerator.num_processes > 1:
            sharers = 1 if self.args.accelerator_config.split_batches else self.accelerator.num_processes
            dataset = WholeBatches(dataset, batch_size * sharers)
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    def _init_training_state(self, max_steps, steps_an_epoch, epochs, resume_from_checkpoint, trial):
        found = super()._init_training_state(max_steps, steps_an_epoch, epochs, resume_from_checkpoint, trial)
        place = checkpoints.place_of(resume_from_checkpoint)
        if place is None or isinstance(self.train_dataset, Dataset):
            return found
        return place[0], 0 if self.args.ignore_data_skip else place[1] * self.args.gradient_accumulation_steps

    def _run_epoch(self, model, epoch, train_dataloader, *args, **kwargs):
        taken = 0
        if kwargs["resume_from_checkpoint"] is not None and epoch == kwargs["epochs_trained"]:
            taken = kwargs["steps_trained_in_current_epoch"] // self.args.gradient_accumulation_steps
        self._epoch_began = epoch, self.state.global_step - taken
        self._windows.begin_epoch(train_dataloader, epoch)
        return super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    def _marked(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The rows of the batch that was read last, with those marked that only pad it."""
        # with reuse, the sampler yields only whole steps
        return self.rollouts.mark_padding_rows(prompts) if self.args.rollout_reuse == 1 else list(prompts)

    # The date in the prompts

    @property
    def _day(self) -> date | None:
        """The date in the prompts; None where no template writes it."""
        sides = [self.student_side, *self.panel.sides.values()]
        return self._today if any(side.writes_day for side in sides) else None

    def _write_day(self, day: date):
        self._today = day
        known = [self.student_side] if "student_side" in self.__dict__ else []
        for side in (*known, *self.panel.sides.values()):
            side.day = day

    def _keep_day(self, checkpoint: str | None):
        """Before a resume: renders the datasets again with the date on which the run of `checkpoint` began, if it differs."""
        day = checkpoints.day_of(checkpoint)
        if self._day is None or day in (None, self._day):
            return
        logger.warning(
            f"A chat template writes the day. The run of {checkpoint} began on {day}, so its prompts go on to say {day} and not "
            f"{self._day}."
        )
        self._write_day(day)

        def render(dataset, name: str):
            return self._prepare_dataset(dataset, self.processing_class, self.args, False, None, name)

        train, evaluated = self._given_datasets
        self.train_dataset = render(train, "train")
        if isinstance(evaluated, Mapping):
            self.eval_dataset = {name: render(dataset, name) for name, dataset in evaluated.items()}
        elif evaluated is not None:
            self.eval_dataset = render(evaluated, "eval")
        self.__dict__.pop("_identity", None)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        found = checkpoints.to_resume_from(resume_from_checkpoint, self.args.output_dir)
        self._keep_day(found)
        self._lineage = checkpoints.begin(found, self.args, self._identity)
        ahead = self.rollouts.ahead
        if ahead is None:
            return super().train(found, *args, **kwargs)
        ahead.load(None)
        try:
            return super().train(found, *args, **kwargs)
        finally:
            ahead.stop()

    def _save_checkpoint(self, model, trial):
        folder = checkpoints.folder_of(self._get_output_dir(trial), self.state.global_step)
        if self.args.should_save:
            checkpoints.clear(folder)
        self.accelerator.wait_for_everyone()
        epoch, before = self._epoch_began
        place = epoch, self.state.global_step - before
        with checkpoints.whole(self.state, folder, self._lineage, self._identity, place, self._classes):
            super()._save_checkpoint(model, trial)

    @cached_property
    def _identity(self) -> dict:
        return identity(self.args, self.accelerator.unwrap_model(self.model), self.panel, self.train_dataset, self._day)

    def _save_rng_state(self, output_dir: str):
        super()._save_rng_state(output_dir)
        if self.state.global_step % self.args.rollout_reuse:
            self._pending.save(output_dir)
        for keeper in (self.rollouts.early_stop, self.rollouts.ahead):
            if keeper is not None:
                keeper.save(output_dir)
        self.accelerator.wait_for_everyone()  # the next step marks the checkpoint as complete

    def _load_optimizer_and_scheduler(self, checkpoint: str | None):
        with checkpoints.read_whole(checkpoint):
            if checkpoint is None:
                return super()._load_optimizer_and_scheduler(checkpoint)
            if (Path(checkpoint) / SCHEDULER_NAME).exists():
                others = checkpoints.other_classes(checkpoint, self._classes)
                checkpoints.warn_of_what_stays(checkpoint, self._identity, others)
                self._load_what_fits(checkpoint, others)
            self._take_up_schedule()
            self._pending.load(checkpoint)
            for keeper in (self.rollouts.early_stop, self.rollouts.ahead):
                if keeper is not None:
                    keeper.load(checkpoint)

    @property
    def _classes(self) -> dict[str, str]:
        """Of the optimizer and of the schedule, neither of which can read another's state. DeepSpeed keeps both itself."""
        if self.is_deepspeed_enabled:
            return {}
        optimizer = self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer
        parts = {"optimizer": optimizer, "schedule": self.lr_scheduler}
        return {name: f"{type(own).__module__}.{type(own).__qualname__}" for name, own in parts.items()}

    def _load_what_fits(self, checkpoint: str, others: Mapping[str, str]):
        """The state of the optimizer and of the schedule; of a schedule neither where one of the two is of another class."""
        if not others:
            return super()._load_optimizer_and_scheduler(checkpoint)
        scheduler, groups = self.lr_scheduler, [{**group} for group in self.optimizer.param_groups]
        if "optimizer" not in others:
            self.lr_scheduler = SimpleNamespace(load_state_dict=lambda state: None)
            try:
                super()._load_optimizer_and_scheduler(checkpoint)
            finally:
                self.lr_scheduler = scheduler
            for group, own in zip(self.optimizer.param_groups, groups, strict=True):
                group.update({name: value for name, value in own.items() if "lr" in name or name not in group})
        if isinstance(scheduler, LambdaLR):
            scheduler.last_epoch = self.state.global_step

    def _take_up_schedule(self):
        """The next step's learning rate is this run's. The checkpoint has that of its own schedule, which is 0 where it was at its end."""
        scheduler = self.lr_scheduler
        if not isinstance(scheduler, LambdaLR):
            return
        rates = [
            rate * at(scheduler.last_epoch) for rate, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates  # which is logged

    def _load_rng_state(self, checkpoint: str | None):
        with checkpoints.read_whole(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, checkpoint: str, *args, **kwargs):
        with checkpoints.read_whole(checkpoint):
            super()._load_from_checkpoint(checkpoint, *args, **kwargs)
