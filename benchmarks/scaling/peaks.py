"""
The planner's peaks beside measured ones: real steps of models with random weights, each in a process of its own.

    CTOPD_ASSETS=<folder> python -m benchmarks.scaling.peaks          # from the repository root; small models on the CPU
    CTOPD_ASSETS=<folder> python -m benchmarks.scaling.peaks --gpu    # Llama-3.2-1B <- Qwen2.5-7B by shape, bfloat16

Writes `peaks.json` (`peaks_gpu.json`) to `benchmarks/results/scaling/`. The peak is the largest memory that PyTorch's allocator
has in use during a step. The second step is measured, since the first one creates the optimizer state.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from benchmarks.clock import peak_bytes
from benchmarks.report import assets_folder, header, save
from benchmarks.speed.models import LLAMA_1B, QWEN_7B, ROWS_1B_7B, Ours, Setting, conversations, published, quiet
from trl_ctopd.looking.plan.memory import cache_bytes, passes, plan
from trl_ctopd.looking.plan.work import Work


RESULTS = Path(__file__).parents[1] / "results" / "scaling"
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8} | {
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
QWEN_HALF_B = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14} | {
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def cases(assets: Path, gpu: bool) -> dict[str, tuple[Setting, bool, str]]:
    """Settings, whether gradient checkpointing is on, and the loss."""
    if gpu:
        shared = {"device": "cuda", "dtype": torch.bfloat16}
        base = Setting(published(assets), ROWS_1B_7B, 256, 8, 1, (LLAMA_1B, QWEN_7B), **shared)
        small = replace(base, shapes=(LLAMA_1B, QWEN_HALF_B))
        return {
            "1B <- 7B, LoRA, 8 prompts": (replace(base, lora=True), False, "dpca"),
            "1B <- 7B, LoRA, 32 prompts, checkpointing": (replace(base, lora=True, batch=32), True, "dpca"),
            "1B <- 7B, LoRA, 32 prompts, checkpointing, reverse_kl": (
                replace(base, lora=True, batch=32),
                True,
                "reverse_kl",
            ),
            "1B <- 0.5B, full, 8 prompts": (small, False, "dpca"),
            "1B <- 0.5B, full, 2 x 16 prompts, checkpointing": (replace(small, batch=16, accumulation=2), True, "dpca"),
        }
    base = Setting(published(assets), ROWS_1B_7B, 128, 2, 1, (SMALL, SMALL))
    return {
        "full, 2 prompts": (base, False, "dpca"),
        "LoRA, 4 prompts": (replace(base, lora=True, batch=4), False, "dpca"),
        "LoRA, 4 prompts, checkpointing, reverse_kl": (replace(base, lora=True, batch=4), True, "reverse_kl"),
        "full, 2 x 4 prompts, checkpointing": (replace(base, batch=4, accumulation=2), True, "dpca"),
    }


def measure(assets: Path, setting: Setting, checkpointing: bool, loss: str) -> dict:
    """Bytes of one case, measured in this process; and the teacher's longest prompt, in tokens."""
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        options = {"gradient_checkpointing": checkpointing, "teacher_batch_size": setting.batch}
        options["distillation_loss"] = loss
        side = Ours(setting, conversations(assets, setting.prompts), Path(folder), **options)
        side.run()
        gc.collect()
        there = torch.cuda.memory_allocated() if setting.device == "cuda" else held(side.trainer)
        measured = there + peak_bytes(side.run)
    return {"measured": measured, "prompt_tokens": max(map(len, side.texts[0]))}


def held(trainer) -> int:
    """Bytes of both models and of the optimizer state."""
    states = (value for state in trainer.optimizer.state.values() for value in state.values())
    tensors = [*trainer.model.parameters(), *trainer.teacher.model.parameters(), *filter(torch.is_tensor, states)]
    return sum(tensor.nbytes for tensor in tensors)


def predict(setting: Setting, checkpointing: bool, loss: str, prompt_tokens: int) -> int:
    configs = [setting.config(side) for side in (0, 1)]
    work = Work(
        prompt_tokens,
        setting.new_tokens,
        setting.batch,
        setting.accumulation,
        lora_rank=16 if setting.lora else None,
        activation_checkpointing=checkpointing,
        dtype=str(setting.dtype).removeprefix("torch."),
        autocast=False,
        cuda=setting.device == "cuda",
        loss=loss,
    )
    own, read = passes(*configs, work)
    return plan(own, read, cache_bytes(configs[0], work), work, "ddp", 1).peak


def main(assets: Path, gpu: bool, output: Path) -> None:
    report, every = header(), cases(assets, gpu)
    report["cases"] = {}
    for name, (setting, checkpointing, loss) in tqdm(every.items()):
        command = [sys.executable, "-m", "benchmarks.scaling.peaks", "--case", name, *["--gpu"] * gpu]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        found["predicted"] = predict(setting, checkpointing, loss, found["prompt_tokens"])
        report["cases"][name] = {**found, "ratio": round(found["predicted"] / found["measured"], 3)}
    save(output, report)
    table = Table("case", "predicted GiB", "measured GiB", "ratio")
    for name, found in report["cases"].items():
        sizes = (f"{found[side] / 2**30:.2f}" for side in ("predicted", "measured"))
        table.add_row(name, *sizes, f"{found['ratio']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", help="one case alone, and its bytes on standard output")
    arguments = parser.parse_args()
    assets = assets_folder(parser)
    if arguments.case:
        print(json.dumps(measure(assets, *cases(assets, arguments.gpu)[arguments.case])))
    else:
        output = arguments.output or RESULTS / ("peaks_gpu.json" if arguments.gpu else "peaks.json")
        main(assets, arguments.gpu, output)
