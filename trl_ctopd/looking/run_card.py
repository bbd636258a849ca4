"""The model card of a trainer's run."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from peft import PeftModel
from trl.trainer.utils import get_config_model_id

from ..rollouts.pairing import Prompt
from ..rollouts.prompts import BLEND
from . import card, provenance
from .best_effort import best_effort


class RunCard:
    """Makes a new card only when there is something new. A checkpoint gets the card of the output folder."""

    def __init__(self):
        self._last: card.Written | None = None

    def write(
        self,
        trainer,
        folder: str,
        model_name: str | None = None,
        dataset_name: str | Sequence[str] | None = None,
        tags: Sequence[str] = (),
    ):
        """Writes the card of `trainer`'s run and the learning curve into `folder`. A card that fails is left out."""
        with best_effort("The model card"):
            folder_of_run = Path(trainer.args.hub_model_id or trainer.args.output_dir)
            model_name = model_name or folder_of_run.name or folder_of_run.resolve().name
            datasets = (dataset_name,) if isinstance(dataset_name, str) else tuple(dataset_name or ())
            key = (len(trainer.state.log_history), model_name, datasets, *tags)
            if self._last is None or self._last.key != key:
                self._last = _made(trainer, key, model_name, datasets, tags)
            self._last.write(folder)


def _is_text(dataset: Dataset | IterableDataset) -> bool:
    """Whether a rendered dataset begins with plain text; False where that is not known."""
    if not isinstance(dataset, Dataset) or "frame" not in dataset.column_names:
        return False
    return Prompt([], [], frame=dataset.with_format(None)[0]["frame"]).framed.is_text


def _is_blended(dataset: Dataset | IterableDataset) -> bool | None:
    """Whether several teachers read every row of a rendered dataset; None where they read some, or that is not known."""
    if not isinstance(dataset, Dataset):
        return None
    if BLEND not in dataset.column_names:
        return False
    blends = dataset.select_columns(BLEND).with_format("arrow")[:][BLEND]
    several = pc.sum(pc.not_equal(blends, "")).as_py()
    return None if 0 < several < len(blends) else several > 0


def _made(trainer, key: tuple, model_name: str, datasets: Sequence[str], tags: Sequence[str]) -> card.Written:
    student, seats = get_config_model_id(trainer.model.config), trainer.panel.seats
    history, dataset = trainer.state.log_history, trainer.train_dataset
    picture = command = None
    with best_effort("The run's command"):
        command = provenance.command()  # reads the working folder, which may be deleted
    with best_effort("The picture of the learning curve"):
        picture = card.learning_curve(history)
    made = card.model_card(
        model_name=model_name,
        hub_model_id=trainer.hub_model_id,
        student=student,
        teachers={key: (seat.name, seat.tokenizer) for key, seat in seats.items()},
        student_tokenizer=trainer.processing_class,
        args=provenance.settings_of(trainer),
        adapters=trainer.model.active_adapters if isinstance(trainer.model, PeftModel) else [],
        on_text=_is_text(dataset),
        datasets=datasets or list(filter(None, [provenance.dataset_source(dataset)])),
        tags=[*trainer._tag_names, *tags],
        log_history=history,
        prompts=len(dataset) if isinstance(dataset, Dataset) else None,
        licenses=[provenance.license_of(name) for name in (student, *(seat.name for seat in seats.values()))],
        command=command,
        picture=None if picture is None else card.PICTURE,
        blended=_is_blended(dataset),
        **provenance.given_to(trainer),
    )
    return card.Written(key, made, picture)
