"""A resumed run that has taken all of its steps takes no more."""

from accelerate.logging import get_logger
from transformers import Trainer


logger = get_logger(__name__)


class EndedRun(Trainer):
    """
    A `Trainer` whose steps end at `max_steps`, also where it resumes from there, and a warning says so.

    transformers 5.23 looks whether a run has ended only after a step. A run of `max_steps` that is started again after its last
    checkpoint, as a cluster does with a job that was killed, takes one more step each time.
    """

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        logger.warning(
            f"Nothing is left to train: the checkpoint has taken {self.state.global_step} steps, and the run has {self.state.max_steps}."
        )
        self.control.should_training_stop = True
