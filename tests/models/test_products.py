"""Linear layers that multiply by oneDNN: the function of `nn.Linear`, on every processor; where they are used, and what of a model stays."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch import nn
from toys import SGD, fix_rollouts, prompts, step_of, student_model

from trl_ctopd.models import products
from trl_ctopd.models.heads import lm_head
from trl_ctopd.models.merging import mergeable, merged
from trl_ctopd.models.products import (
    LEAST,
    OneDnnLinear,
    faster_products,
    onednn_is_faster,
    packed,
    use_faster_products,
)
from trl_ctopd.rollouts.generation import write


pack, product = OneDnnLinear.pack, products.product
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")

ALONE = SimpleNamespace(distributed_type=DistributedType.NO)


@pytest.fixture
def everywhere(monkeypatch):
    """As on a processor where oneDNN is the faster library, for products of any size."""
    monkeypatch.setattr(products, "onednn_packs", lambda: True)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "LEAST", 1)


@pytest.fixture
def only_packed(monkeypatch):
    """As on a processor where oneDNN is the faster library for few rows and packed weights alone."""
    monkeypatch.setattr(products, "onednn_packs", lambda: True)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products, "_LEAST_PACKED", 1)


@pytest.fixture
def calls(monkeypatch):
    """How many products oneDNN has made: `calls[0]`."""
    count, own = [0], products.product

    def counted(*args):
        count[0] += 1
        return own(*args)

    monkeypatch.setattr(products, "product", counted)
    return count


@pytest.fixture
def layouts(monkeypatch):
    """Those of the weights by which oneDNN has multiplied."""
    seen = []
    monkeypatch.setattr(
        products, "product", lambda x, weight, bias=None: seen.append(weight.layout) or product(x, weight, bias)
    )
    return seen


def layer(inputs: int = 24, outputs: int = 40, bias: bool = True) -> OneDnnLinear:
    torch.manual_seed(0)
    return OneDnnLinear(inputs, outputs, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (3, 5, 24), (2, 1, 24)], ids=str)
@pytest.mark.parametrize(("layout", "outputs"), [("by rows", 40), ("by rows", 9), ("by columns", 40)])
def test_values_and_gradients_are_those_of_float64(everywhere, calls, bias, shape, layout, outputs):
    own = layer(outputs=outputs, bias=bias)
    if layout == "by columns":
        own.weight.data = own.weight.data.t().contiguous().t()
    exact = nn.Linear(24, outputs, bias=bias, dtype=torch.float64)
    exact.load_state_dict(own.state_dict())
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().double().requires_grad_()
    weights = torch.randn(*shape[:-1], outputs)
    found, expected = own(x), exact(y)
    (found * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    close = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(x.grad, y.grad, **close)
    for parameter, reference in zip(own.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, **close)
    assert calls[0] == 3


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (3, 5, 24), (300, 1, 24), (0, 24), (2, 0, 24)], ids=str)
@pytest.mark.parametrize("outputs", [40, 9, 1])
def test_packed_weights_give_what_float64_gives(bias, shape, outputs):
    own = layer(outputs=outputs, bias=bias)
    exact = nn.Linear(24, outputs, bias=bias, dtype=torch.float64)
    exact.load_state_dict(own.state_dict())
    x = torch.randn(shape)
    own.pack()
    own.weight.zero_()  # it is not read
    torch.testing.assert_close(own(x), exact(x.double()), rtol=1e-5, atol=1e-5, check_dtype=False)


@torch.no_grad()
def test_a_packed_layer_gives_what_a_plain_one_gives_where_onednn_cannot_take_the_product():
    own = layer()
    x, plain = torch.randn(7, 24), nn.Linear(24, 40)
    plain.load_state_dict(own.state_dict())
    own.pack()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(own(x), plain(x))
    own.bias.data, plain.bias.data = torch.ones(()), torch.ones(())
    torch.testing.assert_close(own(x), plain(x))


@torch.no_grad()
def test_a_weight_that_is_made_for_each_pass_is_read_where_the_layer_is_packed(everywhere):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    own, x = layer(), torch.randn(7, 24)
    expected = nn.functional.linear(x, 2 * own.weight, own.bias)
    own.pack()
    nn.utils.parametrize.register_parametrization(own, "weight", Doubled())
    torch.testing.assert_close(own(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("others", [[], ["k_proj"]], ids=["alone", "beside LoRA"])
def test_a_student_writes_with_an_adapter_on_its_parameters(everywhere, build, others):
    torch.manual_seed(0)
    targets = {"target_parameters": ["q_proj.weight", "down_proj.weight"], "target_modules": others}
    config = LoraConfig(r=4, lora_alpha=32, init_lora_weights=False, **targets)
    trainer = build(model=student_model(hidden_size=256, intermediate_size=256), peft_config=config)
    model, prompt = trainer.model, list(range(5, 15))
    assert products._LEAST_PACKED <= 256 * 256
    settings = trainer.generation_config, trainer.accelerator, trainer.args
    with faster_products(model, trainer.accelerator):
        [(ids, drawn_at)] = write(model, [prompt], *settings, merge=True, record=True)
    read = model.eval()(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / trainer.args.temperature
    expected = read.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(drawn_at), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_packed_for_a_while_and_small_ones_not_at_all(fails, monkeypatch):
    monkeypatch.setattr(products, "_LEAST_PACKED", 24 * 40)
    model = nn.Sequential(layer(), layer(40, 23), nn.Linear(23, 60))
    x = torch.randn(7, 24)
    expected = model(x)
    with pytest.raises(RuntimeError, match="amid") if fails else nullcontext(), packed(model):
        with packed(model):  # what is packed stays so
            pass
        assert [getattr(own, "packed", None) is not None for own in model] == [True, False, False]
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        if fails:
            raise RuntimeError("amid")
    assert model[0].packed is None and torch.equal(model(x), expected)


def test_an_input_in_another_order_of_memory_is_read_as_what_it_is(everywhere):
    own = layer()
    x = torch.randn(24, 6).t()
    torch.testing.assert_close(own(x), nn.functional.linear(x, own.weight, own.bias), rtol=1e-5, atol=1e-5)
    wide = torch.randn(6, 48)[:, ::2]
    torch.testing.assert_close(own(wide), nn.functional.linear(wide, own.weight, own.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "bias",
    [lambda: torch.randn(40, 3)[:, 1], lambda: torch.ones(1).expand(40), lambda: torch.ones(()), lambda: torch.ones(1)],
    ids=["a column", "one number for all", "a number", "of shape (1,)"],
)
def test_a_bias_is_read_as_what_it_is(everywhere, bias):
    layer = OneDnnLinear(24, 40)
    layer.bias = nn.Parameter(bias())
    input = torch.randn(7, 24)
    torch.testing.assert_close(layer(input), input @ layer.weight.t() + layer.bias)
    torch.testing.assert_close(products.linear(input, layer.weight, layer.bias), layer(input))


def test_a_switched_layer_is_transformed_and_derived_twice_as_a_plain_one(everywhere):
    layer, plain = OneDnnLinear(24, 40), nn.Linear(24, 40)
    plain.load_state_dict(layer.state_dict())
    input = torch.randn(7, 24)

    def second(own):
        given = input.clone().requires_grad_()
        [first] = torch.autograd.grad(own(given).pow(3).sum(), given, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [given, own.weight, own.bias])

    torch.testing.assert_close(second(layer), second(plain), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(layer)(input[:, None]), torch.func.vmap(plain)(input[:, None]))
    found = (torch.func.jvp(own, (input,), (input,)) for own in (layer, plain))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("shape", [(24,), (7, 24), (3, 5, 24), (2, 3, 5, 24)], ids=str)
def test_what_a_switched_layer_gives_can_be_changed_in_place_as_a_plain_ones(everywhere, shape):
    layer, plain, input = OneDnnLinear(24, 40), nn.Linear(24, 40), torch.randn(shape)
    plain.load_state_dict(layer.state_dict())
    by = torch.ones(1, requires_grad=True)

    def derived(own):
        given = input.clone().requires_grad_()
        found = own(given)
        found += given.sum() * by  # as adapters do
        found = found.clamp_(-6, 6).pow(3)  # as OLMo does
        [first] = torch.autograd.grad(found.sum(), given, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), [given, own.weight, own.bias, by])

    torch.testing.assert_close(derived(layer), derived(plain), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("packs", [False, True])
def test_what_is_made_without_gradients_can_be_changed_in_place_with_them(everywhere, packs):
    own, by = layer(), torch.ones(1, requires_grad=True)
    if packs:
        own.pack()
    with torch.no_grad():
        found = own(torch.randn(3, 5, 24))
    found *= by
    found.sum().backward()
    torch.testing.assert_close(by.grad, found.detach().sum()[None])


def test_nothing_is_computed_or_kept_for_a_gradient_that_is_not_asked_for(everywhere, calls):
    own = layer(bias=False).requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.shape) or saved, lambda saved: saved):
        found = own(torch.randn(3, 24, requires_grad=True)).sum()
    found.backward()
    assert calls[0] == 2 and own.weight.grad is None and kept == [own.weight.shape]
    with torch.no_grad():
        assert own(torch.randn(3, 24)).grad_fn is None


def test_recomputed_layers_have_the_same_gradient(everywhere):
    own, x = layer(), torch.randn(3, 24, requires_grad=True)
    own(x).square().sum().backward()
    expected, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(own, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_small_products_and_other_types_stay_with_torch(calls, monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    own = layer()
    rows = LEAST // own.weight.numel() + 1
    own(torch.randn(rows - 1, 24))
    assert calls[0] == 0
    own(torch.randn(rows, 24))
    assert calls[0] == 1
    monkeypatch.setattr(products, "LEAST", 1)
    assert own(torch.randn(0, 24)).shape == (0, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert own(torch.randn(3, 24)).dtype == torch.bfloat16
    copy.deepcopy(own).double()(torch.randn(3, 24, dtype=torch.float64))
    copy.deepcopy(own).to(torch.bfloat16)(torch.randn(3, 24, dtype=torch.bfloat16))
    copy.deepcopy(own).to("meta")(torch.randn(3, 24, device="meta"))
    with torch.backends.mkldnn.flags(enabled=False):
        own(torch.randn(3, 24))
    assert calls[0] == 1


def test_a_compiled_layer_is_one_graph_of_torchs_own_product(everywhere, calls):
    own, x = layer(), torch.randn(3, 24)
    torch.testing.assert_close(
        torch.compile(own, backend="eager", fullgraph=True)(x), nn.functional.linear(x, own.weight, own.bias)
    )
    assert calls[0] == 0


@pytest.mark.parametrize(
    ("processor", "capability", "for_all", "packed_from"),
    [
        ("vendor_id\t: AuthenticAMD\n", "AVX512", True, 1),
        ("AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD", "AVX512", True, 1),
        ("vendor_id\t: AuthenticAMD\n", "AVX2", False, None),
        ("vendor_id\t: GenuineIntel\n", "AVX512", False, 4),
        ("vendor_id\t: GenuineIntel\n", "AVX2", False, None),
        ("", "DEFAULT", False, None),
    ],
)
def test_with_avx512_onednn_is_faster_on_amd_and_for_some_packed_rows_on_intel(
    monkeypatch, processor, capability, for_all, packed_from
):
    monkeypatch.setattr(products, "_processor", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(products, "onednn_is_faster", onednn_is_faster.__wrapped__)
    assert products.onednn_is_faster() is for_all
    packs = [rows for rows in range(1, 40) if products.packing_is_faster(rows)]
    assert packs == ([] if packed_from is None else [*range(packed_from, 40)])


def test_plain_layers_are_switched_and_others_stay(everywhere):
    class Own(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(2, 2), Own(2, 2), nn.Embedding(2, 2), nn.Linear(2, 2, device="meta")])
    for kind in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        use_faster_products(model, SimpleNamespace(distributed_type=kind))
        assert type(model[0]) is nn.Linear
    weights = model.state_dict()
    use_faster_products(model, ALONE)
    assert [type(module) for module in model] == [OneDnnLinear, Own, nn.Embedding, nn.Linear]
    assert list(model.state_dict()) == list(weights)


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_layers_are_plain_again_but_those_that_were_not(everywhere, fails):
    model = nn.Sequential(nn.Linear(2, 2), OneDnnLinear(2, 2))
    with pytest.raises(RuntimeError, match="amid") if fails else nullcontext(), faster_products(model, ALONE):
        with faster_products(model, ALONE):
            assert {type(own) for own in model} == {OneDnnLinear}
        assert {type(own) for own in model} == {OneDnnLinear}
        if fails:
            raise RuntimeError("amid the run")
    assert [type(own) for own in model] == [nn.Linear, OneDnnLinear]


def test_on_other_processors_all_stay(monkeypatch):
    monkeypatch.setattr(products, "onednn_packs", lambda: False)
    model = nn.Sequential(nn.Linear(2, 2))
    use_faster_products(model, ALONE)
    assert type(model[0]) is nn.Linear


@torch.no_grad()
def test_a_merged_adapter_is_packed_and_taken_out_again_exactly(everywhere, calls):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model, ids = get_peft_model(student_model(), config).eval(), torch.arange(40).view(2, 20) % 30
    expected = model(input_ids=ids).logits
    use_faster_products(model, ALONE)
    apart = model(input_ids=ids).logits
    torch.testing.assert_close(apart, expected, rtol=1e-4, atol=1e-5)
    weights = [weight.clone() for weight in model.parameters()]
    layers, before = mergeable(model), calls[0]
    with merged(layers, pack=True):
        assert all(own.get_base_layer().packed is not None for own in layers)
        assert all(torch.equal(weight, own) for weight, own in zip(weights, model.parameters(), strict=True))
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert calls[0] > before
    assert all(
        torch.equal(weight, own) and own.is_contiguous()
        for weight, own in zip(weights, model.parameters(), strict=True)
    )
    assert torch.equal(model(input_ids=ids).logits, apart)
    assert all(own.get_base_layer().packed is None for own in layers)


@pytest.mark.parametrize(("settings", "packs"), [({}, True), ({"bf16": True}, False)], ids=["float32", "autocast"])
def test_a_student_writes_with_packed_weights_in_float32_alone(
    everywhere, build, layouts, monkeypatch, settings, packs
):
    monkeypatch.setattr(products, "_LEAST_PACKED", 1)
    trainer = build(peft_config=LoraConfig(r=4, target_modules="all-linear"), **settings)
    layers = []
    monkeypatch.setattr(OneDnnLinear, "pack", lambda own: (layers.append(own), pack(own)))
    trainer.train()
    assert bool(layers) == packs == (torch._mkldnn in layouts)
    assert all(own.packed is None for own in layers)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    ("batch", "settings", "packs"),
    [(4, {}, True), (3, {}, False), (4, {"generation_batch_size": 3}, False)],
    ids=["four", "three", "three of four"],
)
def test_where_only_packed_weights_are_faster_they_are_all_that_onednn_multiplies_by(
    only_packed, build, layouts, adapter, batch, settings, packs
):
    settings |= {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if adapter else {}
    trainer = build(dataset=prompts(4), per_device_train_batch_size=batch, **settings)
    trainer.train()
    assert set(layouts) == ({torch._mkldnn} if packs else set())


def test_a_copy_multiplies_by_its_own_weights_and_peft_merges_for_good(everywhere):
    torch.manual_seed(0)
    model = get_peft_model(
        student_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    use_faster_products(model, ALONE)
    ids = torch.arange(20).view(1, 20)
    expected, other = model(input_ids=ids).logits, copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert torch.equal(other(input_ids=ids).logits, expected)
    plain = other.merge_and_unload()
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"peft_config": LoraConfig(r=4, target_modules="all-linear")}], ids=["full", "LoRA"]
)
def test_a_step_moves_the_weights_as_it_does_by_torchs_own_products(build, calls, monkeypatch, settings):
    def step() -> torch.Tensor:
        return step_of(fix_rollouts(build(dataset=prompts(4), per_device_train_batch_size=4, **SGD, **settings)))

    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    expected = step()
    assert calls[0] == 0
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "LEAST", 1)
    torch.testing.assert_close(step(), expected, rtol=1e-3, atol=1e-6)
    assert calls[0] > 0 and expected.abs().max() > 1e-5


@pytest.mark.parametrize("faster", [True, False])
def test_a_whole_lm_head_multiplies_by_the_faster_library_too(calls, monkeypatch, faster):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: faster)
    monkeypatch.setattr(products, "LEAST", 1)
    model = student_model()
    hidden = torch.randn(5, model.config.hidden_size, requires_grad=True)
    weight = model.get_output_embeddings().weight
    exact, double = weight.detach().double().requires_grad_(), hidden.detach().double().requires_grad_()
    lm_head(model, torch.float32, 1.0)(hidden).log_softmax(-1)[:, :3].sum().backward()
    (double @ exact.t()).log_softmax(-1)[:, :3].sum().backward()
    torch.testing.assert_close(hidden.grad.double(), double.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)
    assert calls[0] == 3 * faster


@pytest.mark.parametrize("faster", [True, False])
def test_a_product_into_a_tile_is_that_of_float64(calls, monkeypatch, faster):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: faster)
    monkeypatch.setattr(products, "LEAST", 1)
    torch.manual_seed(0)
    rows, weight, buffer = torch.randn(5, 12), torch.randn(30, 12), torch.empty(8, 40)
    tile = buffer[:5, :20]
    products.multiply(rows, weight[:20], out=tile)
    torch.testing.assert_close(buffer[:5, :20].double(), rows.double() @ weight[:20].double().t(), rtol=1e-5, atol=1e-5)
    assert calls[0] == faster
