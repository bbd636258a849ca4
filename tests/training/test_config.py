"""The settings: copied, pickled and named alike, they stay the settings that they were."""

import copy
import dataclasses
import json
import pickle
import sys
import warnings
from functools import partial
from types import ModuleType

import pytest
import torch
from toys import SGD, fix_rollouts, prompts, step_of, student_model, student_tokenizer, teacher_model, teacher_tokenizer
from transformers import BitsAndBytesConfig

from trl_ctopd import CrossTokenizerGKDConfig
from trl_ctopd.losses import ALM, DPCA, ULD, LostLoss, build_loss, loss_name
from trl_ctopd.preference import CrossTokenizerDPOConfig


config = partial(CrossTokenizerGKDConfig, "out", use_cpu=True, bf16=False, report_to=[])


def alm(batch, num_items):
    """A loss of one's own that is named as a built-in one."""
    return batch.student_log_probs.sum() / num_items, {}


def of_a_notebook():
    def loss(batch, num_items):
        return batch.student_log_probs.sum() / num_items, {}

    return loss


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda args: pickle.loads(pickle.dumps(args))])
def test_a_loss_object_goes_through_copies_and_pickles_with_its_knobs(copied):
    args = copied(config(distillation_loss=DPCA(advantage_clip=2.0)))
    assert args.distillation_loss == DPCA(advantage_clip=2.0)
    assert copied(config(distillation_loss=alm)).distillation_loss is alm
    assert copied(config(distillation_loss="alm")).distillation_loss == "alm"


def test_a_deep_copy_shares_nothing_with_its_original():
    args = config(distillation_loss_kwargs={"advantage_clip": 3.0})
    copy.deepcopy(args).distillation_loss_kwargs["advantage_clip"] = 4.0
    assert args.distillation_loss_kwargs == {"advantage_clip": 3.0}


def test_a_closure_survives_a_copy_and_is_missed_in_words_after_a_pickle(build):
    loss = of_a_notebook()
    args = config(distillation_loss=loss)
    assert copy.deepcopy(args).distillation_loss is loss
    saved = pickle.loads(pickle.dumps(args))
    assert isinstance(saved.distillation_loss, LostLoss)
    with pytest.raises(ValueError, match="loss 'of_a_notebook.<locals>.loss' of this saved config is not there.*anew"):
        build(distillation_loss=saved.distillation_loss)


