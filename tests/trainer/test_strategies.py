"""DDP, ZeRO-2, ZeRO-3 and FSDP2 with two real processes on the CPU, as `examples/accelerate_configs/cpu` sets them up, beside
one process alone. Each strategy's cases share a launch, since most of its time goes to starting."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import check_finished
from peft import AutoPeftModelForCausalLM
from protocol_server import ProtocolServer
from safetensors.torch import load_file
from strategies_run import CASES, FIXED, WRITTEN, run, save_models
from toys import teacher_model, teacher_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer


pytestmark = pytest.mark.multiprocess
CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs" / "cpu"
HELPERS = Path(__file__).parents[1] / "helpers"
KINDS = {
    "ddp": ("DistributedType.MULTI_CPU", "DistributedDataParallel", "DistributedDataParallel"),
    "zero2": ("DistributedType.DEEPSPEED", "DeepSpeedEngine", "DeepSpeedEngine"),
    "zero3": ("DistributedType.DEEPSPEED", "DeepSpeedEngine", "DeepSpeedEngine"),
    "fsdp2": ("DistributedType.FSDP", "FSDPLlamaForCausalLM", "FSDPPeftModel"),
}
SHARDED = ("zero3", "fsdp2")
QUICK = {
    "ddp": ["distributions", "nothing", "remote", "shuffled", "streamed", "written"],
    "zero2": ["full", "written-in-half"],
    "zero3": ["full-accumulated", "uneven", "reverse-kl-lora"],
    "fsdp2": ["lora-accumulated", "distributions", "reverse-kl", "written"],
}


def launch(strategy: str, folder: Path, names: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"),
            *("--config_file", CONFIGS / f"{strategy}.yaml", CONFIGS / "on_cpu.py"),
            *(HELPERS / "strategies_run.py", folder, *names),
        ],
        capture_output=True,
        text=True,
        timeout=900,
        # of a process that a signal ends, where it was; and no warnings around it
        env={**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONWARNINGS": "ignore"},
    )


@pytest.fixture(scope="module")
def served():
    """A teacher's server that fails for some of the rows, the same in every run."""
    tokenizer = teacher_tokenizer()
    opening = tokenizer.convert_tokens_to_ids("<|user|>")

    def fault(number, payload):
        return "nan" if payload["prompt"][0] == opening and sum(payload["prompt"]) % 4 == 0 else None

    with ProtocolServer(teacher_model(), tokenizer, fault=fault) as server:
        yield server


@pytest.fixture(scope="module")
def alone(tmp_path_factory, served):
    """`alone(case)` is what one process alone finds, and the folder of the student it trained."""
    folder = tmp_path_factory.mktemp("alone")
    save_models(folder)
    (folder / "url").write_text(served.url)
    return functools.cache(lambda name: (run(folder, name), folder / name))


@pytest.fixture(scope="module")
def together(tmp_path_factory, served):
    """`together(strategy, case)` is what each of two processes finds, and the folder of the student they trained."""

    @functools.cache
    def launched(strategy, quick):
        folder = tmp_path_factory.mktemp(strategy)
        save_models(folder)
        (folder / "url").write_text(served.url)
        names = [name for name in CASES if (name in QUICK[strategy]) == quick]
        return launch(strategy, folder, names), folder

    def found(strategy, name):
        done, folder = launched(strategy, name in QUICK[strategy])
        results = [folder / f"{rank}.json" for rank in (0, 1)]
        check_finished(done, results)
        ranks = [json.loads(path.read_text()) for path in results]
        for rank in ranks:
            kind, full, lora = KINDS[strategy]
            expected = kind, lora if CASES[name].get("lora") else full, 2
            assert (rank[name]["distributed_type"], rank[name]["wrapper"], rank[name]["num_processes"]) == expected
        return [rank[name] for rank in ranks], folder / name

    return found


