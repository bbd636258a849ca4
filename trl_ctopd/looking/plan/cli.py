"""
Estimates the memory that a run needs on each device under each strategy, and whether it fits.

ctopd plan --student meta-llama/Llama-3.2-1B --teacher Qwen/Qwen2.5-7B \\
    --prompt-tokens 512 --new-tokens 1024 --batch 4 --accumulation 8 --lora-rank 16 --devices 8 --memory-gib 80

Models are folders or names on the hub; only their config.json is read. No GPU is needed.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from .work import DTYPES, GIB, STRATEGIES, Work


if TYPE_CHECKING:
    from .memory import Plan


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    configs = [_config(parser, side, given.pop(side)) for side in ("student", "teacher")]
    devices, memory, as_json = (given.pop(name) for name in ("devices", "memory_gib", "json"))
    work = Work(**given)
    from .memory import cache_bytes, passes, plan

    try:
        own, read = passes(*configs, work)
    except ValueError as error:
        parser.error(str(error))
    if own.quantized and work.lora_rank is None:
        parser.error("a quantized student is trained with an adapter: give --lora-rank")
    cache = cache_bytes(configs[0], work)
    plans = {strategy: plan(own, read, cache, work, strategy, devices) for strategy in STRATEGIES}
    if as_json:
        print(json.dumps({name: {**asdict(found), "peak": found.peak} for name, found in plans.items()}, indent=2))
    else:
        show(plans, int(memory * GIB))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ctopd plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", required=True, help="a folder or a name on the hub")
    parser.add_argument("--teacher", required=True, help="the same of the teacher")

    def number(option: str, default: int | None, text: str) -> None:
        shown = text if default is None else f"{text} (default: {default:,})"
        parser.add_argument(option, type=_positive, default=default, metavar="N", help=shown)

    number("--prompt-tokens", Work.prompt_tokens, "longest prompt")
    number("--new-tokens", Work.new_tokens, "longest completion")
    number("--batch", Work.batch, "prompts in a micro-batch of one device")
    number("--accumulation", Work.accumulation, "micro-batches in an optimizer step")
    number("--teacher-batch", None, "rows that the teacher reads at once (default: those of a micro-batch)")
    number("--lora-rank", None, "train an adapter of this rank (default: all weights)")
    for side in ("student", "teacher"):
        parser.add_argument(
            f"--{side}-bits",
            type=int,
            choices=(4, 8),
            help=f"of the {side}'s weights, where bitsandbytes quantizes them as they are loaded (one that was saved quantized says so itself)",
        )
    number("--devices", 1, "GPUs that share the work")
    parser.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="for gradient checkpointing, which training has on by default",
    )
    parser.add_argument(
        "--loss",
        default=Work.loss,
        help="the run's `distillation_loss`: those on distributions need more memory than those on log-probs (default: auto, with the teacher in this process)",
    )
    number("--logit-tile-tokens", Work.logit_tile_tokens, "the setting of this name, which bounds that memory")
    parser.add_argument("--dtype", choices=DTYPES, default=Work.dtype, help=f"of weights (default: {Work.dtype})")
    parser.add_argument("--memory-gib", type=_size, default=80, metavar="GIB", help="of one device (default: 80)")
    parser.add_argument("--json", action="store_true", help="bytes, for a program to read")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _size(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive size")
    return number


def _config(parser: argparse.ArgumentParser, side: str, name: str):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        parser.error(f"--{side} {name}: no config.json can be read: {reason}")


def show(plans: "dict[str, Plan]", memory: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("GiB of one device", *plans, title="What is always there, and what each phase adds")
    rows = {
        "student's weights": "student",
        "teacher's weights": "teacher",
        "optimizer": "optimizer",
        "+ writing": "writing",
        "+ teacher reads": "reading",
        "+ student learns": "learning",
        "+ optimizer step": "gradients",
    }
    for title, name in rows.items():
        table.add_row(title, *(f"{getattr(found, name) / GIB:.2f}" for found in plans.values()))
    table.add_section()
    table.add_row("[bold]peak", *(f"[bold]{found.peak / GIB:.2f}" for found in plans.values()))
    fits = ["[green]fits" if found.peak < memory else "[red]too large" for found in plans.values()]
    table.add_row(f"in {memory / GIB:g} GiB", *fits)
    Console().print(table)
