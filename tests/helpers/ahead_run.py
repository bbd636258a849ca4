"""
One rank of runs whose completions a copy of the student writes one step ahead. test_ahead.py starts it with `accelerate launch`. It
writes to one JSON file for each rank how far the copy was from the student whenever the weights were handed over, and how far the
trained student is from the start, and from one that learned from texts that were written late.
"""

import json
import sys
from pathlib import Path

import torch
from strategies_run import CLIPPED, SGD, build
from toys import weights
from writing_late import write_late


CASES = {
    "whole": {"batch": 4, "accumulation": 2, **SGD},
    "adapter": {"batch": 4, "lora": True, "num_generations": 2, **CLIPPED},
}


def watched(trainer) -> list[float]:
    """Filled with the largest difference of the copy's weights to the student's at each step."""
    found, writer = [], trainer.rollouts.ahead._writer
    hand_over = writer._hand_over

    def watch():
        hand_over()
        own = dict(writer._copy.named_parameters())
        pairs = [(own[name], value) for name, value in writer._student.named_parameters()]
        found.append(max((one - other).abs().max().item() for one, other in pairs))

    writer._hand_over = watch
    return found


def run(folder: Path, name: str) -> dict:
    settings = {"processes": 2, "event": "open", **CASES[name]}
    ahead = build(folder / name, async_rollouts=1, generation_device="cpu", **settings)
    found, start = watched(ahead), weights(ahead)
    ahead.train()
    late = write_late(build(folder / f"{name}-late", **settings))
    late.train()
    far = {"start": weights(ahead) - start, "late": weights(ahead) - weights(late)}
    return {
        "strategy": ahead.accelerator.distributed_type.value,
        "handed_over": found,
        **{f"from_{name}": value.abs().max().item() for name, value in far.items()},
    }


def main(folder: Path):
    found = {name: run(folder, name) for name in CASES}
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
