"""The files of `examples/accelerate_configs`, and `examples/distill.py` under each of them as they are."""

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from distill_command import CONFIGS, distill
from safetensors.torch import load_file
from strategies_run import save_models


NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
FSDP1 = ("--fsdp_version", "1", "--fsdp_reshard_after_forward", "FULL_SHARD")
FSDP1 += ("--fsdp_cpu_ram_efficient_loading", "false", "--fsdp_sync_module_states", "false")
TRAINED_BY_ONE_COMMAND = [name for name in NAMES if name != "ddp_two_nodes"]


def test_there_is_one_for_each_way_to_train():
    assert NAMES == ["ddp", "ddp_two_nodes", "fsdp2", "single_gpu", "zero2", "zero3", "zero3_offload"]
    assert sorted(path.stem for path in (CONFIGS / "cpu").glob("*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_on_the_cpu_it_is_the_same_but_for_the_device_and_the_number_of_processes(name):
    gpu, cpu = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for folder in (CONFIGS, CONFIGS / "cpu"))
    assert gpu.pop("use_cpu") is False and cpu.pop("use_cpu") is True
    assert gpu.pop("num_processes") >= cpu.pop("num_processes")
    assert cpu == gpu


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_it_whole(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    for key, value in yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()).items():
        assert getattr(config, key) == value, key


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    [file] = (folder / "output").glob("*.safetensors")
    return load_file(file)


def trained(folder: Path) -> bool:
    before = load_file(folder / "student" / "model.safetensors")
    after = trained_weights(folder)
    return before.keys() == after.keys() and any(not after[name].equal(value) for name, value in before.items())


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", TRAINED_BY_ONE_COMMAND)
def test_the_script_trains_under_it(name, tmp_path):
    save_models(tmp_path)
    command = distill(tmp_path, name, "--main_process_port", "0")
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)  # DeepSpeed's own optimizer is compiled
    assert done.returncode == 0, done.stderr[-5000:]
    assert trained(tmp_path)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["ddp", "zero3", "fsdp2"])
def test_a_quantized_teacher_teaches_whole_in_every_process(name, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install '.[quantized]'")
    save_models(tmp_path)
    eight_bits = '{"quantization_config": {"load_in_8bit": true}}'
    command = distill(tmp_path, name, "--main_process_port", "0") + ["--teacher_model_init_kwargs", eight_bits]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    assert trained(tmp_path)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddp", ("--accelerator_config", '{"even_batches": false}'), "even_batches=False would give"),
        ("fsdp2", FSDP1, "FSDP version 1 flattens weights together"),
        ("zero3", ("--generation_backend", "transformers_continuous"), "'transformers_continuous' with gather_for_gen"),
        ("zero3", ("--use_vllm", "true"), "vllm_mode='colocate' with gather_for_generation=False"),
    ],
)
def test_what_cannot_work_under_it_is_refused_at_the_start(name, options, message, tmp_path):
    save_models(tmp_path)
    of_accelerate = options if options is FSDP1 else ()
    command = distill(tmp_path, name, "--main_process_port", "0", *of_accelerate)
    command += ["--gather_for_generation", "false", *(() if of_accelerate else options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr[-5000:]
    assert not (tmp_path / "output" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("options", [(), ("--use_peft", "--lora_r", "4")], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "fsdp2"])
def test_the_command_that_was_killed_amid_a_save_goes_on_when_given_again(name, options, tmp_path):
    save_models(tmp_path)
    command = distill(tmp_path, name, "--main_process_port", "0") + ["--max_steps", "4", "--save_steps", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    wanted = trained_weights(tmp_path)
    shutil.rmtree(tmp_path / "output" / "checkpoint-4")
    (tmp_path / "output" / "checkpoint-3" / "trainer_state.json").unlink()
    done = subprocess.run([*command, "--resume_from_checkpoint", "True"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]
    [said] = [line for line in done.stderr.splitlines() if "half written" in line]
    assert said.endswith(f"going on from {tmp_path / 'output' / 'checkpoint-2'}.")
    torch.testing.assert_close(trained_weights(tmp_path), wanted, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_nodes_train_together(tmp_path):
    save_models(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [
        subprocess.Popen(
            distill(tmp_path, "ddp_two_nodes", "--machine_rank", str(rank), "--main_process_port", port),
            env={**os.environ, "ACCELERATE_LOG_LEVEL": "info"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [node.communicate(timeout=900)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert trained(tmp_path)
    [state] = (tmp_path / "output").glob("checkpoint-*/trainer_state.json")
    assert json.loads(state.read_text())["epoch"] == 1, "8 rows in two steps of 2 rows on each of two nodes"
