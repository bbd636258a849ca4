"""Where a run comes from: models, data, versions and command, as the card and the report name them.

- Models and datasets on the hub have their names there. A local folder is shown by its last part only.
- A command is shown without secrets, and without this machine's folders.
"""

import os
import re
import shlex
import sys
from copy import copy
from functools import cache
from importlib.metadata import version
from pathlib import Path

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..config import CrossTokenizerGKDConfig
from ..redact import redact, redacted_arguments
from .best_effort import best_effort


logger = get_logger(__name__)

PACKAGES = ("trl", "transformers", "peft", "accelerate", "datasets", "tokenizers", "torch")
LICENSE_FIELDS = ("license", "license_name", "license_link")


def versions() -> dict[str, str]:
    return {"trl_ctopd": __version__, **{name: version(name) for name in PACKAGES}}


def hub_name(name: str) -> str:
    """The hub name of a model that was read from the cache folder; any other name unchanged."""
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]", name)
    return "/".join(cached.groups()) if cached else name


def on_hub(name: str | None) -> bool:
    if not name or "/" not in name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def short_name(name: str) -> str:
    """The hub name, or the folder's name; "" for a model created in memory."""
    name = hub_name(name)
    return name if on_hub(name) else Path(name).name


def describe(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's family and size."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(tokenizer).__name__ if backend is None else type(backend.model).__name__
    return f"{kind}, {len(tokenizer):,} tokens"


def dataset_source(dataset: Dataset | IterableDataset | None) -> str | None:
    """The hub name of a dataset that `load_dataset` fetched, as far as the dataset knows it."""
    info = getattr(dataset, "info", None)
    files = list(getattr(info, "download_checksums", None) or {})
    names = {match[1] for file in files if (match := re.match(r"hf://datasets/([^@]+)@", file))}
    return names.pop() if len(names) == 1 else None


@cache
def license_of(name: str) -> dict[str, str | list[str]]:
    """`LICENSE_FIELDS` from the model's own card, in its folder or on the hub; those that it has. A list is one of several."""
    name, folder = hub_name(name), Path(name)
    source = folder / "README.md" if folder.is_dir() else name
    if not (on_hub(name) or os.path.isfile(source)):
        return {}
    with best_effort(f"The licence of {name}"):
        try:
            metadata = ModelCard.load(source).data.to_dict()
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            logger.info(f"The card of {name} cannot be read, so its licence is not named: {error}")
            return {}
        found = {field: _texts(metadata.get(field)) for field in LICENSE_FIELDS}
        return {field: texts[0] if len(texts) == 1 else texts for field, texts in found.items() if texts}
    return {}


def _texts(value) -> list[str]:
    """What a field of a card names."""
    return [str(own) for own in (value if isinstance(value, list) else [value]) if own]


def command() -> str | None:
    """The command that started this process; None in a notebook or a shell."""
    program, *arguments = sys.orig_argv
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules or "-c" in arguments[:2] or not arguments:
        return None
    if Path(arguments[0]).stem == "ctopd":  # the installed command; its interpreter is not part of it
        program, *arguments = arguments
    shown = []
    for argument in redacted_arguments(arguments):
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        shown.append(f"{option}{equals}{without_folder(value)}")
    return re.sub(r"'([^\s']*…)'", r"\1", shlex.join([Path(program).name, *shown]))


def without_folder(value: str) -> str:
    """A path relative to the working folder, or only its last part; other values unchanged. Secrets are hidden."""
    value = redact(value)
    if not os.path.isabs(os.path.expanduser(value)):
        return value
    path = Path(value).expanduser()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def settings_of(trainer) -> CrossTokenizerGKDConfig:
    """The run's settings, with the batch size that it has: `auto_find_batch_size` lowers it."""
    args = copy(trainer.args)
    args.per_device_train_batch_size = trainer._train_batch_size
    return args


def given_to(trainer) -> dict:
    """The names of the reward functions, of the gate and of the tools that the run has, as the trainer calls its arguments."""
    judges, tools = trainer._judges, trainer._tools
    return {
        "reward_funcs": [] if judges is None else judges.names,
        "teacher_gate": None if judges is None else judges.gate_name,
        "tools": [schema["function"]["name"] for schema in tools],
    }


def step(args: CrossTokenizerGKDConfig) -> str:
    """The size of an optimizer step, in words."""
    prompts = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    each = "one completion" if args.num_generations == 1 else f"{args.num_generations} completions"
    again = f", used for {args.rollout_reuse} steps" if args.rollout_reuse > 1 else ""
    return f"{prompts:,} prompts, {each} of each{again}"
