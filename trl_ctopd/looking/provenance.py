"""Where a run comes from: its models, its data, its versions and its command, as the card and the report name them.

- What is on the hub is named as there. A folder is named by its last part alone.
- A command is given without what is secret, and without the folders of this machine.
"""

import os
import re
import shlex
import sys
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
from .ornaments import ornament


logger = get_logger(__name__)

PACKAGES = ("trl", "transformers", "peft", "accelerate", "datasets", "tokenizers", "torch")
LICENSE_FIELDS = ("license", "license_name", "license_link")


def versions() -> dict[str, str]:
    return {"trl_ctopd": __version__, **{name: version(name) for name in PACKAGES}}


def hub_name(name: str) -> str:
    """The hub's name of a model read from its cache folder; any other name as it is."""
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
    """The hub's name, or the folder's; "" for a model made in place."""
    name = hub_name(name)
    return name if on_hub(name) else Path(name).name


def describe(tokenizer: PreTrainedTokenizerBase) -> str:
    """Its family and size."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(tokenizer).__name__ if backend is None else type(backend.model).__name__
    return f"{kind}, {len(tokenizer):,} tokens"


def dataset_source(dataset: Dataset | IterableDataset | None) -> str | None:
    """The hub's name of what `load_dataset` fetched from there, as far as it says so."""
    info = getattr(dataset, "info", None)
    files = list(getattr(info, "download_checksums", None) or {})
    names = {match[1] for file in files if (match := re.match(r"hf://datasets/([^@]+)@", file))}
    return names.pop() if len(names) == 1 else None


@cache
def license_of(name: str) -> dict[str, str]:
    """`LICENSE_FIELDS` of a model's own card, in its folder or on the hub, as far as they are there."""
    name, folder = hub_name(name), Path(name)
    source = folder / "README.md" if folder.is_dir() else name
    if not (on_hub(name) or os.path.isfile(source)):
        return {}
    with ornament(f"The licence of {name}"):
        try:
            metadata = ModelCard.load(source).data.to_dict()
        except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            logger.info(f"The card of {name} cannot be read, so its licence is not named: {error}")
            return {}
        return {field: str(metadata[field]) for field in LICENSE_FIELDS if metadata.get(field)}
    return {}


def command() -> str | None:
    """What this process was started with, or None in a notebook or a shell."""
    program, *arguments = sys.orig_argv
    if hasattr(sys, "ps1") or "ipykernel" in sys.modules or "-c" in arguments[:2] or not arguments:
        return None
    if Path(arguments[0]).stem == "ctopd":  # the installed command, which its interpreter is started with
        program, *arguments = arguments
    shown = []
    for argument in redacted_arguments(arguments):
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        shown.append(f"{option}{equals}{without_folder(value)}")
    return re.sub(r"'([^\s']*…)'", r"\1", shlex.join([Path(program).name, *shown]))


def without_folder(value: str) -> str:
    """A path of this machine as it is seen from the working folder, or by its last part; a secret nowhere."""
    value = redact(value)
    if not os.path.isabs(os.path.expanduser(value)):
        return value
    path = Path(value).expanduser()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def step(args: CrossTokenizerGKDConfig) -> str:
    """What an optimizer step is made of."""
    prompts = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    each = "one completion" if args.num_generations == 1 else f"{args.num_generations} completions"
    again = f", used for {args.rollout_reuse} steps" if args.rollout_reuse > 1 else ""
    return f"{prompts:,} prompts, {each} of each{again}"
