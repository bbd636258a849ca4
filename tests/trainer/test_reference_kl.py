"""A student is kept near what it was at the start: the estimate against exact sums, and what the trainer makes of it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from toys import SGD, fix_rollouts, step_of, student_model, student_tokenizer, weights

from trl_ctopd.losses import ScoredChunks
from trl_ctopd.losses.reference_kl import reference_kl
from trl_ctopd.models.forwards import base_model
from trl_ctopd.models.reference import Reference, adapter_off, why_not_start


def one_token_each(own: torch.Tensor, start: torch.Tensor) -> ScoredChunks:
    """(V,) texts, of which the v-th is token v."""
    chunks = torch.zeros(len(own), 1, dtype=torch.long)
    return ScoredChunks(
        own[:, None], start[:, None], chunks, chunks, torch.ones_like(chunks), 1, reference_log_probs=start[:, None]
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_of_its_gradient_is_that_of_the_kl(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, start = (torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    log_p, log_start = logits.log_softmax(0), start.log_softmax(0)
    [expected] = torch.autograd.grad((log_p.exp() * (log_p - log_start)).sum(), logits, retain_graph=True)
    found = torch.zeros_like(expected)
    for token, p in enumerate(log_p.exp().tolist()):
        value, _ = reference_kl(one_token_each(log_p[token, None], log_start[token, None]), 1)
        found += p * torch.autograd.grad(value, logits, retain_graph=True)[0]
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 0.1


def test_tokens_without_part_do_not_count_and_the_mean_distance_is_logged():
    own, start = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -9.0])
    batch = one_token_each(own, start)
    chunks = torch.tensor([[0], [0], [-1]])
    value, metrics = reference_kl(replace(batch, student_chunks=chunks), 4)
    assert value.item() == pytest.approx(0.5 * (0.25 + 1.0) / 4)
    total, weight = metrics["reference/nats_per_token"]
    assert (total.item(), weight.item()) == (pytest.approx(0.5 - 1.0), 2)


ADAPTER = {"r": 4, "target_modules": "all-linear"}


@pytest.mark.parametrize("stops", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"async_rollouts": 1, "generation_device": "cpu"},
        {"early_stop": "random", "early_stop_kwargs": {"window": 2, "patience": 1, "exempt": 1}},
    ],
)
def test_it_goes_with_text_that_tells_what_it_was_sampled_with(build, settings, stops):
    student = student_model()
    student.generation_config.eos_token_id = [student_tokenizer().eos_token_id, 7][:stops]
    trainer = build(model=student, reference_kl=0.1, peft_config=LoraConfig(**ADAPTER), max_steps=2, **settings)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "reference/nats_per_token" in entry]
    assert len(logged) == 2 and all("sampling/importance_ratio" in entry for entry in logged)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_first_step_is_the_plain_one_and_the_distance_is_logged_from_then_on(build, adapter):
    def run(weight, steps):
        torch.manual_seed(0)
        peft = {"peft_config": LoraConfig(**ADAPTER)} if adapter else {}
        settings = {**SGD, "learning_rate": 0.3, "train_sampling_strategy": "sequential"}
        trainer = fix_rollouts(build(reference_kl=weight, max_steps=steps, model=student_model(), **settings, **peft))
        before = weights(trainer).clone()
        trainer.train()
        return weights(trainer) - before, [entry for entry in trainer.state.log_history if "grad_norm" in entry]

    plain, kept = run(0.0, 1)[0], run(2.0, 1)[0]
    torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-7)
    log = run(2.0, 3)[1]
    assert log[0]["reference/nats_per_token"] == pytest.approx(0, abs=1e-5)
    assert abs(log[-1]["reference/nats_per_token"]) > 1e-4
    assert "reference/nats_per_token" not in run(0.0, 1)[1][0]


def test_micro_batches_give_the_whole_batchs_step_with_an_adapter_that_is_far_from_its_start(build):
    def step(**settings):
        torch.manual_seed(0)
        own = {"train_sampling_strategy": "sequential", "reference_kl": 5.0, **SGD, **settings}
        trainer = fix_rollouts(build(peft_config=LoraConfig(**ADAPTER), **own))
        move(trainer.model)
        return step_of(trainer)

    whole = step(per_device_train_batch_size=8)
    plain, once = (step(per_device_train_batch_size=8, reference_kl=weight) for weight in (0.0, 1.0))
    assert (whole - plain).abs().max() > 1e-3 * whole.abs().max()
    torch.testing.assert_close(whole - plain, 5 * (once - plain), rtol=1e-3, atol=1e-5)
    parts = step(per_device_train_batch_size=2, gradient_accumulation_steps=4, gradient_checkpointing=True)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


TWO = {
    "input_ids": torch.arange(5, 15)[None],
    "scored": torch.tensor([[0, 0], [-5, -3]]),
    "targets": torch.tensor([7, 8]),
}


@pytest.mark.parametrize(
    "adapter",
    [{}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"init_lora_weights": False}, {"bias": "all"}],
    ids=["a new one", "PiSSA", "OLoRA", "trained before", "with biases of the base model"],
)
def test_the_start_under_an_adapter_is_the_student_as_it_was_given(build, adapter):
    """An adapter that is switched off leaves something else than the start in all cases but the first."""
    model = student_model(attention_bias=True)
    trainer = build(model=model, peft_config=LoraConfig(**ADAPTER, **adapter), reference_kl=1.0)
    with torch.no_grad():
        logits = base_model(trainer.model)(input_ids=TWO["input_ids"]).logits[0].log_softmax(-1)
    expected = logits[[5, 7], [7, 8]]
    start = reference(trainer.model, trainer.accelerator)
    move(trainer.model)
    moved = trainer.model(**TWO).log_probs
    torch.testing.assert_close(start.log_probs(trainer.model, **TWO), expected, rtol=1e-5, atol=1e-6)
    assert (moved - expected).abs().max() > 1e-3
    assert torch.equal(trainer.model(**TWO).log_probs, moved), "and the student is as before"
    gradient = torch.autograd.grad(moved.sum(), [own for own in trainer.model.parameters() if own.requires_grad])
    assert any(own.abs().max() > 0 for own in gradient)


def test_weights_of_an_adapter_that_are_frozen_stay_frozen(build):
    """PEFT makes them trainable when an adapter is switched on again: their gradients would count where all are clipped, and a checkpointed
    forward pass would be repeated otherwise than it was."""
    settings = {"reference_kl": 1.0, "gradient_checkpointing": True, "max_steps": 2, **SGD}
    trainer = build(model=student_model(), peft_config=LoraConfig(**ADAPTER), **settings)
    for name, own in trainer.model.named_parameters():
        own.requires_grad_(".lora_B." in name)
    trainer.train()
    trained = {name for name, own in trainer.model.named_parameters() if own.requires_grad}
    assert trained and all(".lora_B." in name for name in trained)


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(**ADAPTER, modules_to_save=["lm_head"]),
        LoKrConfig(r=4, target_modules=["q_proj", "v_proj"]),
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        OFTConfig(oft_block_size=4, target_modules="all-linear"),
        LNTuningConfig(target_modules=["norm"]),
        TrainableTokensConfig(token_indices=[5, 6, 7, 8, 9]),
    ],
    ids=lambda adapter: str(adapter.peft_type.value),
)
def test_the_start_of_an_adapter_of_any_kind_that_was_trained_before_is_that_adapter(build, adapter):
    torch.manual_seed(0)
    model = get_peft_model(student_model(), adapter)
    plain = model.get_base_model()(input_ids=TWO["input_ids"]).logits.detach()
    with torch.no_grad():
        for name, own in model.named_parameters():
            if own.requires_grad and ".lora_" not in name:
                own.add_(torch.randn_like(own), alpha=0.3)
    assert (model(input_ids=TWO["input_ids"]).logits - plain).abs().max() > 1e-3, "it adds something"
    trainer = build(model=model, reference_kl=1.0)
    start = reference(trainer.model, trainer.accelerator)
    as_it_was = trainer.model(**TWO).log_probs
    torch.testing.assert_close(start.log_probs(trainer.model, **TWO), as_it_was)
    move(trainer.model)
    assert (trainer.model(**TWO).log_probs - as_it_was).abs().max() > 1e-3
    torch.testing.assert_close(start.log_probs(trainer.model, **TWO), as_it_was)


def reference(model, accelerator) -> Reference:
    return Reference(model, accelerator, why_not_start(model))


def stacked():
    """A new adapter on one that was trained before and is frozen; both are active."""
    model = get_peft_model(student_model(), LoraConfig(**ADAPTER, init_lora_weights=False), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.base_model.set_adapter(["first", "second"])
    for name, own in model.named_parameters():
        own.requires_grad_(".second." in name)
    return model


def partly_frozen():
    """Of an adapter that was trained before, one layer's weights are frozen, and what the others add is nothing."""
    model = get_peft_model(student_model(), LoraConfig(**ADAPTER, init_lora_weights=False))
    for name, own in model.named_parameters():
        own.requires_grad_(".lora_" in name and ".layers.0." not in name)
        if own.requires_grad and ".lora_B." in name:
            own.data.zero_()
    return model


