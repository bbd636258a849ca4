"""The README's first snippet, as it is printed, on toy models in folders of the names that it gives."""

import re
from pathlib import Path

import datasets
import torch
from torch import nn
from toys import prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer

from trl_ctopd import CrossTokenizerGKDTrainer


README = Path(__file__).parents[2] / "README.md"


def test_the_first_snippet_trains_all_linear_layers_at_a_rate_that_moves_them(tmp_path, monkeypatch):
    snippet, *_ = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    for name, model, tokenizer in (
        ("meta-llama/Llama-3.2-1B-Instruct", student_model(), student_tokenizer()),
        ("Qwen/Qwen2.5-7B-Instruct", teacher_model(), teacher_tokenizer()),
    ):
        assert f'"{name}"' in snippet
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: prompts(4))
    published = []
    monkeypatch.setattr(CrossTokenizerGKDTrainer, "push_to_hub", lambda trainer: published.append(trainer))
    short = snippet.replace("max_new_tokens=512", "max_new_tokens=8, use_cpu=True, report_to=[]")
    assert short != snippet
    names = {}
    exec(compile(short, "README.md", "exec"), names)
    trainer = names["trainer"]
    assert published == [trainer] and (tmp_path / "llama-taught-by-qwen" / "adapter_model.safetensors").exists()
    assert 1e-4 <= trainer.args.learning_rate <= 3e-4
    model = trainer.model.get_base_model()
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    linear = {name for name, own in student_model().named_modules() if isinstance(own, nn.Linear)} - {"lm_head"}
    assert adapted == linear and len(linear) > 4
    moved = [module.lora_B["default"].weight for module in model.modules() if hasattr(module, "lora_B")]
    assert all(weight.abs().max() > 0 and torch.isfinite(weight).all() for weight in moved)
