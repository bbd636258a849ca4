"""An adapter merged for a while: the same function meanwhile, the same weights afterwards."""

import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model
from toys import student_model

from trl_ctopd.models.merging import bases_kept, mergeable, merged


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
    assert not any(getattr(module, "merged", False) for module in model.modules())


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


@torch.no_grad()
@pytest.mark.parametrize("ends", ["as it should", "amid the call"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, init_lora_weights=False),
        LoraConfig(r=4, init_lora_weights=False, use_dora=True),
        IA3Config(init_ia3_weights=False, feedforward_modules=["down_proj"]),
        OFTConfig(oft_block_size=8, init_weights=False),
    ],
    ids=["lora", "dora", "ia3", "oft"],
)
def test_weights_that_peft_merges_into_in_place_are_afterwards_what_they_were_to_the_bit(config, ends):
    config.target_modules = ["q_proj", "down_proj"]
    torch.manual_seed(0)
    model = get_peft_model(student_model().bfloat16(), config).eval()
    before, logits = {name: weight.clone() for name, weight in model.named_parameters()}, model(input_ids=IDS).logits
    for _ in range(3):
        with pytest.raises(RuntimeError, match="ends"), bases_kept(model):
            model.merge_adapter()
            assert any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
            if ends == "as it should":
                model.unmerge_adapter()
            raise RuntimeError("ends")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), name
    assert torch.equal(model(input_ids=IDS).logits, logits), "with the adapter beside them"
