"""Mixtures of experts as students and as teachers: three shapes, with prompts of unlike lengths."""

import sys

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig
from toys import SGD, SHAPE, fix_rollouts, step_of, student_model, student_tokenizer, teacher_model, teacher_tokenizer
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DogeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from trl_ctopd.models.heads import _imbalance


EXPERTS = {
    "qwen3": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 64}),
}


def mixture(shape: str, vocab_size: int, **settings):
    torch.manual_seed(0)
    config, own = EXPERTS[shape]
    return AutoModelForCausalLM.from_config(config(**{**SHAPE, "vocab_size": vocab_size, **own, **settings}))


def student(shape, **settings):
    return mixture(shape, len(student_tokenizer()), **settings)


@pytest.mark.parametrize("shape", EXPERTS)
def test_a_mixture_of_experts_trains_as_student_and_as_teacher(build, shape):
    trainer = build(model=student(shape), max_steps=2, learning_rate=1e-2)
    trainer.train()
    assert all(entry["aux_loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)
    trainer = build(
        teacher=mixture(shape, len(teacher_tokenizer())), lmbda=0.5, seq_kd=True, gradient_accumulation_steps=4
    )
    trainer.train()


def plain_imbalance(model, rows: list[list[int]]) -> torch.Tensor:
    """Of the tokens of all rows, each read by itself: the number of experts times the sum over experts of the share of tokens that
    meet it, times the mean probability its router gives it."""
    chosen, likely = [], []
    for row in rows:
        with torch.no_grad():
            for layer in model.model(input_ids=torch.tensor([row]), output_router_logits=True).router_logits:
                probabilities = layer.double().softmax(-1)
                likely.append(probabilities)
                chosen.append(torch.zeros_like(probabilities).scatter(1, probabilities.topk(2).indices, 1.0))
    return 4 * (torch.cat(chosen).mean(0) * torch.cat(likely).mean(0)).sum()


@pytest.mark.parametrize("shape", EXPERTS)
def test_the_imbalance_is_that_of_the_texts_without_their_padding(build, shape):
    trainer = fix_rollouts(build(model=student(shape)))
    seen = []
    score = trainer._score
    trainer._score = lambda model, inputs: seen.append((inputs, found := score(model, inputs))) or found
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    trainer.model.load_state_dict(before)
    [(inputs, (batch, *_))] = seen
    rows = [ids[:length] for ids, length in zip(inputs["input_ids"].tolist(), inputs["lengths"].tolist(), strict=True)]
    assert len({len(row) for row in rows}) > 1
    expected = plain_imbalance(trainer.model.eval(), rows)
    assert batch.imbalance.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_without_experts_of_a_class_that_may_have_some_trains(build):
    torch.manual_seed(0)
    config = DogeConfig(**SHAPE, vocab_size=len(student_tokenizer()), is_moe=False, eos_token_id=2, bos_token_id=0)
    trainer = build(model=AutoModelForCausalLM.from_config(config))
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]


def test_the_coefficient_of_the_imbalance_weighs_its_gradient(build):
    steps = {}
    for coefficient in (0.0, 1.0, 10.0):
        settings = {"router_aux_loss_coef": coefficient, **SGD}
        steps[coefficient] = step_of(fix_rollouts(build(model=student("mixtral"), **settings)))
    moved = steps[1.0] - steps[0.0]
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(steps[10.0] - steps[0.0], 10 * moved, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("batch", "window"), [(4, 2), (2, 4)])
def test_the_imbalance_is_a_mean_over_micro_batches(build, batch, window):
    settings = {"router_aux_loss_coef": 5.0, "train_sampling_strategy": "sequential", "logging_steps": 1, **SGD}
    trainer = fix_rollouts(
        build(model=student("qwen3"), per_device_train_batch_size=batch, gradient_accumulation_steps=window, **settings)
    )
    trainer.train()
    without = fix_rollouts(
        build(
            model=student("qwen3"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=window,
            **{**settings, "router_aux_loss_coef": 0.0},
        )
    )
    without.train()
    [found], [expected] = ([e for e in t.state.log_history if "loss" in e] for t in (trainer, without))
    assert found["loss"] == pytest.approx(expected["loss"] + 5 * found["aux_loss"], rel=1e-3)
    assert "aux_loss" not in expected


def test_an_adapter_that_leaves_the_experts_out_says_so(build, caplog):
    build(model=student("gpt-oss"), peft_config=LoraConfig(target_modules="all-linear")).train()
    assert "leaves the experts of this GptOssForCausalLM as they are" in caplog.text
    assert "target_parameters=['mlp.experts.down_proj', 'mlp.experts.gate_up_proj']" in caplog.text
    caplog.clear()
    names = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    adapter = LoraConfig(target_modules="all-linear", target_parameters=names)
    build(model=student("gpt-oss"), peft_config=adapter).train()
    assert "leaves the experts" not in caplog.text


@pytest.mark.parametrize(("shape", "reached"), [("qwen3", True), ("mixtral", True), ("gpt-oss", False)])
def test_an_adapter_on_all_linear_layers_says_whether_it_reaches_the_experts(build, caplog, shape, reached):
    caplog.set_level("INFO")
    trainer = build(model=student(shape), peft_config=LoraConfig(target_modules="all-linear"))
    trained = [name for name, part in trainer.model.named_parameters() if part.requires_grad and ".experts." in name]
    reached = reached and Version(peft.__version__) >= Version("0.20")  # before, PEFT counted linear layers alone
    assert bool(trained) == reached == ("The adapter reaches the experts of this " in caplog.text)
    assert ("leaves the experts of this " in caplog.text) != reached


@pytest.mark.skipif(Version(peft.__version__) < Version("0.20"), reason="before, PEFT counted linear layers alone")
def test_shared_experts_that_an_adapter_leaves_out_are_named_with_the_setting_that_reaches_them(build, caplog):
    own = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
    own |= {"head_dim": 16, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_hidden_layers": 2}
    config = Glm4MoeConfig(**{**SHAPE, "vocab_size": len(student_tokenizer()), **own})
    build(model=AutoModelForCausalLM.from_config(config), peft_config=LoraConfig(target_modules="all-linear"))
    assert "leaves linear layers beside them as they are" in caplog.text
    names = sorted(f"mlp.{of}{part}_proj.weight" for of in ("", "shared_experts.") for part in ("down", "gate", "up"))
    assert f"target_parameters={names}" in caplog.text
    caplog.clear()
    adapter = LoraConfig(target_modules="all-linear", target_parameters=names)
    trainer = build(model=AutoModelForCausalLM.from_config(config), peft_config=adapter, max_steps=1)
    assert "as they are" not in caplog.text
    before = {name: part.clone() for name, part in trainer.model.named_parameters() if "lora_B" in name}
    trainer.train()
    moved = [name for name, part in trainer.model.named_parameters() if name in before and not part.equal(before[name])]
    for own in ("layers.0.mlp.down_proj", "layers.1.mlp.shared_experts.down_proj", "layers.1.mlp.experts"):
        assert any(own in name for name in moved)


def test_the_three_shapes_have_a_balance_of_their_own():
    for shape in EXPERTS:
        assert hasattr(sys.modules[type(student(shape)).__module__], "load_balancing_loss_func")


def test_a_mixture_without_a_balance_of_its_own_trains_without_one_and_says_so(build, caplog):
    torch.manual_seed(0)
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": 8}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
    config = DeepseekV3Config(
        **{
            **SHAPE,
            "num_key_value_heads": 2,
            "vocab_size": len(student_tokenizer()),
            "eos_token_id": 2,
            **heads,
            **experts,
        },
        first_k_dense_replace=1,
    )
    trainer = build(model=AutoModelForCausalLM.from_config(config), router_aux_loss_coef=0.1)
    assert "has no effect: transformers has no load-balancing loss for DeepseekV3ForCausalLM" in caplog.text
    trainer.train()
    assert not any("aux_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing_experts_are_balanced_or_it_says_that_they_are_not(build, caplog, reentrant):
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}, **SGD}
    trainers = [
        fix_rollouts(build(model=student("mixtral"), router_aux_loss_coef=coefficient, **settings))
        for coefficient in (0.0, 10.0)
    ]
    without, balanced = map(step_of, trainers)
    moves = not torch.allclose(without, balanced, rtol=0, atol=1e-4)
    said = "has no effect: with gradient_checkpointing_kwargs={'use_reentrant': True}" in caplog.text
    assert (moves, said) == (not reentrant, reentrant)
    assert any("aux_loss" in entry for entry in trainers[1].state.log_history) == (not reentrant)
    packs = [trainer.rollouts._packer is not None for trainer in trainers]
    assert packs == [True, reentrant]  # padded rows only where experts are balanced over them


def test_other_models_have_no_imbalance(build):
    trainer = build(model=student_model(), teacher=teacher_model())
    trainer.train()
    assert not any("aux_loss" in entry for entry in trainer.state.log_history)


def test_an_adapters_virtual_tokens_count_in_the_imbalance():
    torch.manual_seed(0)
    model, logits = student("mixtral"), torch.randn(2 * (3 + 4), 4)  # in each of two rows 3 come before the text
    found, whole = (_imbalance(model, (logits,), torch.ones(2, size, dtype=torch.bool)) for size in (4, 7))
    assert found.item() == pytest.approx(whole.item(), rel=1e-6)
