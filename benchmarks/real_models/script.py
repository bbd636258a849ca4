"""What the scripts on the pretrained pair share: their options, and a model as it is loaded."""

import argparse
from pathlib import Path

import torch
from demo_real import problems
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def parser(doc: str, output: Path) -> argparse.ArgumentParser:
    """With where models and tasks come from and results go; `doc` is the script's docstring."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", type=Path, help="folder that has both models; else they come from the hub")
    made.add_argument("--data", default=problems.HUB_NAME, help="hub name, or a .jsonl file with MBPP's columns")
    made.add_argument("--output", type=Path, default=output)
    return made


def loaded(model: str, adapter: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """In float32, with the adapter merged where one is named."""
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter:
        own = PeftModel.from_pretrained(own, adapter).merge_and_unload()
    return own, AutoTokenizer.from_pretrained(model)
