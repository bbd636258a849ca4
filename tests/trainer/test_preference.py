"""Preference pairs across tokenizers (CTPD): DPO by chunks, with the teacher as the reference."""

import copy
import math
from contextlib import nullcontext
from datetime import date
from types import SimpleNamespace

import needs
import numpy as np
import pytest
import torch
from accelerate import DistributedType
from datasets import Dataset, DatasetDict
from peft import LoHaConfig, LoraConfig, get_peft_model
from toys import SHAPE, student_model, student_tokenizer, teacher_model, teacher_tokenizer, trained_before, weights
from transformers import MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer

from trl_ctopd import preference
from trl_ctopd.losses.ctpd import chunk_sums, chunk_weights, columns
from trl_ctopd.models import products
from trl_ctopd.models.trials import draws_noise
from trl_ctopd.preference import CrossTokenizerDPOConfig, CrossTokenizerDPOTrainer
from trl_ctopd.rollouts.pairing import Prompt, pair
from trl_ctopd.text.chat import Conversation, Speaker
from trl_ctopd.text.sections import SectionAligner, aligner_of


QUIET = {
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 2,
    "max_steps": 3,
}


def pairs(rows=4):
    def said(text):
        return [{"role": "assistant", "content": text}]

    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is {n} plus {n + 40}?"}],
                "chosen": said(f"{2 * n + 40} is the sum"),
                "rejected": said(f"{2 * n + 41} is what"),
            }
            for n in range(10, 10 + rows)
        ]
    )


