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


@pytest.fixture
def build(tmp_path):
    """A trainer of toy models on the CPU; keyword arguments are settings, or arguments of the trainer."""
    from toys import prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer

    from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer

    def build(model=None, teacher=None, dataset=None, **settings):
        arguments = {
            name: settings.pop(name)
            for name in ("peft_config", "eval_dataset", "callbacks", "optimizers")
            if name in settings
        }
        tokenizers = {
            "processing_class": settings.pop("processing_class", None) or student_tokenizer(),
            "teacher_processing_class": settings.pop("teacher_processing_class", None) or teacher_tokenizer(),
        }
        settings = {
            "output_dir": str(tmp_path / "run"),
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "max_new_tokens": 8,
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-2,
            **settings,
        }
        return CrossTokenizerGKDTrainer(
            model=student_model() if model is None else model,
            teacher_model=teacher_model() if teacher is None else teacher,
            args=CrossTokenizerGKDConfig(**settings),
            train_dataset=prompts() if dataset is None else dataset,
            **tokenizers,
            **arguments,
        )

    return build
