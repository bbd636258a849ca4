"""
Memory and time of every loss and of TRL's `ULDLoss`, on the same models with real vocabularies, by the length of the text.

    CTOPD_ASSETS=<folder> python -m benchmarks.speed.loss          # on the CPU
    CTOPD_ASSETS=<folder> python -m benchmarks.speed.loss --gpu    # hidden sizes of Llama-3.2-1B and Qwen2.5-7B, bf16

`CTOPD_ASSETS` holds `tokenizers/<name>` as published on the hub and `datasets/gsm8k/train.jsonl`.

Decisions:
- The models are an embedding, a norm and an LM head with the published number of rows, without layers between, so that only
  the losses differ. A step reads one text with both models and computes the gradient of the loss. `floor` is the same backward
  pass from the hidden states, without a head. The gradient passes through the head, which is frozen as under LoRA: a head's own
  gradient is equally large for every loss and would hide the differences.
- Memory is the peak of live bytes. The figure is its slope over the length: the bytes that each further token costs, above
  those of the floor.
- Ours runs as in the trainer: log-probs of the sampled tokens by the fused head, whole distributions in tiles of
  `TILE_TOKENS`. TRL's loss runs as in `GOLDTrainer`: whole logits of both models.
- Bytes are counted by the allocator, and times are measured on this machine: compare them only with each other.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, Qwen2Config
from trl.experimental.gold import GOLDConfig
from trl.experimental.gold.gold_trainer import GOLDTrainer, ULDLoss, build_teacher_inputs_from_texts

from benchmarks.clock import peak_bytes, stopwatch
from benchmarks.report import assets_folder, gsm8k, header, save
from trl_ctopd import TextAlignment, align_text
from trl_ctopd.losses import LOSSES, Distributions, ScoredChunks, build_loss
from trl_ctopd.models.heads import add_token_scores, hidden_states, lm_head
from trl_ctopd.text.vocabulary import CACHE_DIR, VocabularyPair


matplotlib.use("Agg")
import matplotlib.pyplot as plt


RESULTS = Path(__file__).parents[1] / "results" / "speed"
STUDENT, TEACHER = "llama-3.2", "qwen2.5"
ROWS = {STUDENT: 128_256, TEACHER: 151_936}
TILE_TOKENS, REPEATS = 64, 3
PEERS = {"TRL ULD": {}, "TRL GOLD": {"uld_use_hybrid_loss": True}}


@dataclass
class Scene:
    """Two models that read one text, cut at several lengths."""

    models: list[PreTrainedModel]
    tokenizers: list
    device: torch.device
    vocabulary: VocabularyPair | None = None  # for losses on distributions

    def ours(self, name: str, read: TextAlignment) -> torch.Tensor:
        on_logits, sides, scores = LOSSES[name].signal == "logits", [], []
        for model, ids in zip(self.models, (read.student_ids, read.teacher_ids), strict=True):
            with hidden_states(model) as states, torch.set_grad_enabled(model is self.models[0]):
                inputs, columns = self.row([0, *ids]), torch.arange(-len(ids) - 1, -1, device=self.device)
                scored = torch.stack([torch.zeros_like(columns), columns])
                scores.append(model(input_ids=inputs, scored=scored, targets=inputs[0, 1:]).log_probs[None])
            if on_logits:
                sides.append(Distributions(states[0][:, :-1], lm_head(model, model.dtype, 1.0)))
        batch = ScoredChunks(
            *scores,
            *(self.row(part) for part in (read.student_chunks, read.teacher_chunks, read.student_widths)),
            len(read.chunk_bytes),
            student_ids=self.row(read.student_ids),
            teacher_ids=self.row(read.teacher_ids),
            student=sides[0] if sides else None,
            teacher=sides[1] if sides else None,
            vocabulary=self.vocabulary,
            tile_tokens=TILE_TOKENS,
        )
        return build_loss(name)(batch, len(read.student_ids))[0]

    def trls(self, loss: ULDLoss, read: TextAlignment) -> torch.Tensor:
        student, teacher = self.tokenizers
        ids = [0, *read.student_ids, student.eos_token_id]
        batch = {"input_ids": self.row(ids), "labels": self.row([-100, *ids[1:]])}
        trainer = SimpleNamespace(
            use_uld_loss=True, teacher_tokenizer=teacher, uld_loss_fn=loss, _tokenizer=student
        )  # fmt: skip
        GOLDTrainer._maybe_add_completion_byte_offsets(trainer, batch)
        [*teacher_side] = build_teacher_inputs_from_texts(teacher, ["a"], [read.text])
        teacher_ids, teacher_labels, _, teacher_offsets = (part.to(self.device) for part in teacher_side)
        with torch.no_grad():
            teacher_logits = self.models[1](input_ids=teacher_ids).logits
        return loss(
            student_logits=self.models[0](input_ids=batch["input_ids"]).logits,
            teacher_logits=teacher_logits,
            student_labels=batch["labels"],
            teacher_labels=teacher_labels,
            student_input_ids=batch["input_ids"],
            teacher_input_ids=teacher_ids,
            student_byte_offsets=batch["byte_offsets"],
            teacher_byte_offsets=teacher_offsets,
        )

    def floor(self, read: TextAlignment) -> torch.Tensor:
        """Both backbones, and a backward pass from the student's hidden states."""
        student, teacher = self.models
        with torch.no_grad():
            teacher.base_model(input_ids=self.row([0, *read.teacher_ids]))
        return student.base_model(input_ids=self.row([0, *read.student_ids])).last_hidden_state.float().sum()

    def row(self, values: list[int]) -> torch.Tensor:
        return torch.tensor([values], device=self.device)

    def peak_bytes(self, loss: Callable[[], torch.Tensor]) -> int:
        loss()  # builds what is built on first use
        self.models[0].zero_grad()
        return peak_bytes(lambda: loss().backward())

    def seconds(self, loss: Callable[[], torch.Tensor]) -> float:
        found = []
        for _ in range(REPEATS):
            self.models[0].zero_grad()
            with stopwatch() as spent:
                loss().backward()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
            found.append(spent.seconds)
        return statistics.median(found)


