"""
A full optimizer step of `CrossTokenizerGKDTrainer` (`dpca`) against TRL's `GOLDTrainer`, and against the minimum that any
step needs.

    CTOPD_ASSETS=<folder> python -m benchmarks.speed.step          # from the repository root; on the CPU
    CTOPD_ASSETS=<folder> python -m benchmarks.speed.step --gpu    # Llama-3.2-1B <- Qwen2.5-7B by shape, bf16

Writes `step.json` and `step.png` (`step_gpu.*`) to `benchmarks/results/speed/`. The folder holds `tokenizers/<name>` as
published on the hub and `datasets/gsm8k/train.jsonl`. `--quick` does the same with small sizes and without the published
vocabularies, to test that it runs; with `--gpu` it runs the GPU part of this file on whatever device there is.

Decisions:
- Same models (equal weights, a copy for each), prompts, micro-batches, length, sampling (temperature 1, whole
  distribution), optimizer (Trainer's default), learning rate, precision; no gradient checkpointing. Every completion has
  full length (`models.py` says how). If the two trainers write or read different numbers of tokens, the run is an error.
- GOLD runs on-policy with the ULD loss and its byte alignment, all else by default; `hybrid` is `uld_use_hybrid_loss`.
- On the CPU all sides are built first and take one step each that does not count. Then they take turns: at least five rounds,
  more if they are short, and the order changes with the round. A ratio is the median of the rounds' ratios. Times are wall
  times; processor time is given beside them, since other processes do not count in it.
- On the GPU each side runs alone: it is built, warmed up and timed, then built again with twice the prompts until memory
  runs out. Our trainer compiles its decode step there, in the step that warms it up, and is measured without compiling too.
- The floor is three plain loops of the same sizes: `generate` with a KV cache for all prompts at once; the teacher's forward
  pass with log-probs of the given tokens, for the same ids that it read in our trainer; the student's forward and backward
  pass for the log-probs of the written tokens; then the optimizer step. The heads are the fastest ones: TRL's kernel for the
  teacher; for the student the logits of `TILE` tokens at a time, whose gradient is computed at once, by hand. A loss that needs
  all log-probs first cannot do that, and computes the logits twice. The floor clips no gradients, logs nothing and has no
  data loader. Rows are padded on the right and nothing is masked.
- `writing_limit_seconds` is the least that writing can take: in each decode step all weights and the cache are read once from memory
  (`bandwidth.py`). The floor's own writing is `generate`, far above it.

Other differences between the two trainers, each as in its own code:
- GOLD calls `generate` once a micro-batch, ours once a step.
- GOLD's teacher reads the student's chat template, in its own tokens, and an end of turn; ours reads its own template. So the
  teacher's number of tokens differs; both are recorded.
- GOLD's data needs an answer (GSM8K's), which an on-policy run tokenizes once and does not train on.
- GOLD averages over micro-batches; ours divides by the step's tokens.
- Phases: ours are from its own log, with the loss's backward pass in `student`. GOLD's are measured from outside, with the whole
  backward pass in `student`, and its alignment partly in `loss`, partly in `generation`, partly in `rest`. On a GPU both are
  times of the host.
"""

import argparse
import dataclasses
import gc
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import matplotlib
import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl.kernels import ChunkedLogProbFunction

from benchmarks.clock import Clock, Step
from benchmarks.report import assets_folder, header, save
from benchmarks.speed.bandwidth import bandwidth, writing_limit
from benchmarks.speed.models import (
    LEARNING_RATE,
    LLAMA_1B,
    NARROW,
    QWEN_7B,
    ROWS_1B_7B,
    Gold,
    Ours,
    Setting,
    conversations,
    finished,
    published,
    quiet,
    small,
    turn,
)


matplotlib.use("Agg")
from matplotlib import pyplot as plt


RESULTS = Path(__file__).parents[1] / "results" / "speed"
ROWS = (128_256, 151_936)
TILE = 512
COLUMNS = {"cpu": 1024, "cuda": 8192}  # of the vocabulary at a time
UNCOMPILED = "ours, not compiled"
SIDES = ("floor", "ours", UNCOMPILED, "gold", "gold hybrid")
PHASES = {  # in the order of the plot
    "generation": "tab:blue",
    "compilation": "tab:cyan",
    "teacher": "tab:orange",
    "student": "tab:green",
    "optimizer": "tab:olive",
    "alignment": "tab:purple",
    "loss": "tab:red",
    "rest": "tab:gray",
}


