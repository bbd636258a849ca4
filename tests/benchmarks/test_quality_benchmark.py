"""The quality benchmark in little: worlds of a few steps, two methods, cut off and started again, and its report."""

import random
from dataclasses import replace

import pytest
import torch

from benchmarks.quality import gradient, methods, models, report, run, tasks, toy_pairs, worlds


TASKS = [tasks.sums(), tasks.plurals(), tasks.stories(), tasks.hundreds()]
SIZE = worlds.Size(
    teacher_width=32,
    student_width=32,
    layers=1,
    teacher_steps=dict.fromkeys(run.HOME, 2),
    student_steps=dict.fromkeys(run.HOME, 2),
    same_teacher_steps=dict.fromkeys(run.HOME, 2),
    batch_size=4,
    learning_rate=3e-3,
    task={"sums": {"addends": 2}},
    held_out=4,
    prompts=8,
)
SCALE = run.Scale(SIZE, 2, 2, (1e-3, 1e-4), seeds=1, other_seeds=1, curve=(1, 2))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The lines of two methods' runs on one task, from a run that was cut off within a line and started again."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("quality")
        patch.setattr(worlds, "CACHE", folder / "cache")
        patch.setattr(run, "CACHE", folder / "cache")
        patch.setattr("trl_ctopd.teachers.panel.CACHE_DIR", folder / "vocabularies")
        patch.setitem(run.SCALES, "cpu", SCALE)
        patch.setattr(run, "HOME", {"sums": "digits"})
        patch.setattr(run, "DIGITS", {})
        patch.setattr(run, "LEADING", ["dpca", "seq_kd"])
        patch.setattr(run, "OTHERS", [])
        path = folder / "runs.jsonl"
        run.main("cpu", ["tuning"], None, path)
        whole = path.read_text()
        path.write_text(whole[:-40])
        run.main("cpu", ["tuning", "headline", "curve"], None, path)
        once = path.read_text()
        run.main("cpu", ["tuning", "headline", "curve"], None, path)
        return path, whole, once


def test_a_run_that_was_cut_off_is_done_again_and_finished_ones_are_not(finished):
    path, whole, once = finished
    assert path.read_text() == once
    assert once.startswith("".join(whole.splitlines(keepends=True)[:3]))
    lines = list(run.read(path).values())
    purposes = [line["run"]["purpose"] for line in lines]
    assert {purpose: purposes.count(purpose) for purpose in purposes} == {"tuning": 4, "headline": 2, "curve": 1}


def test_a_line_tells_what_was_run_and_what_it_cost(finished):
    for line in run.read(finished[0]).values():
        assert "error" not in line
        assert line["finite"]
        assert 0 <= line["accuracy"] <= 1 and 0 <= line["second_skill"] <= 1
        assert line["student_flops"] > 0 and line["teacher_flops"] > 0 and line["cpu_seconds"] > 0
        assert line["tokens"]["student"] > line["tokens"]["written"] > 0
        assert len(line["revision"]) == 40 and line["versions"].keys() >= {"torch", "trl", "trl_ctopd"}
    headline = [line for line in run.read(finished[0]).values() if line["run"]["purpose"] == "headline"]
    assert [*headline[0]["accuracy_curve"]] == ["1"]


def test_what_is_reported_has_the_learning_rate_that_was_best_on_other_prompts_and_another_seed(finished):
    found = run.read(finished[0])
    plan = run.Plan(SCALE)
    for line in found.values():
        if line["run"]["purpose"] == "headline":
            assert line["run"]["learning_rate"] == plan.chosen(line["run"]["method"], "sums", found)
            assert line["run"]["seed"] > 0


def made_up(method, task, seed, accuracy, purpose="headline", **settings):
    """A finished run as the suite writes it, with the accuracy asked for."""
    settings = {"method": method, "task": task, "pair": run.HOME[task], "teacher": "cross", "seed": seed, **settings}
    return {
        "run": {**settings, "learning_rate": 1e-3, "updates": 40, "purpose": purpose},
        "accuracy": accuracy,
        "start": 0.4,
        "teacher_accuracy": 1.0,
        "second_skill": 0.5,
        "cpu_seconds": 9.0,
        "teacher_flops": 10**9,
        "student_flops": 10**9,
        "gap_nats_per_byte": 0.1,
        "accuracy_curve": {"20": 0.5 * accuracy},
        "parameters": {"student": 10**6, "teacher": 10**6},
        "log": [{"alignment/masked_fraction": 0.25}],
        "all_cpu_seconds": 9.0,
    }


def test_the_report_shows_the_median_share_best_first_with_its_spread():
    lines = [made_up("dpca", task, seed, 0.4 + 0.1 * seed) for task in run.HOME for seed in (1, 2, 3)]
    lines += [made_up("seq_kd", task, seed, 0.9) for task in run.HOME for seed in (1, 2)]
    lines += [made_up("seq_kd", task, 1, 1.0, "curve") for task in run.HOME]
    rows = report.headline(lines).splitlines()
    assert rows[2].startswith("| `seq_kd` | 0.83 (0.83 to 0.83)")
    assert rows[3].startswith("| `dpca` | 0.33 (0.17 to 0.50) |")
    assert "| 3 |" in rows[3]
    # seq_kd's long run: 0.4 at the start, 0.5 after half its 2 GFLOP, 1.0 after all; 0.6 in between, at 1.2
    assert rows[3].endswith("| 0.60 / 0.60 / 0.60 |")


