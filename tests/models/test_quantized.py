"""Students whose weights are quantized: whether what lies below a layer can be trained, and checkpoints of compressed-tensors."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from toys import student_model, student_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from trl_ctopd.models import loading
from trl_ctopd.models.quantized import prepare_quantized, saved_quantization, with_quantization_config


DEQUANTIZED = {"quantization_config": {"quant_method": "compressed-tensors", "dequantize": True}}


class ToyHfQuantizer(HfQuantizer):
    is_trainable = True

    def _process_model_before_weight_loading(self, model, **kwargs):
        raise AssertionError("the model is loaded already")

    def is_serializable(self):
        return True


def rounded(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
    return (x / scale).round() * scale


class Rounding(nn.Linear):
    """As compressed-tensors and torchao compute with 8-bit activations: no gradient comes back."""

    def forward(self, x):
        return super().forward(rounded(x.detach()))


class StraightThrough(nn.Linear):
    def forward(self, x):
        return super().forward(x + (rounded(x) - x).detach())


class Halving(nn.Linear):
    def forward(self, x):
        return super().forward(x / 2 + x.detach() / 2)


def quantized(kind: type, place: str = "model.layers.1.mlp.down_proj"):
    student = student_model()
    student.get_submodule(place).__class__ = kind
    student.hf_quantizer = ToyHfQuantizer(QuantizationConfigMixin(quant_method="toy"))
    return student


@pytest.mark.parametrize(("kind", "share"), [(Rounding, "0%"), (Halving, "50%")])
def test_a_quantized_student_with_a_layer_that_passes_no_right_gradient_is_refused(build, kind, share):
    with pytest.raises(
        ValueError, match=f"its {kind.__name__} model.layers.1.mlp.down_proj gives its input {share} of the gradient"
    ):
        build(model=quantized(kind), peft_config=LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_quantized_student_that_rounds_with_a_straight_gradient_is_trained(build, autocast):
    trainer = build(
        model=quantized(StraightThrough), peft_config=LoraConfig(target_modules="all-linear"), bf16=autocast
    )
    before = {name: part.detach().clone() for name, part in trainer.model.named_parameters() if "lora_B" in name}
    trainer.train()
    assert all(not torch.equal(before[name], trainer.model.get_parameter(name)) for name in before)


class PackedByWriting(nn.Linear):
    """As bitsandbytes' 4-bit layers on a CPU that computes in bfloat16: packed at the first pass in eval mode, for inference alone."""

    support_avx512bf16_for_cpu = True
    packed = False

    def forward(self, x):
        self.packed |= self.support_avx512bf16_for_cpu and not self.training and not x.requires_grad
        return super().forward(x.detach() if self.packed else x)


def test_a_quantized_student_whose_layers_would_be_packed_by_its_first_rollout_is_trained(build):
    trainer = build(model=quantized(PackedByWriting), peft_config=LoraConfig(target_modules="all-linear"))
    layer = trainer.model.get_base_model().model.layers[1].mlp.down_proj.base_layer
    assert isinstance(layer, PackedByWriting)
    trainer.train()
    assert not layer.packed
    layer.packed = True
    with pytest.raises(
        ValueError, match="down_proj gives its input 0% .*packed it for inference.*load the student again"
    ):
        prepare_quantized(trainer.model.get_base_model())


