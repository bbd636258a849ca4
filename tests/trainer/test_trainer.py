"""One claim a trap of GKDTrainer: each of these fails on the inherited behaviour."""

import inspect
import os
import re
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from toys import (
    SGD,
    fix_rollouts,
    prompts,
    step_of,
    student_model,
    student_tokenizer,
    teacher_model,
    teacher_tokenizer,
    weights,
)
from transformers import AutoModelForCausalLM, GenerationConfig
from trl.kernels import ChunkedLogProbFunction
from trl.models.utils import unwrap_model_for_generation

from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer
from trl_ctopd.gkd import GKDTrainer
from trl_ctopd.training import choice


@pytest.mark.parametrize(("batch", "window"), [(4, 2), (2, 4)])
def test_gradient_accumulation_windows_give_the_same_step(build, batch, window):
    # the sequential sampler makes the windows hold the same rows
    order = {"train_sampling_strategy": "sequential"}
    whole = step_of(fix_rollouts(build(per_device_train_batch_size=8, **SGD, **order)))
    parts = step_of(
        fix_rollouts(build(per_device_train_batch_size=batch, gradient_accumulation_steps=window, **SGD, **order))
    )
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_the_whole_window_is_written_in_one_call_with_every_generation(build):
    trainer = build(per_device_train_batch_size=2, gradient_accumulation_steps=3, num_generations=2)
    calls = []
    generate = trainer.model.generate

    def counted(**inputs):
        if (
            inputs["generation_config"].max_new_tokens > 1
        ):  # a call for one token reads a prompt that rows have in common
            calls.append(inputs["input_ids"].shape[0])
        return generate(**inputs)

    trainer.model.generate = counted
    trainer.train()
    assert calls == [2 * 3 * 2]


@pytest.mark.parametrize("fails_at", [0, 2])
def test_steps_that_stay_after_an_out_of_memory_error_are_told(build, caplog, fails_at):
    trainer = fix_rollouts(build(auto_find_batch_size=True, per_device_train_batch_size=4, max_steps=3))
    step = trainer.training_step

    def training_step(model, inputs, *args):
        if len(inputs["input_ids"]) == 4 and trainer.state.global_step == fails_at:
            raise RuntimeError("CUDA out of memory. ")
        return step(model, inputs, *args)

    trainer.training_step = training_step
    trainer.train()
    told = "those of the 2 steps that it has taken by then. .* per_device_train_batch_size=3"
    assert bool(re.search(told, caplog.text)) == (fails_at == 2)
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("teacher_rows", [None, 3])
def test_after_an_out_of_memory_error_figures_teacher_card_and_report_are_those_of_the_smaller_micro_batches(
    build, teacher_rows
):
    """The error comes with the second micro-batch: the first one's figures are not to be in the log."""

    def made(**settings):
        order = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2, "report": True}
        return fix_rollouts(build(teacher_batch_size=teacher_rows, num_generations=2, **order, **settings))

    found, plain = made(auto_find_batch_size=True, per_device_train_batch_size=4), made(per_device_train_batch_size=3)
    step, taken = found.training_step, []

    def training_step(model, inputs, *args):
        taken.append(len(inputs["input_ids"]))
        loss = step(model, inputs, *args)
        if taken == [8, 8]:
            raise RuntimeError("CUDA out of memory. ")
        return loss

    found.training_step = training_step
    folder = Path(found.args.output_dir)
    found.train()
    shown = found.state.log_history[0], (folder / "report.html").read_text(encoding="utf-8")
    found.create_model_card()
    plain.train()
    expected = plain.state.log_history[0]
    assert taken == [8, 8, 6, 6]
    own = {name for name in expected if not name.startswith("seconds/")} - {"compute_overhead"}
    assert {name: shown[0][name] for name in own} == pytest.approx({name: expected[name] for name in own}, nan_ok=True)
    assert found.teacher.batch_size == (teacher_rows or 6)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "each of 6 prompts" in card and "| `per_device_train_batch_size` | 3 |" in card
    assert "6 prompts, 2 completions of each" in shown[1]


