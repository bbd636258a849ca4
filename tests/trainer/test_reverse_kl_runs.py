"""The exact reverse KL through the trainer: with a server that tells the likeliest tokens, an adapter, half precision, another
sampler's tokens; beside the plain step in this process."""

import contextlib
import math
from itertools import product

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from protocol_server import ProtocolServer
from template_sides import tokenizer
from toys import SGD, fix_rollouts, prompts, step_of, student_model, teacher_model, teacher_tokenizer

from trl_ctopd.teachers import servers as servers_module
from trl_ctopd.text.chat import Conversation
from trl_ctopd.text.token_bytes import token_bytes
from trl_ctopd.text.turns import TOOLS


SHARP = {
    "initializer_range": 0.3,
    "vocab_size": len(teacher_tokenizer()),
}  # no padding rows, of which a server says nothing
KNOWN = [0, 8, 32, 128]


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    monkeypatch.setattr("trl_ctopd.teachers.panel.CACHE_DIR", tmp_path / "cache")
    monkeypatch.setattr(servers_module, "FIRST_PAUSE", 0.01)


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            ProtocolServer(teacher_model(**SHARP), teacher_tokenizer(), **options)
        )


def reverse_kl(build, top_k=None, **settings):
    settings = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 8, **SGD, **settings}
    return build(
        teacher=settings.pop("teacher", None) or teacher_model(**SHARP),
        distillation_loss="reverse_kl",
        distillation_loss_kwargs={"top_k": top_k},
        **settings,
    )


def plain_dpca(build, **settings):
    settings = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 8, **SGD, **settings}
    return build(teacher=settings.pop("teacher", None) or teacher_model(**SHARP), **settings)


def close(found: torch.Tensor, expected: torch.Tensor):
    assert expected.abs().max() > 1e-4, "there is something to learn"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 + 1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("kind", "top_k"),
    [
        pytest.param(kind, top_k, marks=[] if (kind, top_k) == ("vllm", 8) else pytest.mark.slow)
        for kind, top_k in product(["vllm", "sglang"], KNOWN)
    ],
)
def test_a_servers_likeliest_tokens_give_the_step_of_the_same_teacher_in_this_process(
    build, serve, kind, top_k, monkeypatch
):
    count = len(teacher_tokenizer())  # a teacher in this process tells of all of them how the student's tokens close
    monkeypatch.setattr("trl_ctopd.teachers.panel.CLOSING_TOKENS", count)
    served = serve(protocol=kind)
    remote = fix_rollouts(reverse_kl(build, top_k, teacher=served.url))
    close(step_of(remote), step_of(fix_rollouts(reverse_kl(build, top_k))))
    asked = [payload["prompt_logprobs"] for payload in served.requests]
    assert asked.count(max(top_k, count)) >= 8


@pytest.mark.parametrize("remote", [False, True])
def test_with_nothing_told_the_step_is_that_of_dpca_with_closed_chunks(build, serve, remote):
    teacher = serve().url if remote else None
    expected = step_of(fix_rollouts(plain_dpca(build, event="closed", credit="macro", teacher=teacher)))
    close(step_of(fix_rollouts(reverse_kl(build, 0, teacher=teacher))), expected)


def test_with_nothing_told_masked_text_does_not_change_that(build):
    """Bytes that are no UTF-8 take no part: before them a chunk ends, and after them one begins, with a log p_close each."""

    def write(trainer):
        fix_rollouts(trainer)
        tokenizer, whole = trainer.processing_class, trainer.rollouts.write
        broken = tokenizer.convert_tokens_to_ids("Ħ")  # of a character of several bytes
        trainer.rollouts.write = lambda *given: [
            ([token for own in ids for token in (own, broken)], None) for ids, _ in whole(*given)
        ]
        return trainer

    expected, found = (write(own) for own in (plain_dpca(build, event="closed", credit="macro"), reverse_kl(build, 0)))
    close(step_of(found), step_of(expected))
    log = found.state.log_history[0]
    assert log["masked_bytes/invalid_utf8"] > 0 and log["closing/contradicted_fraction"] == 0


def told_by_a_sampler(trainer):
    """As vLLM's kernels, which draw from another distribution than the one that is trained."""
    fix_rollouts(trainer)
    write = trainer.rollouts.write

    def written(model, prompts, step):
        texts = [ids for ids, _ in write(model, prompts, step)]
        generator = torch.Generator().manual_seed(0)
        return [(ids, (-3 * torch.rand(len(ids), generator=generator) - 4).tolist()) for ids in texts]

    trainer.rollouts.write = written
    return trainer


def test_another_samplers_tokens_are_weighed_as_dpca_weighs_them(build):
    expected = step_of(told_by_a_sampler(plain_dpca(build, event="closed", credit="macro")))
    close(step_of(told_by_a_sampler(reverse_kl(build, 0))), expected)
    unweighed = step_of(fix_rollouts(reverse_kl(build, 0)))
    assert (unweighed - expected).abs().max() > 0.01 * expected.abs().max()
    whole, sampled = (step_of(write(reverse_kl(build))) for write in (fix_rollouts, told_by_a_sampler))
    assert (whole - sampled).abs().max() > 0, "what is left to the sample is weighed"


def test_half_precision_and_an_adapter_give_the_step_of_float32(build):
    def step(**settings):
        torch.manual_seed(0)
        adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        eager = {
            "attn_implementation": "eager"
        }  # torch 2.13 has no other in bfloat16 for a processor that is told to do without AVX-512
        student, teacher = student_model(initializer_range=0.3, **eager), teacher_model(**SHARP, **eager)
        return step_of(fix_rollouts(reverse_kl(build, model=student, teacher=teacher, peft_config=adapter, **settings)))

    plain, half = step(), step(bf16=True)
    assert torch.cosine_similarity(plain, half, dim=0) > 0.99
    close(step(per_device_train_batch_size=2, gradient_accumulation_steps=4, gradient_checkpointing=True), plain)


