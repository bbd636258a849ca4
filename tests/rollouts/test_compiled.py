"""A compiled decode step: the text of the uncompiled one, and each shape compiled once."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config
from peft import LoraConfig, get_peft_model
from test_generation import PROMPTS, cut, model_of, settings
from toys import student_model
from transformers import CompileConfig, TrainerCallback

from trl_ctopd import CrossTokenizerGKDConfig
from trl_ctopd.rollouts import compiled
from trl_ctopd.rollouts.compiled import CompiledDecode, check_compiled, chosen_backend, length_of, rows_of
from trl_ctopd.rollouts.generation import TransformersWriter, _generate, _SampledLogProbs


@pytest.fixture(scope="module")
def graphs():
    """One entry for each graph that is compiled, which takes no compiler here."""
    found = []

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "compile_config", lambda device: by(backend))
        yield found
    torch._dynamo.reset()


def by(backend) -> CompileConfig:
    config = CompileConfig(dynamic=False, mode=None, backend=backend)
    config._compile_all_devices = True
    return config


class Watched(CompiledDecode):
    """Knows how many rows its calls had, and how many tokens they wrote."""

    def __init__(self):
        super().__init__(falls_back=False)
        self.calls = []

    def __call__(self, model, input_ids, **given):
        output = super().__call__(model, input_ids, **given)
        self.calls.append((len(input_ids), output.sequences.shape[1] - input_ids.shape[1]))
        return output


@pytest.fixture(scope="module")
def llama(graphs):
    return model_of("Llama"), Watched()


def written(model, prompts, config, **options):
    return cut(_generate(model, prompts, config, **{"rows_leave": True, **options}))


@torch.no_grad()
def test_the_text_is_that_of_the_uncompiled_step_and_no_shape_is_compiled_twice(llama, graphs):
    model, decode = llama
    for prompts in (PROMPTS, PROMPTS[7:8], [[11, 12, 13]] * 9, [[15]]):
        for limit in (24, 5):
            for rows_leave in (True, False):
                options = {"prompts": prompts, "config": settings(max_new_tokens=limit), "rows_leave": rows_leave}
                assert written(model, decode=decode, **options) == written(model, **options)
    shapes = {rows_of(rows) for rows, _ in decode.calls}
    assert len(shapes) > 1 and len(graphs) == len(shapes)


@torch.no_grad()
def test_rows_that_have_ended_leave_where_the_rest_fits_into_fewer(llama):
    model, decode = llama
    decode.calls.clear()
    ends = sorted(map(len, written(model, PROMPTS, settings(), decode=decode)))
    begun, following = 0, [own for own, _ in decode.calls[1:]]
    assert decode.calls[0][0] == 24 and following
    for (rows, steps), left in zip(decode.calls, [*following, 0], strict=True):
        assert rows == sum(end > begun for end in ends)
        assert sum(end > begun + steps - 1 for end in ends) > rows / 2 or not left, "not later than at half"
        assert rows_of(left or 1) < rows_of(rows) or not left
        begun += steps
    assert begun == max(ends)


def test_shapes_are_few_and_hold_what_they_are_for():
    lengths = [length_of(tokens) for tokens in range(1, 5000)]
    assert all(tokens <= length <= max(128, 1.5 * tokens) for tokens, length in enumerate(lengths, start=1))
    assert sorted(set(lengths))[:9] == [64, 128, 192, 256, 384, 512, 768, 1024, 1536]
    assert [rows_of(rows) for rows in (1, 8, 9, 16, 17, 64, 65)] == [8, 8, 16, 16, 32, 64, 128]


@torch.no_grad()
def test_the_recorded_log_probs_are_those_of_plain_forward_passes_and_a_seed_gives_one_text(llama):
    (model, decode), config, texts = llama, settings(do_sample=True, top_k=0, temperature=0.7), []
    for _ in range(2):
        torch.manual_seed(3)
        recorder = _SampledLogProbs(len(PROMPTS), config)
        texts.append(written(model, PROMPTS, config, recorder=recorder, decode=decode))
    assert texts[0] == texts[1] and len({len(ids) for ids in texts[0]}) > 3
    for prompt, ids, own in zip(PROMPTS, texts[0], recorder.of_tokens, strict=True):
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(own[: len(ids)].double(), expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["a sliding window", "windows in every other layer"])
def test_a_window_much_shorter_than_the_text_is_kept_to_and_compiled_once(family, graphs):
    model, decode, before = model_of(family), CompiledDecode(falls_back=False), len(graphs)
    for prompts in (PROMPTS[:8], PROMPTS[:2] * 2):
        expected = written(model, prompts, settings())
        assert max(map(len, expected)) == 24
        assert written(model, prompts, settings(), decode=decode) == expected
    assert len(graphs) == before + 1


@torch.no_grad()
def test_an_activated_adapter_writes_the_text_of_the_uncompiled_step(graphs):
    prompts = [[*prompt, 5, 6, *prompt[:more]] for prompt, more in zip(PROMPTS[:3], (0, 1, 2), strict=True)]
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[5, 6])
    model = get_peft_model(model_of("Llama"), config)
    with_adapter_off = written(model, prompts, settings())
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = torch.randn(parameter.shape).double() / 2
    expected = written(model, prompts, settings())
    assert written(model, prompts, settings(), decode=CompiledDecode(falls_back=False)) == expected != with_adapter_off


@torch.no_grad()
def test_a_copy_of_a_student_that_has_written_writes_with_its_own_weights(llama):
    model, decode = llama
    config = settings(max_new_tokens=6)
    written(model, PROMPTS[:8], config, decode=decode)
    copied = copy.deepcopy(model)
    for weight in copied.parameters():
        weight.normal_(0, 0.15)
    expected = written(copied, PROMPTS[:8], config)
    assert expected != written(model, PROMPTS[:8], config)
    assert written(copied, PROMPTS[:8], config, decode=CompiledDecode(falls_back=False)) == expected
    assert torch.equal(pickle.loads(pickle.dumps(model)).lm_head.weight, model.lm_head.weight)


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


class Placed(CompiledDecode):
    """Knows where the weights were when it was called."""

    def __init__(self):
        super().__init__(falls_back=False)
        self.places = set()

    def __call__(self, model, **given):
        self.places.add(places_of(model))
        return super().__call__(model, **given)


def places_of(model) -> tuple[int, ...]:
    return tuple(weight.data_ptr() for weight in model.parameters())


@pytest.mark.parametrize(
    "options",
    [{"peft_config": LORA, "gradient_checkpointing": True}, {"bf16": True}],
    ids=["an adapter", "mixed precision"],
)
def test_nothing_is_compiled_after_the_second_step_and_no_weight_moves(options, graphs, build):
    trainer = build(generation_backend="transformers_compiled", max_steps=3, **options)
    assert isinstance(trainer.rollouts.write._decode, CompiledDecode)
    decode, counts = Placed(), []
    trainer.rollouts.write = TransformersWriter(
        trainer.generation_config, trainer.accelerator, trainer.args, decode=decode
    )

    class Counts(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            counts.append(len(graphs))

    trainer.add_callback(Counts())
    begun = len(graphs)
    trainer.train()
    assert begun < counts[0] and counts[1] == counts[2]
    assert decode.places == {places_of(trainer.model)}
    seconds = [entry["seconds/compilation"] for entry in trainer.state.log_history if "seconds/step" in entry]
    assert seconds[0] > 0 == seconds[2]


def failing(graph, inputs):
    raise NotImplementedError("an operation that this compiler does not know")


@torch.no_grad()
def test_where_torch_cannot_compile_the_text_is_written_all_the_same_and_that_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "compile_config", lambda device: by(failing))
    model, config, texts = model_of("Llama"), settings(do_sample=True, top_k=0), []
    decode = CompiledDecode(falls_back=True)
    with caplog.at_level(logging.WARNING, logger="trl_ctopd"):
        for options in ({"decode": decode}, {"decode": decode}, {}):
            torch.manual_seed(5)
            texts.append(written(model, PROMPTS, config, **options))
    assert texts[0] == texts[1] == texts[2]
    [said] = [record.getMessage() for record in caplog.records if "compile" in record.getMessage()]
    assert "LlamaForCausalLM for 32 rows and a cache of 64 tokens (BackendCompilerFailed: " in said
    assert "does not know), so that generation_backend='auto' is 'transformers' from here on" in said
    with pytest.raises(RuntimeError, match="(?s)could not compile.*does not know.*'transformers' writes without"):
        written(model, PROMPTS, config, decode=CompiledDecode(falls_back=False))


SPLIT = {"hf_device_map": {"model.layers.0": 0, "model.layers.1": "cpu"}}


@pytest.mark.parametrize(
    ("family", "attributes", "settings", "reason"),
    [
        ("Llama", {}, {}, None),
        ("a sliding window", {}, {}, None),
        ("Llama", {}, {"generation_kwargs": {"repetition_penalty": 1.1}}, None),
        ("a state instead of a cache", {}, {}, "does not compile MambaForCausalLM"),
        ("convolutions in the cache", {}, {}, "Lfm2ForCausalLM keeps more than keys and values"),
        ("linear attention", {}, {}, "does not compile MiniMaxForCausalLM"),
        ("Llama", SPLIT, {}, "spread over several devices"),
        ("Llama", {"_auto_class": "AutoModelForCausalLM"}, {}, "LlamaForCausalLM is code from the hub"),
        (
            "Llama",
            {"hf_quantizer": SimpleNamespace(is_compileable=False)},
            {},
            "does not compile a model quantized",
        ),
        ("Llama", {}, {"generation_kwargs": {"cache_implementation": "quantized"}}, "cache_implementation"),
    ],
)
def test_auto_compiles_on_cuda_where_it_can_and_else_says_why_not(
    family, attributes, settings, reason, tmp_path, monkeypatch, caplog
):
    """On the CPU, with a stand-in for the Accelerator of a GPU."""
    monkeypatch.setattr(compiled, "has_triton", lambda: True)
    model = model_of(family)
    for name, value in attributes.items():
        monkeypatch.setattr(type(model) if name.startswith("_") else model, name, value, raising=False)
    accelerator = SimpleNamespace(device=torch.device("cuda"), distributed_type="NO", is_main_process=True)
    args = CrossTokenizerGKDConfig(str(tmp_path), use_cpu=True, generation_backend="auto", **settings)
    with caplog.at_level(logging.INFO, logger="trl_ctopd"):
        chosen = chosen_backend(model, args, accelerator)
    assert chosen == ("transformers_compiled" if reason is None else "transformers")
    assert f"is {chosen!r} here" in caplog.text and (reason or "used from then on") in caplog.text
    args.generation_backend = "transformers_compiled"
    if reason is None:
        return check_compiled(model, args, accelerator)
    with pytest.raises(ValueError, match=f"cannot be used: .*{reason}.*Choose 'transformers', or 'auto'"):
        check_compiled(model, args, accelerator)


@pytest.mark.parametrize("backend", [{}, {"generation_backend": "auto"}])
def test_neither_by_default_nor_by_auto_does_a_run_on_a_cpu_compile(build, caplog, backend):
    with caplog.at_level(logging.INFO, logger="trl_ctopd"):
        trainer = build(**backend)
    assert trainer.rollouts.write._decode is None
    if not backend:
        return
    assert "generation_backend='auto' is 'transformers' here: on a CPU, compiling takes longer" in caplog.text


def test_a_student_that_cannot_be_compiled_is_refused_before_anything_is_trained(build):
    with pytest.raises(ValueError, match="cannot be used: .*flex_attention.*Choose 'transformers'"):
        build(model=student_model(attn_implementation="flex_attention"), generation_backend="transformers_compiled")


def test_a_machine_without_a_compiler_is_told_so(build, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(
        ValueError, match="cannot be used: torch compiles for a CPU with a C.. compiler, and finds none"
    ):
        build(generation_backend="transformers_compiled")