def test_a_run_that_begins_anew_has_a_card_of_its_own(build):
    trainer = build()
    for gap in (0.125, 0.25):
        trainer.train()
        trainer.state.log_history[0]["gap/nats_per_byte"] = gap
        trainer.create_model_card()
        card = Path(trainer.args.output_dir, "README.md").read_text(encoding="utf-8")
        assert f"| `gap/nats_per_byte` | {gap} |" in card


def test_a_turn_end_that_is_the_pad_token_counts_among_the_tokens_seen(build):
    tokenizer = student_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    trainer = fix_rollouts(build(processing_class=tokenizer, include_num_input_tokens_seen="non_padding"))
    trainer.train()
    [batch] = trainer._pending.batches
    ended = (batch["input_ids"] == tokenizer.eos_token_id).sum(1)
    assert ended.min() > 0
    assert trainer.state.num_input_tokens_seen == batch["lengths"].sum()


def test_generation_uses_the_cache_under_gradient_checkpointing(build):
    trainer = build(gradient_checkpointing=True)
    widths = []
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, inputs: widths.append(inputs["input_ids"].shape[1]) if inputs.get("use_cache") else None,
        with_kwargs=True,
    )
    trainer.train()
    assert trainer.model.is_gradient_checkpointing
    read = sum(width > 1 for width in widths)
    assert read and len(widths) - read >= 7
    assert widths[read:] == [1] * (len(widths) - read), "after the prompts, one token at a time"


def test_the_head_never_sees_a_whole_vocabulary_of_logits_to_score(build):
    trainer = build()
    heads = [trainer.model.get_output_embeddings(), trainer.teacher_model.get_output_embeddings()]
    calls = []
    for head in heads:
        head.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    fix_rollouts(trainer).train()
    assert calls == [], "scoring goes through the fused head, which multiplies tile by tile"


def test_two_trainers_of_unlike_temperatures_share_a_teacher_and_a_student(build):
    steps = []
    for temperatures in ([1.0], [1.0, 0.5], [0.5]):
        shared = {"model": student_model(), "teacher": teacher_model()}
        first, *_ = [fix_rollouts(build(**shared, temperature=own, **SGD)) for own in temperatures]
        steps.append(step_of(first))
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-6)
    assert (steps[0] - steps[2]).abs().max() > 0.1 * steps[0].abs().max()


def test_rollouts_are_scored_at_the_temperature_they_were_drawn_at(build):
    for temperature in (1.0, 0.5):
        trainer = fix_rollouts(build(temperature=temperature))
        [batch] = trainer._roll_out(
            trainer.model, [[row for row in trainer.data_collator(list(trainer.train_dataset))["prompts"]]], "train"
        )
        inputs = {name: batch[name] for name in ("input_ids", "scored")}
        scored = trainer.model(**inputs, targets=batch["labels"][:, 1:][batch["labels"][:, 1:] >= 0])
        logits = trainer.model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        plain = (logits / temperature).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        torch.testing.assert_close(scored.log_probs, plain[labels >= 0], rtol=1e-4, atol=1e-4)


def test_the_models_own_generation_config_cannot_bend_the_rollouts(build):
    model = student_model()
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0, min_new_tokens=6, suppress_tokens=[3], eos_token_id=2, temperature=0.1, do_sample=True
    )
    trainer = build(model=model)
    with mock.patch.object(type(model), "_sample", autospec=True, side_effect=type(model)._sample) as sample:
        trainer.train()
    used = sample.call_args.kwargs["generation_config"]
    assert (used.temperature, used.top_p, used.top_k) == (1.0, 1.0, 0)
    assert used.repetition_penalty in (None, 1.0)
    assert not used.min_new_tokens
    assert not used.suppress_tokens
    assert trainer.model.generation_config.repetition_penalty == 5.0, "and it is given back as it was"


