"""A teacher behind a server: what a client on real sockets makes of good answers, and of every bad one."""

import contextlib
import re
import threading
import time

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from protocol_server import ProtocolServer
from toys import SGD, fix_rollouts, prompts, step_of, student_tokenizer, teacher_model, teacher_tokenizer, weights

from trl_ctopd.teachers import servers as servers_module
from trl_ctopd.teachers.local import LocalTeacher
from trl_ctopd.teachers.remote import RemoteTeacher
from trl_ctopd.teachers.servers import Servers, TeacherServerError


SHARP = {"initializer_range": 0.3}  # distributions that tell two models apart


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(servers_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(servers_module, "LONGEST_PAUSE", 0.1)


@pytest.fixture
def serve():
    """`serve(...)`: a server of the toy teacher, closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda model=None, tokenizer=None, **options: stack.enter_context(
            ProtocolServer(
                teacher_model(**SHARP) if model is None else model, tokenizer or teacher_tokenizer(), **options
            )
        )


def connect(*urls, tokenizer=None, model=None, **options) -> RemoteTeacher:
    teacher = RemoteTeacher(Servers(urls, **{"timeout": 10.0, "retries": 6, **options}), model)
    teacher.check(tokenizer or teacher_tokenizer())
    return teacher


def texts(rows: int = 8) -> tuple[list[list[int]], list[list[int]]]:
    tokenizer = teacher_tokenizer()
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    return (
        [encode(f"What is {n} plus two?") for n in range(rows)],
        [encode(f"{n} and two is the sum" + " of what" * (n % 3)) for n in range(rows)],
    )


def scores(teacher: RemoteTeacher, rows: int = 8) -> list[torch.Tensor]:
    found = teacher.start(*texts(rows))
    return [found.row(row) for row in range(rows)]


@pytest.fixture(scope="module")
def right() -> list[torch.Tensor]:
    return LocalTeacher(teacher_model(**SHARP), Accelerator(cpu=True), batch_size=3).log_probs(*texts())


def assert_right(found: list[torch.Tensor], right: list[torch.Tensor]):
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# Scoring


def test_log_probs_are_those_of_the_same_teacher_in_this_process_in_the_order_of_the_rows(serve, right):
    server = serve(fault=lambda n, payload: "delay" if len(payload["prompt"]) % 2 else None, delay=0.05)
    assert_right(scores(connect(server.url)), right)


@pytest.mark.parametrize("served", [False, True])
def test_a_last_token_that_stands_for_several_has_the_log_prob_of_any_of_them(serve, right, served):
    teacher = (
        connect(serve().url) if served else LocalTeacher(teacher_model(**SHARP), Accelerator(cpu=True), batch_size=3)
    )

    def read(completions, others=None):
        asked = texts()[0], completions, others
        if not served:
            return teacher.log_probs(*asked)
        found = teacher.start(*asked)
        return [found.row(row) for row in range(len(found))]

    others = [(7, 9), (), (11,), *[()] * 5]
    found = read(texts()[1], others)
    assert_right([own[:-1] for own in found], [own[:-1] for own in right])
    for row, own in enumerate(others):
        alone = [read([c[:-1] + [end] for c in texts()[1]])[row][-1] for end in (texts()[1][row][-1], *own)]
        expected = torch.stack(alone).double().logsumexp(0).float()
        torch.testing.assert_close(found[row][-1], expected, rtol=0, atol=1e-5)
    assert found[0][-1] > right[0][-1]


def test_requests_are_bounded_in_number_and_share_their_connections(serve, right):
    server = serve(fault=lambda n, payload: "delay", delay=0.03)
    teacher = connect(server.url, concurrency=3)
    server.most_in_flight = 0
    for _ in range(3):
        assert_right(scores(teacher), right)
    assert server.most_in_flight == 3
    assert server.connections <= 4


def test_starting_comes_back_before_the_answers(serve, right):
    server, answers = serve(), threading.Event()
    teacher = connect(server.url, timeout=600.0)
    before = len(server.requests)
    server.fault_from_now_on(lambda n, payload: None if answers.wait(600) else "drop")
    found = teacher.start(*texts())
    assert not any(future.done() for future in found._futures)
    answers.set()
    assert_right([found.row(row) for row in range(8)], right)
    assert len(server.requests) == before + 8 + 1, "each row once, and the probe that ends a step"


def test_a_completion_without_tokens_costs_no_request(serve):
    server = serve()
    teacher = connect(server.url)
    before = len(server.requests)
    found = teacher.start([[5], [5]], [[], [6, 7]])
    assert [len(found.row(row)) for row in (0, 1)] == [0, 2]
    assert len(server.requests) == before + 2


# Failures that pass


@pytest.mark.parametrize("fault", ["429", "500", "503", "drop", "break", "truncate"])
def test_a_failure_that_passes_changes_no_score(serve, right, fault):
    server = serve()
    teacher = connect(server.url)
    server.fault_from_now_on([fault, None, fault])
    assert_right(scores(teacher), right)


def test_a_request_that_takes_too_long_is_tried_again(serve, right):
    server = serve()
    teacher = connect(server.url, timeout=0.5)
    server.delay = 1.0
    server.fault_from_now_on(["delay"])
    assert_right(scores(teacher), right)


def test_retry_after_is_waited_for(serve, monkeypatch):
    server = serve()
    teacher = connect(server.url)
    monkeypatch.setattr("protocol_server.STATUS_FAULTS", {"429": (429, {"Retry-After": "0.4"})})
    server.fault_from_now_on(["429"])
    begin = time.monotonic()
    scores(teacher, rows=1)
    assert time.monotonic() - begin >= 0.4


@pytest.mark.parametrize("fault", ["500", "drop", "truncate"])
def test_a_failure_that_stays_is_an_error_that_tells_the_way_out(serve, fault):
    server = serve()
    teacher = connect(server.url, retries=2)
    server.fault_from_now_on(lambda n, payload: fault)
    with pytest.raises(TeacherServerError, match=r"after 3 tries.*completions.*resume_from_checkpoint=True"):
        scores(teacher)


# Answers that are wrong


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("short", "scores for .* tokens"),
        ("shift", "token 1 was .*, and the answer scores"),
        ("nan", "log-prob nan"),
        ("positive", "log-prob 0.5"),
        ("400", "400: as ordered"),
    ],
)
def test_a_row_whose_answer_is_wrong_is_left_out_and_the_others_are_not(serve, right, fault, reason, caplog):
    server = serve()
    teacher = connect(server.url)
    bad = texts()[0][2] + texts()[1][2]
    server.fault_from_now_on(lambda n, payload: fault if payload["prompt"] == bad else None)
    found = teacher.start(*texts())
    rows = [found.row(row) for row in range(8)]
    assert rows[2].isnan().all() and len(rows[2]) == len(right[2])
    assert [found.failed(row) for row in range(8)] == [row == 2 for row in range(8)]
    assert_right(rows[:2] + rows[3:], right[:2] + right[3:])
    assert any(re.search(reason, message) for message in caplog.messages)


@pytest.mark.parametrize("fault", ["short", "shift", "nan", "positive", "400"])
def test_a_step_of_wrong_answers_alone_is_an_error(serve, fault):
    server = serve()
    teacher = connect(server.url)
    server.fault_from_now_on(lambda n, payload: fault)
    with pytest.raises(TeacherServerError, match="None of the last 8 completions could be scored"):
        scores(teacher)


def test_one_text_that_no_server_scores_is_no_error_and_eight_in_a_row_are(serve):
    server = serve()
    teacher = connect(server.url)
    server.fault_from_now_on(lambda n, payload: "nan" if payload["prompt"] != teacher._probe_ids else None)
    for _ in range(2):
        for _ in range(7):
            assert scores(teacher, rows=1)[0].isnan().all()
        plan, server._fault = server._fault, lambda n, payload: None
        assert not scores(teacher, rows=1)[0].isnan().any()
        server._fault = plan
    for _ in range(7):
        scores(teacher, rows=1)
    with pytest.raises(TeacherServerError, match="None of the last 8 completions could be scored.*log-prob nan"):
        scores(teacher, rows=1)


def test_where_no_text_of_a_step_is_scored_the_servers_are_asked_who_they_are(serve):
    server = serve()
    teacher = connect(server.url)
    server.model = teacher_model(seed=7, **SHARP).eval()
    server.fault_from_now_on(["nan"])
    with pytest.raises(TeacherServerError, match="another model than at the start"):
        scores(teacher, rows=1)


def test_a_zero_probability_is_minus_infinity_at_its_token_alone(serve, right):
    server = serve()
    teacher = connect(server.url)
    server.fault_from_now_on(["zero"])
    [found] = scores(teacher, rows=1)
    assert found[-1] == -float("inf")
    assert_right([found[:-1]], [right[0][:-1]])


# Another model, and several servers


def test_a_server_restarted_with_another_model_is_an_error_before_the_step_ends(serve):
    server = serve()
    teacher = connect(server.url)
    scores(teacher)
    server.close()
    serve(teacher_model(seed=7, **SHARP), port=server.port)
    with pytest.raises(TeacherServerError, match="another model than at the start.*nats a token"):
        scores(teacher)


def test_a_model_swapped_behind_an_open_connection_is_an_error_too(serve):
    server = serve()
    teacher = connect(server.url)
    server.model = teacher_model(seed=7, **SHARP).eval()
    with pytest.raises(TeacherServerError, match="another model than at the start"):
        scores(teacher)


def test_a_server_restarted_with_the_same_model_goes_on(serve, right):
    server = serve()
    teacher = connect(server.url)
    server.close()
    serve(port=server.port)
    assert_right(scores(teacher), right)


def test_a_server_restarted_under_another_name_is_an_error(serve):
    server = serve()
    teacher = connect(server.url)
    server.close()
    serve(port=server.port, name="other")
    with pytest.raises(TeacherServerError, match="The model `toy` does not exist"):
        scores(teacher)


def test_several_servers_share_the_work(serve, right):
    both = [serve(fault=lambda n, payload: "delay", delay=0.05) for _ in range(2)]
    teacher = connect(*(server.url for server in both))
    before = [len(server.requests) for server in both]
    assert_right(scores(teacher), right)
    assert all(len(server.requests) - first >= 3 for server, first in zip(both, before, strict=True))


def test_a_server_that_dies_is_left_out_and_taken_back_when_it_answers(serve, right):
    first, second = serve(), serve()
    teacher = connect(first.url, second.url)
    first.close()
    assert_right(scores(teacher), right)
    again = serve(port=first.port)
    time.sleep(0.15)
    for _ in range(3):
        assert_right(scores(teacher), right)
    assert len(again.requests) > 3


def test_a_server_that_comes_back_with_another_model_gets_no_work(serve, right):
    first, second = serve(), serve()
    teacher = connect(first.url, second.url)
    first.close()
    assert_right(scores(teacher), right)
    other = serve(teacher_model(seed=7, **SHARP), port=first.port)
    for _ in range(3):
        time.sleep(0.15)
        assert_right(scores(teacher), right)
    probes = [payload["prompt"] for payload in other.requests]
    assert probes and all(prompt == teacher._probe_ids for prompt in probes)


# At the start


def test_a_server_that_is_not_up_is_waited_for_and_then_an_error(serve):
    server = serve()
    server.close()
    with pytest.raises(
        TeacherServerError, match=f"does not answer: GET http://127.0.0.1:{server.port}/v1/models: Conn"
    ):
        connect(server.url, retries=1)


def test_one_of_two_servers_is_enough_to_start(serve, right):
    gone, there = serve(), serve()
    gone.close()
    assert_right(scores(connect(gone.url, there.url)), right)


def test_one_of_several_models_must_be_named(serve):
    server = serve(others=["another"])
    with pytest.raises(ValueError, match="serves 'toy', 'another': name one of them with `teacher_model_name_or_path`"):
        connect(server.url)
    assert connect(server.url, model="toy").name == "toy"


def test_a_tokenizer_of_another_model_is_refused_with_the_place_where_they_part(serve):
    server = serve(root="some/teacher")
    with pytest.raises(ValueError, match="other token ids than .*: from token 0 on .*some/teacher"):
        connect(server.url, tokenizer=student_tokenizer())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(serve):
    tokenizer = teacher_tokenizer()
    tokenizer.add_tokens([f"extra{n}" for n in range(20)])
    server = serve(
        fault=lambda n, payload: "400" if max(payload["prompt"]) == max(tokenizer.get_vocab().values()) else None
    )
    with pytest.raises(ValueError, match="cannot score a probe text: .*400"):
        connect(server.url, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("raw_logits", "above 0"), ("processed_logprobs", "change with the sampling temperature")],
)
def test_scores_that_are_no_raw_log_probs_are_refused(serve, kind, message):
    with pytest.raises(ValueError, match=f"{message}.*--logprobs-mode raw_logprobs"):
        connect(serve(scores=kind).url)


@pytest.mark.parametrize("shift", [-0.7, -3.0])
def test_scores_that_sum_to_less_than_what_is_drawn_are_refused(serve, shift):
    server = serve(teacher_model(initializer_range=1.0), shift=shift)
    with pytest.raises(ValueError, match="do not agree with what it samples: by them, .*--logprobs-mode raw_logprobs"):
        connect(server.url)


def test_scores_that_are_never_above_0_but_sum_to_more_than_1_are_refused(serve):
    server = serve()
    answer = server.answer

    def raised(payload):
        given = answer(payload)
        for entry in given["choices"][0].get("prompt_logprobs", [])[1:]:
            for score in entry.values():
                score["logprob"] = min(score["logprob"] + 4, 0)
        return given

    server.answer = raised
    with pytest.raises(ValueError, match="do not agree with what it samples: by them, .*--logprobs-mode raw_logprobs"):
        connect(server.url)


def test_a_server_that_tells_no_ids_of_what_it_draws_is_taken_with_a_warning(serve, right, caplog):
    assert_right(scores(connect(serve(tells_ids=False).url)), right)
    assert "Whether they come as often as its log-probs say is not checked" in caplog.text


def test_servers_with_unlike_models_are_refused(serve):
    urls = serve().url, serve(teacher_model(seed=7, **SHARP)).url
    with pytest.raises(ValueError, match="another model than at the start"):
        connect(*urls)
    with pytest.raises(ValueError, match="serves 'other', and another one serves 'toy'"):
        connect(urls[0], serve(name="other").url)


def test_a_context_too_short_for_the_probe_is_refused(serve):
    with pytest.raises(ValueError, match="takes texts of 20 tokens.*--max-model-len"):
        connect(serve(max_model_len=20).url)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", ""])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="not the address of a server: it should read http://host:port"):
        Servers([url])


# The key


def test_the_key_comes_from_the_environment_and_stands_in_no_message(serve, right, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    server = serve(api_key="sesame")
    monkeypatch.setenv("TOY_KEY", "sesame")
    teacher = connect(server.url, api_key_env="TOY_KEY")
    assert_right(scores(teacher), right)
    assert "sesame" not in caplog.text + repr(vars(teacher)) + repr(vars(teacher._servers))


def test_a_wrong_key_is_an_error_at_once_that_does_not_show_it(serve, monkeypatch):
    server = serve(api_key="sesame")
    monkeypatch.setenv("TOY_KEY", "wrong-key")
    with pytest.raises(TeacherServerError, match=r"401: .*Bearer ….*variable TOY_KEY"):
        connect(server.url, api_key_env="TOY_KEY")


def test_a_password_in_the_address_is_refused_without_being_shown():
    with pytest.raises(ValueError, match="holds a password.*teacher_server_api_key_env") as error:
        Servers(["http://me:sesame@host:8000"])
    assert "sesame" not in str(error.value)


# Training


def run(build, teacher, **settings):
    trainer = fix_rollouts(
        build(teacher=teacher, **{**SGD, "max_steps": 2, "gradient_accumulation_steps": 2, **settings})
    )
    step = step_of(trainer)
    return trainer, step


@pytest.mark.parametrize("loss", ["dpca", "strict_sampled", "alm"])
def test_training_with_the_teacher_behind_a_server_that_tells_all_tokens_is_training_with_it_here(
    build, serve, loss, monkeypatch
):
    monkeypatch.setattr("trl_ctopd.teachers.panel.CLOSING_TOKENS", len(teacher_tokenizer()))
    trainer, step = run(build, serve().url, distillation_loss=loss)
    local, expected = run(build, teacher_model(**SHARP), distillation_loss=loss)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)
    log, other = trainer.state.log_history[0], local.state.log_history[0]
    assert log["gap/nats_per_byte"] == pytest.approx(other["gap/nats_per_byte"], rel=1e-4)
    assert log["teacher/failed_fraction"] == 0
    assert "seconds/teacher_wait" in log and "seconds/teacher_wait" not in other


def test_a_row_that_fails_is_masked_and_counted_and_training_goes_on(build, serve):
    server = serve()
    trainer = fix_rollouts(build(teacher=server.url, per_device_train_batch_size=8, **SGD))
    server.fault_from_now_on(["nan", None, "shift"])
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["teacher/failed_fraction"] == 2 / 8
    assert log["alignment/unscored_fraction"] == 2 / 8
    assert torch.isfinite(weights(trainer)).all()


def test_a_batch_that_fails_ends_training_and_the_last_checkpoint_resumes_as_if_nothing_had_been(
    build, serve, tmp_path
):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "teacher_server_retries": 1, **SGD}
    whole = fix_rollouts(build(teacher=serve().url, output_dir=str(tmp_path / "whole"), **settings))
    whole.train()

    server = serve()
    cut = fix_rollouts(build(teacher=server.url, output_dir=str(tmp_path / "cut"), **settings))
    server.fault_from_now_on(lambda n, payload: "500" if n >= 5 else None)  # 4 rows and a probe: one step
    with pytest.raises(TeacherServerError):
        cut.train()
    assert cut.state.global_step == 1
    server.fault_from_now_on(None)
    resumed = fix_rollouts(build(teacher=server.url, output_dir=str(tmp_path / "cut"), **settings))
    resumed.train(resume_from_checkpoint=True)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=1e-6)


def test_completions_are_used_again_with_the_scores_they_have_and_kept_in_a_checkpoint(build, serve, tmp_path):
    server = serve()
    settings = {
        "rollout_reuse": 2,
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        **SGD,
        "learning_rate": 0.1,
    }
    trainer = fix_rollouts(build(teacher=server.url, **settings))
    before = len(server.requests)
    trainer.train()
    assert len(server.requests) == before + 5
    resumed = fix_rollouts(build(teacher=server.url, **settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    torch.testing.assert_close(weights(resumed), weights(trainer), rtol=0, atol=1e-6)


def one_long_prompt():
    """Eight rows, the third of them longer for the teacher than the probe, by far the longest."""
    rows = prompts(8).to_list()
    rows[2]["prompt"][0]["content"] += " and two" * 40
    return Dataset.from_list(rows)


def longest_prompt(trainer) -> int:
    return max(map(len, trainer.train_dataset["teacher_prompt_ids"]))


def test_a_prompt_that_leaves_no_room_for_a_completion_is_refused_with_its_row(build, serve):
    longest = longest_prompt(build(dataset=one_long_prompt()))
    build(teacher=serve(max_model_len=longest + 2).url, dataset=one_long_prompt())
    with pytest.raises(
        ValueError,
        match=rf"Row 2 of the train dataset: its prompt has {longest} tokens for the teacher, whose server takes {longest} "
        r"with the completion \(1 such rows of 8\).*--max-model-len",
    ):
        build(teacher=serve(max_model_len=longest + 1).url, dataset=one_long_prompt())


def test_a_prompt_that_leaves_no_room_at_the_teachers_server_is_dropped_and_named(build, serve, caplog):
    longest = longest_prompt(build(dataset=one_long_prompt()))
    trainer = build(teacher=serve(max_model_len=longest + 1).url, dataset=one_long_prompt(), overlong_prompts="drop")
    assert len(trainer.train_dataset) == 7 and longest_prompt(trainer) < longest
    assert f"the teacher's server takes {longest} tokens with the completion): row 2." in caplog.text


def test_a_completion_beyond_the_servers_context_is_warned_of_left_out_and_counted(build, serve, caplog):
    longest = longest_prompt(build(dataset=one_long_prompt()))
    trainer = fix_rollouts(
        build(
            teacher=serve(max_model_len=longest + 8).url,
            dataset=one_long_prompt(),
            per_device_train_batch_size=8,
            **SGD,
        )
    )
    assert f"has {longest} tokens for the teacher, whose server takes {longest + 7} with the completion" in caplog.text
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["alignment/teacher_context_exceeded_fraction"] == 1 / 8
    assert log["teacher/failed_fraction"] == 0


def test_a_text_that_is_too_long_for_a_server_that_does_not_say_so_is_left_out_and_counted(build, serve):
    longest = longest_prompt(build(dataset=one_long_prompt()))
    server = serve(max_model_len=None)
    trainer = fix_rollouts(build(teacher=server.url, dataset=one_long_prompt(), per_device_train_batch_size=8, **SGD))
    server.max_model_len = longest + 8
    trainer.train()
    assert trainer.state.log_history[0]["teacher/failed_fraction"] == 1 / 8


def test_evaluation_reads_at_the_server_too(build, serve):
    trainer = build(teacher=serve().url, eval_dataset=prompts(4))
    assert trainer.evaluate()["eval_teacher/failed_fraction"] == 0


def test_the_config_names_servers_and_the_model_whose_tokenizer_is_loaded(build, serve, tmp_path):
    teacher_tokenizer().save_pretrained(tmp_path / "teacher")
    server = serve(root="/models/elsewhere")
    from toys import student_model

    from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer

    args = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": [], "max_new_tokens": 8}
    args["teacher_server_url"] = server.url
    build_it = lambda **more: CrossTokenizerGKDTrainer(  # noqa: E731
        student_model(),
        args=CrossTokenizerGKDConfig(**args, **more),
        train_dataset=prompts(),
        processing_class=student_tokenizer(),
    )
    trainer = build_it(teacher_model_name_or_path=str(tmp_path / "teacher"))
    assert trainer.teacher_processing_class.get_vocab() == teacher_tokenizer().get_vocab()
    with pytest.raises(ValueError, match="'/models/elsewhere' is not a folder here.*`teacher_processing_class`"):
        build_it()


def test_neither_key_nor_address_is_in_the_card_and_the_key_in_no_file(build, serve, monkeypatch, tmp_path):
    monkeypatch.setenv("TEACHER_SERVER_API_KEY", "sesame")
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # where there is no hub, its card is asked for in vain, slowly
    server = serve(api_key="sesame", root="lab/Teacher-7B")
    trainer = build(teacher=server.url, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files and not any(b"sesame" in path.read_bytes() for path in files)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "lab/Teacher-7B" in card and "127.0.0.1" not in card


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"distillation_loss": "gold"},
            "gold needs the teacher's logits.*Choose one of dpca, strict_sampled, alm, gvpo, sft",
        ),
        ({"lmbda": 0.5, "off_policy_loss": "uld"}, "uld needs the teacher's logits"),
        ({"temperature": 0.7}, "temperature=0.7.*at temperature 1"),
        ({"lmbda": 0.5, "seq_kd": True}, "seq_kd: a teacher behind a server reads and does not write"),
        ({"teacher_model_init_kwargs": {"dtype": "float32"}}, "teacher_model_init_kwargs"),
        ({"teacher_server_concurrency": 0}, "teacher_server_concurrency must be at least 1"),
        ({"teacher_server_timeout": 0}, "teacher_server_timeout must be positive"),
    ],
)
def test_what_a_server_cannot_do_is_refused_with_what_can(build, serve, settings, message):
    with pytest.raises(ValueError, match=message):
        build(teacher=serve().url, **settings)
