"""Models' sides of a conversation by real chat templates: TRL's, and those of the published assets; each with the census's toy tokenizer."""

import functools
import runpy
from pathlib import Path

import needs
import trl

from trl_ctopd.text.chat import Speaker
from trl_ctopd.text.parsing import named
from trl_ctopd.text.token_bytes import token_table


census = runpy.run_module("benchmarks.templates.census")
FOLDER = Path(trl.__file__).parent / "chat_templates"
PUBLISHED = ["qwen2.5", "llama-3.2", "phi-3-mini", "deepseek-v3", "mistral-v3", "smollm2-instruct"]  # tokenizers
KWARGS = {"date_string": "26 Jul 2024"}  # Llama's template prints the day otherwise


def tokenizer(name: str):
    """For TRL's template of that name."""
    return census["tokenizer_for"]((FOLDER / f"{name}.jinja").read_text())


@functools.cache
def side(name: str) -> Speaker:
    """By TRL's template of that name."""
    return Speaker(tokenizer(name))


def published(name: str, kwargs: dict | None = None) -> Speaker:
    """By the assets' template of that name."""
    return Speaker(census["tokenizer_for"]((needs.assets() / "templates" / f"{name}.jinja").read_text()), kwargs or {})


def spelled(speaker: Speaker, ids: list[int]) -> str:
    """What ids spell, control tokens by name."""
    return named(ids, token_table(speaker.tokenizer))[0]