def test_no_reference_answer_reaches_an_on_policy_prompt(build):
    trainer = build()
    for row in trainer.train_dataset:
        for tokenizer, ids in (
            (trainer.processing_class, row["prompt_ids"]),
            (trainer.teacher_processing_class, row["teacher_prompt_ids"]),
        ):
            assert "REFERENCE" not in tokenizer.decode(ids)
            assert "What is" in tokenizer.decode(ids)
        assert row["reference_ids"] == []


def test_a_student_with_the_teachers_own_weights_and_tokenizer_is_left_alone(tmp_path):
    trainer = CrossTokenizerGKDTrainer(
        student_model(),
        student_model(),
        CrossTokenizerGKDConfig(
            str(tmp_path), bf16=False, gradient_checkpointing=False, use_cpu=True, report_to=[], disable_tqdm=True,
            max_new_tokens=8, max_steps=1, logging_steps=1, save_strategy="no", per_device_train_batch_size=4, **SGD
        ),
        prompts(),
        processing_class=student_tokenizer(),
        teacher_processing_class=student_tokenizer(),
    )  # fmt: skip
    assert step_of(trainer).abs().max() < 1e-5
    [log] = [entry for entry in trainer.state.log_history if "gap/nats_per_byte" in entry]
    assert abs(log["gap/nats_per_byte"]) < 1e-5
    assert log["alignment/one_to_one_fraction"] == 1


def test_text_the_student_did_not_write_uses_the_off_policy_loss(build):
    for settings in ({"lmbda": 0.0}, {"lmbda": 0.0, "seq_kd": True}, {"lmbda": 0.0, "distillation_loss": "alm"}):
        trainer = build(**settings)
        used = []
        loss = trainer.off_policy_loss
        trainer.off_policy_loss = lambda batch, n, loss=loss, used=used: (
            used.append(type(loss).__name__) or loss(batch, n)
        )
        trainer.distillation_loss = None  # calling it would fail
        trainer.model.generate = None  # so would writing
        trainer.train()
        assert used == ["ALM"]
        assert trainer.state.log_history[0]["off_policy_fraction"] == 1


def test_off_policy_rows_read_the_reference_and_its_end(build):
    trainer = build(lmbda=0.0)
    [batch] = trainer._roll_out(trainer.model, [trainer.data_collator(list(trainer.train_dataset))["prompts"]], "train")
    for ids, start, end in zip(batch["input_ids"], batch["prompt_lengths"], batch["lengths"], strict=True):
        text = trainer.processing_class.decode(ids[start:end])
        assert text.startswith("REFEREN"), "cut to max_new_tokens, here 8"


def test_seq_kd_lets_the_teacher_write_in_student_tokens(build):
    trainer = build(lmbda=0.0, seq_kd=True, dataset=prompts().remove_columns("completion"))
    rows = trainer.data_collator(list(trainer.train_dataset))["prompts"]
    [batch] = trainer._roll_out(trainer.model, [rows], "train")
    assert (batch["labels"] >= 0).sum() > len(rows)
    assert batch["input_ids"].max() < len(trainer.processing_class)


def test_what_the_teacher_writes_fits_both_contexts(build):
    long_ago = teacher_model(max_position_embeddings=44)
    trainer = build(lmbda=0.0, seq_kd=True, teacher=long_ago, max_new_tokens=30, dataset=prompts(2))
    rows = trainer.data_collator(list(trainer.train_dataset))["prompts"]
    completions = [ids for _, ids in trainer.rollouts.references(rows)[0]]
    assert max(len(row.teacher_ids) for row in rows) + 30 > 44, "the teacher could not write 30 tokens"
    assert all(len(ids) <= 30 for ids in completions)
    with pytest.raises(ValueError, match="no room to write in its context of 44"):
        trainer.rollouts.references([mock.Mock(teacher_ids=[0] * 44)])


