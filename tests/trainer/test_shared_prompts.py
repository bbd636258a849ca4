"""Steps of a trainer whose completions share the prompt they are scored after, against steps with padded rows."""

import operator

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from toys import SGD, step_of, student_model, teacher_model

from trl_ctopd.losses import LOSSES
from trl_ctopd.models import packing
from trl_ctopd.teachers import local
from trl_ctopd.teachers.local import LocalTeacher


MODULES = ("trl_ctopd.trainer", "trl_ctopd.teachers.local")


@pytest.fixture
def padded(monkeypatch):
    """From its call on, models are built that read padded rows, all of a batch together."""

    def pad():
        for module in MODULES:
            monkeypatch.setattr(f"{module}.packer_for", lambda *_: None)
        monkeypatch.setattr(local, "of_like_length", lambda lengths: [range(len(lengths))])

    return pad


@pytest.fixture(autouse=True)
def small_models_pack_too(monkeypatch):
    """Beside their hidden size, attention is never small."""
    monkeypatch.setattr(packing, "_LEAST_SAVED", -100.0)


def written(trainer):
    """Completions of unlike length, each by its place in the step."""
    tokenizer = trainer.processing_class

    def write(model, prompts, step):
        texts = [f"{row} is the sum" + " of what and two" * (row * 5 % 4) for row in range(len(prompts))]
        return [(tokenizer.encode(text)[:40] + [tokenizer.eos_token_id] * (len(text) % 2), None) for text in texts]

    trainer.rollouts.write = write
    return trainer


def cells(trainer) -> list[int]:
    """The tokens, padding included, of each forward pass that student or teacher will make."""
    found = []

    def count(module, args, kwargs):
        found.append(kwargs["input_ids"].numel())

    for model in (trainer.model, trainer.teacher_model):
        model.register_forward_pre_hook(count, with_kwargs=True)
    return found


CASES = {
    "all weights, a width of 24": {"pad_to_multiple_of": 24},
    "several micro-batches": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "text it did not write": {"lmbda": 0.5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "an adapter, checkpointed and kept near its start": {
        "peft_config": True,
        "gradient_checkpointing": True,
        "reference_kl": 3.0,
    },
    **{name: {"distillation_loss": name} for name, loss in LOSSES.items() if loss.signal == "logits"},
    "reverse_kl, an adapter, checkpointed, several micro-batches": {
        "distillation_loss": "reverse_kl",
        "peft_config": True,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "reference_kl": 1.0,
    },
    "a baseline": {"baseline": "kl"},
    "distributions of text it did not write": {
        "lmbda": 0.0,
        "off_policy_loss": "gold",
        "per_device_train_batch_size": 2,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_with_shared_prompts_is_that_of_padded_rows(build, padded, case):
    settings = {"num_generations": 4, "train_sampling_strategy": "sequential", **SGD, **CASES[case]}

    def step():
        torch.manual_seed(0)
        adapter = {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)}
        own = {**settings, **(adapter if "peft_config" in settings else {})}
        trainer = written(build(**own))
        read = cells(trainer)
        return step_of(trainer), read, trainer.state.log_history[0]

    packed, read, log = step()
    padded()
    expected, read_before, log_before = step()
    assert len(read) == len(read_before), "as many forward passes"
    assert sum(read) < 0.8 * sum(read_before) and all(map(operator.lt, read, read_before)), "student and teacher"
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    assert log["loss"] == pytest.approx(log_before["loss"], rel=1e-4, abs=1e-5)
    entropies = [{name: own[name] for name in own if name.endswith("entropy")} for own in (log, log_before)]
    assert entropies[0] and entropies[0] == pytest.approx(entropies[1], rel=1e-4)


def test_a_local_teacher_gives_each_completion_its_own_scores(padded):
    """In the order given, with several ways to end, hidden states, and completions of no token."""
    generator = torch.Generator().manual_seed(0)
    prompts = [[7, *range(9, 9 + 11 * (row % 3))] for row in range(12)]
    completions = [torch.randint(5, 100, (row * 7 % 12,), generator=generator).tolist() for row in range(12)]
    ends = [(3, 4) if completion and row % 4 == 1 else () for row, completion in enumerate(completions)]
    found, read = [], []
    for size in (5, 12):
        for pad in (False, True):
            if pad:
                padded()
            teacher = LocalTeacher(teacher_model(), Accelerator(cpu=True), 0.7, batch_size=size)
            teacher.model.register_forward_pre_hook(
                lambda module, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
            )
            found.append(teacher.scores(prompts, completions, ends, with_hidden=True))
    for other in found[1:]:
        for own, theirs in zip(found[0], other, strict=True):
            for mine, his in ((own.log_probs, theirs.log_probs), (own.hidden, theirs.hidden)):
                torch.testing.assert_close(mine, his, rtol=1e-5, atol=1e-5)
    assert [len(own.log_probs) for own in found[0]] == list(map(len, completions))
    packed, plain = read[:3], read[3:6]
    assert sum(shape.numel() for shape in packed) < 0.8 * sum(shape.numel() for shape in plain)


def test_the_completions_of_a_prompt_stay_in_one_micro_batch_where_they_are_packed(build, padded):
    settings = {"num_generations": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}

    def batches():
        trainer = written(build(**settings))
        rows = trainer.data_collator(list(trainer.train_dataset))["prompts"]
        return trainer._roll_out(trainer.model, [[row] for row in rows[:4]], "train")

    shared = batches()
    assert sorted(batch["prompts"].unique().tolist() for batch in shared) == [[0], [1], [2], [3]]
    lengths = [batch["lengths"].max().item() for batch in shared]
    assert lengths == sorted(lengths, reverse=True)
    padded()
    assert any(len(batch["prompts"].unique()) > 1 for batch in batches())


def test_a_student_whose_dropout_stays_on_or_whose_experts_are_balanced_reads_padded_rows(build):
    assert build().rollouts._packer is not None
    assert build(disable_dropout=False).rollouts._packer is None
    assert build(model=student_model(attn_implementation="eager")).rollouts._packer is None
