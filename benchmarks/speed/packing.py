"""
Scoring by padded rows and by packed ones, on a pretrained pair: the teacher's forward pass and the student's forward and backward
pass over eight completions, in turns. And the student's writing with what prompts begin with alike read once, or with each.

    CTOPD_ASSETS=<folder> CTOPD_MODELS=<folder> python -m benchmarks.speed.packing

SmolLM2-135M-Instruct with LoRA (r 16, all linear layers) and Qwen2.5-Coder-0.5B-Instruct, float32, one thread, on the CPU, with
`sdpa`. Questions of GSM8K, after a system message with `shots` of its answers, and as completions the beginnings of its answers, each of
its own length (`even`: all of the greatest). Writes `packing.json` to `benchmarks/results/speed/`.

Decisions:
- Processor time is compared, since the machine may have other work: medians of the rounds. Ratios are of the medians.
- Peak memory is resident memory above that before the pass, the largest of the rounds.
- Packed rows are measured wherever they can be laid out, so that it is seen where the rule of `Packer` draws the line; `packs` says
  what the rule does. Padded rows are the ones that are trained otherwise.
- `difference` is the largest of a log-prob, in nats.
"""

import argparse
import operator
import os
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.clock import peak_mib, start_of_peak, stopwatch
from benchmarks.report import assets_folder, gsm8k, header, save
from trl_ctopd import CrossTokenizerGKDConfig
from trl_ctopd.models import packing
from trl_ctopd.models.beginnings import families
from trl_ctopd.models.heads import add_token_scores
from trl_ctopd.models.products import use_faster_products
from trl_ctopd.rollouts import generation
from trl_ctopd.rollouts.pairing import pad_rows


ROOT = Path(__file__).parents[2]
STUDENT, TEACHER = "smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"
COMPLETIONS = 8
# completions of a prompt, the greatest number of tokens, whether all are of that length, and examples in the system message
CASES = ((4, 64, False, 0), (4, 64, True, 0), (1, 64, False, 0), (2, 64, False, 0), (1, 64, True, 2))
WRITTEN = ((1, 64, True, 0), (1, 64, True, 2))