def test_a_loss_that_returns_something_else_is_told_what_to_return(build):
    with pytest.raises(TypeError, match=r"returns \(value, metrics\).*Tensor"):
        build(distillation_loss=lambda batch, num_items: batch.student_log_probs.sum()).train()
    with pytest.raises(TypeError, match=r"'own' must be a pair \(sum, weight\), got 1.0"):
        build(distillation_loss=lambda batch, num_items: (batch.student_log_probs.sum(), {"own": 1.0})).train()


def test_mixed_draws_depend_on_seed_and_step_alone(build):
    trainer = build(lmbda=0.5)
    first = trainer.rollouts.lmbda_draws(0, 4)
    assert trainer.rollouts.lmbda_draws(0, 4) == first
    assert trainer.rollouts.lmbda_draws(1, 4) != first


def test_figures_of_text_that_the_student_did_not_write_have_names_of_their_own(build):
    names = {
        "gap/nats_per_byte",
        "student/nats_per_byte",
        "teacher/nats_per_byte",
        "entropy",
        "completions/mean_length",
    }

    def logged(lmbda, *draws) -> dict[str, float]:
        settings = {"gradient_accumulation_steps": len(draws), "train_sampling_strategy": "sequential"}
        trainer = fix_rollouts(build(lmbda=lmbda, per_device_train_batch_size=2, **settings))
        trainer.rollouts.lmbda_draws = lambda step, count: list(draws)
        trainer.train()
        log = trainer.state.log_history[0]
        return {name: log[name] for name in log if name.removeprefix("given/") in names}

    own, given = logged(1.0, 0.1), logged(0.0, 0.1)
    assert set(own) == names and set(given) == {f"given/{name}" for name in names}
    for alone, draws in ((own, (0.1, 0.9)), (given, (0.9, 0.1))):
        both = logged(0.5, *draws)
        assert set(both) == {*own, *given}
        assert {name: both[name] for name in alone} == pytest.approx(alone, rel=1e-5)


def test_evaluation_is_on_policy_repeatable_and_leaves_training_alone(build):
    trained = [
        weights(trainer)
        for trainer in (
            build(max_steps=3, eval_dataset=prompts(6), eval_strategy="steps", eval_steps=1),
            build(max_steps=3),
        )
        if trainer.train()
    ]
    torch.testing.assert_close(*trained, rtol=0, atol=0)
    trainer = build(eval_dataset=prompts(6))
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_gap/nats_per_byte"] == second["eval_gap/nats_per_byte"] != 0
    assert {"eval_loss", "eval_student/nats_per_byte", "eval_teacher/nats_per_byte"} <= set(first)


class ScheduleFree(torch.optim.SGD):
    """As schedule-free optimizers do, it gives other weights to evaluate with than to train with."""

    kept = None

    @torch.no_grad()
    def eval(self):
        if self.kept is None:
            own = self.param_groups[0]["params"]
            self.kept = [parameter.clone() for parameter in own]
            for parameter in own:
                parameter.mul_(0.5)

    @torch.no_grad()
    def train(self):
        if self.kept is not None:
            for parameter, value in zip(self.param_groups[0]["params"], self.kept, strict=True):
                parameter.copy_(value)
            self.kept = None


def test_after_an_evaluation_the_student_writes_with_the_weights_that_it_trains(build):
    def trained(**settings) -> torch.Tensor:
        model = student_model()
        optimizer = ScheduleFree([{"params": list(model.parameters())}], lr=0.1)
        trainer = build(model=model, optimizers=(optimizer, None), max_steps=3, eval_dataset=prompts(3), **settings)
        trainer.train()
        optimizer.train()
        return weights(trainer)

    assert torch.equal(trained(eval_strategy="steps", eval_steps=1), trained())


