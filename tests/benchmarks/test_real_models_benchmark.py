"""The comparison on real models in little: toy models in their place, cut off and begun again, and its report."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from toys import student_model, student_tokenizer

from benchmarks.real_models import data, entropy, gpu, indentation, precision, report, run, solved


def rows() -> list[dict]:
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {n} plus one?"}],
            "completion": [{"role": "assistant", "content": f"The sum is {n + 1}."}],
        }
        for n in range(12)
    ]


def plain() -> list[dict]:
    return [{"prompt": f"The sum of {n} and", "completion": f" one is {n + 1}, the sum of two."} for n in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, model, tokenizer in (
        ("student", student_model(), student_tokenizer()),
        ("teacher", student_model(seed=1), student_tokenizer()),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The file of results: after a run that was cut off within its last line, begun again, and begun once more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.PAIRS, "smollm2<-qwen", ("some/student", "some/teacher"))
        patch.setattr(run, "DATASETS", {"gsm8k": rows, "text": plain})
        patch.setattr(run, "UPDATES", 2)
        patch.setattr(run, "LONGER", {"dpca_open": 3})
        patch.setattr(run, "MEASURED_AT", (2, 3))
        methods = ["reverse_kl", "dpca_open", "trl_gold_off"]
        wanted = list(run.runs(methods, ["gsm8k", "text"], 1, [1e-3], ["smollm2<-qwen"]))
        wanted = [run.Run(**{**vars(one), "prompts": 2, "tokens": 4, "held_out": 4}) for one in wanted]
        path = tmp_path_factory.mktemp("results") / "runs.jsonl"
        run.main(wanted[:2], path, folder, None)
        whole = path.read_text()
        path.write_text(whole[:-40])
        run.main(wanted, path, folder, None)
        once = path.read_text()
        run.main(wanted, path, folder, None)
        assert path.read_text() == once
    assert once.startswith(whole.splitlines(keepends=True)[0])
    return path


def test_each_method_of_each_data_set_is_run_once_and_measured_on_the_same_prompts(finished):
    lines = [*run.read(finished).values()]
    assert [(line["run"]["dataset"], line["run"]["method"]) for line in lines] == [
        (dataset, method)
        for dataset in ("gsm8k", "text")
        for method in ("start", "reverse_kl", "dpca_open", "trl_gold_off")
    ]
    for line in lines:
        assert "error" not in line and line["finite"]
        steps = {"start": ["0"], "dpca_open": ["2", "3"]}.get(line["run"]["method"], ["2"])
        assert [*line["curve"]] == steps
        for point in line["curve"].values():
            assert len(point["rows"]) == 4
            nats, sizes = np.array(point["rows"]).T
            assert point["nats_per_byte"] == pytest.approx(nats.sum() / sizes.sum(), abs=1e-4)
        assert len(line["log"]) == line["run"]["updates"]
        assert len(line["revision"]) == 40 and line["versions"].keys() >= {"torch", "trl", "trl_ctopd"}


def test_every_trainer_changes_the_student_that_is_measured(finished):
    lines = {(line["run"]["dataset"], line["run"]["method"]): line for line in run.read(finished).values()}
    for (dataset, method), line in lines.items():
        if method != "start":
            assert line["curve"]["2"]["rows"] != lines[dataset, "start"]["curve"]["0"]["rows"]
            assert line["curve"]["2"]["cpu_seconds"] > 0


def test_an_untrained_student_has_the_same_gap_whatever_loss_it_is_to_learn_by(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(run.PAIRS, "smollm2<-qwen", ("some/student", "some/teacher"))
    monkeypatch.setattr(run, "DATASETS", {"gsm8k": rows})
    curves = [
        run.do(run.Run(method, "gsm8k", "smollm2<-qwen", 0, 0.0, 0, tokens=4, held_out=4), tmp_path, folder)["curve"]
        for method in ("dpca", "reverse_kl", "sft")
    ]
    measured = [{name: curve[0][name] for name in ("nats_per_byte", "entropy", "rows")} for curve in curves]
    assert measured == 3 * measured[:1]


def made_up(method, seed, gap, prompts=(0.0, 0.0), cpu_seconds=100.0, steps=(12,), rate=3e-4, cpu="one"):
    """A finished run: two prompts of 10 bytes, whose gaps differ from `gap` by `prompts`."""
    measured = [[10 * (gap + prompts[0]), 10], [10 * (gap + prompts[1]), 10]]
    point = {"nats_per_byte": gap, "rows": measured, "entropy": 1.0, "mean_length": 9.0, "truncated_fraction": 0.5}
    settings = {"method": method, "dataset": "mbpp", "pair": report.HOME, "seed": seed, "updates": steps[-1]}
    settings["learning_rate"] = 0.0 if method == "start" else rate
    times = {step: {**point, "cpu_seconds": cpu_seconds * step / 12} for step in steps}
    return {"run": settings, "curve": json.loads(json.dumps(times)), "machine": {"cpu": cpu}}


def test_an_answer_without_text_adds_its_nats_to_the_gap():
    line = made_up("dpca", 0, 0.3)
    line["curve"]["12"]["rows"] = [[2.0, 10], [2.5, 0]]
    assert report.curves([line], "mbpp")["dpca"][0][12].gap == pytest.approx(0.45)


def test_what_a_prompt_adds_to_both_methods_is_no_error_of_their_difference():
    lines = [
        made_up("start", 0, 0.5, steps=(0,)),
        made_up("reverse_kl", 0, 0.2, (0.1, -0.1)),
        made_up("sft", 0, 0.3, (0.1, -0.1)),
        made_up("bpm", 0, 0.3, (-0.1, 0.1)),
    ]
    found = report.curves(lines, "mbpp")
    assert found["reverse_kl"][0][12].error == pytest.approx(0.1)
    table = report.beside_the_default(found)
    rows = table.splitlines()
    assert [
        row
        for row in rows
        if row.startswith("| `sft` on references | +0.100 ± 0.000 |") and row.endswith("| +1.0 ± 0.0 |")
    ]
    assert [row for row in rows if row.startswith("| `bpm` | +0.100 ± 0.200 |") and row.endswith("| +1.0 ± 2.0 |")]


def test_gaps_are_compared_at_equal_cpu_seconds_too():
    lines = [
        made_up("start", 0, 0.5, steps=(0,)),
        made_up("reverse_kl", 0, 0.2, cpu_seconds=100),
        made_up("sft", 0, 0.3, cpu_seconds=200),
        made_up("bpm", 0, 0.4, cpu_seconds=50),
    ]
    table = report.beside_the_default(report.curves(lines, "mbpp"))
    assert "+0.200 ± 0.000 |" in next(row for row in table.splitlines() if "sft" in row)  # half way from .5 to .3
    assert "+0.200 ± 0.000 (its last, at 50)" in next(row for row in table.splitlines() if "bpm" in row)


def test_short_runs_have_a_table_of_their_own_beside_reverse_kl_and_none_in_the_others():
    lines = [made_up("start", 0, 0.5, steps=(0,)), made_up("reverse_kl", 0, 0.2, rate=3e-4)]
    short = [
        made_up("reverse_kl", 0, 0.2, steps=(3, 6), rate=1e-3, cpu_seconds=100),
        made_up("dpca", 0, 0.3, steps=(3, 6), rate=1e-3, cpu_seconds=100),
        made_up("dpca", 1, 0.9, steps=(3, 6), rate=1e-3, cpu_seconds=100),
        made_up("sft", 0, 0.4, steps=(3, 6), rate=1e-3, cpu_seconds=200),
        made_up("bpm", 0, 0.4, steps=(3, 6), rate=3e-3, cpu_seconds=200),
    ]
    found = report.blocks(lines + short)
    assert {name: block for name, block in found.items() if name != "mbpp early"} == report.blocks(lines)
    head, _, *rows = found["mbpp early"].splitlines()
    assert "at 50 CPU seconds" in head and "rate 1e-3" in head
    assert rows == [
        "| `dpca`, closed chunks | 2 | 0.600 ± 0.000 | 0.600 ± 0.000 | 50 | +0.100 ± 0.000 | +0.100 ± 0.000 | +0.100 ± 0.000 | 6.0 ± 0.0 | +1.0 ± 0.0 |",
        "| `reverse_kl` (the default) | 1 | 0.200 ± 0.000 | 0.200 ± 0.000 | 50 |  |  |  | 2.0 ± 0.0 |  |",
        "| `sft` on references | 1 | 0.400 ± 0.000 | 0.400 ± 0.000 | 100 | +0.200 ± 0.000 | +0.200 ± 0.000 | +0.200 ± 0.000 | 4.0 ± 0.0 | +2.0 ± 0.0 |",
    ]


def test_short_runs_of_another_pair_have_a_table_for_each_rate_of_the_default():
    lines = [made_up("start", 0, 0.5, steps=(0,))]
    lines += [made_up(method, 0, gap, steps=(3,), rate=1e-4) for method, gap in (("reverse_kl", 0.2), ("dpca", 0.3))]
    for line in lines:
        line["run"]["pair"] = "qwen<-smollm2"
    made = report.blocks(lines)
    assert made.keys() == {"refused", "mbpp qwen<-smollm2", "mbpp qwen<-smollm2 1e-4"}
    [head, _, dpca, own] = made["mbpp qwen<-smollm2 1e-4"].splitlines()
    assert "qwen<-smollm2, rate 1e-4" in head and "+0.100 ± 0.000" in dpca and "`reverse_kl` (the default)" in own


def test_runs_on_more_prompts_are_compared_at_the_defaults_steps_and_seconds_and_stand_in_no_other_table():
    lines = [made_up("start", 0, 0.5, steps=(0,)), made_up("reverse_kl", 0, 0.2)]
    closer = [made_up("start", 0, 0.4, steps=(0,)), made_up("reverse_kl", 0, 0.1, steps=(24, 96), cpu_seconds=120)]
    closer.append(made_up("dpca_open", 0, 0.3, steps=(24, 96, 112), cpu_seconds=120))
    closer[-1]["curve"]["112"]["rows"] = [[1.0, 10], [1.0, 10]]
    closer[-1]["curve"]["112"]["cpu_seconds"] = 1200.0
    closer[-1]["curve"]["96"]["cpu_seconds"] = 720.0
    for line in closer:
        line["run"]["held_out"] = 128
    made = report.blocks(lines, closer)
    head, _, own, other = made.pop("mbpp closer 3e-4").splitlines()
    assert made == report.blocks(lines)
    assert "128 held-out prompts, rate 3e-4" in head and "gap after 24 | gap after 96 | CPU seconds" in head
    assert "at 960 CPU seconds" in head and "112" not in head
    assert "| 0.100 ± 0.000 | 0.100 ± 0.000 | 960 |" in own
    assert "| +0.200 ± 0.000 | +0.200 ± 0.000 | +0.100 ± 0.000 |" in other  # half way between 0.3 and 0.1


def test_seconds_of_another_processor_are_not_compared():
    lines = [made_up("start", 0, 0.5, steps=(0,), cpu="other"), made_up("reverse_kl", 0, 0.2, cpu_seconds=100)]
    lines += [made_up("reverse_kl", 1, 0.4, cpu_seconds=900, cpu="other"), made_up("sft", 0, 0.3, cpu_seconds=200)]
    lines += [made_up("sft", 1, 0.5, cpu_seconds=200), made_up("bpm", 0, 0.4, cpu_seconds=50, cpu="other")]
    made = report.blocks(lines)
    columns = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in made["mbpp"].splitlines()[4:]}
    assert "CPU seconds (one), after 12" in made["mbpp"]
    assert [
        columns[name][6] for name in ("untrained", "`reverse_kl` (the default)", "`sft` on references", "`bpm`")
    ] == [
        "0",
        "100",
        "200",
        "",
    ]
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in made["mbpp beside the default"].splitlines()}
    assert rows["`sft` on references"][1:] == [
        "+0.100 ± 0.000, 2 seeds",
        "+0.150 ± 0.000, 2 seeds",
        "+1.0 ± 0.0, 2 seeds |",
    ]
    assert rows["`bpm`"][1:] == ["+0.200 ± 0.000", "", "+2.0 ± 0.0 |"]


def test_seconds_of_other_products_on_the_same_processor_are_not_compared():
    lines = [
        made_up("start", 0, 0.5, steps=(0,)),
        *(made_up("reverse_kl", seed, 0.2, cpu_seconds=100) for seed in (0, 1)),
    ]
    lines.append(made_up("sft", 0, 0.3, cpu_seconds=50))
    lines[-1]["machine"]["products"] = "oneDNN"
    assert report.processor(lines, "mbpp") == "one"
    [row] = [row for row in report.blocks(lines)["mbpp"].splitlines() if "sft" in row]
    assert row.split(" | ")[6] == ""
    lines += [made_up("bpm", seed, 0.3) | {"machine": lines[-1]["machine"]} for seed in (0, 1)]
    assert "CPU seconds (one), after 12" in report.blocks(lines)["mbpp"], "the default's, although others made more"
    lines += [made_up("reverse_kl", seed, 0.2) | {"machine": lines[-1]["machine"]} for seed in (2, 3)]
    assert "CPU seconds (one with oneDNN), after 12" in report.blocks(lines)["mbpp"]


def test_a_pair_of_which_only_the_start_was_measured_has_its_row():
    line = made_up("start", 0, 0.5, steps=(0,))
    line["run"]["pair"] = "qwen<-smollm2"
    assert report.blocks([line])["mbpp qwen<-smollm2"].endswith(
        "| untrained |  | 1 | 0.500 ± 0.000 | 5.0 ± 0.0 | 0 | 1.00 | 9 | 50 % |"
    )


def test_of_a_seed_that_was_run_twice_the_longer_run_counts():
    lines = [made_up("dpca_open", 0, 0.1, steps=(12, 24)), made_up("dpca_open", 0, 0.3)]
    curve = report.averaged(report.curves(lines, "mbpp")["dpca_open"])
    assert [(step, point.gap, point.seeds) for step, point in curve.items()] == [(12, 0.1, 1), (24, 0.1, 1)]


def test_methods_are_compared_on_the_seeds_that_both_have():
    lines = [made_up("start", 0, 0.5, steps=(0,)), made_up("reverse_kl", 0, 0.1), made_up("reverse_kl", 1, 0.3)]
    lines += [made_up("sft", 1, 0.4), made_up("bpm", 0, 0.2), made_up("bpm", 1, 0.5), made_up("alm", 2, 0.5)]
    rows = report.beside_the_default(report.curves(lines, "mbpp")).splitlines()
    found = {row.split(" | ")[0].strip("| "): row.split(" | ")[1] for row in rows[2:]}
    assert found["untrained"].startswith("+0.400") and found["`sft` on references"].startswith("+0.100")
    assert found["`bpm`"] == "+0.150 ± 0.000, 2 seeds" and found["`alm`"] == ""


def test_of_several_rates_a_methods_best_counts_and_all_are_shown():
    lines = [made_up("trl_gold_on", 0, gap, rate=rate) for rate, gap in ((3e-4, 0.4), (1e-4, 0.2), (3e-5, 0.3))]
    lines += [made_up("reverse_kl", 0, 0.1), made_up("start", 0, 0.5, steps=(0,))]
    assert report.curves(lines, "mbpp")["trl_gold_on"][0][12].gap == 0.2
    made = report.blocks(lines)
    assert "| TRL's GOLD on-policy, hybrid | 1e-4 | 1 | | 0.200" in made["mbpp"].replace("|  |", "| |")
    assert [row.split(" | ")[1:2] for row in made["mbpp rates"].splitlines()[2:]] == [["3e-4"], ["1e-4"], ["3e-5"]]
    assert "mbpp rates" not in report.blocks(lines[1:2] + lines[3:])


def test_of_rates_that_are_level_the_one_with_more_seeds_counts():
    lines = [
        made_up("reverse_kl", 0, 0.2, (0.1, -0.1)),
        made_up("reverse_kl", 1, 0.4),
        made_up("reverse_kl", 0, 0.15, rate=1e-3),
    ]
    assert report.curves(lines, "mbpp")["reverse_kl"].keys() == {0, 1}
    lines[2] = made_up("reverse_kl", 0, 0.05, rate=1e-3)
    assert report.curves(lines, "mbpp")["reverse_kl"].keys() == {0}


def test_rates_are_compared_on_the_seeds_that_they_share():
    lines = [made_up("reverse_kl", seed, gap, rate=3e-4) for seed, gap in ((0, 0.2), (1, 0.4))]
    lines += [made_up("reverse_kl", 0, 0.25, rate=1e-3), made_up("start", 0, 0.5, steps=(0,))]
    assert report.curves(lines, "mbpp")["reverse_kl"].keys() == {0, 1}
    made = report.blocks(lines)
    assert "| 3e-4 | 2 | | 0.300" in made["mbpp"].replace("|  |", "| |")
    assert [row.split(" | ")[1:] for row in made["mbpp rates"].splitlines()[2:]] == [
        ["1e-3", "1", "0.250 ± 0.000 |"],
        ["3e-4", "1", "0.200 ± 0.000 |"],
    ]


def test_seeds_are_averaged():
    lines = [made_up("reverse_kl", 0, 0.2, (0.1, -0.1)), made_up("reverse_kl", 1, 0.4, (-0.1, 0.1))]
    point = report.averaged(report.curves(lines, "mbpp")["reverse_kl"])[12]
    assert (point.gap, point.error, point.seeds) == (pytest.approx(0.3), pytest.approx(0), 2)


def test_the_report_renders_from_real_runs(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "UPDATES", 2)
    lines = [*run.read(finished).values()]
    made = report.blocks(lines)
    assert "| `reverse_kl` (the default) | 1e-3 | 1 |" in made["gsm8k"] and made["text"].startswith("## Plain text")
    assert "| TRL's GOLD on references |" in made["text beside the default"]
    report.plot(lines, tmp_path / "gap.png")
    assert (tmp_path / "gap.png").stat().st_size > 5_000


def test_the_gpu_script_measures_trains_and_says_how_many_steps_it_took(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ANSWER_TOKENS", 4)
    tasks = [
        {"task_id": n, "text": f"Add {n}.", "code": f"def add(x):\n    return x + {n}", "test_list": ["assert True"]}
        for n in range(8)
    ]
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n".join(map(json.dumps, tasks)))
    found = gpu.measured(
        str(folder / "student"), str(folder / "teacher"), str(file), "reverse_kl", 2, 2, 4, 3, 8.0, "cpu"
    )
    assert found["steps"] == 2 and [entry["step"] for entry in found["curve"]] == [1, 2]
    assert found["before"]["tasks"] == 3 and found["before"]["nats_per_byte"] != found["after"]["nats_per_byte"]
    short = gpu.measured(
        str(folder / "student"), str(folder / "teacher"), str(file), "reverse_kl", 50, 2, 4, 3, 0.0, "cpu"
    )
    assert short["steps"] == 1


def test_plain_text_is_cut_between_words_and_nothing_of_it_is_lost(tmp_path, monkeypatch):
    paragraph = " ".join(f"word{n}" for n in range(100))
    kept = {"text": paragraph, "source": "xquad.en"}
    folder = tmp_path / "datasets" / "multilingual"
    folder.mkdir(parents=True)
    lines = [kept, kept, {"text": "short", "source": "xquad.en"}, {"text": paragraph, "source": "xquad.de"}]
    (folder / "sample.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setenv("CTOPD_ASSETS", str(tmp_path))
    [row] = data.text()
    assert row["prompt"] + row["completion"] == paragraph and row["prompt"].split()[-1] == "word39"


@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "tasks.jsonl"
    lines = [{"task_id": n, "text": "Add one.", "code": "", "test_list": ["assert add(1) == 2"]} for n in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_tasks_solved_are_counted_once_for_each_model_and_for_the_adapter(folder, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(solved, "STUDENT", "some/student")
    monkeypatch.setattr(solved, "TEACHER", "some/teacher")
    monkeypatch.setattr(solved, "ANSWER_TOKENS", 4)
    own = get_peft_model(student_model(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    own.save_pretrained(tmp_path / "adapter")
    arguments = ["--models", str(folder), "--data", str(tasks), "--tasks", "3", "--samples", "2"]
    arguments += ["--output", str(tmp_path / "solved.json")]
    solved.main(arguments)
    first = json.loads((tmp_path / "solved.json").read_text())["rows"]
    assert list(first) == ["student", "teacher"] and "any" in first["student"] and "any" not in first["teacher"]

    right = "def add(x):\n    return x + 1"
    asked = []

    def answering(model, tokenizer, conversations, max_new_tokens, samples=0):
        asked.append(samples)
        return [(right if n % 4 == 1 else "no", 4, True) for n in range(len(conversations) * max(1, samples))]

    monkeypatch.setattr(solved, "answers", answering)
    solved.main([*arguments, "--adapter", str(tmp_path / "adapter")])
    second = json.loads((tmp_path / "solved.json").read_text())["rows"]
    assert {name: second[name] for name in first} == first
    assert asked == [0, 2]
    assert second["trained"]["greedy"] == [False, True, False]
    assert second["trained"]["any"] == [True, False, True]
    said = capsys.readouterr().out
    assert "| of 3 tasks | greedy | in any of 2 samples |" in said
    assert "| trained | 1 (+0.33 ± 0.33) | 2 (+0.67 ± 0.33) | 3 | 4 |" in said
    with pytest.raises(SystemExit):
        solved.main([*arguments[:4], "--tasks", "201"])
    with pytest.raises(SystemExit):
        solved.main([*arguments[:4], "--tasks", "2", *arguments[-2:]])


def test_the_error_of_a_gain_is_that_of_paired_differences():
    generator = np.random.default_rng(0)
    before, after = (generator.integers(0, 2, 50).astype(bool).tolist() for _ in range(2))
    paired = np.array(after, dtype=float) - np.array(before, dtype=float)
    assert solved.gain(after, before) == pytest.approx((paired.mean(), paired.std(ddof=1) / 50**0.5))


def test_half_precision_is_compared_with_float32_token_by_token(folder, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "STUDENT", "some/student")
    monkeypatch.setattr(precision, "TEACHER", "some/teacher")
    monkeypatch.setattr(precision, "TOKENS", 8)
    output = tmp_path / "precision.json"
    # torch 2.13 has no fused attention in bfloat16 for a processor that is told to do without AVX-512
    with sdpa_kernel(SDPBackend.MATH):
        precision.main(["--models", str(folder), "--data", str(tasks), "--output", str(output)])
    found = json.loads(output.read_text())["models"]
    for figures in found.values():
        assert figures["tokens"] > 3
        assert 0 < figures["mean_absolute"] < 0.1
        assert figures["mean_absolute"] <= figures["quantile_99"]


def test_a_difference_in_precision_is_told_with_its_bias_and_error():
    generator = np.random.default_rng(0)
    rounded, exact = (torch.tensor(generator.normal(size=200)) for _ in range(2))
    difference = (rounded - exact).numpy()
    found = precision.compared(rounded, exact)
    assert found["mean_absolute"] == pytest.approx(np.abs(difference).mean(), abs=1e-5)
    assert found["bias"] == pytest.approx(difference.mean(), abs=1e-5)
    assert found["bias_standard_error"] == pytest.approx(difference.std(ddof=1) / 200**0.5, abs=1e-5)
    assert found["quantile_99"] == pytest.approx(np.quantile(np.abs(difference), 0.99), abs=1e-4)


def test_entropy_is_that_of_each_models_own_answers_a_token_and_a_byte(folder, tasks, tmp_path, monkeypatch):
    for name, value in {"STUDENT": "some/student", "TEACHER": "some/teacher", "TOKENS": 8}.items():
        monkeypatch.setattr(entropy, name, value)
    own = get_peft_model(student_model(), LoraConfig(r=2, target_modules="all-linear"))
    own.save_pretrained(tmp_path / "adapter")
    output = tmp_path / "entropy.json"
    arguments = ["--models", str(folder), "--data", str(tasks), "--output", str(output)]
    entropy.main([*arguments, "--adapter", str(tmp_path / "adapter")])
    found = json.loads(output.read_text())["models"]
    assert found["trained"] == found["student"] != found["teacher"], (
        "an adapter that has learned nothing changes nothing"
    )

    tokenizer, model = student_tokenizer(), student_model().double()
    asked, text = [{"role": "user", "content": "What is 12?"}], "It is 12 and 3."
    [(nats, tokens, size)] = entropy.entropies(model, tokenizer, [asked] * 2, [text, ""])
    before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    ids, expected = tokenizer.encode(text), 0.0
    for place in range(len(ids)):
        with torch.no_grad():
            p = model(torch.tensor([before + ids[:place]])).logits[0, -1].softmax(-1).tolist()
        expected -= sum(share * np.log(share) for share in p)
    assert (tokens, size) == (len(ids), len(text))
    assert nats == pytest.approx(expected, rel=1e-9)
    assert entropy.told([(nats, tokens, size), (1.0, 1, 3)])["nats_per_byte"] == pytest.approx(
        (expected + 1) / (size + 3), abs=1e-4
    )


def test_the_gaps_of_indentation_are_told_with_one_side_closed_and_with_both(folder, tasks, tmp_path, monkeypatch):
    for name, value in {"STUDENT": "some/student", "TEACHER": "some/teacher", "HEAD": "It is ", "TASK": 0}.items():
        monkeypatch.setattr(indentation, name, value)
    monkeypatch.setattr(indentation, "BODIES", {"one": "12 and 3.", "other": "two."})
    output = tmp_path / "indentation.json"
    indentation.main(["--models", str(folder), "--data", str(tasks), "--output", str(output)])
    found = json.loads(output.read_text())
    assert len(found["student"]) == 4
    for name, text in {"one": "It is 12 and 3.", "other": "It is two."}.items():
        told = found["chunks"][name]
        for side in ("student", "teacher"):
            assert "".join(token for chunk in told for token in chunk[side]).startswith(text)
        assert sum(chunk["one side"] for chunk in told) == pytest.approx(
            sum(chunk["both sides"] for chunk in told), abs=0.01 * len(told)
        )
