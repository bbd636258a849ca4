"""Trainer's progress table in a notebook, with the most important metrics beside the loss. Needs IPython."""

from IPython.display import HTML, display
from transformers import Trainer
from transformers.utils.notebook import (
    NotebookProgressCallback,
    NotebookTrainingTracker,
    text_to_html_table,
)

from .best_effort import best_effort
from .history import GAP, GIVEN


COLUMNS = {
    "loss": ("Training Loss", "{:.4f}"),
    GAP: ("Gap, nats/byte", "{:.4f}"),
    "completions/mean_length": ("Length", "{:.1f}"),
    "completions/truncated_fraction": ("Truncated", "{:.1%}"),
    "alignment/masked_fraction": ("Masked", "{:.1%}"),
}


def show_figures(trainer: Trainer) -> None:
    """Replaces Trainer's own table, if there is one, by `FigureTable`."""
    if trainer.pop_callback(NotebookProgressCallback) is not None:
        trainer.add_callback(FigureTable())


def figures(logs: dict[str, float]) -> dict[str, str]:
    """What the table shows of a log, by heading: `COLUMNS` of training, with the gap on given text where the student wrote none,
    and the gap of each evaluation set."""
    shown = {heading: form.format(logs[name]) for name, (heading, form) in COLUMNS.items() if name in logs}
    if GAP not in logs and GIVEN + GAP in logs:
        shown["Gap on given text"] = f"{logs[GIVEN + GAP]:.4f}"
    for name, value in logs.items():
        if name.startswith("eval_") and name.endswith(GAP):
            dataset = name.removeprefix("eval").removesuffix(GAP).strip("_")
            shown[f"Gap on {dataset or 'the evaluation set'}"] = f"{value:.4f}"
    return shown


class FigureTable(NotebookProgressCallback):
    """A row for each step at which something is logged. An evaluation goes into the row of its step."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.training_tracker = NotebookTrainingTracker(state.max_steps)
        self._rows: list[dict[str, str | int]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        with best_effort("The table of figures"):
            self._add(state, logs)

    def _add(self, state, logs: dict[str, float]):
        shown = figures(logs)
        if self.training_tracker is None or not shown:
            return
        if not self._rows or self._rows[-1]["Step"] != state.global_step:
            self._rows.append({"Step": state.global_step})
        self._rows[-1].update(shown)
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        self.training_tracker.inner_table = [columns, *([row.get(name, "") for name in columns] for row in self._rows)]

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        with best_effort("The table of figures"):
            self._after_evaluation(metrics)

    def _after_evaluation(self, metrics: dict[str, float]):
        self.prediction_bar = None
        if self.training_tracker is not None:
            self.training_tracker.remove_child()
            self._force_next_update = True
        elif shown := figures(metrics):
            display(HTML(text_to_html_table([list(shown), list(shown.values())])))
