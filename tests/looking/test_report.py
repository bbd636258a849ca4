"""The run's report: what was logged, in pictures and words, and nothing that a text in it could do to the page."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from peft import LoraConfig
from toys import SGD, fix_rollouts, prompts, student_model, teacher_model
from transformers import TrainerCallback

from trl_ctopd import CrossTokenizerGKDConfig, DistillationReportCallback
from trl_ctopd.looking import report
from trl_ctopd.looking.history import figures
from trl_ctopd.looking.publish import reports_of
from trl_ctopd.looking.report.advice import advice
from trl_ctopd.looking.report.charts import MOST_POINTS, Series, curves, thinned, ticks
from trl_ctopd.looking.report.page import PHASES, _phases, percent, plain


@pytest.fixture(autouse=True)
def a_page_at_each_log(monkeypatch):
    monkeypatch.setattr(report, "MOST_OF_THE_TIME", math.inf)


def read(trainer) -> str:
    with open(f"{trainer.args.output_dir}/report.html", encoding="utf-8") as file:
        return file.read()


def texts(html: str) -> str:
    """What a person reads, in one line."""
    found = []

    class Reader(HTMLParser):
        quiet = 0

        def handle_starttag(self, tag, attributes):
            self.quiet += tag == "style"

        def handle_endtag(self, tag):
            self.quiet -= tag == "style"

        def handle_data(self, data):
            found.append("" if self.quiet else data)

    Reader().feed(html)
    return " ".join(" ".join(found).split())


@pytest.fixture
def run(build, tmp_path):
    """Trains with a report, in a folder of its own."""

    def run(resume=None, **settings):
        settings = {"report": True, "output_dir": str(tmp_path / "run"), **settings}
        trainer = build(**settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


# --- on a real run


def test_a_runs_page_has_its_curves_samples_settings_and_versions(run):
    trainer = run(max_steps=4, seed=7, num_completions_to_print=2)
    page = read(trainer)
    said = texts(page)
    logged = [entry for entry in trainer.state.log_history if "gap/nats_per_byte" in entry]
    assert len(logged) == 4
    for entry in logged:
        assert f"<title>training: {plain(entry['gap/nats_per_byte'])} at step {entry['step']}</title>" in page
    for title in (
        "Gap to the teacher",
        "Length of a completion",
        "Truncated and empty",
        "Masked and clipped",
        "Entropy",
    ):
        assert title in said
    for phase in ("the student writes", "the teacher reads", "the student learns", "alignment"):
        assert phase in said
    assert "LlamaForCausalLM learns from Qwen2ForCausalLM" in said and "step 4 of 4" in said
    assert "First sample, step 1" in said and "Latest sample, step 4" in said
    assert page.count('class="ctopd scored"') == 4
    for fact in (
        "seed 7",
        "method reverse_kl",
        f"student's tokenizer BPE, {len(trainer.processing_class)} tokens",
        "16 prompts",
        "trl_ctopd 0.",
        "transformers 5.",
    ):
        assert fact in said
    assert re.search(r"learning_rate 0.01 ", said)


def test_a_run_on_given_text_alone_shows_the_gap_of_that_text_and_says_so(run):
    trainer = run(lmbda=0.0, max_steps=2)
    page = read(trainer)
    for entry in trainer.state.log_history[:2]:
        assert f"<title>given text: {plain(entry['given/gap/nats_per_byte'])} at step {entry['step']}</title>" in page
    assert "Gap to the teacher" in texts(page) and "gap on given text, nats a byte" in texts(page)


def test_the_page_is_one_file_that_loads_nothing_and_leaves_no_other_behind(run, tmp_path):
    page = read(run())
    assert re.findall(r"<(?:script|link|img|iframe)", page) == []
    assert set(re.findall(r"(?:src|href)=\S+|url\((?!\"data:)\S+", page)) == set()
    assert "default-src 'none'" in page
    assert str(tmp_path) not in page
    assert [path.name for path in (tmp_path / "run").glob("*.html")] == ["report.html"]


def test_without_asking_there_is_no_report_and_a_callback_asks_too(run, tmp_path):
    run(report=False)
    assert not (tmp_path / "run" / "report.html").exists()
    run(report=False, callbacks=[DistillationReportCallback()])
    assert (tmp_path / "run" / "report.html").exists()


def test_the_page_goes_on_while_the_run_does_and_its_first_samples_stay(run, monkeypatch):
    written = []
    real = DistillationReportCallback.update
    monkeypatch.setattr(
        DistillationReportCallback,
        "update",
        lambda own, trainer, *args: real(own, trainer, *args) or written.append(texts(read(trainer))),
    )
    run(max_steps=3)
    assert [re.search(r"step (\d) of 3", page)[1] for page in written] == ["1", "2", "3", "3"]
    assert ["Latest sample" in page for page in written] == [False, True, True, True]
    assert all("First sample, step 1" in page for page in written)


@pytest.mark.parametrize("counted", ["no", "all"])
def test_a_page_takes_a_small_part_of_the_time_and_the_last_one_is_written_anyway(run, monkeypatch, counted):
    monkeypatch.setattr(report, "MOST_OF_THE_TIME", 1e-9)
    pages = []
    monkeypatch.setattr(
        report.os, "replace", lambda old, new, real=report.os.replace: pages.append(new) or real(old, new)
    )
    said = texts(read(run(max_steps=5, include_num_input_tokens_seen=counted)))
    assert len(pages) == 2, "the first, and the last"
    assert "step 5 of 5" in said and "Latest sample, step 5" in said


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_goes_on_with_its_curves_and_its_first_samples(run, tmp_path, restore):
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "restore_callback_states_from_checkpoint": restore,
    }
    whole = run(**settings)
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["DistillationReportCallback"]["attributes"]["first"][""][0]["step"] == 1
    resumed = run(resume=str(tmp_path / "run" / "checkpoint-2"), **{**settings, "output_dir": str(tmp_path / "again")})
    page = read(resumed)
    assert re.findall(r"<title>training: \S+ at step (\d)</title>", page)[:4] == ["1", "2", "3", "4"]
    assert "First sample, step 1" in texts(page) and "Latest sample, step 4" in texts(page)
    assert reports_of(resumed)[0].first == reports_of(whole)[0].first


def test_a_run_resumed_from_a_checkpoint_that_knew_no_report_saves_and_reports(run, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    run(report=False, **settings)
    resumed = run(resume=str(tmp_path / "run" / "checkpoint-1"), **settings)
    assert "First sample, step 2" in texts(read(resumed))


def test_every_evaluation_set_has_its_curve_and_its_samples(run):
    trainer = run(
        max_steps=2, eval_strategy="steps", eval_steps=1, eval_dataset={"math": prompts(4), "other": prompts(4)}
    )
    page = read(trainer)
    last = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    for name in ("math", "other"):
        assert f"<title>evaluation on {name}: {plain(last[f'eval_{name}_gap/nats_per_byte'])} at step 2</title>" in page
        assert f"samples of the evaluation on {name}" in texts(page)
    assert "samples of training" not in texts(page), "evaluations show the same prompts before and after"


def test_an_accuracy_that_someone_logs_has_a_curve_of_its_own(build):
    trainer = build(report=True)
    trainer.state.log_history += [{"eval_accuracy": 0.25, "step": 0}, {"eval_accuracy": 0.5, "step": 1}]
    trainer.log({"loss": 1.0})
    assert "<title>evaluation: 0.25 at step 0</title>" in read(trainer)


def test_an_adapters_settings_are_named_and_tokens_are_not(run):
    said = texts(
        read(
            run(peft_config=LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"), hub_token="hf_secret")
        )
    )
    assert "r of the adapter 3" in said
    assert "hf_secret" not in said and "hub_token" not in said


@pytest.mark.parametrize(
    ("loss", "by"),
    [("auto", "dpca, macro credit of open chunks"), ("gold", "dpca, macro credit of open chunks"), ("alm", "alm")],
)
def test_samples_are_coloured_whatever_the_loss_reads(run, loss, by):
    assert f"by {by}" in texts(read(run(distillation_loss=loss)))


def test_a_callback_that_leaves_the_student_in_eval_mode_takes_no_figures_away(run):
    class Samples(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.eval()

    trainer = run(callbacks=[Samples()], max_steps=2, logging_steps=1, log_completions=True)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2 and all("gap/nats_per_byte" in entry for entry in steps)
    said = texts(read(trainer))
    assert "of training" in said and "of the evaluation" not in said


def test_what_the_teacher_cannot_read_is_shown_without_scores(run):
    page = read(run(teacher=teacher_model(max_position_embeddings=8), num_completions_to_print=1))
    assert 'class="ctopd"' in page and 'class="ctopd scored"' not in page
    assert "100 % of texts are longer than the teacher's context of 8 tokens" in texts(page)


@pytest.mark.parametrize("loss", ["dpca", "reverse_kl"])
@pytest.mark.parametrize("gated", [False, True])
def test_what_the_run_left_out_is_shown_as_not_compared_and_the_gap_is_the_logged_one(build, loss, gated):
    gate = {"teacher_gate": lambda completions, **_: [[(0, 3)]] * len(completions)} if gated else {}
    trainer = build(report=True, distillation_loss=loss, per_device_train_batch_size=1, **gate)
    ids = trainer.processing_class.encode("the sum of what is tw")  # cut off where a teacher's token may go on
    trainer.rollouts.write = lambda model, prompts, step: [(ids, None) for _ in prompts]
    trainer.train()
    page, logged = read(trainer), trainer.state.log_history[0]
    [sample] = reports_of(trainer)[0].last[""]
    assert logged["closing/unclosed_fraction"] == 1
    assert f"{logged['gap/nats_per_byte']:.3f} nats a byte of gap" in texts(page)
    compared = sum(chunk >= 0 for chunk in sample["student_chunks"])
    assert compared == len(ids) - 1 - gated * len(trainer.processing_class.encode("the"))
    assert len(re.findall(r"<small>[^<]+</small></span>", page)) == compared
    assert "left out" in texts(page)


def test_a_completion_that_is_wrong_as_a_whole_is_shown_without_scores(run):
    page = read(run(teacher_gate=lambda completions, **_: [False] * len(completions), num_completions_to_print=1))
    assert 'class="ctopd"' in page and 'class="ctopd scored"' not in page
    assert "0 chunks" in texts(page) and "left out" in texts(page)


def test_samples_of_a_checkpoint_without_their_chunks_are_shown_as_aligned(run):
    trainer = run(num_completions_to_print=1)
    [sample] = reports_of(trainer)[0].last[""]
    del sample["student_chunks"]
    trainer.log({"loss": 1.0})
    assert 'class="ctopd scored"' in read(trainer)


def test_a_hostile_prompt_and_completion_stay_text(build):
    hostile = '</div><script>alert("x")</script><img src=x onerror=alert(1)>'
    dataset = prompts(4).map(lambda row: {"prompt": [{"role": "user", "content": hostile}]})
    trainer = build(report=True, dataset=dataset, max_new_tokens=80)
    ids = trainer.processing_class.encode(hostile)
    trainer.rollouts.write = lambda model, prompts, step: [(ids, None) for _ in prompts]
    trainer.train()
    page = read(trainer)
    assert "<script" not in page and "<img" not in page and "&lt;img" in page
    assert page.count("<main>") == page.count("</main>") == 1


def test_a_report_changes_nothing_of_the_run_and_runs_no_model_once_more(build, tmp_path):
    losses, calls = {}, {}
    for report_asked in (False, True):
        trainer = fix_rollouts(
            build(report=report_asked, output_dir=str(tmp_path / str(report_asked)), max_steps=2, **SGD)
        )
        count = calls[report_asked] = [0]
        for model in (trainer.model, trainer.teacher_model):
            model.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        trainer.train()
        losses[report_asked] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[True] == losses[False]
    assert calls[True] == calls[False]


# --- where the time goes


def test_every_phase_of_a_run_has_its_row(run):
    trainer = run(teacher_gate=lambda completions, **_: [True] * len(completions))
    phases = {name.removeprefix("seconds/") for name in trainer.state.log_history[0] if name.startswith("seconds/")}
    assert phases - {"step"} <= set(PHASES) and "rewards" in phases
    assert "rewards and gate" in texts(read(trainer))


def test_a_phases_seconds_are_a_mean_over_steps_and_not_over_logs():
    logs = [(2, 1.0, 0.5), (4, 1.0, 0.5), (5, 6.0, 5.5)]
    history = [{"seconds/step": step, "seconds/teacher": teacher, "step": at} for at, step, teacher in logs]
    history.insert(1, {"eval_runtime": 1.0, "eval_seconds/step": 9.0, "eval_seconds/teacher": 9.0, "step": 3})
    rows = {row["name"]: row["seconds"] for row in _phases(figures(history))}
    assert rows == {"the teacher reads": "1.5", "the rest": "0.5"}
    assert _phases(figures([{"loss": 1.0, "step": 1}])) == []


# --- warnings in words


QUIET = {
    "loss": 0.5, "grad_norm": 1.0, "gap/nats_per_byte": 0.1, "completions/truncated_fraction": 0.05,
    "completions/empty_fraction": 0.0, "alignment/masked_fraction": 0.02, "alignment/neutralised_fraction": 0.0,
    "alignment/teacher_context_exceeded_fraction": 0.0, "advantage/clipped_fraction": 0.01, "ratio/clipped_fraction": 0.05,
    "masked_bytes/invalid_utf8": 0.1, "masked_bytes/markup": 0.02,
}  # fmt: skip


@pytest.fixture
def advise(tmp_path):
    args = CrossTokenizerGKDConfig(str(tmp_path), max_new_tokens=64, rollout_reuse=4, bf16=False)
    return lambda logs, **options: advice([{**QUIET, **log} for log in logs], args, **options)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"completions/truncated_fraction": 0.31}, "31 % of completions are truncated: raise max_new_tokens (now 64)."),
        ({"completions/empty_fraction": 0.2}, "20 % of completions are empty"),
        ({"alignment/masked_fraction": 0.4}, "40 % of the student's tokens take no part, mostly for invalid_utf8."),
        ({"alignment/teacher_context_exceeded_fraction": 0.25}, "longer than the teacher's context of 2,048 tokens"),
        ({"alignment/neutralised_fraction": 0.05}, "In 5 % of chunks the teacher's log-probs are not finite"),
        ({"advantage/clipped_fraction": 0.3}, "30 % of the student's tokens meet advantage_clip=10.0"),
        ({"ratio/clipped_fraction": 0.5}, "50 % of ratios meet PPO's bounds: lower rollout_reuse (now 4)"),
        ({"loss": math.nan}, "not finite: lower learning_rate"),
        ({"grad_norm": math.inf}, "not finite: lower learning_rate"),
    ],
)
def test_a_figure_out_of_bounds_is_said_in_words_with_what_to_do(advise, figures, said):
    [warning] = advise([figures], teacher_context=2048)
    assert said in warning


def test_a_quiet_run_is_told_nothing(advise):
    assert advise([{"gap/nats_per_byte": 0.1 - 0.002 * step} for step in range(40)]) == []
    assert advise([]) == []


def test_what_is_over_is_not_warned_of(advise):
    assert advise([{"completions/truncated_fraction": 0.9}] * 5 + [{}] * 5) == []


@pytest.mark.parametrize(
    ("gaps", "warned"),
    [
        ([0.1, 0.11, 0.1, 0.12, 0.2, 0.3, 0.31, 0.33], True),
        ([0.33, 0.31, 0.3, 0.2, 0.12, 0.1, 0.11, 0.1], False),
        ([0.1, 0.9, 0.2, 0.8, 0.9, 0.1, 0.3, 0.9], False),  # noise
        ([0.1, 0.3], False),  # too few to tell
        ([0.1] * 4 + [0.109] * 4, False),  # less than a tenth
    ],
)
def test_a_gap_that_grows_beyond_its_noise_is_warned_of(advise, gaps, warned):
    said = advise([{"gap/nats_per_byte": gap} for gap in gaps])
    assert said == (
        [
            "The gap has grown from 0.105 to 0.320 nats a byte: the student moves away from its teacher. Lower learning_rate."
        ]
        if warned
        else []
    )


def noisy(middle: float, noise: float) -> list[float]:
    return [middle + noise * (-1) ** step for step in range(30)]


@pytest.mark.parametrize(
    ("gaps", "warned"),
    [
        (noisy(0.5, 0.01), True),
        ([0.5 - 0.01 * step for step in range(30)], False),
        (noisy(0.5, 0.3), False),
        (noisy(0.5, 0.01)[:19], False),
        (noisy(0.002, 0.001), False),
    ],
    ids=["stands still", "falls", "too noisy to tell", "too few logs to tell", "nothing left to close"],
)
def test_a_gap_that_does_not_move_is_met_with_a_rate_that_moves_it(advise, gaps, warned):
    said = advise([{"gap/nats_per_byte": gap} for gap in gaps])
    assert [line for line in said if "has not moved in 30 logs" in line and "1e-4 to 3e-4" in line] == said
    assert bool(said) == warned


# --- curves


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.031), (-0.4, 2.2), (0, 12345), (0, 0), (-3e-7, 0)])
def test_ticks_are_few_evenly_spaced_and_cover_the_values(low, high):
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 6
    assert marks[0] <= low and marks[-1] >= high
    steps = [after - before for before, after in zip(marks, marks[1:], strict=False)]
    assert all(step == pytest.approx(steps[0]) for step in steps)


def test_a_long_curve_is_thinned_to_means_and_keeps_its_last_step():
    points = [(step, float(step % 2)) for step in range(1, 10_001)]
    shown = thinned(points)
    assert len(shown) == MOST_POINTS and shown[-1][0] == 10_000
    assert {value for _, value in shown} == {0.5}
    assert thinned(points[:150]) == points[:150]


def test_values_that_are_no_numbers_leave_a_curve_of_the_others():
    svg = curves([Series("gap", [(1, 0.5), (2, math.nan), (3, math.inf), (4, 0.25)])], plain)
    assert re.findall(r"<title>(.*?)</title>", svg) == ["gap: 0.5 at step 1", "gap: 0.25 at step 4"]
    assert "nan" not in svg and "inf" not in svg
    assert "nothing logged yet" in curves([Series("gap", [(1, math.nan)])], plain)


def test_a_label_with_markup_in_it_stays_text():
    svg = curves([Series('evaluation on <b>"x"', [(1, 1.0)])], plain)
    assert "<b>" not in svg and 'aria-label="evaluation on &lt;b&gt;&#34;x&#34;' in svg


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.12345, "0.123"),
        (12.5, "12.5"),
        (100.0, "100"),
        (-0.5, "−0.5"),
        (1e-5, "1.0e−05"),
        (1234.0, "1,234"),
    ],
)
def test_numbers_have_three_digits_and_none_in_vain(value, shown):
    assert plain(value) == shown


def test_shares_are_percentages():
    assert percent(0.3149) == "31.5 %" and percent(1.0) == "100 %"


def test_figures_are_told_apart_by_the_set_that_they_are_of():
    log = [
        {"loss": 1.0, "step": 1},
        {"eval_runtime": 1.0, "eval_gap/nats_per_byte": 0.5, "step": 1},
        {"eval_my_set_runtime": 1.0, "eval_my_set_gap/nats_per_byte": 0.25, "step": 2},
    ]
    assert figures(log)["gap/nats_per_byte"] == {"evaluation": [(1, 0.5)], "evaluation on my_set": [(2, 0.25)]}
    assert figures(log)["loss"] == {"training": [(1, 1.0)]}


def test_a_students_log_probs_that_are_not_finite_do_not_stop_the_page(build):
    trainer = build(report=True, num_completions_to_print=1, model=student_model())
    trainer.train()
    sample = {**reports_of(trainer)[0].last[""][0]}
    sample["student_log_probs"] = [math.nan] * len(sample["ids"])
    reports_of(trainer)[0].last[""] = [sample]
    trainer.log({"loss": math.nan})
    assert 'class="ctopd"' in read(trainer)