def test_predict_returns_the_figures_that_evaluate_does(build):
    trainer = build(eval_dataset=prompts(4))
    evaluated, predicted = trainer.evaluate(), trainer.predict(prompts(4)).metrics
    figures = {name for name in evaluated if "/" in name and "seconds/" not in name}
    assert "eval_gap/nats_per_byte" in figures
    for name in figures | {"eval_loss"}:
        assert predicted[name.replace("eval_", "test_", 1)] == pytest.approx(evaluated[name]), name


@pytest.mark.parametrize("streamed", [False, True])
def test_a_dataset_is_shuffled_where_it_is_asked_for(build, streamed):
    def order(**settings):
        rows = prompts(16).to_iterable_dataset() if streamed else prompts(16)
        return [tuple(row["prompt_ids"]) for row in build(dataset=rows, **settings).train_dataset]

    plain, shuffled = order(), order(shuffle_dataset=True)
    assert shuffled != plain and sorted(shuffled) == sorted(plain)
    assert order(shuffle_dataset=True) == shuffled != order(shuffle_dataset=True, seed=7)


def test_evaluate_takes_a_fresh_dataset(build):
    assert "eval_gap/nats_per_byte" in build().evaluate(prompts(3).remove_columns("completion"))


def test_every_promised_figure_is_logged(build):
    trainer = build(max_steps=2, log_completions=True)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["gap/nats_per_byte"] == pytest.approx(
        log["teacher/nats_per_byte"] - log["student/nats_per_byte"], abs=1e-5
    )
    promised = """loss alignment/one_to_one_fraction alignment/masked_fraction alignment/student_tokens_per_chunk
        masked_bytes/invalid_utf8 masked_bytes/markup alignment/teacher_tokens_per_chunk alignment/neutralised_fraction
        alignment/teacher_context_exceeded_fraction advantage/clipped_fraction entropy completions/mean_length
        completions/truncated_fraction completions/empty_fraction off_policy_fraction seconds/generation seconds/teacher
        seconds/student seconds/alignment"""
    assert set(promised.split()) <= set(log)
    assert log["seconds/student"] > 0


def test_sample_completions_are_printed_with_their_gap(build, capsys):
    build(log_completions=True).train()
    printed = capsys.readouterr().out
    assert "nats/byte" in printed
    assert "What is" in printed


def test_no_advice_to_move_to_a_trainer_that_cannot_do_this(build, caplog):
    build().train()
    assert "DistillationTrainer" not in caplog.text