def cases(names):
    return [
        pytest.param(strategy, name, marks=[] if name in QUICK[strategy] else pytest.mark.slow, id=f"{strategy}-{name}")
        for strategy in QUICK
        for name in names
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    [file] = folder.glob("*.safetensors")
    return load_file(file)


def agree(found: dict, expected: dict):
    for name in expected.keys() - {"total_flos"}:
        if (
            "seconds/" not in name
            and "compute_overhead" not in name
            and "_runtime" not in name
            and "_per_second" not in name
        ):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert found.keys() == expected.keys()


@pytest.mark.parametrize(("strategy", "name"), cases(FIXED))
def test_three_steps_of_two_processes_are_those_of_one(strategy, name, alone, together):
    expected, expected_folder = alone(name)
    [first, second], folder = together(strategy, name)
    wanted, found = weights(expected_folder), weights(folder)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    start = {} if CASES[name].get("lora") else weights(expected_folder.parent / "student")
    moved = max((value - start.get(key, 0)).abs().max() for key, value in wanted.items())
    assert moved > 1e-3, "there was something to learn"
    assert len(first["log"]) == 3
    for ours, theirs in zip(first["log"], expected["log"], strict=True):
        agree(ours, theirs)
    agree(first["evaluated"], expected["evaluated"])


@pytest.mark.parametrize(("strategy", "name"), cases(CASES))
def test_both_processes_log_the_same_figures_and_draw_the_same_lots(strategy, name, together):
    [first, second], _ = together(strategy, name)
    assert first["log"] == second["log"]
    assert first["draws"] == second["draws"]
    assert {name: value for name, value in first["evaluated"].items() if "/" in name} == {
        name: value for name, value in second["evaluated"].items() if "/" in name
    }


@pytest.mark.parametrize(("strategy", "name"), cases(["written-in-half"]))
def test_log_probs_are_float32_where_the_models_are_not(strategy, name, together):
    for rank in together(strategy, name)[0]:
        assert rank["rounded"] == [False, False]


@pytest.mark.parametrize(("strategy", "name"), cases(["remote"]))
def test_rows_that_a_server_fails_to_score_are_counted_over_both_processes(strategy, name, together):
    for rank in together(strategy, name)[0]:
        assert 0 < sum(entry["teacher/failed_fraction"] for entry in rank["log"]) / 3 < 1


@pytest.mark.parametrize(("strategy", "name"), cases(["cut", "written-and-cut"]))
def test_completions_of_both_processes_are_cut_by_one_threshold(strategy, name, together):
    for rank in together(strategy, name)[0]:
        before, *after = rank["log"]
        assert before["early_stop/masked_fraction"] == 0 and "early_stop/threshold" not in before
        assert all(0 < log["early_stop/masked_fraction"] < 1 and log["early_stop/threshold"] > 0 for log in after)


@pytest.mark.parametrize(("strategy", "name"), cases([name for name in CASES if name != "remote"]))
def test_the_teacher_is_shared_out_where_the_student_is_and_learns_nothing(strategy, name, together):
    for rank in together(strategy, name)[0]:
        assert rank["teacher_share"] == pytest.approx(0.5 if strategy in SHARDED else 1, abs=0.01)
        assert not rank["teacher_learns"]


@pytest.mark.parametrize(("strategy", "name"), cases(WRITTEN))
def test_the_saved_student_loads_and_writes(strategy, name, together):
    [first, _], folder = together(strategy, name)
    assert len(first["log"]) == 3
    lora = CASES[name].get("lora", False)
    model = (AutoPeftModelForCausalLM if lora else AutoModelForCausalLM).from_pretrained(folder)
    assert (folder / "adapter_config.json").exists() == lora
    ids = AutoTokenizer.from_pretrained(folder)("one plus two", return_tensors="pt").input_ids
    assert model.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    start = load_file(folder.parent / "student" / "model.safetensors")
    found = weights(folder)
    assert any(not torch.equal(value, start.get(name, torch.zeros_like(value))) for name, value in found.items())
