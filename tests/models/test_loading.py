"""Models as they come: adapters by name or as modules, and students that could not be saved."""

import itertools
import json
import shutil

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from tokenizers_for_tests import unigram
from toys import (
    SGD,
    SHAPE,
    STUDENT_TEMPLATE,
    step_of,
    student_model,
    student_tokenizer,
    teacher_model,
    teacher_tokenizer,
    weights,
)
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    Glm4MoeConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from trl_ctopd import CrossTokenizerDPOConfig, CrossTokenizerDPOTrainer
from trl_ctopd.models.loading import adapter_base, check_saves, load_model, load_tokenizer
from trl_ctopd.models.sharding import keep_apart


LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def student(tmp_path):
    return saved(student_model(), student_tokenizer(), tmp_path / "student")


@pytest.fixture
def first_run(build, tmp_path, student):
    """The folder of an adapter that a run has saved."""
    trainer = build(model=student, peft_config=lora(), max_steps=3, output_dir=str(tmp_path / "first"))
    trainer.train()
    trainer.save_model()
    return tmp_path / "first"


def test_an_adapter_that_a_run_has_saved_teaches_the_next_by_name_and_as_a_module(build, first_run, student):
    settings = {"optim": "sgd", "learning_rate": 1.0, "teacher_processing_class": student_tokenizer()}
    module = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student, dtype="float32"), first_run)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(student, dtype="float32"), first_run)
    steps = [
        step_of(build(model=student_model(3), teacher=teacher, **settings))
        for teacher in (str(first_run), module, whole.merge_and_unload())
    ]
    assert steps[2].abs().max() > 1e-3
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=0)
    torch.testing.assert_close(steps[0], steps[2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["dpca", "bpm"])
def test_an_adapter_as_teacher_learns_nothing(build, first_run, loss):
    tokenizer = {"teacher_processing_class": student_tokenizer()}
    trainer = build(model=student_model(3), teacher=str(first_run), distillation_loss=loss, **tokenizer)
    before = {name: value.clone() for name, value in trainer.teacher_model.state_dict().items()}
    trainer.train()
    for name, value in trainer.teacher_model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_an_adapter_by_name_is_trained_on_as_the_student(build, first_run, tmp_path):
    trainer = build(model=str(first_run), processing_class=None)
    assert isinstance(trainer.model, PeftModel)
    before = weights(trainer).clone()
    trainer.train()
    assert not torch.equal(weights(trainer), before)
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert names and all("lora_" in name for name in names)
    with pytest.raises(ValueError, match="is an adapter already, and `peft_config` asks for another"):
        build(model=str(first_run), peft_config=lora())


def test_a_new_adapter_on_a_model_that_transformers_has_loaded_with_one_is_refused(build, first_run, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(first_run)
    with pytest.raises(ValueError, match="what it has learned would be lost"):
        build(model=model, peft_config=lora())
    args = CrossTokenizerDPOConfig(str(tmp_path / "pairs"), use_cpu=True, bf16=False, report_to=[])
    rows = Dataset.from_list([{"prompt": "What is 1?", "chosen": " one", "rejected": " two"}])
    with pytest.raises(ValueError, match="what it has learned would be lost"):
        CrossTokenizerDPOTrainer(
            model,
            teacher_model(),
            args,
            rows,
            processing_class=student_tokenizer(),
            teacher_processing_class=teacher_tokenizer(),
            peft_config=lora(),
        )


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(build, tmp_path, student):
    base = AutoModelForCausalLM.from_pretrained(student)
    folder = saved(get_peft_model(base, lora()), None, tmp_path / "bare")
    assert adapter_base(folder) == student
    trainer = build(model=folder, processing_class=None)
    assert trainer.processing_class.get_vocab() == student_tokenizer().get_vocab()


def test_an_adapter_that_does_not_say_of_which_model_is_refused_in_words(tmp_path):
    folder = saved(get_peft_model(student_model(), lora()), None, tmp_path / "bare")
    with pytest.raises(ValueError, match="does not say of which model"):
        adapter_base(folder)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_adapter_with_weights_that_fit_nothing_is_refused_in_words(build, tmp_path, student, side):
    base = AutoModelForCausalLM.from_pretrained(student)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    folder = saved(adapted, student_tokenizer(), tmp_path / "adapter")
    LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path=student).save_pretrained(
        folder
    )
    with pytest.raises(ValueError, match=r"of which 4 fit nothing in LlamaForCausalLM .*down_proj.*merge_and_unload"):
        if side == "student":
            build(model=folder, processing_class=None)
        else:
            build(teacher=folder, teacher_processing_class=student_tokenizer())


@pytest.mark.parametrize(
    ("shared", "rslora", "refusal"),
    [
        (0, False, None),
        (1, False, "of which 6 fit nothing in Glm4MoeForCausalLM .*shared_experts"),
        (0, True, "rsLoRA"),
    ],
)
def test_an_adapter_on_each_expert_is_read_into_fused_ones_or_refused(build, tmp_path, shared, rslora, refusal):
    """As transformers 4 has trained it, which has a module for each expert. PEFT has no place for what is on shared experts, and scales rsLoRA
    otherwise."""
    own = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1}
    own |= {"head_dim": 16, "first_k_dense_replace": 0, "n_shared_experts": shared, "num_hidden_layers": 1}
    config = Glm4MoeConfig(**{**SHAPE, "vocab_size": len(student_tokenizer()), **own})
    base = saved(AutoModelForCausalLM.from_config(config), student_tokenizer(), tmp_path / "base")
    ends = {"gate": (32, 64), "up": (32, 64), "down": (64, 32)}
    layers = [f"experts.{n}." for n in range(4)] + ["shared_experts."] * shared
    found = {}
    for layer, (part, (size, out)) in itertools.product(layers, ends.items()):
        at = f"base_model.model.model.layers.0.mlp.{layer}{part}_proj"
        found |= {f"{at}.lora_A.weight": torch.randn(8, size), f"{at}.lora_B.weight": torch.randn(out, 8)}
    adapter = LoraConfig(
        r=8,
        target_modules=[f"{part}_proj" for part in ends],
        use_rslora=rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    adapter.save_pretrained(tmp_path / "adapter")
    save_file(found, tmp_path / "adapter" / "adapter_model.safetensors")
    if refusal is None:
        trainer = build(model=str(tmp_path / "adapter"), processing_class=None)
        loaded = {n: p for n, p in trainer.model.named_parameters() if "lora_B" in n}
        assert loaded and all(weight.count_nonzero() for weight in loaded.values())
        return
    with pytest.raises(ValueError, match=refusal):
        build(model=str(tmp_path / "adapter"), processing_class=None)


# --- what could not be saved


@pytest.mark.parametrize("flag", [{"temperature": 0.6}, {"top_p": 0.9}, {"top_k": 20}])
def test_sampling_settings_without_do_sample_are_made_such_as_can_be_saved(build, tmp_path, caplog, flag):
    model = student_model()
    for name, value in flag.items():
        setattr(model.generation_config, name, value)
    trainer = build(model=model, save_strategy="steps", save_steps=1)
    assert "sampling settings without `do_sample`" in caplog.text
    trainer.train()
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1").generation_config
    assert config.do_sample and {name: getattr(config, name) for name in flag} == flag


def test_settings_of_beams_without_beams_are_refused_and_not_called_sampling(build, caplog):
    model = student_model()
    model.generation_config.length_penalty = 0.5
    with pytest.raises(ValueError, match="generation config could not be saved once it is trained"):
        build(model=model)
    assert not model.generation_config.do_sample and "do_sample" not in caplog.text


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_end_of_text_beyond_the_embedding_is_refused(build, side):
    model = {"student": student_model, "teacher": teacher_model}[side]()
    model.generation_config.eos_token_id = [2, 50256]
    with pytest.raises(
        ValueError, match=f"The {side}'s generation config ends a text at the token 50256, and its model embeds"
    ):
        build(**{"model" if side == "student" else "teacher": model})


def test_models_are_given_by_path_objects_too(build, tmp_path):
    for name, model, tokenizer in (
        ("s", student_model(), student_tokenizer()),
        ("t", teacher_model(), teacher_tokenizer()),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    tokenizers = {"processing_class": None, "teacher_processing_class": None}
    named = build(model=str(tmp_path / "s"), teacher=str(tmp_path / "t"), **tokenizers, **SGD)
    by_path = build(model=tmp_path / "s", teacher=tmp_path / "t", **tokenizers, **SGD)
    torch.testing.assert_close(step_of(by_path), step_of(named), rtol=0, atol=0)


def test_what_could_not_be_saved_is_refused_before_the_first_step(build, tmp_path, monkeypatch):
    model = student_model()
    monkeypatch.setattr(model.config, "note", {1, 2}, raising=False)  # JSON has no sets
    with pytest.raises(
        ValueError, match="student could not be saved once it is trained: TypeError.*not JSON serializable"
    ):
        build(model=model)
    assert not list((tmp_path / "run").glob(".dry-save-*"))


def test_trying_to_save_leaves_model_and_folder_as_they_were(tmp_path):
    model, tokenizer = student_model(), student_tokenizer()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_saves(model, tokenizer, str(tmp_path))
    assert not list(tmp_path.iterdir())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


# --- GGUF


def gguf_writer(file, tokens: list[str], merges: list[list[str]], split: str | None):
    """Of a Qwen2 shape; the tokens that begin with "<|" are control tokens. Tensors are still to be added."""
    gguf = pytest.importorskip("gguf", reason="needs the writer of GGUF files: pip install gguf")
    PartialState(cpu=True)  # what loads the file logs with accelerate's loggers
    writer = gguf.GGUFWriter(str(file), "qwen2")
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(SHAPE["num_attention_heads"])
    writer.add_head_count_kv(SHAPE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    if split is not None:
        writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])  # 3: control
    return writer


def close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory):
    """A folder with a Qwen2 shape with the student's tokenizer: `toy.gguf`, and `yarn.gguf`, which scales its rotary embeddings."""
    gguf = pytest.importorskip("gguf", reason="needs the writer of GGUF files: pip install gguf")
    folder, tokenizer = tmp_path_factory.mktemp("gguf"), student_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**{**SHAPE, "vocab_size": len(tokenizer)}))
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    for file in ("toy.gguf", "yarn.gguf"):
        writer = gguf_writer(folder / file, tokens, merges, "qwen2")
        if file == "yarn.gguf":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(4.0)
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_eos_token_id(tokenizer.eos_token_id)
        writer.add_pad_token_id(tokenizer.pad_token_id)
        writer.add_chat_template(tokenizer.chat_template)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, SHAPE["num_hidden_layers"])
        for name, tensor in model.state_dict().items():
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
        close(writer)
    return folder