def test_paths_alone_are_enough(tmp_path):
    for name, model, tokenizer in (
        ("student", student_model(), student_tokenizer()),
        ("teacher", teacher_model().to(torch.bfloat16), teacher_tokenizer()),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    args = CrossTokenizerGKDConfig(
        str(tmp_path / "run"), teacher_model_init_kwargs={"attn_implementation": "eager"}, max_new_tokens=8,
        use_cpu=True, report_to=[],
    )  # fmt: skip
    trainer = CrossTokenizerGKDTrainer(str(tmp_path / "student"), str(tmp_path / "teacher"), args, prompts())
    assert trainer.teacher_model.config._attn_implementation == "eager"
    assert trainer.teacher_model.dtype == torch.bfloat16, "the teacher keeps the dtype it was saved in"
    assert trainer.model.dtype == torch.float32, "the student trains in float32"
    assert len(trainer.teacher_processing_class) == len(teacher_tokenizer())


def test_args_have_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = student_model()
    model.config._name_or_path = "org/student"
    trainer = CrossTokenizerGKDTrainer(
        model, teacher_model(), None, prompts(), None, student_tokenizer(), teacher_tokenizer()
    )
    args = trainer.args
    assert args.output_dir == "student-ctopd"
    assert (args.learning_rate, args.temperature, args.lmbda, args.top_p) == (1e-6, 1.0, 1.0, 1.0)
    loss = trainer.distillation_loss
    assert (args.distillation_loss, loss.event, loss.advantage_clip) == ("reverse_kl", "closed", 10.0)
    loss = choice.distillation_loss(CrossTokenizerGKDConfig(str(tmp_path), distillation_loss="dpca"))
    assert (loss.event, loss.credit, loss.advantage_clip) == ("closed", "macro", 10.0)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The sum of 2 and 3 is"},
        {"prompt": "The sum of 2 and 3 is", "completion": " five"},
        {"prompt": [{"role": "user", "content": "two and three"}]},
        {"messages": [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "two"}]},
        {"messages": [{"role": "system", "content": "sum"}, {"role": "user", "content": "two?"}]},
        {
            "prompt": [{"role": "user", "content": "two and three"}],
            "tools": [{"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}],
            "chat_template_kwargs": {"shout": True},
        },
    ],
    ids=["text", "text-completion", "prompt", "messages", "messages-without-answer", "tools"],
)
def test_every_dataset_shape_trains(build, row):
    trainer = build(dataset=Dataset.from_list([row] * 4))
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_prompts_are_rendered_once_and_found_again_by_the_next_run(build, tmp_path):
    path = tmp_path / "prompts.parquet"
    prompts(6).to_parquet(path)
    files = []
    for _ in range(2):
        dataset = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
        rendered = build(dataset=dataset, dataset_num_proc=2).train_dataset
        files.append([(file["filename"], os.stat(file["filename"]).st_mtime_ns) for file in rendered.cache_files])
    assert len(files[0]) == 2, "a file for each process"
    assert files[1] == files[0]


@pytest.mark.parametrize("newer", [None, "transformers", "tokenizers", "this package"])
def test_rows_that_other_versions_have_rendered_are_rendered_anew(build, tmp_path, monkeypatch, newer):
    path = tmp_path / "prompts.parquet"
    prompts(6).to_parquet(path)

    def files(**settings):
        dataset = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
        return {file["filename"] for file in build(dataset=dataset, **settings).train_dataset.cache_files}

    first = files()
    if newer == "this package":
        monkeypatch.setattr("trl_ctopd.rollouts.prompts.__version__", "newer")
    elif newer:
        monkeypatch.setattr(
            "trl_ctopd.rollouts.prompts.version", lambda name: "newer" if name == newer else version(name)
        )
    assert (files() == first) == (newer is None)
    assert files(teacher_chat_template_kwargs={"shout": True}).isdisjoint(first), "another rendering"


def test_streaming_datasets_train(build):
    assert build(dataset=prompts().to_iterable_dataset()).train().global_step == 1