@dataclass(frozen=True)
class Plan:
    settings: dict[str, Setting]  # by name
    rounds: int
    seconds: float = 0  # short steps are repeated for this long
    largest: int | None = (
        None  # the largest number of prompts tried where each side runs alone; `None`: they take turns
    )


def cpu_plan(assets: Path, folder: Path, quick: bool) -> Plan:
    tokenizers = small(assets, folder)
    rows = len(AutoTokenizer.from_pretrained(tokenizers[0])), len(AutoTokenizer.from_pretrained(tokenizers[1]))
    settings = {
        f"small vocabularies, {length} tokens": Setting(tokenizers, rows, length)
        for length in ((32,) if quick else (32, 128, 512))
    }
    # GOLD's time grows with the square of the length: one prompt at 512 tokens
    for length, prompts in () if quick else ((128, 2), (512, 1)):
        settings[f"published vocabularies, {length} tokens"] = Setting(
            published(assets), ROWS, length, 1, prompts, hybrid=length < 512
        )
    return Plan(settings, rounds=2 if quick else 5, seconds=0 if quick else 60)


def gpu_plan(
    assets: Path, quick: bool, lengths: list[int], trained: list[str], hybrid: bool, rounds: int, largest: int
) -> Plan:
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)  # half precision is slow on a CPU
    shapes = (NARROW, {**NARROW, "tie_word_embeddings": False}) if quick else (LLAMA_1B, QWEN_7B)
    settings = {}
    for length in (16,) if quick else lengths:
        for part in trained:
            settings[f"{part}, {length:,} tokens"] = Setting(
                published(assets),
                ROWS_1B_7B,
                length,
                1,
                1 if quick else 4,
                shapes,
                part == "LoRA",
                hybrid,
                device,
                dtype=dtype,
                uncompiled=True,
            )
    return Plan(settings, rounds=2 if quick else rounds, largest=2 if quick else largest)