def test_the_report_renders_from_real_runs_and_leaves_what_is_written_by_hand(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HOME", {"sums": "digits"})
    page = tmp_path / "README.md"
    page.write_text("By hand.\n\n<!-- quality: table 1 -->\nold\n<!-- /quality -->\n\nBy hand too.\n")
    gradients = {name: gradient.compare(0, deviation) for name, deviation in gradient.DEVIATIONS.items()}
    gradients = {
        name: {loss: {figure: [value] * 3 for figure, value in found.items()} for loss, found in losses.items()}
        for name, losses in gradients.items()
    }
    lines = [
        {**line, "teacher_accuracy": 1.0} for line in run.read(finished[0]).values()
    ]  # this one has learned nothing
    made = report.blocks(lines, gradients, run.Plan(SCALE), run.read(finished[0]))
    report.plot(lines, tmp_path / "headline.png")
    report.curves(lines, tmp_path / "curves.png")
    assert (tmp_path / "headline.png").stat().st_size > 5_000 and (tmp_path / "curves.png").stat().st_size > 5_000
    report.fill(page, made)
    text = page.read_text()
    assert text.startswith("By hand.") and text.endswith("By hand too.\n") and "old" not in text
    assert "| `dpca` |" in text and "| `seq_kd` |" in text
    assert "| macro |" in made["table 2"] and " 1.00 (" in made["table 2"]


def test_macros_gradient_is_the_exact_one_where_all_completions_are_listed():
    tables = gradient.Tables(3, 0.5)
    sampled = tables.sampled_gradients(replace(gradient.LOSSES["macro"], advantage_clip=None))
    mean = tables.scores.detach().sum(1).exp() @ sampled
    torch.testing.assert_close(mean, tables.exact_gradient(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_answer_is_right_a_mistaken_one_is_not_and_a_derailed_one_goes_on_as_it_should(task):
    rng = random.Random(0)
    items = [task.draw(rng) for _ in range(200)]
    assert all(task.is_right(item, item.answer) for item in items)
    share = sum(task.is_right(item, task.mistaken(item, rng)) for item in items) / len(items)
    assert 0.2 < share < 0.7
    for item in items:
        given, rest = task.derailed(item, rng)
        assert given  # what follows can be the end of the turn alone
        assert len((given + rest).split()) == len(item.answer.split())


@pytest.mark.parametrize("pair", toy_pairs.PAIRS)
def test_the_tokenizers_of_a_pair_cut_the_same_text_differently_and_lose_nothing(pair):
    task = TASKS[[*toy_pairs.PAIRS].index(pair) % 3]
    items = [task.draw(random.Random(seed)) for seed in range(300)]
    student, teacher = toy_pairs.build(pair, [f"{item.prompt}\n{item.answer}" for item in items])
    assert student.chat_template != teacher.chat_template
    for tokenizer in (student, teacher):
        ids = [tokenizer.encode(item.answer, add_special_tokens=False) for item in items]
        assert tokenizer.batch_decode(ids) == [item.answer for item in items]
        assert max(map(len, ids)) <= task.max_new_tokens
    assert sum(student.tokenize(item.answer) != teacher.tokenize(item.answer) for item in items) > 150


def test_the_gpu_scale_has_models_of_20_to_100_million_parameters_and_room_for_its_longer_answers():
    size = run.SCALES["gpu"].size
    student, teacher = toy_pairs.build("digits", [TASKS[0].draw(random.Random(seed)).answer for seed in range(50)])
    for config, tokenizer, width in (
        (models.LlamaConfig, student, size.student_width),
        (models.Olmo2Config, teacher, size.teacher_width),
    ):
        with torch.device("meta"):
            assert 20e6 < models.new_model(config, tokenizer, width, size.layers).num_parameters() < 100e6
    for name, pair in run.HOME.items():
        task = getattr(tasks, name)(**size.task[name])
        items = [task.draw(random.Random(seed)) for seed in range(200)]
        for tokenizer in toy_pairs.build(pair, [f"{item.prompt}\n{item.answer}" for item in items]):
            assert max(len(tokenizer.encode(item.answer)) for item in items) < task.max_new_tokens


def test_only_what_comes_after_the_given_beginning_is_learned():
    task = tasks.sums()
    _, tokenizer = toy_pairs.build("digits", [task.draw(random.Random(seed)).answer for seed in range(200)])
    batch = models.as_batch(tokenizer, [("Add 8 9 1", "8+9=27", "+1=28"), ("Add 1 1", "", "1+1=2")])
    learned = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["+1=28<|im_end|>", "1+1=2<|im_end|>"]


def test_golds_teacher_is_given_its_own_template_and_other_text_is_refused(monkeypatch):
    items = [TASKS[0].draw(random.Random(seed)) for seed in range(50)]
    student, teacher = toy_pairs.build("digits", [item.prompt for item in items])
    seen = []
    name = "build_teacher_inputs_from_texts"
    monkeypatch.setattr(methods.gold_trainer, name, lambda tokenizer, prompts, completions: seen.extend(prompts))
    question = {"conversation": models.messages("Add 1 2"), "add_generation_prompt": True, "tokenize": False}
    with methods.teacher_template(student, teacher):
        build = getattr(methods.gold_trainer, name)
        build(teacher, [student.apply_chat_template(**question)], [""])
        with pytest.raises(ValueError, match="Not a prompt"):
            build(teacher, ["Add 1 2"], [""])
    assert seen == [teacher.apply_chat_template(**question)]
