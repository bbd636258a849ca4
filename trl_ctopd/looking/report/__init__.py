"""`DistillationReportCallback`: a page about the run that is updated while it goes on."""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..best_effort import best_effort
from ..samples import Sample


MOST_OF_THE_TIME = (
    0.02  # share of the run's time that writing the page may take; a log that comes sooner waits for the next
)


class DistillationReportCallback(TrainerCallback, ExportableState):
    """
    Writes `report.html` into the output folder, again as the run logs: curves, sample completions with their credit,
    settings, versions, and warnings in words. The page is one file that loads nothing from elsewhere.

    `CrossTokenizerGKDConfig(report=True)` adds one, and so does `callbacks=[DistillationReportCallback()]`. A resumed run
    continues its curves and keeps its first completions. The page shows prompts and completions. `push_to_hub` uploads it
    with the rest of the output folder.
    """

    def __init__(self):
        # samples as JSON values, by the prefix of their metrics: "" for training, "eval_", "eval_math_"
        self.first: dict[str, list[dict]] = {}
        self.last: dict[str, list[dict]] = {}
        self._not_before = 0.0

    def state(self) -> dict:
        return {"args": {}, "attributes": {"first": self.first, "last": self.last}}

    def on_train_begin(self, args, state, control, **kwargs):
        known = state.stateful_callbacks.setdefault(
            type(self).__name__, self.state()
        )  # Trainer asks for it when it saves
        if state.global_step:  # the run is resumed
            kept = (known[0] if isinstance(known, list) else known)["attributes"]
            self.first, self.last = dict(kept["first"]), dict(kept["last"])

    def update(self, trainer, prefix: str, samples: Sequence[Sample]):
        """Called by the trainer on its main process whenever it has logged."""
        if samples:
            kept = [asdict(sample) for sample in samples]
            self.first.setdefault(prefix, kept)
            self.last[prefix] = kept
        with best_effort("The report"):
            self._write(trainer)

    def _write(self, trainer):
        now = time.perf_counter()
        # train_runtime is in all logs with include_num_input_tokens_seen
        ends = "train_loss" in trainer.state.log_history[-1]
        if now < self._not_before and not ends:
            return
        from .page import page  # loads the viewer, which nothing else here needs

        path = Path(trainer.args.output_dir) / "report.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(".report.html")
        try:
            unfinished.write_text(page(trainer, self.first, self.last), encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        done = time.perf_counter()
        self._not_before = done + (done - now) / MOST_OF_THE_TIME