@pytest.mark.slow
def test_an_adapter_on_4_bits_has_the_gradient_after_writing_that_it_had_before(build, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantized]'")
    student_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    four_bits = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}}
    adapter = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = build(model=str(tmp_path), model_init_kwargs=four_bits, peft_config=adapter).model
    ids, found = torch.arange(5, 25)[None], []
    for _ in range(2):
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: part.grad.clone() for name, part in model.named_parameters() if "lora_" in name})
        with torch.no_grad():
            model.eval()(input_ids=ids)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_modules_trained_whole_beside_4_bits_keep_their_dtype_and_are_trained(build, tmp_path, whole):
    """TRL makes them bfloat16, and the base gives float32 states."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantized]'")
    student_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    adapter = LoraConfig(target_modules=["q_proj"], modules_to_save=whole, task_type="CAUSAL_LM")
    four_bits = {"quantization_config": {"load_in_4bit": True}}
    trainer = build(model=str(tmp_path), model_init_kwargs=four_bits, peft_config=adapter, learning_rate=1e-2)
    head = trainer.model.get_output_embeddings().modules_to_save["default"]
    before = head.weight.detach().clone()
    trainer.train()
    assert head.weight.dtype == torch.float32 and not torch.equal(head.weight, before)


def test_the_check_of_gradients_draws_no_random_numbers_and_leaves_the_mode_as_it_was():
    student = quantized(StraightThrough).eval()
    state = torch.get_rng_state()
    prepare_quantized(student)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module.training for module in student.modules())
    assert all(part.grad is None for part in student.parameters())


def test_a_dict_of_a_command_line_becomes_a_quantization_config():
    found = with_quantization_config({"dtype": "auto", "quantization_config": {"load_in_8bit": True}})
    assert isinstance(found["quantization_config"], BitsAndBytesConfig) and found["quantization_config"].load_in_8bit
    given = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    assert with_quantization_config(given) is given


def test_what_a_folder_says_of_its_quantization_is_found(tmp_path):
    assert saved_quantization(str(tmp_path / "missing")) is None
    student_model().save_pretrained(tmp_path)
    assert saved_quantization(str(tmp_path)) is None
    config = json.loads((tmp_path / "config.json").read_text())
    for place in (config, config.setdefault("text_config", {})):
        place["quantization_config"] = {"quant_method": "fp8"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert saved_quantization(str(tmp_path)) == {"quant_method": "fp8"}
        del place["quantization_config"]


def test_a_student_of_compressed_tensors_is_refused_with_the_way_out_before_it_is_loaded(build, tmp_path):
    folder = tmp_path / "student"
    student_model().config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
    student = student_model()
    student.hf_quantizer = ToyHfQuantizer(QuantizationConfigMixin(quant_method="compressed-tensors"))
    for model in (str(folder), student):
        with pytest.raises(
            ValueError, match="compressed-tensors.*load it dequantized, .model_init_kwargs=.*'dequantize': True"
        ):
            build(model=model, peft_config=LoraConfig())


@pytest.fixture
def eight_bits(tmp_path):
    """The folder of a student in which weights and activations of the layers have 8 bits (W8A8), and its dequantized weights."""
    needed = "needs compressed-tensors: pip install compressed-tensors"
    pytest.importorskip("compressed_tensors", reason=needed)
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme

    model, folder = student_model(), tmp_path / "w8a8"
    scheme = preset_name_to_scheme("W8A8", ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    expected = {name: weight.detach().clone() for name, weight in model.state_dict().items() if "_scale" not in name}
    for name, layer in model.named_modules():
        if hasattr(layer, "weight_scale"):
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
            layer.weight_scale.data.copy_(scale)
            expected[f"{name}.weight"] = (layer.weight.detach() / scale).round() * scale
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    student_tokenizer().save_pretrained(folder)
    return str(folder), expected


@pytest.mark.parametrize("adapter", [False, True])
def test_a_dequantized_student_of_compressed_tensors_is_trained_and_saved_as_plain_weights(
    build, eight_bits, tmp_path, adapter
):
    folder, expected = eight_bits
    settings = {"model": folder, "model_init_kwargs": DEQUANTIZED}
    trainer = build(**settings, peft_config=LoraConfig(target_modules="all-linear") if adapter else None)
    base = trainer.model.get_base_model() if adapter else trainer.model
    for name, weight in base.state_dict().items():
        if "lora_" not in name:
            torch.testing.assert_close(weight, expected[name.replace(".base_layer", "")], rtol=1e-5, atol=1e-6)
    before = {name: part.detach().clone() for name, part in trainer.model.named_parameters() if part.requires_grad}
    trainer.train()
    still = [name for name, part in before.items() if torch.equal(part, trainer.model.get_parameter(name))]
    assert not [name for name in still if "lora_A" not in name], "A has no gradient while B is zero"
    whole = trainer.model.merge_and_unload() if adapter else trainer.model
    whole.save_pretrained(tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "saved", "expected"),
    [
        ({"device_map": None}, "gptq", {"": torch.device("cuda:3")}),
        ({"device_map": None, "quantization_config": QuantoConfig(weights="int8")}, None, {"": torch.device("cuda:3")}),
        ({"device_map": None, "quantization_config": {"load_in_8bit": True}}, None, None),
        ({"device_map": None}, "bitsandbytes", None),
        ({"device_map": None}, None, None),
        ({"device_map": {"": "cpu"}}, "gptq", {"": "cpu"}),
    ],
)
def test_a_quantized_model_that_nothing_places_is_loaded_on_the_device_of_its_process(
    monkeypatch, tmp_path, kwargs, saved, expected
):
    student_model().config.save_pretrained(tmp_path)
    if saved:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": saved}}))
    given = {}
    monkeypatch.setattr(loading, "PartialState", lambda: SimpleNamespace(device=torch.device("cuda:3")))
    monkeypatch.setattr(loading, "create_model_from_path", lambda name, **kwargs: given.update(kwargs))
    loading.load_model(str(tmp_path), kwargs)
    assert given["device_map"] == expected
