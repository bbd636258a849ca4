"""Completions by vLLM: TRL's `VLLMGeneration` needs vLLM and mostly a GPU, so that a stand-in with its very signatures takes
its place here, and answers in the shapes that it documents. test_vllm_colocate.py has a real engine."""

import inspect

import needs
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from toys import SGD, SHAPE, step_of, student_model, student_tokenizer, weights
from transformers import AutoModelForCausalLM, LlamaModel, Qwen3MoeConfig
from trl.generation.vllm_generation import VLLMGeneration

from trl_ctopd.losses import ScoredChunks
from trl_ctopd.rollouts import vllm as vllm_writing
from trl_ctopd.rollouts.vllm import importance


class Engine:
    """Writes what `fix_rollouts` has a student write, and claims to have drawn each token at `shift` nats below the model."""

    made: "list[Engine]" = []
    shift = 0.0
    logprobs_mode = "processed_logprobs"

    def __init__(self, *args, **kwargs):
        self.settings = inspect.signature(VLLMGeneration.__init__).bind(self, *args, **kwargs).arguments
        self.synced, self.calls = [], []
        self.vllm_client = self
        Engine.made.append(self)

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": self.logprobs_mode}}

    def sync_weights(self):
        self.synced.append(torch.cat([p.detach().flatten().clone() for p in self.settings["model"].parameters()]))

    @torch.no_grad()
    def generate(self, *args, **kwargs):
        call = inspect.signature(VLLMGeneration.generate).bind(self, *args, **kwargs).arguments
        self.calls.append(call)
        tokenizer, model, scores = self.settings["processing_class"], self.settings["model"], []
        completions = []
        for prompt in call["prompts"]:
            ids = tokenizer.encode(f"{len(prompt)} is the sum of two")[:40] + [tokenizer.eos_token_id, 7]
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            completions.append(ids)
            scores.append([[logits[n, token].item() - self.shift] for n, token in enumerate(ids)])
        return call["prompts"], completions, scores, [[[token] for token in ids] for ids in completions]


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(vllm_writing, "VLLMGeneration", Engine)
    monkeypatch.setattr(Engine, "made", [])
    return Engine


@pytest.fixture
def build_vllm(build, engine, tmp_path):
    student_model().save_pretrained(tmp_path / "student")

    def build_it(**settings):
        return build(model=settings.pop("model", str(tmp_path / "student")), use_vllm=True, **settings)

    return build_it


def experts_model():
    sizes = {name: value for name, value in SHAPE.items() if name != "intermediate_size"}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(**sizes, **experts, vocab_size=len(student_tokenizer()), router_aux_loss_coef=0.0)
    )


def test_what_is_used_of_trl_is_there():
    """`Engine` binds every call to these; here, what comes back."""
    assert {"sync_weights", "generate"} <= set(dir(VLLMGeneration))
    assert "`completion_ids`" in VLLMGeneration.generate.__doc__ and "num_logprobs" in VLLMGeneration.generate.__doc__


def test_completions_of_the_engine_end_at_their_stop_token_and_are_trained_on(build_vllm, engine):
    trainer = build_vllm(**SGD)
    step = step_of(trainer)
    [made] = engine.made
    assert step.abs().max() > 1e-3
    assert [len(call["prompts"]) for call in made.calls] == [4]
    assert made.settings["generation_kwargs"] == {"stop_token_ids": trainer.stop_ids}
    log = trainer.state.log_history[0]
    assert log["completions/truncated_fraction"] == 0
    assert log["sampling/log_prob_difference"] == pytest.approx(0, abs=1e-5)
    assert log["sampling/importance_ratio"] == pytest.approx(1, abs=1e-5)


def test_the_engine_has_the_weights_of_each_step_before_it_writes(build_vllm, engine):
    trainer = build_vllm(**{**SGD, "max_steps": 3})
    first = weights(trainer).clone()
    trainer.train()
    [made] = engine.made
    assert len(made.synced) == len(made.calls) == 3
    torch.testing.assert_close(made.synced[0], first, rtol=0, atol=0)
    assert not torch.equal(made.synced[1], made.synced[0]) and not torch.equal(made.synced[2], made.synced[1])


