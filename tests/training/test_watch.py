"""What goes wrong without a word is told: weights that are no numbers, text of another distribution, nothing to train."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from datasets import IterableDataset
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.boft.layer import MultiplicativeDropoutLayer
from toys import prompts, student_model, student_tokenizer, teacher_model, weights
from transformers import TrainerCallback

from trl_ctopd.losses import ScoredChunks
from trl_ctopd.models.loading import disable_dropout
from trl_ctopd.models.trials import draws_noise, stirred
from trl_ctopd.training import checks
from trl_ctopd.training.watch import DIFFERENCE, ENGINE_DIFFERENCE, SamplingWatch, sampling_metrics


class Poison(TrainerCallback):
    """Makes a gradient NaN in step `step`."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.nan)


@pytest.mark.parametrize("settings", [{}, {"lmbda": 0.0}, {"peft_config": LoraConfig(target_modules="all-linear")}])
def test_a_student_that_turns_nan_ends_the_run_and_the_last_good_checkpoint_is_kept(build, tmp_path, settings):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 4}
    trainer = build(**saving, **settings, callbacks=[Poison(3)])
    with pytest.raises(
        FloatingPointError, match="NaN or infinite after step 3.*resume_from_checkpoint=True (goes on|continues) from"
    ):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = build(**saving, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and torch.isfinite(weights(resumed)).all()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_weights_that_are_no_numbers_are_called_that(build, side):
    model = (student_model if side == "student" else teacher_model)()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=f"The {side}'s logits are not finite: weights of its .* are NaN or infinite"):
        build(**{"model" if side == "student" else "teacher": model})


def test_a_student_whose_logits_overflow_while_it_writes_is_told_so(build):
    trainer = build()
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: output * math.inf)
    with pytest.raises(FloatingPointError, match="model that writes has NaN or infinite logits"):
        trainer.train()


@pytest.mark.parametrize("wrapped", [False, True], ids=["an adapter to be made", "a PeftModel"])
def test_an_activated_adapter_that_peft_never_activates_is_refused_and_trained_where_it_does(build, wrapped):
    invocation = student_tokenizer().encode("<|start|>assistant", add_special_tokens=False)
    activated = {"target_modules": "all-linear", "alora_invocation_tokens": invocation}

    def built(config):
        given = {"model": get_peft_model(student_model(), config)} if wrapped else {"peft_config": config}
        return build(learning_rate=1e-2, **given)

    with pytest.raises(ValueError, match=r"begins at \[.*which PeftModel is not. Set task_type='CAUSAL_LM'"):
        built(LoraConfig(**activated))
    trainer = built(LoraConfig(**activated, task_type="CAUSAL_LM"))
    before = weights(trainer).clone()
    trainer.train()
    assert (weights(trainer) != before).any()


def test_a_student_with_nothing_to_train_is_refused(build, tmp_path):
    frozen = student_model().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train: all .* of its LlamaForCausalLM are frozen.*requires_grad_"):
        build(model=frozen)
    get_peft_model(student_model(), LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(student_model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="nothing to train.*`is_trainable=True`"):
        build(model=loaded)
    build(model=PeftModel.from_pretrained(student_model(), tmp_path / "adapter", is_trainable=True)).train()


def test_a_student_whose_active_adapter_is_not_the_one_that_is_trained_is_told_so(build):
    student = get_peft_model(student_model(), LoraConfig(target_modules="all-linear"))
    student.add_adapter("other", LoraConfig(target_modules="all-linear"))
    student.set_adapter("other")
    for name, parameter in student.named_parameters():
        parameter.requires_grad = "lora_" in name and "default" in name
    with pytest.raises(ValueError, match="loss depends on no weight that is to be trained.*set_adapter"):
        build(model=student).train()


def test_a_teacher_that_shares_the_students_weights_is_refused(build):
    base = student_model()
    student = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="share .* weights: the LlamaForCausalLM is within the student"):
        build(model=student, teacher=base, teacher_processing_class=student_tokenizer())


# --- the text is drawn from what is scored


def test_the_entropy_difference_is_that_of_plain_sums():
    generator = torch.Generator().manual_seed(0)
    chunks = torch.tensor([[0, 1, -1], [0, -1, -1]])
    log_probs, entropy = -torch.rand(2, 3, generator=generator), torch.rand(2, 3, generator=generator)
    batch = ScoredChunks(log_probs / 2, log_probs, chunks, chunks, chunks, 2, drawn_log_probs=log_probs)
    total = sum(
        -log_probs[row, column].item() - entropy[row, column].item() for row, column in ((0, 0), (0, 1), (1, 0))
    )
    found, weight = sampling_metrics(batch, entropy)[DIFFERENCE]
    assert found.item() == pytest.approx(total) and weight == 3


SAMPLED = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "generation_kwargs": None,
    "early_stop": None,
    "async_rollouts": 0,
    "use_vllm": False,
}


def watched(values, masked=0.0, figure=DIFFERENCE, **settings) -> list[str]:
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("trl_ctopd.training.watch")
    logger.addHandler(handler)
    try:
        watch = SamplingWatch(SimpleNamespace(**{**SAMPLED, **settings}))
        for value in values:
            watch.read({figure: value, "alignment/masked_fraction": masked})
    finally:
        logger.removeHandler(handler)
    return said