def test_answers_without_the_thought_that_the_students_prompt_opens_are_compared_as_answers():
    """They go on from before the opened thought, and are not all masked as one."""
    template = (
        "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n"
        "{% if message['role'] == 'assistant' and message['reasoning_content'] %}<think>\n{{ message['reasoning_content'] }}</think>\n{% endif %}"
        "{{ message['content'] }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = student_tokenizer()
    tokenizer.chat_template = template
    student, teacher = Speaker(tokenizer), Speaker(teacher_tokenizer())
    [row] = pairs(1)
    rendered = preference._render_pair(row, 0, student, {"": teacher}, "train")
    opened = student.prompt_ids(Conversation(row["prompt"]))
    assert len(rendered["prompt_ids"]) < len(opened)
    prompt, sections = preference._prompt(rendered), SectionAligner(aligner_of(student, teacher), student, teacher)
    ends = dict.fromkeys(student.stop_ids(), teacher.turn_end)
    [found] = pair([prompt], [rendered["chosen_ids"]], aligner_of(student, teacher), turn_ends=ends, sections=sections)
    assert (found.student_chunks >= 0).all() and not found.alignment.masked


def build(folder, dataset=None, model=None, teacher=None, teacher_tokens=None, weighers=(None, None), **settings):
    settings = {**QUIET, **settings}
    peft_config, evaluated = settings.pop("peft_config", None), settings.pop("eval_dataset", None)
    return CrossTokenizerDPOTrainer(
        model or student_model(),
        teacher or teacher_model(),
        CrossTokenizerDPOConfig(str(folder), **settings),
        pairs() if dataset is None else dataset,
        positive_teacher=weighers[0],
        negative_teacher=weighers[1],
        processing_class=student_tokenizer(),
        teacher_processing_class=teacher_tokens or teacher_tokenizer(),
        peft_config=peft_config,
        eval_dataset=evaluated,
    )


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("side", ["model", "teacher"])
def test_models_that_were_trained_in_another_precision_are_compared_in_this_runs(tmp_path, side, bf16):
    made = {"model": student_model, "teacher": teacher_model}[side]
    fresh = build(tmp_path, bf16=bf16, **{side: made()})
    before = build(tmp_path, bf16=bf16, **{side: trained_before(made(), tmp_path, not bf16)})
    assert losses(before) == losses(fresh)
    torch.testing.assert_close(weights(before), weights(fresh), rtol=0, atol=0)


def test_an_adapter_in_half_precision_goes_on_in_it_when_its_run_is_resumed(tmp_path):
    """As TRL makes that of a quantized student."""

    def student():
        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return get_peft_model(student_model().to(torch.bfloat16), config, autocast_adapter_dtype=False)

    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    whole = build(tmp_path, model=student(), **settings)
    whole.train()
    resumed = build(tmp_path, model=student(), **{**settings, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {own.dtype for own in resumed.model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["default", "mine"])
def test_an_adapter_that_is_given_is_learned_as_it_is_and_saved_alone(tmp_path, name):
    """TRL's DPOTrainer adds a copy as the reference, of which PiSSA makes another base model."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    student = get_peft_model(student_model(), config, adapter_name=name)
    before = {own: weight.clone() for own, weight in student.state_dict().items()}
    trainer = build(tmp_path, model=student)
    assert list(trainer.model.peft_config) == [name]
    assert all(torch.equal(weight, before[own]) for own, weight in trainer.model.state_dict().items())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    folders = [own.name for own in (tmp_path / "saved").iterdir() if own.is_dir()]
    assert folders == ([] if name == "default" else [name])


def test_pairs_of_a_student_whose_weights_are_not_finite_end_the_run_before_a_checkpoint_of_them(tmp_path):
    trainer = build(tmp_path, save_strategy="steps", save_steps=1)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[5] = torch.nan
    with pytest.raises(FloatingPointError, match="Weights of the student are NaN or infinite before the first step"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("streamed", ["dataset", "eval_dataset"])
def test_a_stream_is_refused_to_train_and_to_evaluate_on(tmp_path, streamed):
    with pytest.raises(ValueError, match="pass a map-style Dataset, not a stream"):
        build(tmp_path, **{streamed: pairs().to_iterable_dataset()})


def test_a_chunks_weight_is_the_papers_formula():
    generator = np.random.default_rng(0)
    positive, negative = generator.normal(size=(2, 40)) * 2
    for mu in (1.0, -1.0):
        found = chunk_weights(torch.tensor(positive), torch.tensor(negative), mu, -0.5, 1.5, 1.3)
        wanted = [1.3 * math.exp(mu * min(max(p - n, -0.5), 1.5)) for p, n in zip(positive, negative, strict=True)]
        assert found.tolist() == pytest.approx(wanted, abs=1e-12)


def test_columns_equal_a_loop_over_chunks_and_leave_out_what_cannot_be_compared():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        chunks = int(torch.randint(1, 6, (), generator=generator))
        student = torch.randint(-1, chunks, (9,), generator=generator)
        teacher = torch.randint(-1, chunks, (7,), generator=generator)
        log_probs = -torch.rand(7, generator=generator, dtype=torch.float64) * 5
        log_probs[0] = -math.inf
        weights = torch.rand(chunks, generator=generator, dtype=torch.float64) + 0.2
        of_tokens, reference = columns(student.tolist(), log_probs, teacher.tolist(), weights)
        wanted, total = [0.0] * 9, 0.0
        for chunk in range(chunks):
            inside = [i for i in range(9) if student[i] == chunk]
            nats = sum(log_probs[j].item() for j in range(7) if teacher[j] == chunk)
            if inside and any(teacher == chunk) and math.isfinite(nats):
                total += weights[chunk].item() * nats
                for i in inside:
                    wanted[i] = weights[chunk].item()
        assert of_tokens == pytest.approx(wanted) and reference == pytest.approx(total)


def test_with_a_constant_weight_chunks_may_be_merged():
    generator = torch.Generator().manual_seed(1)
    log_probs = -torch.rand(8, generator=generator, dtype=torch.float64)
    student, teacher = [0, 0, 1, 2, 3, 3], [0, 1, 1, 2, 2, 3, 3, 3]
    apart = columns(student, log_probs, teacher, torch.full((4,), 0.7, dtype=torch.float64))
    merged = ([chunk // 2 for chunk in side] for side in (student, teacher))
    merged_student, merged_teacher = merged
    together = columns(merged_student, log_probs, merged_teacher, torch.full((2,), 0.7, dtype=torch.float64))
    assert apart[0] == together[0] and apart[1] == pytest.approx(together[1])


@pytest.mark.parametrize("policy", ["bridge", "mask"])
def test_the_end_of_an_answer_is_a_chunk_of_its_own_or_takes_no_part(tmp_path, policy):
    row = build(tmp_path, eos_policy=policy).train_dataset[0]
    stop = student_tokenizer().eos_token_id
    assert row["chosen_ids"][-1] == stop and row["chosen_weights"][-1] == (policy == "bridge")
    assert row["chosen_weights"][0] == 1


def test_with_one_tokenizer_and_no_weights_it_is_trls_dpo(tmp_path):
    """Whose reference log-probs are the teacher's."""
    tokenizer = student_tokenizer()
    reference = student_model(seed=1)
    model = student_model()
    ours = build(
        tmp_path / "ours", model=copy.deepcopy(model), teacher=copy.deepcopy(reference), teacher_tokens=tokenizer
    )
    theirs = DPOTrainer(
        copy.deepcopy(model),
        ref_model=reference,
        args=DPOConfig(str(tmp_path / "theirs"), precompute_ref_log_probs=True, **QUIET),
        train_dataset=pairs(),
        processing_class=student_tokenizer(),
    )
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours.train_dataset[column][:] == theirs.train_dataset[column][:]
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-6)


def test_a_reference_that_is_the_student_costs_log_two_at_the_first_step(tmp_path):
    model = student_model()
    trainer = build(
        tmp_path, model=copy.deepcopy(model), teacher=model, teacher_tokens=student_tokenizer(), max_steps=1
    )
    assert losses(trainer) == pytest.approx([math.log(2)], abs=1e-5)


def test_the_teachers_columns_keep_their_precision_under_deepspeed(tmp_path):
    """Trainer would round them to DeepSpeed's bfloat16: a sum of log-probs by up to 1 where it is below -256."""
    trainer = build(tmp_path)
    trainer.is_deepspeed_enabled = True
    batch = next(iter(trainer.get_train_dataloader()))
    moved = trainer._prepare_inputs(dict(batch))
    for name in ("ref_chosen_logps", "ref_rejected_logps", "completion_weights"):
        assert moved[name].dtype == torch.float32 and torch.equal(moved[name], batch[name])


def test_swapping_a_pair_and_the_sign_of_mu_turns_the_margin_round(tmp_path):
    weighers = teacher_model(), teacher_model()
    with torch.no_grad():
        for weight in weighers[0].parameters():
            weight.mul_(1.1)
    swapped = pairs().rename_columns({"chosen": "rejected", "rejected": "chosen"})
    margins = []
    for dataset, mu in ((pairs(), 1.0), (swapped, -1.0)):
        trainer = build(tmp_path / str(mu), dataset, weighers=copy.deepcopy(weighers), weight_mu=mu, max_steps=1)
        trainer.train()
        margins.append(trainer.state.log_history[0]["rewards/margins"])
    assert margins[0] == pytest.approx(-margins[1], abs=1e-5) and abs(margins[0]) > 1e-3


def test_chunks_get_the_weights_that_the_two_teachers_give_them(tmp_path):
    weighers = teacher_model(), teacher_model()
    with torch.no_grad():
        for weight in weighers[0].parameters():
            weight.mul_(1.2)
    trainer = build(tmp_path, weighers=weighers)
    row = trainer.train_dataset[0]
    weights = np.array(row["chosen_weights"])
    assert len(weights) == len(row["chosen_ids"])
    assert np.exp(-0.5) - 1e-6 <= weights[weights > 0].min() < weights.max() <= np.exp(1.5) + 1e-6
    [rollout] = trainer._panel.pair(
        [Prompt(row["prompt_ids"], row["teacher_prompt_ids"], frame=row["frame"])], [row["chosen_ids"]]
    )
    chunks = torch.as_tensor(rollout.teacher_chunks)
    sums = [
        chunk_sums(
            own.log_probs([rollout.teacher_prompt_ids], [rollout.teacher_ids])[0].double(), chunks, rollout.num_chunks
        )
        for own in trainer._weighers
    ]
    wanted = np.exp(np.clip((sums[0] - sums[1]).numpy(), -0.5, 1.5))
    inside = rollout.student_chunks >= 0
    assert weights[inside] == pytest.approx(wanted[rollout.student_chunks[inside]], abs=1e-5)


def test_it_trains_an_adapter_across_tokenizers_and_the_margin_grows(tmp_path):
    trainer = build(
        tmp_path, peft_config=LoraConfig(target_modules="all-linear"), max_steps=8, learning_rate=1e-2, beta=0.5
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0] + 0.1


def test_the_student_multiplies_by_the_faster_library_while_it_learns_pairs(tmp_path, monkeypatch):
    for name in ("onednn_packs", "onednn_is_faster"):
        monkeypatch.setattr(products, name, lambda: True)
    trainer, seen = build(tmp_path, max_steps=1), set()
    layers = [own for name, own in trainer.model.named_modules() if name.endswith("_proj")]
    for own in layers:
        own.register_forward_hook(lambda layer, *_: seen.add(type(layer)))
    trainer.train()
    assert seen == {products.OneDnnLinear} and {type(own) for own in layers} == {torch.nn.Linear}


def test_the_teachers_columns_are_computed_once(tmp_path, monkeypatch):
    folder = tmp_path / "pairs"
    pairs().save_to_disk(folder)
    dataset = Dataset.load_from_disk(str(folder))
    first = build(tmp_path / "run", dataset)
    monkeypatch.setattr(CrossTokenizerDPOTrainer, "_columns", lambda *_: pytest.fail("the teacher read again"))
    second = build(tmp_path / "run", dataset)
    assert second.train_dataset["chosen_weights"][:] == first.train_dataset["chosen_weights"][:]


def reordered():
    """The teacher, and the same with its embeddings in another order, which leaves the sum of each weight as it is."""
    one, other = teacher_model(), teacher_model()
    rounded = (
        one.get_input_embeddings().weight.detach().mul(1024).round() / 1024
    )  # whose float32 sum is exact in any order
    one.get_input_embeddings().weight.data.copy_(rounded)
    other.get_input_embeddings().weight.data.copy_(rounded.flip(0))
    return one, other


@pytest.mark.parametrize(
    "one_and_other",
    [
        lambda: (teacher_model(), teacher_model(rope_parameters={"rope_type": "default", "rope_theta": 100.0})),
        reordered,
        lambda: (teacher_model(), None),
    ],
    ids=["rotates otherwise", "has its rows in another order", "is read in half precision"],
)
def test_a_teacher_that_reads_otherwise_is_not_taken_for_the_one_before(tmp_path, one_and_other):
    """It has the name, the tokenizer and the sums of weights of the one whose columns are cached."""
    pairs().save_to_disk(tmp_path / "pairs")
    dataset = Dataset.load_from_disk(str(tmp_path / "pairs"))
    one, other = one_and_other()
    build(tmp_path / "run", dataset, teacher=one)
    settings = {"bf16": True} if other is None else {}
    other = teacher_model() if other is None else other
    found = build(tmp_path / "run", dataset, teacher=other, **settings)
    alone = build(tmp_path / "run", pairs(), teacher=other, **settings)  # rows in memory, of which nothing is cached
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        assert found.train_dataset[column][:] == alone.train_dataset[column][:]


class Calendar(date):
    now = date(2024, 2, 29)

    @classmethod
    def today(cls):
        return cls.now


def test_pairs_of_a_run_that_has_taken_its_steps_are_learned_no_further_when_it_is_started_again(tmp_path, caplog):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "per_device_train_batch_size": 1}
    build(tmp_path / "run", **settings).train()
    again = build(tmp_path / "run", **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 1
    assert "Nothing is left to train: the checkpoint has taken 1 steps" in caplog.text


def assert_same_rows(mine, other):
    """Prompts, and the teacher's log-probs of the answers to them, which round otherwise where other rows were read beside them."""
    assert mine.column_names == other.column_names
    for name in mine.column_names:
        of_numbers = "log" in name
        assert mine[:][name] == (pytest.approx(other[:][name], rel=1e-4, abs=1e-4) if of_numbers else other[:][name])


@pytest.mark.parametrize("asked", ["by name", "the newest"])
def test_pairs_of_a_run_that_is_resumed_on_another_day_go_on_with_the_day_it_began(
    tmp_path, caplog, monkeypatch, asked
):
    monkeypatch.setattr(preference, "date", Calendar)
    monkeypatch.setattr(Calendar, "now", date(2024, 2, 29))
    dated = teacher_tokenizer()
    dated.chat_template = '{{ strftime_now("%d of %m") }}' + dated.chat_template
    settings = {"save_strategy": "steps", "save_steps": 1, "teacher_tokens": dated}
    settings |= {"eval_dataset": {"few": pairs(2)}, "per_device_eval_batch_size": 1}
    whole = build(tmp_path / "run", max_steps=2, **settings)
    whole.train()
    Calendar.now = date(2024, 3, 1)
    late = build(tmp_path / "run", max_steps=3, **settings)
    assert "29 of 02" in dated.decode(whole.train_dataset[0]["teacher_prompt_ids"])
    assert "01 of 03" in dated.decode(late.train_dataset[0]["teacher_prompt_ids"])
    late.train(resume_from_checkpoint=True if asked == "the newest" else str(tmp_path / "run" / "checkpoint-1"))
    for mine, other in (
        (late.train_dataset, whole.train_dataset),
        (late.eval_dataset["few"], whole.eval_dataset["few"]),
    ):
        assert_same_rows(mine, other)
    assert "began on 2024-02-29, so its prompts go on to say 2024-02-29 and not 2024-03-01" in caplog.text
    Calendar.now = date(2024, 3, 2)
    later = build(tmp_path / "run", max_steps=4, **settings)
    later.train(resume_from_checkpoint=True)
    assert_same_rows(later.train_dataset, whole.train_dataset)  # of the first day, however often a run is resumed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precompute_ref_log_probs": False}, "Leave it True"),
        ({"loss_type": ["sft"]}, "counts tokens"),
        ({"weight_low": 2.0}, "is above weight_high"),
        ({"weight_mu": math.nan}, "weight_mu must be a number, got nan"),
        ({"eos_policy": "drop"}, "Unknown eos_policy 'drop': choose one of bridge, mask"),
        ({"teacher_batch_size": 0}, "teacher_batch_size must be at least 1, got 0"),
        ({"max_length": -1}, "max_length must be at least 1, got -1"),
        ({"chat_template_kwargs": "enable_thinking=False"}, "chat_template_kwargs must be a dict"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        CrossTokenizerDPOConfig(str(tmp_path), **QUIET, **settings)


def test_activations_are_not_offloaded_from_a_cpu(tmp_path):
    with pytest.raises(ValueError, match="this run is on a CPU.*set activation_offloading=False"):
        build(tmp_path / "run", activation_offloading=True)


def test_tied_embeddings_that_an_adapter_trains_apart_are_refused_where_fsdp_would_tie_them_again(
    tmp_path, monkeypatch
):
    plugin = SimpleNamespace(cpu_ram_efficient_loading=True)  # a real one sets a variable of the environment
    sharded = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    check = preference.check_tied
    monkeypatch.setattr(preference, "check_tied", lambda model, accelerator: check(model, sharded))
    for modules in (None, ["embed_tokens"]):
        model = get_peft_model(
            student_model(tie_word_embeddings=True), LoraConfig(target_modules="all-linear", modules_to_save=modules)
        )
        with pytest.raises(ValueError, match="would tie them again") if modules else nullcontext():
            build(tmp_path, model=model)


def test_an_adapter_that_learns_pairs_with_the_default_learning_rate_is_warned_of(tmp_path, caplog):
    adapter = LoraConfig(target_modules=["q_proj"])
    build(tmp_path, peft_config=adapter, learning_rate=CrossTokenizerDPOConfig.learning_rate)
    assert caplog.text.count("the default, is for whole weights: an adapter learns next to nothing") == 1
    caplog.clear()
    build(tmp_path, peft_config=adapter)
    assert "the default, is for" not in caplog.text


def test_pairs_whose_prompts_are_all_text_are_warned_of(tmp_path, caplog):
    said = "All prompts are text, and the models have chat templates"
    build(tmp_path, Dataset.from_list([{"prompt": "Two and two", "chosen": " is four", "rejected": " is five"}] * 2))
    assert caplog.text.count(said) == 1
    caplog.clear()
    build(tmp_path)
    assert said not in caplog.text


def test_pairs_of_the_same_answer_are_counted(tmp_path, caplog):
    rows = pairs(4).to_list()
    alike = [{**row, "rejected": row["chosen"]} for row in rows]
    build(tmp_path, Dataset.from_list([rows[0], *alike[1:3], rows[3]]))
    assert (
        caplog.text.count("2 of 4 pairs of the train dataset have the same answer") == 1 and "in row 1" in caplog.text
    )
    caplog.clear()
    build(tmp_path)
    assert "the same answer" not in caplog.text


def test_an_adapter_that_leaves_a_students_experts_out_says_so(tmp_path, caplog):
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": len(student_tokenizer())}
    student = MixtralForCausalLM(MixtralConfig(**{**SHAPE, **sizes}))
    build(tmp_path, model=student, peft_config=LoraConfig(target_modules=["q_proj"]))
    assert "leaves the experts of this MixtralForCausalLM as they are" in caplog.text


def test_one_weighing_teacher_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="both, or neither"):
        build(tmp_path, weighers=(teacher_model(), None))


def wordy(side="rejected"):
    """Two pairs, of which the second has a long answer."""
    first, second = pairs(2)
    return Dataset.from_list([first, {**second, side: [{"role": "assistant", "content": "the sum of it " * 40}]}])


@pytest.mark.parametrize(
    ("short", "message"),
    [
        ("max_length", "has [0-9]+ student tokens, max_length is 100 and the student's own context 4096"),
        ("student", "has [0-9]+ student tokens, max_length is None and the student's own context 100"),
        ("teacher", "{} answer are [0-9]+ tokens for the teacher, whose context is 100 .1 such rows of 2"),
        ("weighing teacher", "{} answer are [0-9]+ tokens for the teacher, whose context is 100 .1 such rows of 2"),
        ("none", None),
    ],
)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_answer_that_a_model_cannot_read_whole_is_refused(tmp_path, side, short, message):
    def model(make, name):
        return make(max_position_embeddings=100 if name == short else 4096)

    refused = pytest.raises(ValueError, match=f"Row 1 of the train dataset.*{message}".format(side))
    with refused if message else nullcontext():
        columns = build(
            tmp_path,
            wordy(side),
            model(student_model, "student"),
            model(teacher_model, "teacher"),
            weighers=(model(teacher_model, ""), model(teacher_model, "weighing teacher")),
            max_length=100 if short == "max_length" else None,
        ).train_dataset
        assert all(map(any, columns[f"{side}_weights"])) and max(columns[f"ref_{side}_logps"]) < 0


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (pairs().remove_columns("rejected"), "train dataset has no column 'rejected', only 'prompt', 'chosen': .*`ctopd distill`"),
        (pairs().remove_columns(["chosen", "rejected"]), "no column 'chosen' and no column 'rejected', only 'prompt'"),
        (Dataset.from_list([pairs()[0], {**pairs()[1], "chosen": None}]), "Row 1 of the train dataset: its `chosen` is None"),
        (Dataset.from_list([{"chosen": "two", "rejected": ""}]), "Row 0 of the train dataset: its `rejected` is ''"),
        (pairs().select([]), "train dataset is empty"),
    ],
)  # fmt: skip
def test_pairs_without_an_answer_are_refused(tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, dataset)