@pytest.mark.parametrize("make", [stacked, partly_frozen])
def test_frozen_weights_of_an_adapter_that_is_on_belong_to_the_start(build, make):
    """Switching the adapter off would take them away too."""
    trainer = build(model=make(), reference_kl=1.0)
    start, as_it_was = reference(trainer.model, trainer.accelerator), trainer.model(**TWO).log_probs
    with adapter_off(trainer.model):
        assert (trainer.model(**TWO).log_probs - as_it_was).abs().max() > 1e-3
    trainer.train()
    assert trainer.state.log_history[0]["reference/nats_per_token"] == pytest.approx(0, abs=1e-5)
    move(trainer.model)
    assert (trainer.model(**TWO).log_probs - as_it_was).abs().max() > 1e-3
    torch.testing.assert_close(start.log_probs(trainer.model, **TWO), as_it_was)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_new_adapter_on_a_frozen_one_is_refused_where_the_student_is_sharded(kind):
    with pytest.raises(ValueError, match="adds something at the start.*Train a new adapter"):
        reference(stacked(), SimpleNamespace(distributed_type=DistributedType[kind]))


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
        LoraConfig(**ADAPTER, use_dora=True),
        LoraConfig(**ADAPTER, trainable_token_indices=[5, 6]),
        LoraConfig(**ADAPTER, modules_to_save=["lm_head"]),
        AdaLoraConfig(r=4, target_modules=["q_proj"], total_step=10),
        LoKrConfig(r=4, target_modules=["q_proj"]),
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LNTuningConfig(target_modules=["norm"]),
    ],
    ids=lambda adapter: str(adapter.peft_type.value),
)
def test_a_new_adapter_of_any_kind_that_changes_nothing_is_told_from_one_that_does(adapter):
    model = get_peft_model(student_model(), adapter)
    assert why_not_start(model) is None
    move(model)
    assert why_not_start(model) == "the adapter adds something at the start"


