"""One rank of a two-process run; started by test_distributed.py with torchrun, writes what it saw to a file a rank."""

import sys

import torch
from toys import SGD, fix_rollouts, prompts, step_of, student_model, student_tokenizer, teacher_model, teacher_tokenizer

from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer


def run(folder: str, *, batch: int, real_generation: bool = False, **settings) -> dict:
    trainer = CrossTokenizerGKDTrainer(
        student_model(),
        teacher_model(max_position_embeddings=60),  # some rows are beyond it
        CrossTokenizerGKDConfig(
            folder,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_new_tokens=8,
            logging_steps=1,
            save_strategy="no",
            per_device_train_batch_size=batch,
            train_sampling_strategy="sequential",
            **{**SGD, "max_steps": 1, **settings},
        ),
        prompts(),
        eval_dataset=prompts(4),
        processing_class=student_tokenizer(),
        teacher_processing_class=teacher_tokenizer(),
    )
    if not real_generation:
        fix_rollouts(trainer)
    step = step_of(trainer)
    return {
        "step": step,
        "log": trainer.state.log_history[0],
        "eval": trainer.evaluate(),
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "wrapper": type(trainer.model_wrapped).__name__,
    }


REUSED = {"rollout_reuse": 2, "max_steps": 4, "learning_rate": 0.1}


if __name__ == "__main__":
    folder, mode, loss = sys.argv[1:]
    settings = {
        "fixed": {"batch": 4},
        "reused": {"batch": 2, "gradient_accumulation_steps": 2, **REUSED},
        "written": {
            "batch": 2, "real_generation": True, "lmbda": 0.5, "gradient_accumulation_steps": 2, "max_steps": 3,
            "num_generations": 2, "off_policy_loss": "gold",
        },
    }  # fmt: skip
    result = run(folder, distillation_loss=loss, **settings[mode])
    torch.save(result, f"{folder}/{mode}-{torch.distributed.get_rank()}.pt")