def test_an_empty_evaluation_set_of_pairs_and_splits_in_the_place_of_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="few dataset is empty"):
        build(tmp_path, eval_dataset={"few": pairs().select([])})
    with pytest.raises(TypeError, match="must be a `Dataset`.*got `DatasetDict`: choose one of its splits"):
        build(tmp_path, DatasetDict(train=pairs()))


def test_an_evaluation_leaves_nothing_beside_checkpointed_layers_of_an_activated_adapter(tmp_path):
    invocation = student_tokenizer().encode("<|start|>assistant", add_special_tokens=False)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", alora_invocation_tokens=invocation)
    evaluated = {"eval_dataset": pairs(2), "eval_strategy": "steps", "eval_steps": 1}
    trainer = build(tmp_path, peft_config=config, gradient_checkpointing=True, **evaluated)
    trainer.train()
    assert trainer.state.global_step == 3


def test_an_adapter_that_is_no_policy_is_refused(tmp_path):
    with pytest.raises(ValueError, match="student's adapter .LILY. a token's probability depends on what follows it"):
        build(tmp_path, peft_config=needs.adapter("Lily", r=4, target_modules="all-linear"))


def test_dropout_of_adapters_of_any_kind_is_left_out(tmp_path):
    targets = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    for disabled in (True, False):
        config = LoHaConfig(module_dropout=0.5, **targets)
        model = build(tmp_path, peft_config=config, disable_dropout=disabled).model
        assert draws_noise(model) is not disabled