def test_a_lasting_difference_is_warned_of_once_and_chance_never():
    PartialState()  # which accelerate's log asks for
    noise = torch.randn(400, generator=torch.Generator().manual_seed(1)).tolist()
    assert watched([0.05 * value for value in noise]) == []
    [line] = watched([0.1 + 0.05 * value for value in noise])
    assert DIFFERENCE in line and "another distribution than the one that is scored" in line
    assert watched([0.1 + 0.05 * value for value in noise[:9]]) == [], "nine logs are too few to tell"
    assert watched([0.1 + 0.05 * value for value in noise], masked=0.02) == [], "masked tokens may explain it"
    for asked_for in ({"top_p": 0.9}, {"async_rollouts": 1}):
        assert watched([0.1 + 0.05 * value for value in noise], **asked_for) == []


def test_an_engine_that_is_further_off_than_rounding_is_warned_of_once_at_the_first_log():
    PartialState()
    figure = {"figure": ENGINE_DIFFERENCE, "use_vllm": True}
    assert watched([0.03, 0.13, math.nan], **figure) == [], "bfloat16, 8 bits, nothing told"
    [line] = watched([0.8, 0.9], **figure)
    assert f"{ENGINE_DIFFERENCE} is 0.80 nats" in line and "more than 0.30" in line and "use_vllm=False" in line
    assert len(watched([0.03, 0.8], **figure)) == 1, "or later"
    assert "one update before" in watched([0.8], **figure, async_rollouts=1)[0]
    assert watched([0.8], **figure, top_p=0.5) == [], (
        "the engine's log-probs are of the half that is left, up to ln 2 higher"
    )
    assert len(watched([1.1], **figure, top_p=0.5)) == 1
    for other in (
        {"use_vllm": False},
        {"top_k": 20},
        {"min_p": 0.1},
        {"generation_kwargs": {"repetition_penalty": 1.3}},
    ):
        assert watched([0.8], **{**figure, **other}) == [], "asked for, or not an engine's"


def test_text_drawn_from_another_distribution_shows_in_the_figure(build):
    settings = {"max_steps": 2, "per_device_train_batch_size": 16, "learning_rate": 0.0, "max_new_tokens": 16}
    plain, bent = build(**settings), build(**settings)
    bent.generation_config.top_k = 5  # unknown to what scores
    for trainer in (plain, bent):
        trainer.train()
    found = [
        sum(entry[DIFFERENCE] for entry in trainer.state.log_history if DIFFERENCE in entry) / 2
        for trainer in (plain, bent)
    ]
    assert abs(found[0]) < 0.2 and found[1] < found[0] - 0.2


# --- dropout, and rows in several processes


def test_disable_dropout_reaches_the_dropout_of_attention(build):
    trainer = build(model=student_model(attention_dropout=0.5), disable_dropout=True)
    attention = trainer.model.model.layers[0].self_attn
    assert attention.attention_dropout == 0.0
    ids = torch.arange(8)[None]
    trainer.model.train()
    torch.testing.assert_close(trainer.model(input_ids=ids).logits, trainer.model(input_ids=ids).logits, rtol=0, atol=0)
    assert (
        build(model=student_model(attention_dropout=0.5), disable_dropout=False)
        .model.model.layers[0]
        .self_attn.attention_dropout
        == 0.5
    )


ALL = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
DROPPING = {
    "LoRA": LoraConfig(lora_dropout=0.5, **ALL),
    "LoHa, ranks": LoHaConfig(r=4, rank_dropout=0.5, **ALL),
    "LoHa, modules": LoHaConfig(r=4, module_dropout=0.5, **ALL),
    "LoKr, ranks": LoKrConfig(r=4, rank_dropout=0.5, **ALL),
    "LoKr, modules": LoKrConfig(r=4, module_dropout=0.5, **ALL),
}


@torch.no_grad()
@pytest.mark.parametrize("name", DROPPING)
def test_disable_dropout_reaches_the_dropout_of_adapters(name):
    model, ids = get_peft_model(student_model(), DROPPING[name]).train(), torch.arange(8)[None]
    assert draws_noise(model)
    disable_dropout(model)
    with stirred(model):
        learning = model(ids).logits
        torch.testing.assert_close(learning, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)


def test_disable_dropout_reaches_layers_that_are_no_dropout_of_torchs():
    layer = MultiplicativeDropoutLayer(p=0.5)  # BOFT's
    blocks = torch.randn(1, 8, 4, 4)
    disable_dropout(layer)
    assert layer.training and torch.equal(layer(blocks), blocks)


def in_two_processes(monkeypatch, theirs):
    monkeypatch.setattr(checks, "gather_object", lambda own: [*own, theirs])
    return SimpleNamespace(num_processes=2)


def test_processes_with_datasets_of_unlike_lengths_are_refused_at_the_start(monkeypatch, caplog):
    with pytest.raises(
        ValueError, match="train dataset has 16, 15 rows in processes 0 to 1: give every process the whole"
    ):
        checks.check_same_data(in_two_processes(monkeypatch, (15, "15 rows")), prompts(16), None)
    accelerator = in_two_processes(monkeypatch, (16, "16 other rows"))
    with pytest.raises(ValueError, match="math dataset has 4, 16 rows"):
        checks.check_same_data(accelerator, prompts(16), {"math": prompts(4)})
    assert "train dataset has other rows in some processes than in others" in caplog.text


def test_a_stream_can_be_evaluated_on_beside_a_dataset(build):
    stream = IterableDataset.from_generator(lambda: iter(prompts(6)))
    trainer = build(eval_dataset=stream)
    expected = build(eval_dataset=prompts(6)).evaluate()
    assert trainer.evaluate()["eval_gap/nats_per_byte"] == expected["eval_gap/nats_per_byte"]
    with pytest.raises(ValueError, match="dispatch_batches=True.*leave it out"):
        build(accelerator_config={"dispatch_batches": True})