def texts(tokenizer, rows: list[dict], generations: int, tokens: int, even: bool, shots: int) -> tuple[list, list]:
    """Prompts and completions as ids. Answers follow one another where one is too short."""
    prompts, completions = [], []
    examples = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows[len(rows) - shots :])
    system = [{"role": "system", "content": f"Answer as in these examples.\n\n{examples}"}] if shots else []
    for row in range(COMPLETIONS):
        messages = [*system, {"role": "user", "content": rows[row // generations]["question"]}]
        prompts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        ids = tokenizer.encode("\n".join(own["answer"] for own in rows[row:]), add_special_tokens=False)
        share = 1 if even else (1, 0.4, 0.75, 0.55, 0.9, 0.3, 0.65, 0.5)[row]
        completions.append(ids[: int(tokens * share)])
    return prompts, completions


def named(case: tuple[int, int, bool, int]) -> dict:
    return dict(zip(("generations", "new_tokens", "even", "shots"), case, strict=True))


class Pass:
    """A model's pass over rows, padded or packed; backwards too where it learns."""

    def __init__(self, folder: Path, learns: bool):
        self.tokenizer, self.learns = AutoTokenizer.from_pretrained(folder), learns
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        add_token_scores(model, entropy=learns)
        if learns:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.model, self.hidden_size = model, model.config.hidden_size

    def inputs(self, prompts: list, completions: list) -> dict[str, dict]:
        rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        width = max(map(len, rows))
        places = [
            (row, len(prompts[row]) - 1 + n - width) for row in range(len(rows)) for n in range(len(completions[row]))
        ]
        scored = torch.tensor(places).T
        targets = torch.tensor([token for completion in completions for token in completion])
        padded = {"input_ids": pad_rows(rows, width, 0), "scored": scored}
        self.packs = packing.Packer(self.hidden_size)(prompts, completions, width) is not None
        with mock.patch.object(packing, "_LEAST_SAVED", -10.0):
            packed = packing.Packer(self.hidden_size)(prompts, completions, width)
        found = {"padded": padded} | ({} if packed is None else {"packed": packing.packed_inputs(packed, scored)})
        return {name: {**own, "targets": targets} for name, own in found.items()}

    def __call__(self, inputs: dict) -> torch.Tensor:
        with torch.set_grad_enabled(self.learns):
            log_probs = self.model(**inputs).log_probs
        if self.learns:
            log_probs.mean().backward()
            self.model.zero_grad()
        return log_probs.detach()


class Writing:
    """The student's writing of completions of as many tokens as a case says, with its adapter merged."""

    def __init__(self, own: Pass, folder: Path):
        self.model, self.tokenizer = own.model, own.tokenizer
        self.args = CrossTokenizerGKDConfig(str(folder), use_cpu=True, bf16=False, report_to="none")
        self.accelerator = Accelerator(cpu=True)
        use_faster_products(self.model, self.accelerator)

    def __call__(self, prompts: list, tokens: int, shared: bool) -> list:
        config = generation.sampling_config(self.args, [self.tokenizer.eos_token_id], self.tokenizer.pad_token_id)
        config.update(max_new_tokens=tokens, min_new_tokens=tokens)
        torch.manual_seed(0)
        alike = families if shared else lambda texts, worth: []
        with mock.patch.object(generation, "families", alike):
            return generation.write(self.model, prompts, config, self.accelerator, self.args, merge=True)


def written(own: Writing, rows: list[dict], case: tuple[int, int, bool, int], rounds: int, warm: bool) -> dict:
    prompts, _ = texts(own.tokenizer, rows, *case)
    spent, found = {"each": [], "once": []}, {}
    for turn in range(rounds + warm):
        for name in sorted(spent, reverse=bool(turn % 2)):
            with stopwatch() as watch:
                found[name] = own(prompts, case[1], name == "once")
            if turn >= warm:
                spent[name].append(watch.cpu_seconds)
    medians = {name: statistics.median(seconds) for name, seconds in spent.items()}
    shared = sum((len(places) - 1) * length for places, length in families(sorted(map(tuple, prompts)), 0))
    return {
        "tokens_of_prompts": sum(map(len, prompts)),
        "tokens_shared": shared,
        "cpu_seconds": medians,
        "all_cpu_seconds": spent,
        "ratio": medians["once"] / medians["each"],
        "texts_alike": sum(map(operator.eq, found["each"], found["once"])),
    }


def compared(own: Pass, rows: list[dict], case: tuple[int, int, bool, int], rounds: int, warm: bool) -> dict:
    sides = own.inputs(*texts(own.tokenizer, rows, *case))
    scores, spent, peaks = {}, {name: [] for name in sides}, dict.fromkeys(sides, 0.0)
    for turn in range(rounds + warm):
        for name in sorted(sides, reverse=bool(turn % 2)):
            before = start_of_peak(False)
            with stopwatch() as watch:
                scores[name] = own(sides[name])
            if turn >= warm:
                spent[name].append(watch.cpu_seconds)
                peaks[name] = max(peaks[name], peak_mib(False, before) or 0.0)
    found = {
        name: {
            "rows": sides[name]["input_ids"].shape[0],
            "width": sides[name]["input_ids"].shape[1],
            "cpu_seconds": statistics.median(seconds),
            "all_cpu_seconds": seconds,
            "peak_mib": peaks[name],
        }
        for name, seconds in spent.items()
    }
    if "packed" in found:
        found["ratio"] = found["packed"]["cpu_seconds"] / found["padded"]["cpu_seconds"]
        found["difference"] = (scores["packed"] - scores["padded"]).abs().max().item()
    return {**found, "packs": own.packs}


def main(assets: Path, models: Path, rounds: int, output: Path) -> None:
    report = header() | {"completions": COMPLETIONS, "rounds": rounds, "cases": [], "writing": []}
    torch.set_num_threads(1)
    rows = gsm8k(assets, 2 * COMPLETIONS + 4)
    passes = {"teacher": Pass(models / TEACHER, False), "student": Pass(models / STUDENT, True)}
    table = Table(
        "generations", "tokens", "even", "shots", "model", "padded", "packed", "s", "s packed", "ratio", "packs", "MiB"
    )
    for settings in CASES:
        for name, own in passes.items():
            found = compared(own, rows, settings, rounds, warm=len(report["cases"]) < 2)
            case = {**named(settings), "model": name, **found}
            report["cases"].append(case)
            padded, packed = found["padded"], found.get("packed")
            shapes = [f"{side['rows']}x{side['width']}" if side else "" for side in (padded, packed)]
            numbers = [
                f"{padded['cpu_seconds']:.2f}",
                *([f"{packed['cpu_seconds']:.2f}", f"{found['ratio']:.2f}"] if packed else ["", ""]),
            ]
            memory = f"{padded['peak_mib']:.0f}" + (f" {packed['peak_mib']:.0f}" if packed else "")
            line = [*map(str, settings), name, *shapes, *numbers, str(found["packs"]), memory]
            table.add_row(*line)
            print(*line, flush=True)
        save(output, report)
    with tempfile.TemporaryDirectory() as folder:
        writing = Writing(passes["student"], Path(folder))
        for settings in WRITTEN:
            report["writing"].append({**named(settings), **written(writing, rows, settings, rounds, warm=True)})
            print("writing", report["writing"][-1], flush=True)
    save(output, report)
    Console(width=120).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "speed" / "packing.json")
    chosen = parser.parse_args()
    if not os.environ.get("CTOPD_MODELS"):
        parser.error("CTOPD_MODELS names no folder with the two models")
    main(assets_folder(parser), Path(os.environ["CTOPD_MODELS"]), chosen.rounds, chosen.output)