def scene(assets: Path, hidden: tuple[int, int], dtype: torch.dtype, device: torch.device, rows: dict) -> Scene:
    tokenizers = [AutoTokenizer.from_pretrained(assets / "tokenizers" / name) for name in (STUDENT, TEACHER)]
    models = []
    for name, config, size in zip((STUDENT, TEACHER), (LlamaConfig, Qwen2Config), hidden, strict=True):
        torch.manual_seed(len(models))
        shape = {"hidden_size": size, "num_hidden_layers": 0, "num_attention_heads": 1, "tie_word_embeddings": False}
        model = AutoModelForCausalLM.from_config(config(vocab_size=rows[name], **shape)).to(device, dtype)
        add_token_scores(model.requires_grad_(False), entropy=name == STUDENT)
        models.append(model)
    models[0].model.norm.requires_grad_(True)
    return Scene(models, tokenizers, device)


def compared(where: Scene) -> VocabularyPair:
    student, teacher = where.tokenizers
    return VocabularyPair(
        student,
        teacher,
        student_size=ROWS[STUDENT],
        teacher_size=ROWS[TEACHER],
        student_stops=[student.eos_token_id],
        teacher_stops=[teacher.eos_token_id],
        device=where.device,
        cache_dir=CACHE_DIR,
    )


def dpca_slope(where: Scene, text: list[int], lengths: list[int]) -> dict:
    """The slope of dpca alone. Ids beyond the models' rows are folded back, which only changes the log-probs."""
    peaks = []
    for length in lengths:
        read = align_text(text[:length], *where.tokenizers)
        for model, ids in zip(where.models, (read.student_ids, read.teacher_ids), strict=True):
            ids[:] = [token % model.config.vocab_size for token in ids]
        extra, floor = (
            where.peak_bytes(lambda read=read, loss=loss: loss(read))
            for loss in (lambda read: where.ours("dpca", read), where.floor)
        )
        peaks.append(extra - floor)
    return {"extra_peak_bytes": peaks, "extra_bytes_a_token": round(np.polyfit(lengths, peaks, 1)[0])}


