"""What `async_rollouts=1` promises, with nothing at the same time."""

import torch

from trl_ctopd.rollouts.generation import TransformersWriter


def write_late(trainer):
    """Has the student write each step's text in the step itself, with its weights of before the last update."""
    source, model = trainer.rollouts, trainer.model
    write = TransformersWriter(trainer.generation_config, trainer.accelerator, trainer.args, record=True)
    older = []

    def late(wrapped, asked, step):
        now = [parameter.detach().clone() for parameter in model.parameters()]
        older.append(now)
        put(older[max(step - 1, 0)])
        written = write(wrapped, asked, step)
        put(now)
        return written

    @torch.no_grad()
    def put(values):
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)

    source.write = late
    return trainer