@pytest.mark.parametrize("rows", [6, 7, 9, 2, 1])
def test_a_stream_is_learned_as_the_same_rows_of_a_known_number_are(build, rows):
    """Two rows a micro-batch, two of these a step: the last step of each pass has fewer, and a pass may be less than a step."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6, "logging_steps": 1}
    found = []
    for dataset in (prompts(rows), prompts(rows).to_iterable_dataset()):
        order = {"train_sampling_strategy": "sequential"}
        trainer = fix_rollouts(build(dataset=dataset, **sizes, **order, **{**SGD, "learning_rate": 0.01}))
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append((weights(trainer), [entry["completions/mean_length"] for entry in log]))
    (known, lengths), (streamed, own) = found
    torch.testing.assert_close(streamed, known)
    assert own == lengths


def test_chat_template_kwargs_go_to_their_own_side(build):
    template = "{{ messages[0]['content'] }}{% if shout %} two two two{% endif %}"
    for ours, theirs, shouting in (
        ({"shout": True}, {}, (True, False)),
        (None, {"shout": True}, (False, True)),
        ({"shout": True}, None, (True, True)),
    ):
        tokenizers = student_tokenizer(), teacher_tokenizer()
        for tokenizer in tokenizers:
            tokenizer.chat_template = template
        trainer = build(chat_template_kwargs=ours, teacher_chat_template_kwargs=theirs)
        trainer._tokenizer, trainer.panel.only.side.tokenizer = tokenizers
        del trainer.__dict__["student_side"]
        rendered = trainer._prepare_dataset(prompts(1), None, trainer.args, False, None, "train")[0]
        texts = tokenizers[0].decode(rendered["prompt_ids"]), tokenizers[1].decode(rendered["teacher_prompt_ids"])
        assert tuple("two two two" in text for text in texts) == shouting


def test_nan_teacher_log_probs_never_reach_the_weights(build):
    trainer = fix_rollouts(build(**SGD))
    score = trainer.teacher.scores

    def broken(*asked):
        scores = score(*asked)
        scores[0].log_probs[:] = float("nan")
        scores[1].log_probs[0] = float("-inf")
        return scores

    trainer.teacher.scores = broken
    trainer.train()
    log = trainer.state.log_history[0]
    assert torch.isfinite(weights(trainer)).all()
    assert torch.isfinite(torch.tensor([log["loss"], log["gap/nats_per_byte"]])).all()
    assert 0 < log["alignment/neutralised_fraction"] < 1


def test_a_plain_rows_end_is_scored_as_any_of_the_teachers_stops(build):
    teacher = teacher_model(initializer_range=0.3)
    stops = [teacher_tokenizer().eos_token_id, 100]
    teacher.generation_config.eos_token_id = stops
    rows = Dataset.from_list([{"prompt": f"What is {n} plus" + " and two" * n} for n in range(4)])
    trainer = fix_rollouts(build(teacher=teacher, dataset=rows, length_grouped=False))
    prompts = trainer.data_collator(list(trainer.train_dataset))["prompts"]
    [batch] = trainer._roll_out(trainer.model, [prompts], "train")
    ended = 0
    for row, prompt in enumerate(prompts):
        chunks = batch["teacher_chunks"][row]
        last = int((chunks >= 0).nonzero()[-1])
        if batch["teacher_ids"][row, last] not in stops:
            continue
        ids = torch.tensor([[*prompt.teacher_ids, *batch["teacher_ids"][row, :last].tolist()]])
        with torch.no_grad():
            expected = teacher.double()(ids).logits[0, -1].log_softmax(-1)[stops].logsumexp(0)
        teacher.float()
        assert batch["teacher_log_probs"][row, last].item() == pytest.approx(expected.item(), abs=1e-4)
        ended += 1
    assert ended


def test_a_text_beyond_the_teachers_context_is_masked_and_counted(build):
    trainer = fix_rollouts(build(teacher=teacher_model(max_position_embeddings=40), per_device_train_batch_size=16))
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 < log["alignment/teacher_context_exceeded_fraction"] < 1
    assert log["alignment/masked_fraction"] > 0


def test_much_masked_text_is_warned_of(build, caplog):
    build(teacher=teacher_model(max_position_embeddings=5)).train()
    assert "100% of the student's tokens take no part" in caplog.text


def test_a_step_in_which_nothing_can_be_scored_changes_nothing(build):
    trainer = build(teacher=teacher_model(max_position_embeddings=5), **SGD)
    assert step_of(trainer).abs().max() == 0


@pytest.mark.parametrize("targets", [None, ["q_proj", "embed_tokens"]])
def test_lora_trains_the_adapter_alone_and_merges_to_what_was_trained(build, tmp_path, targets):
    adapter = LoraConfig(r=4, target_modules=targets)
    trainer = build(peft_config=adapter, max_steps=3, gradient_checkpointing=True)
    before = {name: tensor.clone() for name, tensor in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, tensor in trainer.model.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved and all("lora_" in name for name in moved)
    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(student_model(), str(tmp_path / "adapter")).merge_and_unload()
    ids = torch.arange(12)[None]
    torch.testing.assert_close(reloaded(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_bf16_autocast_trains(build):
    trainer = build(bf16=True, gradient_checkpointing=True)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


def test_a_saved_student_loads_and_writes(build, tmp_path):
    trainer = build()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(model.lm_head.weight, trainer.model.lm_head.weight)
    assert model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False).shape[1] > 4


def test_a_process_that_saves_nothing_writes_no_card(build, tmp_path, monkeypatch):
    trainer = build()
    monkeypatch.setattr(CrossTokenizerGKDConfig, "should_save", False)
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_a_saved_folder_has_our_card_with_lora_too(build, tmp_path):
    trainer = build(peft_config=LoraConfig(r=4), save_strategy="steps", save_steps=1, distillation_loss="dpca")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    for folder in (tmp_path / "adapter", tmp_path / "run" / "checkpoint-1"):
        assert "2606.09456" in (folder / "README.md").read_text()


def test_the_saved_student_stops_at_every_stop_token_it_learned(build, tmp_path):
    model = student_model()
    model.generation_config.eos_token_id = 9
    trainer = build(model=model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert set(saved.eos_token_id) == set(trainer.stop_ids) > {9}


def test_each_of_several_evaluation_sets_keeps_its_own_figures(build):
    trainer = build(eval_dataset={"short": prompts(3), "long": prompts(6)})
    figures = trainer.evaluate()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_short_gap/nats_per_byte", "eval_long_gap/nats_per_byte"} <= logged & set(figures)


@pytest.mark.parametrize("window", [1, 2])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(build, tmp_path, window):
    # two steps in the first epoch, so that resuming has data to skip
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": window,
        "dataset": prompts(12),
    }
    whole = build(**settings)
    whole.train()
    resumed = build(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


def test_sampling_settings_reach_the_generation(build):
    trainer = build(top_p=0.9, top_k=7, min_p=0.05, temperature=0.7, generation_kwargs={"repetition_penalty": 1.1})
    config = trainer.generation_config
    assert (config.top_p, config.top_k, config.min_p, config.temperature) == (0.9, 7, 0.05, 0.7)
    assert config.repetition_penalty == 1.1
    assert config.use_cache and config.do_sample
    assert trainer.train().global_step == 1


def test_a_callable_is_a_loss(build):
    def likelihood(batch, num_items):
        return -(batch.student_log_probs * (batch.student_chunks >= 0)).sum() / num_items, {
            "own": (torch.ones(()), torch.ones(()))
        }

    trainer = build(distillation_loss=likelihood, save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["own"] == 1
    assert "likelihood" in trainer.args.to_json_string()


def test_trl_still_has_what_this_trainer_stands_on():
    """A failure here says what moved in TRL; the pin in setup.cfg should have kept it out."""
    parents = [base.__name__ for base in CrossTokenizerGKDTrainer.__mro__]
    own = ["ResumableTrainer", "EndedRun", "ResumedAdapters"]
    assert parents[1:7] == [*own, "GKDTrainer", "SFTTrainer", "_BaseTrainer"], parents
    expected = {
        GKDTrainer.compute_loss: ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
        GKDTrainer.__mro__[1]._prepare_dataset: [
            "self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name",
        ],
        GKDTrainer.get_batch_samples: ["self", "epoch_iterator", "num_batches", "device"],
        GKDTrainer.prediction_step: ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
        GKDTrainer.create_model_card: ["self", "model_name", "dataset_name", "tags"],
        ChunkedLogProbFunction.forward: [
            "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping",
            "logit_scale", "outputs",
        ],
        unwrap_model_for_generation: [
            "model", "accelerator", "gather_deepspeed3_params", "generation_kwargs", "gradient_checkpointing_kwargs",
        ],
    }  # fmt: skip
    for function, parameters in expected.items():
        assert list(inspect.signature(function).parameters) == parameters, f"{function.__qualname__} has moved in TRL"
