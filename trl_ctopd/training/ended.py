"""A resumed run that has taken all of its steps takes no more."""

from accelerate.logging import get_logger
from transformers import Trainer


logger = get_logger(__name__)


class EndedRun(Trainer):
    """
    A `Trainer` whose steps end at `max_steps`, also where it resumes from there, and a warning says so.

    transformers 5.23 looks whether a run has ended only after a step. A run of `max_steps` that is started again after its last
    checkpoint, as a cluster does with a job that was killed, takes one more step each time. A run of epochs, in which a step has more rows than
    before, counts the old steps as so many epochs more, and may end without a step (findings/resumed_on_more_devices_ends_at_once.sh).
    """

    def train(self, *args, **kwargs):
        self._has_begun = False
        output = super().train(*args, **kwargs)
        if not self._has_begun and self.state.global_step:
            logger.warning(
                f"Nothing is left to train: the checkpoint has taken {self.state.global_step} steps, and the run's {self.args.num_train_epochs:g} "
                f"epochs have {self.state.max_steps} with the processes and the accumulation of now. To go on, raise num_train_epochs or set "
                "max_steps."
            )
        return output

    def _run_epoch(self, *args, **kwargs):
        self._has_begun = True
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        logger.warning(
            f"Nothing is left to train: the checkpoint has taken {self.state.global_step} steps, and the run has {self.state.max_steps}."
        )
        self.control.should_training_stop = True
