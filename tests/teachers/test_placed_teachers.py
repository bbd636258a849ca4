"""Teachers that `teacher_model_init_kwargs` places or quantizes: on the CPU, where each of them can be loaded, beside the same
teacher as it is."""

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from toys import prompts, teacher_model, teacher_tokenizer
from transformers import AutoModelForCausalLM, Phi3Config

from trl_ctopd.teachers import local
from trl_ctopd.teachers.local import LocalTeacher, load_teacher


TEXTS = [[5, 6, 7], [8, 9]], [[40, 41, 42, 43], [50, 51]]
ON_DISK = {
    **dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"),
    "model.layers.1": "disk",
}
QUANTIZED = {
    "4 bits": {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}},
    "8 bits": {"quantization_config": {"load_in_8bit": True}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    teacher_model(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    teacher_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def trained(build, folder):
    """A trainer that has taken two steps from the teacher in `folder`, loaded with these settings."""

    def trained(init_kwargs: dict, **settings):
        trainer = build(
            teacher=folder,
            teacher_model_init_kwargs=init_kwargs,
            dataset=prompts(8),
            max_steps=2,
            per_device_train_batch_size=2,
            **settings,
        )
        trainer.train()
        return trainer

    return trained


def gaps(trainer) -> list[float]:
    return [entry["gap/nats_per_byte"] for entry in trainer.state.log_history if "loss" in entry]


def log_probs(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, ON_DISK], ids=["auto", "cpu", "some of it on disk"])
def test_a_teacher_placed_by_a_device_map_teaches_the_same(trained, tmp_path, device_map):
    as_it_is = trained({})
    placed = trained({"device_map": device_map, "offload_folder": str(tmp_path / "offload")})
    torch.testing.assert_close(gaps(placed), gaps(as_it_is), rtol=1e-6, atol=1e-6)
    assert gaps(placed)[0] != gaps(placed)[1]
    if device_map is ON_DISK:
        assert placed.teacher.model.hf_device_map == ON_DISK
        assert placed.teacher.model.model.layers[1].mlp.up_proj.weight.device.type == "meta", "where it was put"


def test_on_a_cpu_rows_that_are_not_packed_are_read_with_those_of_like_length(monkeypatch):
    accelerator, model, lengths = Accelerator(cpu=True), teacher_model(), (40, 30, 39, 31)
    prompts = [list(range(n, n + length - 3)) for n, length in enumerate(lengths)]
    completions = [[50 + n, 60, 70] for n in range(len(lengths))]
    teacher, shapes = LocalTeacher(model, accelerator, batch_size=8), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = teacher.log_probs(prompts, completions)
    assert shapes == [(2, 40), (2, 31)]
    for prompt, completion, own in zip(prompts, completions, found, strict=True):
        torch.testing.assert_close(own, log_probs(model, prompt, completion), rtol=1e-4, atol=1e-4)
    shapes.clear()
    monkeypatch.setattr(local, "is_sharded", lambda *_: True)  # processes that share a model make the same calls
    teacher.log_probs(prompts, completions)
    assert shapes == [(4, 40)]


def test_a_row_is_read_alike_beside_a_long_one_where_positions_turn(monkeypatch):
    """Phi-3's longrope: transformers takes the factors for long texts for all rows of a pass that has a long one."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    limits = {"max_position_embeddings": 512, "original_max_position_embeddings": 36}
    sizes = {
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    config = Phi3Config(**sizes, **limits, pad_token_id=0, initializer_range=0.3, rope_parameters=rope)
    model = AutoModelForCausalLM.from_config(config).eval()
    short, long = (list(range(5, 15)), list(range(20, 45))), (list(range(6, 16)), list(range(20, 50)))
    alone = [log_probs(model, *row) for row in (short, long)]
    teacher = LocalTeacher(model, Accelerator(cpu=True), batch_size=8)
    torch.testing.assert_close(
        teacher.log_probs(*map(list, zip(short, long, strict=True))), alone, rtol=1e-4, atol=1e-4
    )
    monkeypatch.setattr(teacher, "_turning_length", 512)
    assert (teacher.log_probs(*map(list, zip(short, long, strict=True)))[0] - alone[0]).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("settings", QUANTIZED.values(), ids=QUANTIZED)
@pytest.mark.parametrize("saved", [False, True], ids=["quantized as it is loaded", "saved quantized"])
def test_a_quantized_teacher_gives_its_own_log_probs_and_teaches(trained, folder, tmp_path, settings, saved):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantized]'")
    if saved:
        AutoModelForCausalLM.from_pretrained(folder, **settings).save_pretrained(tmp_path / "quantized")
        path, settings = str(tmp_path / "quantized"), {}
    else:
        path = folder
    model = load_teacher(path, settings, False, Accelerator(cpu=True))
    assert model.is_quantized
    teacher = LocalTeacher(model, Accelerator(cpu=True), batch_size=1)
    for prompt, completion, found in zip(*TEXTS, teacher.log_probs(*TEXTS), strict=True):
        torch.testing.assert_close(found, log_probs(model, prompt, completion), rtol=1e-4, atol=1e-4)
    if not saved:
        trainer = trained(settings)
        assert trainer.teacher.model.is_quantized
        own, whole = gaps(trainer)[0], gaps(trained({}))[0]
        assert own != whole and own == pytest.approx(whole, rel=0.1), "a little worse for wear"


@pytest.mark.slow
def test_a_quantized_student_learns_through_an_adapter_and_is_refused_without(build, folder):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantized]'")
    settings = {"model": folder, "processing_class": teacher_tokenizer(), "model_init_kwargs": QUANTIZED["4 bits"]}
    trainer = build(**settings, peft_config=LoraConfig(r=4))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)
    loaded = AutoModelForCausalLM.from_pretrained(folder, **QUANTIZED["4 bits"])
    with pytest.raises(ValueError, match="quantized.*train an adapter on it"):
        build(model=loaded, processing_class=teacher_tokenizer())
