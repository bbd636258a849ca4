"""The progress table of a notebook; `test_notebook.py` sees it in a real one."""

import pytest
from toys import prompts
from transformers import TrainerControl, TrainerState
from transformers.utils.notebook import NotebookProgressCallback

from trl_ctopd.looking.notebook import FigureTable, show_figures


TRAINING = {
    "loss": 0.51234,
    "gap/nats_per_byte": 0.25,
    "completions/mean_length": 12.345,
    "completions/truncated_fraction": 0.25,
    "alignment/masked_fraction": 0.015,
    "seconds/step": 3.0,
}
CELLS = ["0.5123", "0.2500", "12.3", "25.0%", "1.5%"]
HEAD = ["Step", "Training Loss", "Gap, nats/byte", "Length", "Truncated", "Masked"]


@pytest.fixture
def log():
    """`log(step, logs)`; the table so far is `log.table()`."""
    callback = FigureTable()
    state = TrainerState(max_steps=10)
    callback.on_train_begin(None, state, TrainerControl())

    def log(step, logs):
        state.global_step = step
        callback.on_log(None, state, TrainerControl(), logs=logs)

    log.table = lambda: callback.training_tracker.inner_table
    return log


def test_a_row_has_the_figures_that_matter(log):
    log(5, TRAINING)
    log(10, {"train_loss": 0.4, "train_runtime": 3.0})  # Trainer's summary, which is no row
    assert log.table() == [HEAD, [5, *CELLS]]


def test_evaluations_stand_in_the_row_of_their_step_and_every_row_is_whole(log):
    log(5, TRAINING)
    log(10, TRAINING)
    log(10, {"eval_loss": 1.0, "eval_gap/nats_per_byte": 0.125})
    log(10, {"eval_math_loss": 1.0, "eval_math_gap/nats_per_byte": 0.5})
    assert log.table() == [
        [*HEAD, "Gap on the evaluation set", "Gap on math"],
        [5, *CELLS, "", ""],
        [10, *CELLS, "0.1250", "0.5000"],
    ]


def test_a_run_on_given_text_alone_shows_the_gap_of_that_text_and_says_so(log):
    log(5, {"loss": 0.5, "given/gap/nats_per_byte": -0.25})
    assert log.table() == [["Step", "Training Loss", "Gap on given text"], [5, "0.5000", "-0.2500"]]


def test_the_table_takes_the_place_of_trainers_and_of_nothing_else(build):
    trainer = build()
    before = list(trainer.callback_handler.callbacks)
    show_figures(trainer)
    assert trainer.callback_handler.callbacks == before
    trainer.add_callback(NotebookProgressCallback())
    show_figures(trainer)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks[len(before) :]]
    assert kinds == [FigureTable]


def test_evaluating_without_training_shows_its_figures_once(build, capsys):
    trainer = build(eval_dataset=prompts(4))
    trainer.add_callback(FigureTable())
    trainer.evaluate()
    assert capsys.readouterr().out.count("IPython.core.display.HTML") >= 1