def test_an_engine_that_changes_the_students_class_is_refused(build_vllm, engine, monkeypatch):
    """As vLLM's does where it runs a family by transformers' own code."""
    own = engine.__init__

    def made(self, *args, **kwargs):
        own(self, *args, **kwargs)
        monkeypatch.setattr(LlamaModel, "__call__", lambda *given, **named: pytest.fail("no forward pass"))

    monkeypatch.setattr(engine, "__init__", made)
    with pytest.raises(ValueError, match="has changed LlamaModel for it in this process.*vllm_mode='server'"):
        build_vllm()


def test_an_adapters_model_is_handed_over_whole_for_trl_to_merge(build_vllm, engine):
    trainer = build_vllm(peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer.train()
    assert engine.made[0].settings["model"] is trainer.model and hasattr(trainer.model, "merge_adapter")


def test_handing_over_a_merged_adapter_leaves_the_frozen_weights_as_they_were(build_vllm, engine, monkeypatch):
    """TRL merges in place and takes it out again (`VLLMGeneration._iter_named_params`), which rounds."""

    def sync_weights(self):
        for _ in range(2):
            self.settings["model"].merge_adapter()
            moved.append(
                [
                    n
                    for n, p in self.settings["model"].named_parameters()
                    if n in frozen and not torch.equal(p, frozen[n])
                ]
            )
            self.settings["model"].unmerge_adapter()

    frozen, moved = {}, []
    monkeypatch.setattr(engine, "sync_weights", sync_weights)
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = build_vllm(model_init_kwargs={"dtype": "bfloat16"}, peft_config=adapter, **{**SGD, "max_steps": 3})
    frozen.update({n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad})
    trainer.train()
    assert len(moved) == 6 and all(moved)
    for name, weight in trainer.model.named_parameters():
        assert name not in frozen or torch.equal(weight, frozen[name]), name


@pytest.mark.parametrize(("shift", "ratio"), [(0.5, 2.718281828**0.5), (2.0, 3.0), (-0.5, 2.718281828**-0.5)])
def test_where_engine_and_trainer_disagree_the_step_is_weighed_by_the_ratio_up_to_its_bound(
    build_vllm, engine, monkeypatch, shift, ratio
):
    own = {"distillation_loss": "dpca", **SGD}  # reverse_kl has a part that was not sampled
    agreed = step_of(build_vllm(**own))
    monkeypatch.setattr(engine, "shift", shift)
    trainer = build_vllm(**own)
    torch.testing.assert_close(step_of(trainer), ratio * agreed, rtol=1e-3, atol=1e-5)
    log = trainer.state.log_history[0]
    assert log["sampling/log_prob_difference"] == pytest.approx(abs(shift), rel=1e-3)
    assert log["sampling/truncated_fraction"] == (shift == 2.0)


@pytest.mark.parametrize("shift", [0.1, 0.8])
def test_an_engine_that_writes_as_another_model_is_told_of_once(build_vllm, engine, monkeypatch, caplog, shift):
    monkeypatch.setattr(engine, "shift", shift)
    build_vllm(max_steps=3).train()
    said = [
        record.getMessage()
        for record in caplog.records
        if "log-probs of what it has just written" in record.getMessage()
    ]
    assert len(said) == (shift > 0.3)
    assert not said or "sampling/log_prob_difference is 0.80 nats a token" in said[0]


def test_importance_is_one_where_the_engine_told_nothing():
    chunks = torch.tensor([[0, 1, -1]])
    batch = ScoredChunks(
        torch.tensor([[-1.0, -2.0, -3.0]]), torch.zeros(1, 2), chunks, torch.tensor([[0, 1]]), chunks, 2
    )
    ratio, metrics = importance(batch, torch.tensor([[float("nan"), -2.5, -9.0]]), 3.0)
    assert ratio.tolist() == [[1.0, pytest.approx(2.718281828**0.5), 1.0]]
    assert metrics["sampling/log_prob_difference"] == (0.5, 1)


def test_evaluation_writes_with_the_engine_too(build_vllm, engine):
    from toys import prompts

    assert "eval_sampling/importance_ratio" in build_vllm(eval_dataset=prompts(4)).evaluate()


def test_given_text_is_not_the_engines(build_vllm, engine):
    trainer = build_vllm(lmbda=0.0, distillation_loss="alm")
    trainer.train()
    assert engine.made[0].calls == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vllm_mode": "elsewhere"}, "Unknown vllm_mode 'elsewhere': choose one of server, colocate"),
        ({"generation_backend": "transformers_continuous"}, "generation_backend='transformers_continuous'"),
        ({"generation_batch_size": 2}, "batches by itself"),
        ({"generation_kwargs": {"bad_words_ids": [[5]]}}, "generation_kwargs has bad_words_ids"),
        ({"vllm_mode": "server", "vllm_enable_sleep_mode": True}, "on the training GPU"),
        ({"model": student_model()}, "this model was created in memory"),
        (
            {"peft_config": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")},
            "prompt-learning adapter cannot be merged|Install transformers<5.24",
        ),
        (
            {"model": "tied", "peft_config": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])},
            "embed_tokens shares its weight",
        ),
        (
            {
                "model": "tied",
                "peft_config": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
            },
            "embed_tokens shares its weight",
        ),
        ({"peft_config": "Shadow"}, "PEFT cannot merge SHADOW and take it out again.*: choose LoRA"),
        ({"peft_config": "OSF"}, "PEFT cannot merge OSF and take it out again.*: choose LoRA"),
        ({"vllm_importance_sampling_clip_max": 0.0}, "clip_max must be positive"),
        (
            {"model": "experts"},
            r"on a CPU, and the student has experts \(model.layers.0.mlp.experts.*Set use_vllm=False",
        ),
        (
            {"model": "experts", "peft_config": LoraConfig(r=4, target_modules=["q_proj"])},
            "on a CPU, and the student has experts",
        ),
    ],
)
def test_what_vllm_cannot_write_under_is_refused(build_vllm, tmp_path, settings, message):
    if settings.get("model") == "tied":
        tied = student_model(tie_word_embeddings=True)
        tied.save_pretrained(tmp_path / "tied")
        settings = {**settings, "model": AutoModelForCausalLM.from_pretrained(tmp_path / "tied")}
    if settings.get("model") == "experts":
        experts_model().save_pretrained(tmp_path / "experts")
        settings = {**settings, "model": str(tmp_path / "experts")}
    if isinstance(settings.get("peft_config"), str):
        settings = {**settings, "peft_config": needs.adapter(settings["peft_config"])}
    with pytest.raises(ValueError, match=message):
        build_vllm(**settings)


def test_experts_are_not_refused_behind_a_server(build_vllm):
    build_vllm(model=experts_model(), vllm_mode="server").train()


def test_embeddings_that_are_trained_whole_and_stay_tied_are_not_refused(build_vllm, tmp_path):
    student_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    whole = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    build_vllm(model=AutoModelForCausalLM.from_pretrained(tmp_path / "tied"), peft_config=whole)


def test_a_server_that_tells_other_log_probs_than_it_drew_with_is_refused(build_vllm, engine, monkeypatch):
    monkeypatch.setattr(engine, "logprobs_mode", "raw_logprobs")
    with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
        build_vllm(vllm_mode="server", model=student_model())


def test_without_vllm_the_error_says_how_to_install_it(build, tmp_path):
    student_model().save_pretrained(tmp_path / "student")
    with pytest.raises(ImportError, match=r"pip install trl\[vllm\]"):
        build(model=str(tmp_path / "student"), use_vllm=True)