def test_a_gguf_file_whose_positions_transformers_forgets_is_refused_and_read_with_the_models_own_config(
    gguf_folder, tmp_path
):
    with pytest.raises(
        ValueError, match=r"yarn.gguf of .* scales its rotary embeddings \(qwen2.rope.scaling.type\), and transformers"
    ):
        load_model(str(gguf_folder), {"gguf_file": "yarn.gguf"})
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    config = Qwen2Config(**{**SHAPE, "vocab_size": len(student_tokenizer())}, rope_parameters=rope)
    config.save_pretrained(tmp_path)
    read = load_model(str(gguf_folder), {"gguf_file": "yarn.gguf", "config": str(tmp_path), "dtype": "float32"})
    assert read.config.rope_parameters["rope_type"] == "yarn"
    plain = load_model(str(gguf_folder), {"gguf_file": "toy.gguf", "dtype": "float32"})
    assert all(torch.equal(own, other) for own, other in zip(read.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("by", ["name", "module"])
def test_a_student_in_a_gguf_file_is_trained_and_saved(build, tmp_path, gguf_folder, by, adapter):
    saving = {"save_strategy": "steps", "save_steps": 1, "peft_config": lora() if adapter else None}
    if by == "name":
        settings = {"model": str(gguf_folder), "model_init_kwargs": {"gguf_file": "toy.gguf"}, "processing_class": None}
    else:
        settings = {"model": AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file="toy.gguf")}
    build(**settings, **saving).train()
    folder = tmp_path / "run" / "checkpoint-1"
    if adapter:
        assert (folder / "adapter_model.safetensors").exists()
    else:
        assert not hasattr(AutoModelForCausalLM.from_pretrained(folder).config, "quantization_config")


@pytest.mark.parametrize("loss", ["dpca", "bpm"])
def test_a_teacher_in_a_gguf_file_teaches_as_the_same_one_in_a_folder(build, tmp_path, gguf_folder, loss):
    plain = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file="toy.gguf")
    settings = {"optim": "sgd", "learning_rate": 1.0, "distillation_loss": loss, "model": student_model(3)}
    tokenizer = {"teacher_processing_class": student_tokenizer()}
    expected = step_of(build(**{**settings, "model": student_model(3)}, teacher=plain, **tokenizer))
    gguf = {"teacher": str(gguf_folder), "teacher_model_init_kwargs": {"gguf_file": "toy.gguf"}}
    found = step_of(build(**{**settings, "model": student_model(3)}, **gguf, **tokenizer))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_tokenizer_beside_a_gguf_file_is_preferred_and_the_one_within_is_warned_of(gguf_folder, tmp_path, caplog):
    found = load_tokenizer(None, str(gguf_folder), None, False, "toy.gguf")
    assert found.encode("What is 3?") == student_tokenizer().encode("What is 3?")
    assert "is read from toy.gguf, which keeps no normalizer" in caplog.text
    caplog.clear()
    shutil.copy(gguf_folder / "toy.gguf", tmp_path)
    student_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(None, str(tmp_path), None, False, "toy.gguf").get_vocab() == student_tokenizer().get_vocab()
    assert not caplog.text


