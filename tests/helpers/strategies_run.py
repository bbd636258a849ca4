"""
One rank of a run under an Accelerate config. test_strategies.py starts it with `accelerate launch`, and calls it for the single
process. It runs several cases in one launch, each with its own trainer. It writes its results to one JSON file for each rank, and
the trained student to one folder for each case.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from toys import prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer

from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer


SGD = {"optim": "sgd", "learning_rate": 0.03, "max_grad_norm": 0.0}
CLIPPED = {"optim": "adamw_torch", "learning_rate": 1e-2, "adam_epsilon": 1e-2, "max_grad_norm": 0.05}
THREE = {"accumulation": 3, "batch": 4}
RULE = {"window": 3, "patience": 1, "exempt": 2, "quantile": 0.9, "warmup_steps": 1, "warmup_rollouts": 4}
KAT = {"early_stop": "kat", "early_stop_kwargs": RULE}
FIXED = {
    "full": {"batch": 8, **CLIPPED},
    "full-accumulated": {**THREE, **SGD, "gradient_checkpointing": True},
    "lora": {"lora": True, "batch": 8, **SGD, "gradient_checkpointing": True},
    "lora-accumulated": {"lora": True, **THREE, **CLIPPED},
    "distributions": {"batch": 4, "distillation_loss": "bpm", **SGD, "learning_rate": 1.0},
    "reverse-kl": {"batch": 4, "distillation_loss": "reverse_kl", **SGD},
    "reverse-kl-lora": {
        "lora": True,
        **THREE,
        "distillation_loss": "reverse_kl",
        **SGD,
        "gradient_checkpointing": True,
    },
    "reverse-kl-nothing": {"batch": 8, "blank": True, "distillation_loss": "reverse_kl", **SGD},
    "reused": {"batch": 8, "accumulation": 2, "rollout_reuse": 2, **SGD},
    "uneven": {"rows": 21, "batch": 8, **SGD},
    "streamed": {"rows": 21, "batch": 8, "streamed": True, **SGD},
    "few": {"rows": 3, "batch": 4, **SGD},
    "nothing": {"batch": 8, "blank": True, **SGD},
    "remote": {"batch": 8, "served": True, **SGD},
    "given": {**THREE, "lmbda": 0.5, "off_policy_loss": "gold", **SGD},
    "shuffled": {"batch": 8, "train_sampling_strategy": "random", **SGD},
    "cut": {**THREE, "max_new_tokens": 40, **KAT, **SGD},
}
WRITTEN = {
    "written": {"batch": 4, "lmbda": 0.5, "accumulation": 2, "gradient_checkpointing": True, **CLIPPED},
    "written-lora": {"lora": True, "batch": 4, "num_generations": 2, "gather_for_generation": False, **CLIPPED},
    "written-in-half": {"batch": 4, "bf16": True, **CLIPPED},
    "written-and-cut": {"batch": 8, "max_new_tokens": 12, **KAT, **CLIPPED},
    "written-by-the-teacher": {"batch": 4, "lmbda": 0.5, "seq_kd": True, "accumulation": 2, "lora": True, **SGD},
}
CASES = {**FIXED, **WRITTEN}


def save_models(folder: Path):
    """The models that every run starts from: `student`, `tied-student` and `teacher` in `folder`."""
    for name, model, tokenizer in (
        ("student", student_model(), student_tokenizer()),
        ("tied-student", student_model(tie_word_embeddings=True), student_tokenizer()),
        ("teacher", teacher_model(max_position_embeddings=60), teacher_tokenizer()),  # some rows are longer
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def build(
    folder: Path,
    *,
    batch,
    processes=1,
    accumulation=1,
    lora=False,
    rows=24,
    blank=False,
    fixed=False,
    served=False,
    streamed=False,
    **settings,
):
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules="all-linear") if lora else None
    train, evaluated = prompts(rows), prompts(3)
    if streamed:
        train, evaluated = (own.to_iterable_dataset(num_shards=2) for own in (train, evaluated))
    trainer = CrossTokenizerGKDTrainer(
        str(folder.parent / ("tied-student" if lora else "student")),
        (folder.parent / "url").read_text() if served else str(folder.parent / "teacher"),
        CrossTokenizerGKDConfig(
            str(folder),
            **{
                "bf16": False,
                "gradient_checkpointing": False,
                "use_cpu": True,
                "report_to": [],
                "disable_tqdm": True,
                "max_new_tokens": 8,
                "max_steps": 3,
                "logging_steps": 1,
                "save_strategy": "no",
                "lr_scheduler_type": "constant",
                "per_device_train_batch_size": batch // processes,
                "gradient_accumulation_steps": accumulation,
                "train_sampling_strategy": "sequential",
                **settings,
            },
        ),
        train,
        eval_dataset=evaluated,
        processing_class=student_tokenizer(),
        teacher_processing_class=teacher_tokenizer(),
        peft_config=adapter,
    )
    if fixed:
        texts, told = partial(text, trainer.processing_class, blank=blank), "early_stop" in settings
        trainer.rollouts.write = lambda model, given, step: [
            (ids, [-5.0 - token % 3 for token in ids] if told else None) for ids in map(texts, given)
        ]
    return trainer


def text(tokenizer, prompt, blank: bool) -> list[int]:
    """A completion of uneven length that depends only on the prompt. With `blank`, it is empty except for prompts of one length,
    so that a process has nothing to score."""
    mark = sum(prompt.student_ids) % 4
    if blank and mark:
        return [tokenizer.eos_token_id] if mark == 1 else []
    ids = tokenizer.encode(f"{len(prompt.student_ids)} is the sum" + " of what and two" * mark)[:40]
    return ids + [tokenizer.eos_token_id] * (len(ids) % 2)


def local_elements(model) -> int:
    """The number of model weights that this process holds."""

    def held(parameter):
        if isinstance(parameter, DTensor):
            return parameter.to_local().numel()
        return parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()

    return sum(map(held, model.parameters()))


def rounded(trainer) -> list[bool]:
    """Whether all log-probs of the student and of the teacher, as a loss gets them, are rounded to half precision."""
    with torch.no_grad(), trainer.compute_loss_context_manager():
        batch, *_ = trainer._score(trainer.model_wrapped, trainer._prepare_inputs(trainer._pending.batches[0]))
    return [bool((own == own.bfloat16()).all()) for own in (batch.student_log_probs, batch.teacher_log_probs)]


def run(folder: Path, name: str, processes: int = 1) -> dict:
    trainer = build(folder / name, processes=processes, fixed=name in FIXED, **CASES[name])
    draws = trainer.rollouts.lmbda_draws(0, 4)
    trainer.train()
    found = {
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "wrapper": type(trainer.model_wrapped).__name__,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "draws": draws,
        "rounded": rounded(trainer),
        "evaluated": trainer.evaluate(),
    }
    if not CASES[name].get("served"):
        teacher = trainer.teacher.model
        whole = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in teacher.parameters())
        found["teacher_share"] = local_elements(teacher) / whole
        found["teacher_learns"] = any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    trainer.save_model(str(folder / name))
    trainer.accelerator.wait_for_everyone()
    return found


def main(folder: Path, names: list[str]):
    found = {}
    for name in names:
        found[name] = run(folder, name, processes=2)
    rank = torch.distributed.get_rank()
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
