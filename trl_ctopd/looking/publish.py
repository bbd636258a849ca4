"""Sends a log's completions to a table on the screen, to the run's trackers, and to the report."""

from .best_effort import best_effort
from .report import DistillationReportCallback
from .samples import Sample, Samples, show


def reports_of(trainer) -> list[DistillationReportCallback]:
    return [own for own in trainer.callback_handler.callbacks if isinstance(own, DistillationReportCallback)]


def publish(trainer, samples: Samples, prefix: str):
    """
    Shows the kept samples, on the main process, after their metrics are logged.

    Args:
        prefix: of the metrics: "" for training, `eval_`, `eval_math_`.
    """
    if trainer.is_world_process_zero():
        args, taken = trainer.args, _taken(trainer, samples)
        if taken and args.log_completions:
            shown_by, rows = trainer.callback_handler.callbacks, args.num_completions_to_print
            with best_effort("The table of completions"):
                show(taken, trainer.processing_class, shown_by, rows, f"{prefix}completions")
        for report in reports_of(trainer):
            report.update(trainer, prefix, taken)
    samples.clear()


def _taken(trainer, samples: Samples) -> list[Sample]:
    with best_effort("The samples of completions"):
        return samples.take(trainer.state.global_step, trainer.processing_class, trainer.panel.align_completions)
    return []