@pytest.mark.parametrize("split", ["glm4", "a-new-one", None])
def test_a_gguf_file_whose_way_of_splitting_text_transformers_does_not_know_is_refused(tmp_path, split):
    close(gguf_writer(tmp_path / "toy.gguf", [*LETTERS, "og", "<|end|>"], [["o", "g"]], split))
    with pytest.raises(ValueError, match=f"splits text in the way {split!r}, which transformers .* does not know"):
        load_tokenizer(None, str(tmp_path), None, False, "toy.gguf")


@pytest.mark.parametrize("split, word", [("llama-bpe", ["dog"]), ("qwen2", ["d", "og"]), ("gpt-2", ["d", "og"])])
def test_a_word_that_no_merges_lead_to_is_a_token_of_a_gguf_file_where_llama_cpp_reads_it_so(tmp_path, split, word):
    close(gguf_writer(tmp_path / "toy.gguf", [*LETTERS, "og", "dog", "<|end|>"], [["o", "g"]], split))
    found = load_tokenizer(None, str(tmp_path), None, False, "toy.gguf")
    assert found.tokenize("dog") == word
    found.save_pretrained(tmp_path / "saved")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved").tokenize("dog") == word


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory) -> str:
    """A tokenizer with a template whose turn markers the base student's does not have."""
    tokenizer = student_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|start|>", "<|turn|>", "<|over|>"]})
    tokenizer.chat_template = STUDENT_TEMPLATE.replace("<|start|>", "<|turn|>").replace("<|eot|>", "<|over|>")
    tokenizer.eos_token = "<|over|>"
    folder = tmp_path_factory.mktemp("chat")
    tokenizer.save_pretrained(folder)
    return str(folder)


