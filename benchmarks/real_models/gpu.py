"""The pair of `make demo-real` on one GPU in bfloat16: 60 steps of 64 prompts × 256 tokens, in at most 8 minutes in all.

    python -m benchmarks.real_models.gpu [--models FOLDER] [--data mbpp.jsonl]      # from the repository root

Measures the held-out gap and the tasks solved before and after. Training ends early where the time would not suffice for measuring
again. Prints what it did, and writes it to `benchmarks/results/real_models/gpu.json`. The models come from the hub or, on a machine
without one, from a folder (1.3 GB in bfloat16).
"""

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from demo_real import problems
from demo_real.answering import answers
from demo_real.measuring import measure
from demo_real.run import ANSWER_TOKENS, LEARNING_RATE, STUDENT, TEACHER, build, named, prompts_of
from transformers import PrinterCallback, TrainerCallback

from benchmarks import report

from . import MEASURED_RUN, script
from .run import RESULTS


class Deadline(TrainerCallback):
    """Ends training at a moment of `time.monotonic`. Counts the steps and their seconds."""

    def __init__(self):
        self.moment = self.began = self.seconds = 0.0
        self.steps = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps, self.seconds = state.global_step, time.monotonic() - self.began
        a_step = self.seconds / self.steps
        print(f"step {self.steps} of {state.max_steps}, {a_step:.2f} seconds a step", flush=True)
        if time.monotonic() + a_step > self.moment:
            control.should_training_stop = True


def measured(
    student: str,
    teacher: str,
    data: str,
    loss: str,
    steps: int,
    prompts: int,
    tokens: int,
    tasks: int,
    minutes: float,
    device: str,
) -> dict:
    begun = time.monotonic()
    on_cpu, dtype = device == "cpu", "float32" if device == "cpu" else "bfloat16"
    all_tasks = problems.load_problems(data)
    held_out, training = all_tasks[:tasks], all_tasks[tasks:]
    deadline = Deadline()
    micro_batch = next(size for size in (16, 8, 4, 2, 1) if prompts % size == 0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(
            student,
            teacher,
            prompts_of(training),
            Path(folder),
            prompts_of(held_out[:64]),
            model_init_kwargs={"dtype": dtype},
            teacher_model_init_kwargs={"dtype": dtype},
            bf16=not on_cpu,
            use_cpu=on_cpu,
            distillation_loss=loss,
            per_device_train_batch_size=micro_batch,
            per_device_eval_batch_size=64,
            gradient_accumulation_steps=prompts // micro_batch,
            max_steps=steps,
            max_new_tokens=tokens,
            learning_rate=LEARNING_RATE,
            **MEASURED_RUN,
        )
        trainer.add_callback(deadline)
        trainer.remove_callback(PrinterCallback)

        def both() -> dict:
            own = trainer.accelerator.unwrap_model(trainer.model)
            messages = [task.messages for task in held_out]
            texts = [
                text for text, _, _ in answers(own, trainer.processing_class, messages, ANSWER_TOKENS, batch_size=128)
            ]
            return {**asdict(measure(trainer)), "solved": sum(problems.solved(held_out, texts)), "tasks": len(held_out)}

        before, ready = both(), time.monotonic()
        deadline.moment = begun + 60 * minutes - 1.2 * (ready - begun)
        trainer.train()
        after = both()
    log = [entry for entry in trainer.state.log_history if "gap/nats_per_byte" in entry]
    curve = [{name: entry[name] for name in ("step", "gap/nats_per_byte", "entropy")} for entry in log]
    return {
        "loss": loss,
        "dtype": dtype,
        "prompts": prompts,
        "tokens": tokens,
        "steps_asked": steps,
        "steps": deadline.steps,
        "seconds_a_step": round(deadline.seconds / deadline.steps, 2),
        "seconds": round(time.monotonic() - begun, 1),
        "peak_gib": None if on_cpu else round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "before": before,
        "after": after,
        "curve": curve,
    }


if __name__ == "__main__":
    parser = script.parser(__doc__, RESULTS / "gpu.json")
    parser.add_argument("--student", default=STUDENT, help="hub name or folder")
    parser.add_argument("--teacher", default=TEACHER, help="hub name or folder")
    parser.add_argument("--loss", default="reverse_kl")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--tasks", type=int, default=100, help="held-out tasks")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = vars(parser.parse_args())
    models, output = options.pop("models"), options.pop("output")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu tries the script without one")
    made_with = report.header()
    options |= {side: named(options[side], models) for side in ("student", "teacher")}
    found = measured(**options)
    print(json.dumps(found, indent=1))
    report.save(output, {**made_with, **found})
