"""An adapter merged for a while: the same function meanwhile, the same weights afterwards."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from toys import student_model

from trl_ctopd.models.merging import mergeable, merged


def adapted(**config):
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **config}
    return get_peft_model(student_model(), LoraConfig(**settings)).eval()


IDS = torch.arange(40).view(2, 20) % 30


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_within_the_model_computes_the_same_and_afterwards_every_weight_is_the_one_it_was(in_place):
    model = adapted()
    before = {name: (weight, weight.data_ptr(), weight.clone()) for name, weight in model.named_parameters()}
    logits = model(input_ids=IDS).logits
    for _ in range(20):
        layers = mergeable(model)
        assert len(layers) > 0
        with merged(layers, in_place):
            torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-5)
            moved = [name for name, weight in model.named_parameters() if weight.data_ptr() != before[name][1]]
            assert len(moved) == (0 if in_place else len(layers))
    for name, weight in model.named_parameters():
        own, place, value = before[name]
        assert weight is own and weight.data_ptr() == place and torch.equal(weight, value)
    assert torch.equal(model(input_ids=IDS).logits, logits)


@pytest.mark.parametrize("in_place", [False, True])
def test_weights_are_put_back_when_writing_fails(in_place):
    model = adapted()
    places = [(weight.data_ptr(), weight.detach().clone()) for weight in model.parameters()]
    with pytest.raises(RuntimeError, match="amid"), merged(mergeable(model), in_place):
        raise RuntimeError("amid the call")
    for weight, (place, value) in zip(model.parameters(), places, strict=True):
        assert weight.data_ptr() == place and torch.equal(weight, value)
    assert not any(layer.merged for layer in mergeable(model))


@pytest.mark.parametrize(
    ("config", "share"),
    [
        ({}, "all"),
        ({"use_dora": True}, "none"),
        ({"lora_bias": True}, "none"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "without embeddings"),
    ],
)
@torch.no_grad()
def test_layers_of_another_kind_or_with_shared_weights_keep_their_adapter_apart(config, share):
    model = adapted(**config)
    if share == "without embeddings":
        base = model.get_base_model()
        base.lm_head.weight = base.model.embed_tokens.weight
    adapters = [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]
    names = {type(layer.get_base_layer()).__name__ for layer in mergeable(model)}
    assert (len(mergeable(model)) == len(adapters)) == (share == "all")
    assert names == {"all": {"Linear"}, "none": set(), "without embeddings": {"Linear"}}[share]
    logits = model(input_ids=IDS).logits
    with merged(mergeable(model)):
        torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-5)
