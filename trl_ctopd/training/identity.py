"""Settings, models and data of a run as JSON values, compared when it is resumed."""

import hashlib
import json
import re
from datetime import date

import numpy as np
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from ..config import CrossTokenizerGKDConfig
from ..teachers.panel import Panel


# settings that do not change the weights: where a run is saved, how it is logged, how much memory it takes
_WITHOUT_BEARING = re.compile(
    r"output_dir|run_name|project|report\w*|log_\w+|logging_\w+|save_\w+|eval_\w+|do_\w+|push_to_hub\w*|hub_\w+|trackio\w*"
    r"|disable_tqdm|resume_from_checkpoint|num_completions_to_print|dataloader_\w+|teacher_server_\w+|dataset_num_proc"
    r"|load_best_model_at_end|metric_for_best_model|greater_is_better|include_\w+|skip_memory_metrics|torch_empty_cache_steps"
    r"|ddp_\w+|local_rank|per_device_eval_batch_size|prediction_loss_only|teacher_batch_size|teacher_overlap|logit_tile_tokens|vllm_server_\w+"
    r"|vllm_group_port|vllm_gpu_memory_utilization|\w*token|debug|restore_callback_states_from_checkpoint"
)
# of an adapter: where its weights come from and go to
_ABOUT_FILES = re.compile(r"base_model_name_or_path|revision|inference_mode|auto_mapping|peft_version|task_type")
_ROWS, _WEIGHTS = 1024, 64  # at most as many are read for a digest


def identity(
    args: CrossTokenizerGKDConfig,
    student: nn.Module,
    panel: Panel,
    train_dataset: Dataset | IterableDataset | None,
    day: date | None = None,
) -> dict:
    """What a resumed run must have in common with the run that it continues. `day`: the date in the prompts, None where there is
    none. Of a `student` whose whole weights are trained, a checkpoint has all."""
    teachers = {
        name: seat.name if seat.remote else f"{seat.name} {model_digest(seat.teacher.base_model)}".strip()
        for name, seat in panel.seats.items()
    }
    found = {**settings_that_matter(args), "teacher": teachers, "train_dataset": dataset_digest(train_dataset)}
    if isinstance(student, PeftModel):
        found |= {"frozen_weights": model_digest(student, frozen=True), **adapter_settings(student)}
    return found if day is None else {**found, "prompt_date": day.isoformat()}


def settings_that_matter(args: CrossTokenizerGKDConfig) -> dict:
    """The settings that change the weights, by name."""
    found = {name: value for name, value in args.to_dict().items() if not _WITHOUT_BEARING.fullmatch(name)}
    found["world_size"] = args.world_size
    return json.loads(json.dumps(found, default=str))


def adapter_settings(student: PeftModel) -> dict:
    """What shapes the active adapter, by name."""
    given = json.loads(json.dumps(student.active_peft_config.to_dict(), default=_plain))
    return {f"peft_config.{name}": value for name, value in given.items() if not _ABOUT_FILES.fullmatch(name)}


def _plain(value):
    return sorted(value) if isinstance(value, set) else str(value)


def dataset_digest(dataset: Dataset | IterableDataset | None) -> str:
    """The number of rows of a rendered dataset, and a hash of up to a thousand of them."""
    if not isinstance(dataset, Dataset):
        return type(dataset).__name__
    rows = np.linspace(0, len(dataset) - 1, min(len(dataset), _ROWS)).astype(int)
    digest = hashlib.sha256()
    for row in dataset.with_format(None).select(rows):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return f"{len(dataset)} rows, {digest.hexdigest()[:12]}"


def model_digest(model: nn.Module, frozen: bool = False) -> str:
    """A hash of the shapes, and of a few numbers of those weights that this process holds unsharded; of `frozen` ones alone, if asked for."""
    digest = hashlib.sha256()
    parameters = [(name, own) for name, own in model.named_parameters() if not (frozen and own.requires_grad)]
    for place in np.linspace(0, len(parameters) - 1, min(len(parameters), _WEIGHTS)).astype(int):
        name, parameter = parameters[place]
        digest.update(f"{name} {getattr(parameter, 'ds_shape', parameter.shape)}".encode())
        here = not (isinstance(parameter, DTensor) or hasattr(parameter, "ds_id") or parameter.device.type == "meta")
        if here:
            digest.update(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