def base_tokenizer():
    tokenizer = student_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.parametrize("white", [(), (" " * 8, "\n\n")], ids=["markup alone", "white space too"])
def test_white_space_that_comes_with_a_cloned_template_is_warned_of(build, chat_folder, tmp_path, caplog, white):
    source = AutoTokenizer.from_pretrained(chat_folder)
    source.add_tokens([AddedToken(token, normalized=False) for token in white])
    source.save_pretrained(tmp_path / "source")
    build(processing_class=base_tokenizer(), chat_template_path=str(tmp_path / "source"))
    assert ("2 tokens of white space too, such as '        '" in caplog.text) == bool(white)


def test_a_base_student_learns_a_cloned_template_with_an_adapter_and_is_loaded_again(build, tmp_path, chat_folder):
    student_model().save_pretrained(tmp_path / "base")
    base_tokenizer().save_pretrained(tmp_path / "base")
    trainer = build(
        model=str(tmp_path / "base"),
        processing_class=base_tokenizer(),
        chat_template_path=chat_folder,
        peft_config=LoraConfig(target_modules="all-linear"),
        max_steps=2,
        learning_rate=0.1,
    )
    [rows] = [part for name, part in trainer.model.named_parameters() if "trainable_tokens_delta" in name]
    before = rows.detach().clone()
    trainer.train()
    assert (rows != before).any(), "the new turn markers are learned"
    trainer.save_model()
    again = AutoPeftModelForCausalLM.from_pretrained(trainer.args.output_dir).eval()
    ids = torch.tensor([trainer.train_dataset[0]["prompt_ids"]])
    assert "<|turn|>assistant" in trainer.processing_class.decode(ids[0])
    with torch.no_grad():
        expected = again(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        columns = torch.arange(-ids.shape[1], -1)
        scored = torch.stack([torch.zeros_like(columns), columns])
        scores = trainer.model.eval()(input_ids=ids, scored=scored, targets=ids[0, 1:])
    torch.testing.assert_close(scores.log_probs, expected, rtol=0, atol=1e-4)


def test_tokens_added_to_a_student_whose_head_is_its_embedding_are_refused_with_what_can_be_done(
    build, tmp_path, chat_folder
):
    def built(path: str, peft_config=None):
        model = student_model(tie_word_embeddings=True)
        return build(model=model, processing_class=base_tokenizer(), chat_template_path=path, peft_config=peft_config)

    with pytest.raises(
        ValueError, match="its LM head is .*or is its embedding.*path of a .jinja file.*without `peft_config`"
    ):
        built(chat_folder, LoraConfig(target_modules="all-linear"))
    known = tmp_path / "known.jinja"
    known.write_text(STUDENT_TEMPLATE, encoding="utf-8")
    built(str(known), LoraConfig(target_modules="all-linear")).train()
    built(chat_folder).train()


def test_a_tokenizer_that_transformers_has_rebuilt_is_warned_of(tmp_path, caplog):
    PartialState(cpu=True)  # accelerate's loggers write once it is there, and a config makes it
    unigram().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')  # with which AutoTokenizer builds a Qwen2Tokenizer
    found = load_tokenizer(None, str(tmp_path), None, False)
    own = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert found.tokenize("the dog's") != own.tokenize("the dog's")
    assert f"The tokenizer of {tmp_path} reads text otherwise than its tokenizer.json" in caplog.text
    caplog.clear()
    load_tokenizer(found, "", None, False)
    assert "reads text otherwise" in caplog.text, "given as it is, too"
    caplog.clear()
    load_tokenizer(own, "", None, False)
    assert not caplog.text


@pytest.fixture
def fp8(tmp_path):
    """The folder of a student as an FP8 checkpoint: each weight of the layers with a scale for every 16 x 16 of its elements."""
    folder = tmp_path / "fp8"
    student_model().save_pretrained(folder)
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        weights[name] = weight
        if "proj" in name:
            scale = weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).abs().amax((1, 3)) / 448
            whole = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
            weights |= {name: (weight / whole).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [16, 16],
        "activation_scheme": "dynamic",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("adapter", [False, True])
def test_a_student_from_an_fp8_checkpoint_is_saved_as_it_was_trained(build, fp8, tmp_path, adapter):
    trainer = build(model=str(fp8), peft_config=lora() if adapter else None)
    trainer.train()
    if adapter:
        trainer.model.merge_and_unload().save_pretrained(tmp_path / "out")
    else:
        trainer.save_model(str(tmp_path / "out"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = (trainer.model.get_base_model() if adapter else trainer.model).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=0)


def test_an_adapter_on_an_fp8_checkpoint_is_read_with_its_weights_where_no_quantization_is_asked_for(fp8, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(fp8)
    get_peft_model(base, lora()).save_pretrained(tmp_path / "adapter")
    found = load_model(str(tmp_path / "adapter"), {"quantization_config": None})
    expected = base.state_dict()
    for name, weight in found.get_base_model().state_dict().items():
        if "lora_" not in name:
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_that_a_checkpoint_has_beside_tied_embeddings_stays_apart_where_accelerate_ties(tmp_path, tied):
    teacher_model(tie_word_embeddings=tied).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    keep_apart(model)
    model.tie_weights()  # as Accelerate does under FSDP2
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_a_model_merged_over_its_adapter_is_warned_of_since_it_gets_the_adapter_twice(build, tmp_path, caplog):
    model = get_peft_model(teacher_model(), lora())
    folder = str(tmp_path / "merged")
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(tmp_path / "alone")
    build(teacher=str(tmp_path / "alone"))
    assert "and an adapter" not in caplog.text
    model.get_base_model().save_pretrained(folder)
    build(teacher=folder)
    assert f"{folder} holds a whole model and an adapter, which is put on it" in caplog.text


@pytest.mark.parametrize("side", ["model", "teacher"])
def test_old_weights_beside_new_shards_are_warned_of_since_they_are_read(build, tmp_path, caplog, side):
    make = {"model": student_model, "teacher": teacher_model}[side]
    old, new = make(), make(3)
    folder = str(tmp_path / "twice")
    old.save_pretrained(folder, max_shard_size="10KB")
    old.save_pretrained(folder)
    build(**{side: folder})
    assert "two models' weights" not in caplog.text, "one file takes the place of shards"
    new.save_pretrained(folder, max_shard_size="10KB")
    trainer = build(**{side: folder})
    assert f"{folder} holds two models' weights: model.safetensors, which is read, and" in caplog.text
    read = {"model": trainer.model, "teacher": trainer.teacher_model}[side]
    torch.testing.assert_close(read.lm_head.weight.detach(), old.lm_head.weight.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama-2", "phi-3-mini"])
def test_a_published_tokenizer_whose_turns_begin_with_other_tokens_than_in_its_file_is_warned_of(name, assets, caplog):
    PartialState(cpu=True)
    folder = str(assets / "tokenizers" / name)
    load_tokenizer(None, folder, None, False)
    assert "'The'] in " in caplog.text and "'▁The']. If" in caplog.text
    caplog.clear()
    load_tokenizer(PreTrainedTokenizerFast.from_pretrained(folder), "", None, False)
    assert not caplog.text, "what the warning says to pass is not warned of"


def sentencepiece_folder(folder, kind: str, **settings):
    """A tokenizer that is kept as a SentencePiece model alone, read by transformers as `kind`."""
    sentencepiece = pytest.importorskip("sentencepiece")
    file = {"LlamaTokenizer": "tokenizer.model", "T5Tokenizer": "spiece.model"}[kind]
    text = ["It's 12345 times HTTPServer's camelCase 'The ECOLE' don't (x) += return naive", "the quick brown fox"] * 20
    with open(folder / file, "wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text),
            model_writer=out,
            vocab_size=400,
            hard_vocab_limit=False,
            minloglevel=2,
            **settings,
        )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "unk_token": "<unk>"}))
    return str(folder)


LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}