def test_a_loss_of_a_module_that_is_gone_does_not_keep_the_config_from_loading(monkeypatch):
    module = ModuleType("losses_of_mine")
    exec("def mine(batch, num_items): return 0, {}", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    saved = pickle.dumps(config(distillation_loss=module.mine, learning_rate=3e-4))
    monkeypatch.delitem(sys.modules, module.__name__)
    args = pickle.loads(saved)
    assert args.learning_rate == 3e-4
    with pytest.raises(ValueError, match="loss 'mine' of this saved config is not there"):
        build_loss(args.distillation_loss)


def test_an_own_loss_is_never_called_as_a_built_in_one():
    assert loss_name(alm) == "test_config.alm"
    with pytest.raises(ValueError, match="Unknown distillation_loss 'test_config.alm'"):
        config(distillation_loss=config(distillation_loss=alm).to_dict()["distillation_loss"])
    assert loss_name(DPCA()) == "DPCA" and loss_name("alm") == "alm"


def test_a_trainer_of_copied_settings_learns_as_one_of_the_settings_themselves(build, tmp_path):
    from trl_ctopd import CrossTokenizerGKDTrainer

    def step(args):
        trainer = CrossTokenizerGKDTrainer(
            student_model(),
            teacher_model(),
            args,
            prompts(8),
            processing_class=student_tokenizer(),
            teacher_processing_class=teacher_tokenizer(),
        )
        return step_of(fix_rollouts(trainer))

    settings = {"max_new_tokens": 8, "max_steps": 1, "save_strategy": "no", "disable_tqdm": True, **SGD}
    args = config(distillation_loss=DPCA(advantage_clip=0.01), gradient_checkpointing=False, **settings)
    found = step(copy.deepcopy(args))
    torch.testing.assert_close(found, step(args), rtol=0, atol=0)
    assert (found - step(config(gradient_checkpointing=False, **settings))).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_the_old_name_of_dtype_is_taken_with_one_warning(name):
    with pytest.warns(UserWarning, match=f"{name}: `torch_dtype` is the old name of `dtype`") as said:
        args = config(**{name: {"torch_dtype": "bfloat16", "revision": "main"}})
    assert getattr(args, name) == {"revision": "main", "dtype": "bfloat16"}
    assert len([warning for warning in said if "torch_dtype" in str(warning.message)]) == 1
    with pytest.raises(ValueError, match="dtype='float32' and torch_dtype='bfloat16': set only `dtype`"):
        config(**{name: {"torch_dtype": "bfloat16", "dtype": "float32"}})


@pytest.mark.parametrize("kind", [CrossTokenizerGKDConfig, CrossTokenizerDPOConfig])
@pytest.mark.parametrize("name", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_a_quantization_config_can_be_written_as_json_and_stays_what_it_was(kind, name):
    quantization, place = BitsAndBytesConfig(load_in_8bit=True), {"": torch.device("cpu")}
    given = {"quantization_config": quantization, "dtype": torch.bfloat16, "device_map": place}
    args = kind("out", use_cpu=True, bf16=False, report_to=[], **{name: given})
    found = json.loads(args.to_json_string())[name]
    assert found["quantization_config"]["load_in_8bit"] is True
    assert (found["dtype"], found["device_map"]) == ("bfloat16", {"": "cpu"})
    assert getattr(args, name) == {"quantization_config": quantization, "dtype": torch.bfloat16, "device_map": place}


@pytest.mark.parametrize("name", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_a_quantization_of_none_is_no_argument_since_it_makes_noise_of_quantized_checkpoints(name):
    assert getattr(config(**{name: {"dtype": "auto", "quantization_config": None}}), name) == {"dtype": "auto"}


def test_models_are_loaded_in_the_dtype_that_its_old_name_asks_for(build, tmp_path):
    for name, model, tokenizer in (
        ("student", student_model(), student_tokenizer()),
        ("teacher", teacher_model(), teacher_tokenizer()),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    kwargs = {"torch_dtype": "bfloat16"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = build(
            model=str(tmp_path / "student"),
            teacher=str(tmp_path / "teacher"),
            model_init_kwargs=kwargs,
            teacher_model_init_kwargs=kwargs,
        )
    assert trainer.model.dtype == trainer.teacher_model.dtype == torch.bfloat16


def test_a_cross_entropy_is_for_given_text_alone(build):
    with pytest.raises(ValueError, match="cross_entropy_weight=1.0 has no effect with lmbda=1.0.*whatever it wrote"):
        build(distillation_loss="uld", distillation_loss_kwargs={"cross_entropy_weight": 1.0})
    trainer = build(distillation_loss="uld", distillation_loss_kwargs={"cross_entropy_weight": 1.0}, lmbda=0.5)
    assert trainer.distillation_loss == ULD(cross_entropy_weight=0.0)
    assert trainer.off_policy_loss == ULD(cross_entropy_weight=1.0)
    trainer = build(distillation_loss="uld", distillation_loss_kwargs={"cross_entropy_weight": 1.0}, lmbda=0.0)
    assert trainer.off_policy_loss == ULD(cross_entropy_weight=1.0)


def test_the_students_own_text_is_never_learned_by_cross_entropy(build):
    """A teacher that is the student leaves nothing to learn from its own text."""
    settings = {"distillation_loss": "uld", "lmbda": 0.5, "gradient_accumulation_steps": 4, **SGD}
    same = {"teacher": student_model(), "teacher_processing_class": student_tokenizer()}
    trainer = build(**same, **settings, distillation_loss_kwargs={"cross_entropy_weight": 1.0})
    trainer.rollouts.lmbda_draws = lambda step, count: [0.0] * count
    assert step_of(trainer).norm() < 0.01


@pytest.mark.parametrize("value", [64.0, True, "64"])
def test_a_count_that_is_no_whole_number_is_told_so(value):
    with pytest.raises(ValueError, match=f"max_new_tokens must be a whole number, an int, got {value!r}"):
        config(max_new_tokens=value)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"lmbda": float("nan")}, "lmbda must be a number, got nan"),
        ({"temperature": float("inf")}, "temperature must be finite and positive, got inf"),
        ({"top_k": 5.0}, "top_k must be a whole number, an int, got 5.0"),
        ({"teacher_server_timeout": "5"}, "teacher_server_timeout must be a number, got '5'"),
        ({"teacher_server_retries": 2.5}, "teacher_server_retries must be a whole number, an int, got 2.5"),
        ({"generation_kwargs": {"prompt_lookup_num_tokens": 2}}, "prompt_lookup_num_tokens: with a draft.*one text"),
    ],
)
def test_a_setting_that_no_run_could_use_is_refused_with_its_name_and_value(setting, told):
    with pytest.raises(ValueError, match=told):
        config(**setting)


def test_stop_strings_are_refused_with_what_ends_a_turn():
    with pytest.raises(ValueError, match="stop_strings=.*has no turn end.*eos_token_id"):
        config(generation_kwargs={"stop_strings": ["Question:"]})


def test_a_loss_of_a_built_in_kind_is_saved_whole(build):
    assert pickle.loads(pickle.dumps(config(distillation_loss=ALM()))).distillation_loss == ALM()


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("gap/nats_per_byte", False),
        ("eval_gap/nats_per_byte", False),
        ("eval_numbers_given/gap/nats_per_byte", False),
        ("completions/truncated_fraction", False),
        ("numbers_loss", False),
        ("reward", True),
    ],
)
@pytest.mark.parametrize("kind", ["at the start", "a copy"])
def test_the_best_checkpoint_is_by_default_the_one_with_the_better_figure(metric, greater, kind):
    args = config(metric_for_best_model=metric)
    args = args if kind == "at the start" else dataclasses.replace(args)
    assert args.greater_is_better is greater
    assert config(metric_for_best_model=metric, greater_is_better=not greater).greater_is_better is not greater