def activated(invocation: list[int]) -> dict:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", alora_invocation_tokens=invocation)
    model = get_peft_model(student_model(), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    return {"model": model}


def test_an_activated_adapter_begins_in_the_prompt_and_not_where_an_answer_has_its_invocation(tmp_path):
    invocation = student_tokenizer().encode(" of what", add_special_tokens=False)
    seen = []
    for end in ("", " of what"):
        said = [[{"role": "assistant", "content": text + end}] for text in ("ten is the sum", "nine is two")]
        prompt = [{"role": "user", "content": "What is the sum of what and two"}]
        dataset = Dataset.from_list([{"prompt": prompt, "chosen": said[0], "rejected": said[1]}] * 2)
        trainer = build(tmp_path / str(len(end)), dataset, **activated(invocation))
        trainer.model.register_forward_hook(lambda module, args, output: seen.append(output.log_probs.detach()))
        batch = trainer.data_collator([trainer.train_dataset[0]])
        start = len(trainer.train_dataset[0]["prompt_ids"]) - 1
        with torch.no_grad():
            trainer.compute_loss(trainer.model, batch)
        seen[-1] = seen[-1][:, start : start + 2]
    torch.testing.assert_close(*seen)


def test_an_activated_adapter_that_no_prompt_activates_is_refused(tmp_path):
    with pytest.raises(ValueError, match="would never be on.*none of the 4 prompts"):
        build(tmp_path, **activated([7, 7]))


@pytest.mark.parametrize("settings", [{"eos_policy": "mask"}, {"weight_scale": 2.0}])
def test_columns_of_other_settings_are_computed_anew(tmp_path, settings):
    pairs().save_to_disk(tmp_path / "pairs")
    dataset = Dataset.load_from_disk(str(tmp_path / "pairs"))
    build(tmp_path / "run", dataset)
    found = build(tmp_path / "run", dataset, **settings)
    alone = build(tmp_path / "run", pairs(), **settings)  # rows in memory, of which nothing is cached
    assert found.train_dataset["chosen_weights"][:] == alone.train_dataset["chosen_weights"][:]


@pytest.mark.parametrize("change", ["another adapter", "another alpha", "no adapter"])
def test_columns_of_a_teacher_whose_adapter_has_changed_are_computed_anew(tmp_path, change):
    pairs().save_to_disk(tmp_path / "pairs")

    def teacher(alpha):
        model = get_peft_model(teacher_model(), LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear"))
        model.add_adapter("other", model.peft_config["default"])
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.3)
        return model

    def columns_of(model):
        dataset = Dataset.load_from_disk(str(tmp_path / "pairs"))
        return build(tmp_path / "run", dataset, teacher=model).train_dataset["ref_chosen_logps"][:]

    first = columns_of(teacher(8))
    assert columns_of(teacher(8)) == first
    changed = teacher(64 if change == "another alpha" else 8)
    if change == "another adapter":
        changed.set_adapter("other")
    with changed.disable_adapter() if change == "no adapter" else nullcontext():
        assert columns_of(changed) != first


def test_the_end_of_a_plain_text_weighs_by_all_the_ends_that_its_teachers_may_write(tmp_path):
    teacher = teacher_model()
    teacher.generation_config.eos_token_id = [teacher_tokenizer().eos_token_id, 7]
    dataset = Dataset.from_list([{"prompt": "What is 1?", "chosen": " one two", "rejected": " three"}])
    weighers = teacher_model(seed=3), teacher_model(seed=4)
    trainer = build(tmp_path, dataset, teacher=teacher, weighers=weighers, weight_low=-9.0, weight_high=9.0)
    row = trainer.train_dataset[0]
    prompt = Prompt(row["prompt_ids"], row["teacher_prompt_ids"], frame=row["frame"])
    [rollout] = trainer._panel.pair([prompt], [row["chosen_ids"]])
    assert rollout.other_ends
    asked = [rollout.teacher_prompt_ids], [rollout.teacher_ids], [rollout.other_ends]
    ends = [own.log_probs(*asked)[0][-1].item() for own in trainer._weighers]
    assert row["chosen_weights"][-1] == pytest.approx(np.exp(ends[0] - ends[1]), rel=1e-4)


def test_a_copy_of_the_student_computes_with_its_own_weights(tmp_path):
    trainer = build(tmp_path, model=student_model(), max_steps=1)
    trainer.train()
    other, ids = copy.deepcopy(trainer.model).eval(), torch.arange(20, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
        for weight in other.parameters():
            weight.zero_()
        assert not other(input_ids=ids).logits.any()


@pytest.mark.parametrize("side", ["teacher", "weighers"])
def test_a_student_that_is_one_of_its_teachers_is_refused(tmp_path, side):
    model = student_model()
    given = {"teacher": model} if side == "teacher" else {"weighers": (model, student_model(1))}
    with pytest.raises(ValueError, match="Teacher and student are the same module"):
        build(tmp_path, model=model, **given)


def test_pairs_as_they_are_are_predicted_as_they_are_evaluated(tmp_path):
    trainer = build(tmp_path, eval_dataset=pairs())
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.predict(pairs()).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_saved_student_has_a_card_of_its_own_and_keeps_one_that_was_written(tmp_path):
    trainer = build(tmp_path, peft_config=LoraConfig(target_modules="all-linear"), max_steps=1)
    trainer.train()
    trainer.save_model()
    card = tmp_path / "README.md"
    assert "CTPD" in card.read_text() and "[More Information Needed]" not in card.read_text()
    trainer.create_model_card(dataset_name="trl-lib/pairs")
    trainer.save_model()
    assert "trl-lib/pairs" in card.read_text()


def test_an_evaluation_before_training_leaves_the_student_to_be_prepared_for_training(tmp_path):
    """Else it would be trained without DDP."""
    trainer = build(tmp_path, eval_dataset=pairs(), max_steps=1)
    forward = trainer.model.forward
    trainer.evaluate()
    assert trainer.model not in trainer.accelerator._models
    assert trainer.model.forward == forward
    trainer.train()
    assert trainer.model in trainer.accelerator._models