# --- what is refused


def test_a_server_that_tells_fewer_is_refused_with_the_way_out(build, serve):
    capped = serve(fault=lambda n, payload: "400" if (payload["prompt_logprobs"] or 0) > 20 else None)
    with pytest.raises(ValueError, match="does not return the 32 most likely tokens: .*400.*top_k.*--max-logprobs"):
        reverse_kl(build, 32, teacher=capped.url)
    assert reverse_kl(build, 20, teacher=capped.url).train().global_step == 1
    echo = serve(protocol="echo")
    with pytest.raises(ValueError, match="`echo` and `logprobs`.* does not return the ids of the 8 most likely"):
        reverse_kl(build, 8, teacher=echo.url)
    assert reverse_kl(build, 0, teacher=echo.url).train().global_step == 1


def test_whole_distributions_are_not_asked_of_a_server_and_the_way_out_is_named(build, serve):
    with pytest.raises(ValueError, match="needs the teacher's logits.*gives logprobs only.*reverse_kl with a `top_k`"):
        reverse_kl(build, teacher=serve().url)


def test_several_teachers_are_refused(build):
    teachers = {"one": teacher_model(), "two": teacher_model(seed=3)}
    with pytest.raises(
        ValueError, match="^reverse_kl needs the teacher's logits, and one of 2 teachers gives logprobs only"
    ):
        reverse_kl(
            build,
            8,
            teacher=teachers,
            teacher_processing_class=dict.fromkeys(teachers, teacher_tokenizer()),
            dataset=prompts().add_column("teacher", ["one", "two"] * 8),
        )


def test_completions_of_a_student_that_was_updated_since_are_refused(build):
    with pytest.raises(ValueError, match="rollout_reuse=2 .*'reverse_kl' does not account for.*dpca"):
        reverse_kl(build, rollout_reuse=2)


@pytest.mark.parametrize(("loss", "masked"), [("dpca", False), ("reverse_kl", False), ("bpm", True)])
def test_markup_of_two_templates_is_learned_and_other_losses_on_distributions_warn(build, loss, masked, caplog):
    """The student ends its thought with a tag, the teacher with a control token and a frame word."""
    student, teacher = tokenizer("qwen3"), tokenizer("gptoss")
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Hi"}]}] * 4)
    own = {"processing_class": student, "teacher_processing_class": teacher, "dataset": rows, "max_new_tokens": 40}
    room = {"max_position_embeddings": 4096}  # for a system message, a token a character
    models = student_model(vocab_size=len(student), **room), teacher_model(vocab_size=len(teacher), **room)
    trainer = build(models[0], models[1], distillation_loss=loss, max_steps=1, **own)
    message = {"role": "assistant", "content": "It is four.", "reasoning_content": "Two and two."}
    ids = trainer.rollouts._student.reference(Conversation(rows[0]["prompt"], message))[1]
    trainer.rollouts.write = lambda model, prompts, step, ended=None: [(ids, None)] * len(prompts)
    trainer.train()
    told = trainer.state.log_history[0]
    assert (told["alignment/masked_fraction"] > 0.1) == masked == ("to write these less and less" in caplog.text)
    assert told["alignment/masked_fraction"] == 0 or masked
    assert math.isfinite(told["grad_norm"])


@pytest.mark.parametrize(
    ("teacher", "settings", "masked"),
    [
        ("gptoss", {"markup_policy": "mask"}, True),
        ("gptoss", {"mask_strings": ["</think>"]}, True),
        ("gptoss", {}, False),
        ("gptoss", {"tools": TOOLS}, False),
        ("phi3", {}, False),  # has no place for a thought, nor is anything scored before its end
        ("phi3", {"thought_policy": "text"}, True),
        ("phi3", {"tools": TOOLS}, True),  # nor for calls, before which an answer is
    ],
    ids=str,
)
def test_a_newline_that_may_begin_masked_markup_has_no_guess(build, teacher, settings, masked):
    """Qwen3's template writes one before `</think>`, and between an answer and a call."""
    student, teacher = tokenizer("qwen3"), tokenizer(teacher)
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        **{name: own for name, own in settings.items() if name == "tools"},
    }
    settings = {name: own for name, own in settings.items() if name != "tools"}
    room = {"max_position_embeddings": 2048}
    models = student_model(vocab_size=len(student), **room), teacher_model(vocab_size=len(teacher), **room)
    settings["max_length"] = 2048
    rows = Dataset.from_list([row] * 4)
    trainer = build(*models, processing_class=student, teacher_processing_class=teacher, dataset=rows, **settings)
    newline = token_bytes(student).index(b"\n")
    assert (newline in trainer.vocabulary.without_counterpart.tolist()) == masked


def test_with_one_tokenizer_no_token_is_without_a_counterpart(build):
    """The teacher reads the student's own markup, and tells how likely it is."""
    tokenizers = [tokenizer("qwen3") for _ in range(2)]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Hi"}]}] * 4)
    size = len(tokenizers[0])
    own = {"processing_class": tokenizers[0], "teacher_processing_class": tokenizers[1], "dataset": rows}
    trainer = build(student_model(vocab_size=size), student_model(vocab_size=size, seed=1), **own)
    assert trainer.vocabulary.is_one_tokenizer and not len(trainer.vocabulary.without_counterpart)
    assert trainer.student_side.turn_markup
