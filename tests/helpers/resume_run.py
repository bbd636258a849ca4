"""
One process of a run that may be killed. test_resume.py starts it in a process of its own, alone or as one rank of several;
test_fault.py starts it with `accelerate launch`.

`Death` says where it kills itself with SIGKILL: at a given moment of a step, or during the writing of a checkpoint file, of which
half then exists.
"""

import contextlib
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from peft import LoraConfig
from toys import prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer
from transformers import Trainer, TrainerCallback, TrainerState

from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer


WRITERS = {
    "model.safetensors": (Trainer, "_save"),
    "adapter_model.safetensors": (Trainer, "_save"),
    "optimizer.pt": (Trainer, "_save_optimizer_and_scheduler"),
    "rng_state.pth": (Trainer, "_save_rng_state"),
    "rng_state_1.pth": (Trainer, "_save_rng_state"),
    "rollouts_0.pt": (CrossTokenizerGKDTrainer, "_save_rng_state"),
    "ahead_0.pt": (CrossTokenizerGKDTrainer, "_save_rng_state"),
    "trainer_state.json": (TrainerState, "save_to_json"),
}
MOMENTS = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_save")


@dataclass
class Death:
    """In step `step` (or when its checkpoint is saved), at a moment of `MOMENTS` or during the writing of a file of `WRITERS`."""

    step: int
    where: str
    rank: int = 0
    by: signal.Signals = signal.SIGKILL

    def arm(self, trainer: Trainer):
        if self.where in MOMENTS:
            trainer.add_callback(_AtMoment(self))
            return
        owner, method = WRITERS[self.where]
        write = getattr(owner, method)

        def write_half(writer, path, *args, **kwargs):
            write(writer, path, *args, **kwargs)
            file = next((path for path in (Path(path), Path(path) / self.where) if path.name == self.where), None)
            if file.parent.name == f"checkpoint-{self.step}":
                os.truncate(file, file.stat().st_size // 2)
                os.kill(os.getpid(), self.by)

        setattr(owner, method, write_half)


class _AtMoment(TrainerCallback):
    def __init__(self, death: Death):
        self.death = death

    def __getattribute__(self, name: str):
        if name not in MOMENTS:
            return super().__getattribute__(name)
        return lambda args, state, control, **kwargs: self._at(name, state)

    def _at(self, moment: str, state: TrainerState):
        # the count is raised just before a step's end
        step = state.global_step + (moment not in ("on_step_end", "on_save"))
        if (moment, step) == (self.death.where, self.death.step):
            os.kill(os.getpid(), self.death.by)


def train(folder: Path, rank: int, port: int | None, resume, death: Death | None, settings: dict):
    """Trains in `folder / "run"`. A run that ends leaves its weights in `weights_{rank}.pt`. Its output goes to
    `said_{rank}.txt`."""
    with (
        open(folder / f"said_{rank}.txt", "w") as said,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        os.dup2(said.fileno(), 2)
        if port is not None:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
        trainer = build(folder / "run", **settings)
        assert trainer.accelerator.num_processes == (1 if port is None else 2)
        if death is not None and death.rank == rank:
            death.arm(trainer)
        trainer.train(resume_from_checkpoint=resume)
        torch.save(dict(trainer.accelerator.unwrap_model(trainer.model).state_dict()), folder / f"weights_{rank}.pt")


def build(output_dir: Path, lora: bool = False, **settings) -> CrossTokenizerGKDTrainer:
    """With dropout, so that the weights depend on every process's random numbers."""
    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2) if lora else None
    return CrossTokenizerGKDTrainer(
        student_model(attention_dropout=0.2),
        teacher_model(),
        CrossTokenizerGKDConfig(
            str(output_dir),
            **{
                "bf16": False,
                "gradient_checkpointing": False,
                "use_cpu": True,
                "report_to": [],
                "disable_tqdm": True,
                "disable_dropout": False,
                "max_new_tokens": 8,
                "max_steps": 6,
                "save_steps": 1,
                "learning_rate": 1e-2,
                "per_device_train_batch_size": 2,
                **settings,
            },
        ),
        prompts(11),  # the last batch of two processes is filled up
        processing_class=student_tokenizer(),
        teacher_processing_class=teacher_tokenizer(),
        peft_config=adapter,
    )


def main(folder: Path, by: str, timeout: str):
    """Rank 1 gets the signal `by` in its second step. `timeout`: in seconds; Trainer passes it on only for GPUs."""
    PartialState(cpu=True, timeout=timedelta(seconds=int(timeout)))
    trainer = build(folder / "run")
    if trainer.args.process_index == 1:
        Death(2, "on_step_begin", by=signal.Signals[by]).arm(trainer)
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
