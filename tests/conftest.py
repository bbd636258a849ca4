"""Fixtures that several test files use."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real tokenizers and data, where there is one: CTOPD_ASSETS."""
    folder = os.environ.get("CTOPD_ASSETS")
    if not folder:
        pytest.skip("needs the real tokenizers and data: CTOPD_ASSETS names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def real_tokenizer(assets: Path) -> Callable[[str], Any]:
    """`real_tokenizer("gpt2")` is the tokenizer of that folder, loaded once in a test run."""
    from transformers import AutoTokenizer

    return functools.cache(lambda name: AutoTokenizer.from_pretrained(assets / "tokenizers" / name))