def test_weights_of_the_base_model_that_are_trained_beside_an_adapter_are_told_and_belong_to_the_start(build, caplog):
    model = get_peft_model(student_model(), LoraConfig(**ADAPTER))
    model.base_model.model.model.norm.weight.requires_grad_(True)
    trainer = build(model=model, reference_kl=1.0)
    assert (
        "1 weights of the base model are trained beside the adapter (base_model.model.model.norm.weight)" in caplog.text
    )
    start, as_it_was = reference(trainer.model, trainer.accelerator), trainer.model(**TWO).log_probs
    move(trainer.model)
    torch.testing.assert_close(start.log_probs(trainer.model, **TWO), as_it_was)


@torch.no_grad()
def move(model):
    """As training would."""
    generator = torch.Generator().manual_seed(1)
    for own in model.parameters():
        if own.requires_grad:
            own.add_(0.2 * torch.randn(own.shape, generator=generator))


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "'pissa' takes what"),
        ({"init_lora_weights": False}, "adds something at the start"),
    ],
)
def test_a_start_that_is_not_the_base_model_is_refused_where_the_student_is_sharded(kind, adapter, reason):
    model = get_peft_model(student_model(), LoraConfig(**ADAPTER, **adapter))
    with pytest.raises(ValueError, match=f"{reason}.*Train a new adapter"):
        reference(model, SimpleNamespace(distributed_type=DistributedType[kind]))
    reference(
        get_peft_model(student_model(), LoraConfig(**ADAPTER)), SimpleNamespace(distributed_type=DistributedType[kind])
    )


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_copy_of_a_student_that_is_sharded_is_refused_with_the_way_out(kind):
    with pytest.raises(ValueError, match="reference_kl .*Train a new adapter"):
        reference(torch.nn.Linear(1, 1), SimpleNamespace(distributed_type=DistributedType[kind]))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_below_zero_is_refused(build, weight):
    with pytest.raises(ValueError, match="reference_kl must be a (weight|number)"):
        build(reference_kl=weight)