class Floor:
    """The minimum of any on-policy step, in plain loops; `texts` are the teacher's prompts and completions."""

    def __init__(self, setting: Setting, rows: list[tuple[str, str]], texts: tuple[list[list[int]], list[list[int]]]):
        self._setting, self._clock, self._texts = setting, Clock(setting.device), list(zip(*texts, strict=True))
        self.student, self.teacher = setting.model(0), setting.model(1).eval().requires_grad_(False)
        if setting.lora:
            self.student = get_peft_model(self.student, setting.peft_config)
        trained = [weight for weight in self.student.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
        tokenizer, conversation = setting.tokenizer(0), [[turn("user", question)] for question, _ in rows]
        self._prompts = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
        padded = tokenizer.pad(self._prompts, padding_side="left", return_tensors="pt")
        self._padded = padded.to(setting.device)
        self._config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=setting.new_tokens)

    def run(self) -> Step:
        clock = self._clock
        clock.start()
        with clock.phase("generation"):
            self.student.eval()
            sequences = self.student.generate(**self._padded, generation_config=self._config)
            self.student.train()
            written = sequences[:, self._padded["input_ids"].shape[1] :].tolist()
        with clock.phase("teacher"), torch.no_grad():
            head = self.teacher.get_output_embeddings().weight
            for hidden, targets in self._read(self.teacher, self._texts, "teacher"):
                columns = COLUMNS[self._setting.device]
                ChunkedLogProbFunction.apply(hidden, head, None, targets, 1.0, columns, None, 1.0, ())
        with clock.phase("student"):
            texts = list(zip(self._prompts["input_ids"], written, strict=True))
            student = self.student.get_base_model() if self._setting.lora else self.student
            for hidden, targets in self._read(student, texts, "student"):
                hidden.backward(head_gradient(hidden.detach(), student.get_output_embeddings().weight, targets))
        with clock.phase("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        clock.stop()
        tokens = clock.step.tokens
        tokens["written"], tokens["prompts"] = sum(map(len, written)), tokens["student"] - sum(map(len, written))
        return finished(clock.step, clock.step.phases)

    def _read(self, model, texts: list[tuple[list[int], list[int]]], side: str) -> Iterator[tuple[torch.Tensor, ...]]:
        """For each micro-batch, the hidden states (n, H) that the completions' tokens are predicted from, and the tokens (n,)."""
        texts = sorted(texts, key=lambda text: -len(text[0]) - len(text[1]))
        for start in range(0, len(texts), self._setting.batch):
            micro_batch = texts[start : start + self._setting.batch]
            rows = [torch.tensor([*prompt, *written]) for prompt, written in micro_batch]
            self._clock.step.tokens[side] += sum(map(len, rows))
            at = [
                torch.stack([torch.full((len(written),), row), len(prompt) + torch.arange(len(written))])
                for row, (prompt, written) in enumerate(micro_batch)
            ]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            row, column = torch.cat(at, 1)
            ids, targets, row, before = (p.to(self._setting.device) for p in (ids, ids[row, column], row, column - 1))
            yield model.base_model(input_ids=ids, use_cache=False).last_hidden_state[row, before], targets


@torch.no_grad()
def head_gradient(hidden: torch.Tensor, weight: torch.nn.Parameter, targets: torch.Tensor) -> torch.Tensor:
    """The gradient of `cross_entropy(hidden @ weight.T, targets, reduction="sum")` by `hidden` (n, H). That by `weight` is
    added to its `grad`."""
    gradient = torch.empty_like(hidden)
    if weight.requires_grad and weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    for start in range(0, len(hidden), TILE):
        part, wanted = hidden[start : start + TILE], targets[start : start + TILE, None]
        logits = (part @ weight.T).float().softmax(-1)
        logits.scatter_add_(1, wanted, logits.new_full(wanted.shape, -1))
        logits = logits.to(weight.dtype)
        gradient[start : start + TILE] = logits @ weight
        if weight.requires_grad:
            weight.grad.addmm_(logits.T, part)
    return gradient


def builders(setting: Setting, rows: list[tuple[str, str]], folder: Path) -> dict[str, Callable]:
    """A function for each side, except the floor, that builds it."""
    found = {"ours": lambda: Ours(setting, rows, folder), "gold": lambda: Gold(setting, rows, folder)}
    if setting.uncompiled:
        found[UNCOMPILED] = lambda: Ours(setting, rows, folder, generation_backend="transformers")
    if setting.hybrid:
        found["gold hybrid"] = lambda: Gold(setting, rows, folder, hybrid=True)
    return found


def take_turns(
    setting: Setting, rows: list[tuple[str, str]], folder: Path, rounds: int, seconds: float
) -> dict[str, list[Step]]:
    """The counted steps of each side: at least `rounds`, and more if they are short, until `seconds` have passed."""
    sides = {name: build() for name, build in builders(setting, rows, folder).items()}
    for side in sides.values():
        side.run()
    sides["floor"] = Floor(setting, rows, sides["ours"].texts)
    sides["floor"].run()
    names = [name for name in SIDES if name in sides]
    steps, begun = defaultdict(list), time.perf_counter()
    for turn_of in tqdm(count(), leave=False):
        if turn_of >= rounds and time.perf_counter() - begun >= seconds:
            break
        start = turn_of % len(names)
        for name in names[start:] + names[:start]:
            gc.collect()
            steps[name].append(sides[name].run())
    check_tokens(setting, steps)
    return dict(steps)


def check_tokens(setting: Setting, steps: dict[str, list[Step]]) -> None:
    """Raises `RuntimeError` where a completion is not full, or the sides read different numbers of tokens."""
    for name, own in steps.items():
        for step in own:
            expected = steps["ours"][0].tokens | {"written": setting.prompts * setting.new_tokens}
            if name != "floor":  # each step has another text for the teacher; the floor reads our last one
                expected["teacher"] = step.tokens["teacher"]
            if step.tokens != expected:
                raise RuntimeError(f"{name} had {step.tokens} in a step, expected {expected}.")


def alone(setting: Setting, rows: list[tuple[str, str]], folder: Path, rounds: int, largest: int) -> dict:
    """Each side's counted steps, and the most prompts that fit in one micro-batch, with no other side in memory."""
    steps, most, texts, own = {}, {}, None, rows[: setting.prompts]
    every = builders(setting, own, folder)
    every["floor"] = lambda: Floor(setting, own, texts)
    for name, build in tqdm(every.items(), leave=False):
        if name == "floor" and texts is None:
            continue
        found = within_memory(lambda build=build: timed_alone(build, rounds))
        if found is None:
            continue
        steps[name], read = found
        texts = read or texts
        if name != "floor" and largest > 1:
            most[name] = most_prompts(setting, rows, folder, name, largest)
    if "ours" in steps:
        check_tokens(setting, steps)
    return {"steps": steps, "most": most}


def timed_alone(build: Callable, rounds: int) -> tuple[list[Step], tuple | None]:
    side = build()
    side.run()
    return [side.run() for _ in range(rounds)], getattr(side, "texts", None)


def most_prompts(setting: Setting, rows: list, folder: Path, name: str, largest: int) -> int:
    """The largest power of two of prompts in a micro-batch for which a whole step fits into memory; 0 if none does."""
    fits, batch = 0, 1
    while batch <= largest:
        larger = dataclasses.replace(setting, batch=batch, accumulation=1)
        if within_memory(lambda s=larger: builders(s, rows[: s.batch], folder)[name]().run()) is None:
            break
        fits, batch = batch, 2 * batch
    return fits


def within_memory(work: Callable):
    """What `work` returns, or `None` if the device runs out of memory."""
    found = None
    with suppress(torch.OutOfMemoryError):
        found = work()
    gc.collect()
    torch.cuda.empty_cache()
    return found


def summary(steps: list[Step]) -> dict:
    """Medians of a side's steps."""
    seconds = [step.seconds for step in steps]
    peaks = [step.peak_mib for step in steps if step.peak_mib is not None]
    return {
        "seconds": statistics.median(seconds),
        "seconds_of_rounds": seconds,
        "cpu_seconds": statistics.median(step.cpu_seconds for step in steps),
        "tokens_per_second": steps[0].tokens["written"] / statistics.median(seconds),
        "phases": {name: statistics.median(step.phases.get(name, 0) for step in steps) for name in phases_of(steps)},
        "tokens": steps[0].tokens,
        "peak_mib": max(peaks) if peaks else None,
    }


def phases_of(steps: list[Step]) -> list[str]:
    return list(dict.fromkeys(name for step in steps for name in step.phases))


def ratio(steps: list[Step], to: list[Step]) -> dict[str, float]:
    """The time relative to `to`: median and range of the rounds, and the median by processor time."""
    wall = [own.seconds / other.seconds for own, other in zip(steps, to, strict=True)]
    cpu = [own.cpu_seconds / other.cpu_seconds for own, other in zip(steps, to, strict=True)]
    return {
        "median": statistics.median(wall),
        "lowest": min(wall),
        "highest": max(wall),
        "median_of_cpu_seconds": statistics.median(cpu),
    }


def measure(setting: Setting, plan: Plan, assets: Path, folder: Path) -> dict:
    if plan.largest is None:
        rows, most = conversations(assets, setting.prompts), {}
        steps = take_turns(setting, rows, folder, plan.rounds, plan.seconds)
    else:
        rows = conversations(assets, max(setting.prompts, plan.largest))
        found = alone(setting, rows, folder, plan.rounds, plan.largest)
        steps, most = found["steps"], found["most"]
    result = {"prompts_a_micro_batch": setting.batch, "micro_batches": setting.accumulation, "rows": setting.rows}
    result |= {"new_tokens": setting.new_tokens, "dtype": str(setting.dtype), "lora": setting.lora}
    if own := next(iter(steps.values()), None):
        prompt = own[0].tokens["prompts"] / setting.prompts
        with torch.device("meta"):
            student = AutoModelForCausalLM.from_config(setting.config(0), dtype=setting.dtype)
        sizes = (setting.prompts, prompt, setting.new_tokens, bandwidth(setting.device))
        result["writing_limit_seconds"] = writing_limit(student, *sizes)
    result["sides"] = {name: summary(steps[name]) for name in SIDES if name in steps}
    for name, fits in most.items():
        result["sides"].setdefault(name, {})["most_prompts"] = fits
    pairs = [(name, to) for to in ("ours", "floor") for name in SIDES[1:] if name != to]
    result["ratios"] = {
        f"{name} over {to}": ratio(steps[name], steps[to]) for name, to in pairs if name in steps and to in steps
    }
    return result


def show(results: dict[str, dict]) -> None:
    table = Table("side", "s a step", "cpu s", "tokens/s", "over ours", "over floor", "peak MiB", title="One step")
    for name, result in results.items():
        table.add_section()
        table.add_row(f"[bold]{name}")
        for side, found in result["sides"].items():
            if "seconds" not in found:
                table.add_row(side, "out of memory")
                continue
            shares = [result["ratios"].get(f"{side} over {to}") for to in ("ours", "floor")]
            peak = "" if found["peak_mib"] is None else f"{found['peak_mib']:,.0f}"
            if "most_prompts" in found:
                peak += f"; {found['most_prompts']} prompts fit"
            table.add_row(
                side,
                f"{found['seconds']:.2f}",
                f"{found['cpu_seconds']:.2f}",
                f"{found['tokens_per_second']:,.0f}",
                *("" if share is None else f"{share['median']:.2f}" for share in shares),
                peak,
            )
        if "writing_limit_seconds" in result:
            table.add_row("limit of writing", f"{result['writing_limit_seconds']:.2f}")
    Console(width=110).print(table)


def plot(results: dict[str, dict], path: Path) -> None:
    shape = {"figsize": (9, 1 + 1.3 * len(results)), "layout": "constrained"}
    figure, rows = plt.subplots(len(results), squeeze=False, **shape)
    for axes, (name, result) in zip(rows[:, 0], results.items(), strict=True):
        sides = {side: found for side, found in reversed(result["sides"].items()) if "seconds" in found}
        left = dict.fromkeys(sides, 0.0)
        for phase, colour in PHASES.items():
            width = [max(0.0, found["phases"].get(phase, 0)) for found in sides.values()]
            axes.barh(list(sides), width, left=list(left.values()), color=colour, label=phase)
            left = {side: left[side] + own for side, own in zip(sides, width, strict=True)}
        axes.set_title(name, fontsize=10, loc="left")
        axes.grid(alpha=0.3, axis="x")
    rows[-1, 0].set_xlabel("seconds of an optimizer step")
    figure.legend(*rows[0, 0].get_legend_handles_labels(), ncols=len(PHASES), loc="outside lower center", fontsize=8)
    figure.suptitle("Where the seconds of a step go")
    figure.savefig(path, dpi=120)


def main(assets: Path, output: Path, gpu: bool, quick: bool, **options) -> None:
    report = header()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        plan = gpu_plan(assets, quick, **options) if gpu else cpu_plan(assets, Path(folder), quick)
        shapes = next(iter(plan.settings.values())).shapes
        report |= {"rounds": plan.rounds, "shapes": {"student": shapes[0], "teacher": shapes[1]}}
        report["results"] = {
            name: measure(setting, plan, assets, Path(folder)) for name, setting in tqdm(plan.settings.items())
        }
    save(output, report)
    plot(report["results"], output.with_suffix(".png"))
    show(report["results"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--quick", action="store_true")
    on_gpu = parser.add_argument_group("on the GPU")
    on_gpu.add_argument("--lengths", type=int, nargs="+", default=[2_048, 8_192], help="new tokens")
    on_gpu.add_argument("--trained", nargs="+", choices=("LoRA", "full"), default=["LoRA", "full"])
    on_gpu.add_argument("--no-hybrid", dest="hybrid", action="store_false", help="leave GOLD's hybrid loss out")
    on_gpu.add_argument("--rounds", type=int, default=3)
    on_gpu.add_argument("--largest", type=int, default=64, help="prompts in a micro-batch tried at most; 1: none")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    assets = assets_folder(parser)
    if arguments.gpu and not (arguments.quick or torch.cuda.is_available()):
        parser.error("--gpu: there is none")
    output = arguments.output or RESULTS / ("step_gpu.json" if arguments.gpu else "step.json")
    options = {name: getattr(arguments, name) for name in ("lengths", "trained", "hybrid", "rounds", "largest")}
    main(assets, output, arguments.gpu, arguments.quick, **options)
