"""Trials of a model at the start, on adapters that have learned nothing yet."""

import needs
import pytest
import torch
from peft import get_peft_model
from toys import student_model

from trl_ctopd.models.trials import check_causal, draws_noise, stirred


QV = {"target_modules": ["q_proj", "v_proj"]}
POLICIES = {
    "LoRA": ("Lora", QV),
    "DoRA and a trained head": ("Lora", {**QV, "use_dora": True, "modules_to_save": ["lm_head"]}),
    "activated LoRA": ("Lora", {**QV, "alora_invocation_tokens": [5, 6]}),
    "IA3": ("IA3", {**QV, "feedforward_modules": []}),
    "trained tokens": ("TrainableTokens", {"token_indices": [1, 2]}),
    "a second network": ("Shadow", {}),
    "virtual tokens": ("PromptTuning", {"num_virtual_tokens": 3}),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def adapted(name: str, settings: dict, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return get_peft_model(student_model().to(dtype), needs.adapter(name, **settings)).train()


@DTYPES
def test_an_adapter_that_has_learned_nothing_is_stirred_and_put_back_to_the_bit(dtype):
    model, ids = adapted("Lora", QV, dtype).eval(), torch.arange(8)[None]
    kept, drawn = [own.detach().clone() for own in model.parameters()], torch.get_rng_state()
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(RuntimeError, match="amid"), stirred(model):
            assert not torch.allclose(model(ids).logits, before, rtol=0.1)
            raise RuntimeError("amid")
        assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(own, one) for own, one in zip(model.parameters(), kept, strict=True))
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_whole_model_is_not_stirred():
    model = student_model()
    kept = [own.detach().clone() for own in model.parameters()]
    with stirred(model):
        assert all(torch.equal(own, one) for own, one in zip(model.parameters(), kept, strict=True))


@DTYPES
@pytest.mark.parametrize("name", POLICIES)
def test_adapters_under_which_a_token_depends_on_its_past_alone_pass(name, dtype):
    model = adapted(*POLICIES[name], dtype)
    check_causal("student", model)
    assert model.training and all(own.grad is None for own in model.parameters())


@DTYPES
def test_an_adapter_under_which_a_token_depends_on_its_future_is_refused(dtype):
    message = r"the student's adapter \(LILY\) a token's probability depends on what follows it.*such as LoRA"
    with pytest.raises(ValueError, match=message):
        check_causal("student", adapted("Lily", {"r": 4, **QV}, dtype))


def test_an_adapter_under_which_a_row_depends_on_the_others_is_refused():
    model = adapted("Lora", QV)
    model.base_model.model.model.layers[0].register_forward_hook(lambda module, args, output: output + output.mean(0))
    with pytest.raises(ValueError, match="or on the other rows of its batch"):
        check_causal("student", model)


@DTYPES
@pytest.mark.parametrize(("name", "noisy"), [("Pvera", True), ("Lora", False)])
def test_noise_is_found_that_is_no_dropout(name, noisy, dtype):
    model = adapted(name, {"r": 8, **QV}, dtype).eval()
    assert draws_noise(model) is noisy
    assert not model.training


def test_a_student_that_draws_noise_is_told_of_and_not_packed(build, caplog):
    assert build(peft_config=needs.adapter("Pvera", r=8, **QV)).rollouts._packer is None
    [message] = [message for message in caplog.messages if "draws noise" in message]
    assert "though disable_dropout=True" in message and "not packed" in message
    caplog.clear()
    assert build(peft_config=needs.adapter("Pvera", r=8, **QV), disable_dropout=False).rollouts._packer is None
    assert "draws noise" not in caplog.text


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_trainer_refuses_an_adapter_that_is_no_policy_on_either_side(build, side):
    model = adapted("Lily", {"r": 4, **QV})
    if side == "student":
        arguments = {"model": model}
    else:
        with torch.no_grad():
            for name, own in model.named_parameters():
                if "lily_B" in name:
                    own.fill_(0.1)
        arguments = {"teacher": model, "teacher_processing_class": build().processing_class}
    with pytest.raises(ValueError, match=rf"the {side}'s adapter \(LILY\)"):
        build(**arguments)
