"""Two processes that evaluate before they train are one run still: their gradients are averaged."""

import json
import multiprocessing
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluated_first
import pytest
import torch
from accelerate.utils import DistributedType

from trl_ctopd.models.forwards import left_unprepared


CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs" / "cpu"
EVALUATES = """
import sys
from toys import student_model, student_tokenizer, teacher_model, teacher_tokenizer, prompts
from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer

args = CrossTokenizerGKDConfig(sys.argv[1], use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
    max_new_tokens=8, max_steps=1, per_device_train_batch_size=2, save_strategy="no", logging_steps=1)
trainer = CrossTokenizerGKDTrainer(student_model(), teacher_model(), args, prompts(4), eval_dataset=prompts(2),
    processing_class=student_tokenizer(), teacher_processing_class=teacher_tokenizer())
try:
    trainer.evaluate()
except ValueError as error:
    print("refused:", error, flush=True)
trainer.train()
print("evaluated after:", trainer.evaluate()["eval_loss"], flush=True)
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["evaluated_first", "resume_run"])

    def together(first: bool, precision: str = "no", lora: bool = False) -> list[tuple[dict, torch.Tensor]]:
        """What each process finds, and its weights in the end."""
        folder: Path = tmp_path_factory.mktemp("together")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            context.Process(target=evaluated_first.main, args=(folder, rank, port, first, precision, lora))
            for rank in (0, 1)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout=600)
        assert [rank.exitcode for rank in ranks] == [0, 0]
        return [
            (json.loads((folder / f"{rank}.json").read_text()), torch.load(folder / f"{rank}.pt")) for rank in (0, 1)
        ]

    return together


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("precision", "lora"),
    [
        ("no", False),
        pytest.param("bf16", False, marks=pytest.mark.slow),
        pytest.param("no", True, marks=pytest.mark.slow),
    ],
)
def test_evaluating_and_predicting_before_training_leaves_the_training_as_it_was(together, precision, lora):
    expected, found = together(False, precision, lora), together(True, precision, lora)
    for (said, weights), (usual, wanted) in zip(found, expected, strict=True):
        assert said["wrapped"]
        torch.testing.assert_close(weights, wanted, rtol=0, atol=0)
        torch.testing.assert_close(weights, found[0][1], rtol=0, atol=0)
        assert said["losses"] == usual["losses"]
        assert said["after"] == usual["after"]
        assert said["evaluated"][0] == said["evaluated"][1], "an evaluation before training can be had again"


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_an_evaluation_before_a_sharded_training_is_refused_with_the_way_to_its_figures(kind):
    accelerator = SimpleNamespace(_models=[], distributed_type=DistributedType[kind])
    with (
        pytest.raises(ValueError, match=f"Under {kind} .*evaluate or predict after .*eval_on_start=True"),
        left_unprepared(torch.nn.Linear(1, 1), accelerator),
    ):
        pass


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("strategy", ["fsdp2", "zero2", "zero3"])
def test_two_real_processes_that_evaluate_before_a_sharded_training_are_refused_and_can_do_it_afterwards(
    tmp_path, strategy
):
    (tmp_path / "rank.py").write_text(EVALUATES)
    code = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    code += ["--config_file", str(CONFIGS / f"{strategy}.yaml"), str(CONFIGS / "on_cpu.py")]
    code += [str(tmp_path / "rank.py"), str(tmp_path / "run")]
    done = subprocess.run(code, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluate or predict after `train()`, or set eval_on_start=True") == 2
    assert done.stdout.count("evaluated after: ") == 2
