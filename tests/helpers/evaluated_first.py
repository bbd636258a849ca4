"""One of two processes that evaluate and predict before they train; started by test_several_processes.py. Prints its results."""

import json
import os
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from toys import prompts

from trl_ctopd import CrossTokenizerGKDTrainer


def main(folder: Path, rank: int, port: int, first: bool, precision: str, lora: bool):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from resume_run import build

    settings = {"bf16": precision == "bf16", "max_steps": 2, "save_strategy": "no", "disable_dropout": True}
    trainer: CrossTokenizerGKDTrainer = build(folder / "run", lora=lora, logging_steps=1, **settings)
    figures = []
    if first:
        forward = trainer.model.forward
        figures = [trainer.evaluate(prompts(4))["eval_loss"] for _ in range(2)]
        trainer.predict(prompts(2))
        assert trainer.model.forward == forward
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    wrapped = isinstance(trainer.model_wrapped, DistributedDataParallel)
    found = {
        "wrapped": wrapped,
        "losses": losses,
        "evaluated": figures,
        "after": trainer.evaluate(prompts(4))["eval_loss"],
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.save(weights, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4] == "first", sys.argv[5], sys.argv[6] == "lora")
