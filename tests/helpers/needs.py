"""What some tests need and a machine may lack. Each function returns it, or skips the test with a sentence that says how to get
it. The end of a test run prints each of these sentences once (tests/conftest.py). See docs/tests.md."""

import os
import shutil
from pathlib import Path

import pytest


def assets() -> Path:
    """The folder of published tokenizers and data that CTOPD_ASSETS names."""
    if not os.environ.get("CTOPD_ASSETS"):
        pytest.skip("needs published tokenizers and data: set CTOPD_ASSETS to their folder (docs/tests.md)")
    return Path(os.environ["CTOPD_ASSETS"])


def tokenizer(name: str):
    """That published tokenizer."""
    import transformers
    from packaging.version import Version

    folder = assets() / "tokenizers" / name
    if name.startswith("deepseek") and Version(transformers.__version__) < Version("5.22"):
        pytest.skip("needs transformers 5.22: without a config.json older ones load DeepSeek's tokenizer as Llama's")
    return transformers.AutoTokenizer.from_pretrained(folder)


def models() -> Path:
    """The folder of two small pretrained models that CTOPD_MODELS names."""
    if not os.environ.get("CTOPD_MODELS"):
        pytest.skip("needs two pretrained models: set CTOPD_MODELS to their folder (docs/tests.md)")
    return Path(os.environ["CTOPD_MODELS"])


def adapter(name: str, **settings):
    """The config of PEFT's adapter of that name for a causal language model."""
    import peft

    if not hasattr(peft, f"{name}Config"):
        pytest.skip(f"needs a newer PEFT: {peft.__version__} has no {name}")
    return getattr(peft, f"{name}Config")(**settings, task_type="CAUSAL_LM")


def vllm() -> str:
    """The `vllm` program that CTOPD_VLLM names."""
    if not os.environ.get("CTOPD_VLLM"):
        pytest.skip("needs vLLM: set CTOPD_VLLM to the `vllm` program of another environment (docs/tests.md)")
    return os.environ["CTOPD_VLLM"]


def browser() -> str:
    """Chromium's executable."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("needs a browser: put Chromium on the PATH (apt-get install chromium)")
    return executable