def measure(where: Scene, text: list[int], lengths: list[int], names: list[str]) -> dict[str, dict]:
    """Peak and time of each method at each length, and the slopes of both."""
    reads = [align_text(text[:length], *where.tokenizers) for length in lengths]
    methods: dict[str, Callable] = {name: lambda read, name=name: where.ours(name, read) for name in names}
    for name, settings in PEERS.items():
        config = GOLDConfig(output_dir="unused", use_uld_loss=True, bf16=False, report_to=[], **settings)
        loss = ULDLoss(config, *where.tokenizers, where.device)
        methods[name] = lambda read, loss=loss: where.trls(loss, read)
    results = {}
    for name, loss in tqdm({"floor": where.floor, **methods}.items()):
        steps = [lambda read=read, loss=loss: loss(read) for read in reads]
        peaks, times = [where.peak_bytes(step) for step in steps], [where.seconds(step) for step in steps]
        results[name] = {"peak_bytes": peaks, "seconds": times} | {
            "bytes_a_token": round(np.polyfit(lengths, peaks, 1)[0]),
            "microseconds_a_token": round(np.polyfit(lengths, times, 1)[0] * 1e6, 1),
        }
    for name, result in results.items():
        if name != "floor":
            for figure in ("bytes_a_token", "microseconds_a_token"):
                result[f"extra_{figure}"] = round(result[figure] - results["floor"][figure], 1)
    return results


def at_longest(results: dict[str, dict], name: str, figure: str) -> float:
    """The figure above the floor."""
    return results[name][figure][-1] - results["floor"][figure][-1]


def plot(lengths: list[int], results: dict[str, dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    floor = np.array(results["floor"]["peak_bytes"])
    for name in ("TRL GOLD", "TRL ULD", "gold", "uld", "dpca"):
        extra = (np.array(results[name]["peak_bytes"]) - floor) / 2**20
        axes.plot(lengths, extra, marker="o", label=name if name in PEERS else f"{name} (here)")
    axes.set(xlabel="student tokens", ylabel="MiB beyond the models", yscale="log")
    axes.set_title(f"Memory of a loss at vocabularies of {ROWS[STUDENT]:,} and {ROWS[TEACHER]:,}")
    axes.grid(alpha=0.3)
    axes.set_xticks(lengths)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)


def show(results: dict[str, dict]) -> None:
    table = Table("loss", "peak MiB", "kB a token", "µs a token", title="Beyond the models")
    for name, result in results.items():
        if name != "floor":
            peak, extra = max(result["peak_bytes"]) / 2**20, result["extra_bytes_a_token"] / 1e3
            table.add_row(name, f"{peak:,.0f}", f"{extra:,.1f}", f"{result['extra_microseconds_a_token']:,.0f}")
    Console().print(table)


def main(assets: Path, output: Path, gpu: bool, lengths: list[int]) -> None:
    report = header()
    device, hidden, dtype = torch.device("cpu"), (256, 256), torch.float32
    if gpu:
        device, hidden, dtype = torch.device("cuda"), (2048, 3584), torch.bfloat16
    where = scene(assets, hidden, dtype, device, ROWS)
    where.vocabulary = compared(where)
    text = where.tokenizers[0].encode(" ".join(row["answer"] for row in gsm8k(assets, 200)), add_special_tokens=False)
    report |= {
        "lengths": lengths,
        "rows": ROWS,
        "hidden_sizes": hidden,
        "dtype": str(dtype),
        "tile_tokens": TILE_TOKENS,
    }
    report["losses"] = measure(where, text, lengths, list(LOSSES))
    quarter = {name: size // 4 for name, size in ROWS.items()}
    report["dpca_in_bf16"] = dpca_slope(scene(assets, hidden, torch.bfloat16, device, ROWS), text, lengths)
    report["dpca_with_a_quarter_of_the_rows"] = dpca_slope(scene(assets, hidden, dtype, device, quarter), text, lengths)
    report["trl_over_ours"] = {
        f"{peer} over {name}": {
            figure: round(at_longest(report["losses"], peer, figure) / at_longest(report["losses"], name, figure), 1)
            for figure in ("peak_bytes", "seconds")
        }
        for peer, names in (("TRL ULD", ("dpca", "uld")), ("TRL GOLD", ("dpca", "gold")))
        for name in names
    }
    save(output, report)
    plot(lengths, report["losses"], output.with_suffix(".png"))
    show(report["losses"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    assets = assets_folder(parser)
    if arguments.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is none")
    output = arguments.output or RESULTS / ("loss_gpu.json" if arguments.gpu else "loss.json")
    main(assets, output, arguments.gpu, arguments.lengths)
