"""Half precision on a CPU that has no instructions for it: teachers are made float32, and all else is warned of."""

import logging
import platform
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from toys import student_model, teacher_model, teacher_tokenizer
from transformers import AutoModelForCausalLM

from trl_ctopd import CrossTokenizerGKDConfig
from trl_ctopd.models import loading
from trl_ctopd.models.loading import slow_weights
from trl_ctopd.preference import CrossTokenizerDPOConfig
from trl_ctopd.teachers.local import load_teacher


CPU = {"use_cpu": True, "report_to": "none"}


@pytest.fixture
def folder(tmp_path) -> str:
    """A teacher as most are published: in bfloat16."""
    model = student_model(vocab_size=len(teacher_tokenizer())).bfloat16()
    model.save_pretrained(tmp_path / "teacher")
    teacher_tokenizer().save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


@pytest.fixture(params=[False, True], ids=["slow", "fast"])
def fast(request, monkeypatch) -> bool:
    """Whether the CPU has the instructions."""
    monkeypatch.setattr(loading, "computes_fast", lambda dtype: request.param)
    monkeypatch.setattr("trl_ctopd.training.student.computes_fast", lambda dtype: request.param)
    return request.param


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(loading, "computes_fast", lambda dtype: False)


def test_a_teacher_keeps_its_dtype_only_where_the_cpu_is_fast_in_it(folder, fast, caplog):
    with caplog.at_level(logging.INFO, logger="trl_ctopd"):
        model = load_teacher(folder, None, False, Accelerator(cpu=True))
    assert model.dtype == (torch.bfloat16 if fast else torch.float32)
    assert ("They are converted" in caplog.text) != fast
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for own, other in zip(model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(own, other.to(own.dtype))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_dtype_that_is_asked_for_is_kept(folder, slow, dtype):
    assert load_teacher(folder, {"dtype": dtype}, False, Accelerator(cpu=True)).dtype == torch.bfloat16


def test_a_teacher_that_would_not_fit_in_float32_stays_as_it_is_and_is_warned_of(folder, slow, monkeypatch, caplog):
    monkeypatch.setattr(loading, "get_max_memory", lambda: {"cpu": 1000})
    assert load_teacher(folder, None, False, Accelerator(cpu=True)).dtype == torch.bfloat16
    assert "GB are free" in caplog.text


def test_a_module_in_half_precision_is_left_and_warned_of(build, fast, caplog):
    trainer = build(teacher=teacher_model().bfloat16())
    assert trainer.teacher_model.dtype == torch.bfloat16
    assert ("The teacher's weights are torch.bfloat16" in caplog.text) != fast


def test_a_student_in_half_precision_is_warned_of(build, fast, caplog):
    build(model=student_model().bfloat16())
    assert ("The student's weights are torch.bfloat16" in caplog.text) != fast


def test_mixed_precision_is_warned_of(build, fast, caplog):
    build(bf16=True)
    assert ("bf16=True on a CPU without instructions" in caplog.text) != fast


def test_float32_is_not_warned_of(slow):
    assert not slow_weights("student", student_model())


@pytest.mark.parametrize("config", [CrossTokenizerGKDConfig, CrossTokenizerDPOConfig])
def test_on_a_cpu_mixed_precision_is_off_unless_set(tmp_path, config):
    assert config(str(tmp_path), **CPU).bf16 is False
    assert config(str(tmp_path), **CPU, bf16=True).bf16 is True


@pytest.mark.parametrize(("dtype", "flag"), [(torch.bfloat16, "avx512_bf16"), (torch.float16, "avx512_fp16")])
def test_no_processor_is_called_fast_that_lacks_the_instructions(dtype, flag):
    processor = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not processor.exists():
        pytest.skip("needs Linux on x86-64, which says what its processor can")
    assert flag in processor.read_text().split() or not loading.computes_fast(dtype)