def test_the_checkpoint_with_the_smallest_gap_is_kept(build):
    kept = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": prompts(3), "max_steps": 3}
    trainer = build(metric_for_best_model="gap/nats_per_byte", **kept, **evaluated)
    trainer.train()
    gaps = [own["eval_gap/nats_per_byte"] for own in trainer.state.log_history if "eval_gap/nats_per_byte" in own]
    assert trainer.state.best_metric == min(gaps) < max(gaps)


@pytest.mark.parametrize("names", [(), ("one", "two")], ids=["one dataset", "two datasets"])
def test_an_evaluation_of_answers_without_text_is_not_the_best_and_the_run_goes_on(build, monkeypatch, caplog, names):
    rows, prefix = prompts(3), f"{names[0]}_" if names else ""
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": {name: rows for name in names} or rows}
    kept = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "max_steps": 3}
    trainer = build(metric_for_best_model=f"{prefix}gap/nats_per_byte", **kept, **evaluated)
    write, [stop, *_] = trainer.rollouts.write, trainer.stop_ids
    silent = lambda model, rows, seed: [([stop], None) for _ in rows]  # noqa: E731

    def evaluate(*args, own=trainer.evaluate, **kwargs):
        trainer.rollouts.write = silent if trainer.state.global_step == 2 else write
        try:
            return own(*args, **kwargs)
        finally:
            trainer.rollouts.write = write

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.train()
    measured = [own["step"] for own in trainer.state.log_history if f"eval_{prefix}gap/nats_per_byte" in own]
    assert measured == [1, 3] and trainer.state.global_step == 3 and trainer.state.best_global_step in measured
    assert caplog.text.count("there was nothing to measure") == 1


def test_the_best_model_is_one_of_a_named_evaluation_dataset(build):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": {"one": prompts(3), "two": prompts(3)}}
    with pytest.raises(ValueError, match="one of: one_gap/nats_per_byte, two_gap/nats_per_byte"):
        build(metric_for_best_model="gap/nats_per_byte", **evaluated)
    build(metric_for_best_model="eval_two_gap/nats_per_byte", **evaluated)
    build(metric_for_best_model="gap/nats_per_byte", **evaluated | {"eval_strategy": "no"})


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({"distillation_loss": "gold"}, r"give that of gold as distillation_loss_kwargs=\{'beta': 0.9\}"),
        ({"off_policy_loss": "gold"}, r"give that of gold as off_policy_loss_kwargs=\{'beta': 0.9\}"),
        ({"distillation_loss": "gold", "distillation_loss_kwargs": {"beta": 0.9}}, "beta=0.9 has no effect"),
        ({"distillation_loss": "dpca"}, r"leave it out \(bpm and gold have a beta of their own"),
        ({"distillation_loss": alm}, "leave it out"),
        ({}, "leave it out"),
    ],
)
def test_a_beta_which_is_that_of_gkds_own_loss_is_refused_with_the_way_out(settings, way):
    with pytest.raises(ValueError, match=way):
        config(beta=0.9, **settings)
    assert config(**settings, beta=0.5).beta == 0.5


@pytest.mark.parametrize(
    ("loss", "settings", "knob"),
    [
        ("reverse_kl", {"top_k": 8}, "top_k"),
        ("auto", {"top_k": 8}, "top_k"),
        ("alm", {"temperature": 0.7}, "temperature"),
    ],
)
def test_a_setting_of_sampling_that_a_setting_of_the_loss_has_the_name_of_is_warned_of(
    build, caplog, loss, settings, knob
):
    said = f"The {knob} of distillation_loss="
    build(distillation_loss=loss, **settings)
    assert caplog.text.count(said) == 1
    caplog.clear()
    build(distillation_loss=loss, **settings, distillation_loss_kwargs={knob: 4})
    build(distillation_loss=loss)
    build(distillation_loss="dpca", **settings)
    assert said not in caplog.text