@pytest.mark.parametrize(
    ("kind", "settings", "warned"),
    [
        ("LlamaTokenizer", LLAMA, ""),
        ("LlamaTokenizer", {**LLAMA, "add_dummy_prefix": False}, "the file says ['It'"),
        ("LlamaTokenizer", {**LLAMA, "remove_extra_whitespaces": True}, "which reads ['<0x2C>', '▁', \"▁'\", 'The'"),
        ("T5Tokenizer", {"model_type": "unigram"}, "which reads ['e', '</s>'"),  # the id of <unk> in T5's own model
        ("T5Tokenizer", {"model_type": "unigram", "unk_id": 2, "eos_id": 1, "pad_id": 0, "bos_id": -1}, ""),
    ],
)
def test_a_sentencepiece_model_that_transformers_reads_otherwise_is_warned_of(tmp_path, caplog, kind, settings, warned):
    PartialState(cpu=True)
    load_tokenizer(None, sentencepiece_folder(tmp_path, kind, **settings), None, False)
    assert (warned in caplog.text) if warned else not caplog.text


@pytest.mark.parametrize("name", ["bert-base-uncased", "gpt2", "llama-3.2", "mistral-v3", "qwen2.5", "t5-small"])
def test_no_published_tokenizer_is_said_to_be_rebuilt(name, assets, caplog):
    load_tokenizer(None, str(assets / "tokenizers" / name), None, False)
    assert not caplog.text
