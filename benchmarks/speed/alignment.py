"""How fast sampled tokens become chunks: `TextAligner` against a plain reference and two published implementations.

    CTOPD_ASSETS=<folder> python -m benchmarks.speed.alignment    # from the repository root

Writes `alignment.json` and `alignment.png` to `benchmarks/results/speed/`. The folder holds `tokenizers/<name>` as
published on the hub, `datasets/gsm8k/train.jsonl` and `datasets/multilingual/sample.jsonl`.

- `ours`: one call of `TextAligner` with all completions, and the teacher's sum of each chunk.
- `reference`: slow and obvious. It is also the check: where nothing is masked, `ours` has exactly its chunks.
- `gold`: what TRL's `GOLDTrainer` does with sampled completions, by its own functions; only the loop of
  `_maybe_add_completion_byte_offsets` is restated. For byte-level BPE on both sides only.
- `dpca_published`: DPCA as published: `retokenize_batch` and `_align_chunks` of ivanniu/On-Policy-Distill,
  verl/workers/reward_manager/opd.py, commit 927a8264f2e303b7f82c2d331a58fd4240c8805a. The same procedure in other words: it
  keeps the decoded slices, their order, and the tensors written one chunk at a time. Of the pairs here, its caller has
  template markers only for llama-3.2 <- qwen2.5 and llama-3.2 <- deepseek-v3, and raises an error for the others. For those, the
  figures show what the procedure itself would do.

Decisions.
- Every method starts from the same lists of student ids and ends with the chunk of each token, as in its own code. `ours` and
  `dpca_published` also compute the teacher's log-prob of each chunk (here of zeros). `gold` ends with its groups of positions;
  numbering them for the count is not timed.
- Completions only: no prompts, no template markers to replace, no stop tokens.
- `encode` is the teacher's tokenizer alone: one `encode_batch` of the same texts by its backend. All methods need it, so times
  are given with and without it. Without: `ours` and `dpca_published` are run again with the teacher's encoding given (the
  latter also without decoding the text, as in `_align_chunks` alone); for the others it is the difference.
- `ours` asks the teacher's tokenizer for offsets only for texts that its normalizer may alter, so it encodes faster than
  `encode`. Offsets that it asks for later count as encoding.
- Token tables are built once a run, with the aligner. Their time is given separately.
- Times are processor time of this process, single-threaded. Other processes on the machine do not count.
- The methods take turns in each round. A ratio is the median of the rounds' ratios. `dpca_published` gets fewer rounds: one
  where a run takes longer than `SLOW_SECONDS`, and none at a length where it would take ten times that.
- A completion is the student's encoding of joined texts, cut at a number of tokens. The cut can split a character.
- The masked share is the share of student tokens without a usable chunk. `dpca_published` masks in `_align_chunks`; its caller
  also drops some whole completions, which is not counted. `gold` masks nothing.
"""

import argparse
import gc
import json
import os
import random
import statistics
import unicodedata
from bisect import bisect_right
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.experimental.gold.gold_trainer import ULDLoss, build_teacher_inputs_from_texts
from trl.experimental.utils import is_byte_level_tokenizer, piece_byte_len

from benchmarks.clock import stopwatch
from benchmarks.report import assets_folder, header, save
from trl_ctopd import TextAligner, TextAlignment, token_bytes
from trl_ctopd.losses.credit import chunk_sum
from trl_ctopd.rollouts.pairing import pad_rows
from trl_ctopd.text import aligner as align


matplotlib.use("Agg")
from matplotlib import pyplot as plt


RESULTS = Path(__file__).parents[1] / "results" / "speed"
PAIRS = (  # student, teacher
    ("llama-3.2", "qwen2.5"),
    ("llama-3.2", "deepseek-v3"),
    ("qwen2.5", "mistral-v3"),
    ("llama-2", "qwen2.5"),
    ("smollm2-instruct", "llama-3.2"),
)
TEXTS = ("gsm8k", "multilingual")
LENGTHS = (256, 2_048, 16_384)  # student tokens in a completion
BATCH_TOKENS = 16_384
ROUNDS = {"encode": 7, "ours": 7, "reference": 7, "gold": 7, "dpca_published": 3}
ROUNDS |= {"ours, encoded": 7, "dpca_published, encoded": 3}
SLOW_SECONDS = 3
LARGE_CHUNK = 6  # tokens; `dpca_published` calls larger chunks unreliable
PLOTTED = ("gsm8k", (PAIRS[0], PAIRS[2]))

Completions = list[list[int]]
Chunks = list[list[int]]  # for each completion, the chunk of each student token; -1 = none


class Pair:
    """Two tokenizers, with everything that is built once before a completion is aligned."""

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase):
        self.student, self.teacher = student, teacher
        with stopwatch() as spent:
            self.aligner = TextAligner(student, teacher)
            self.aligner([student.encode("a", add_special_tokens=False)])  # builds what is built on first use
        self.build_seconds = spent.cpu_seconds
        self.student_rows, self.teacher_rows = token_bytes(student), token_bytes(teacher)
        self.student_adds_space = b"".join(
            self.student_rows[i] for i in student.encode("a", add_special_tokens=False)
        ).startswith(b" ")

    def text(self, ids: list[int]) -> str:
        data = b"".join(self.student_rows[i] for i in ids)
        return (data.removeprefix(b" ") if self.student_adds_space else data).decode(errors="replace")


# --- the methods


def encode(pair: Pair, texts: list[str]) -> None:
    pair.teacher.backend_tokenizer.encode_batch(texts, add_special_tokens=False)


def ours(pair: Pair, completions: Completions, encoded: list | None = None) -> list[TextAlignment]:
    with mock.patch.object(align, "encode_as_text", lambda *_: encoded) if encoded else nullcontext():
        alignments = pair.aligner(completions)
    rows = [alignment.teacher.chunks for alignment in alignments]
    chunks = pad_rows(rows, max(map(len, rows)), -1)
    chunk_sum(torch.zeros(chunks.shape), chunks, max(alignment.num_chunks for alignment in alignments))
    return alignments


def reference(pair: Pair, completions: Completions) -> list[tuple[list[int], list[int]]]:
    found = []
    for ids in completions:
        text = pair.text(ids)
        teacher_ids = pair.teacher.encode(text, add_special_tokens=False)
        sides = [
            _ends([pair.student_rows[i] for i in ids], len(text.encode())),
            _ends([pair.teacher_rows[i] for i in teacher_ids], len(text.encode())),
        ]
        shared = sorted(set(sides[0]) & set(sides[1]) - {0})
        found.append(tuple(_chunks(ends, shared) for ends in sides))
    return found


def _ends(rows: list[bytes], length: int) -> list[int]:
    """The end of each token in the text. A surplus byte is a space that was put before the text."""
    added = sum(map(len, rows)) == length + 1 and rows[0].startswith(b" ")
    return [end - added for end in accumulate(map(len, rows))]


def _chunks(ends: list[int], shared: list[int]) -> list[int]:
    """By the start of each token: it is in the first chunk that ends after that."""
    chunks = [bisect_right(shared, start) for start in [0, *ends[:-1]]]
    return [chunk if chunk < len(shared) else -1 for chunk in chunks]


def gold(pair: Pair, completions: Completions) -> list[tuple[list[list[int]], list[list[int]]]]:
    texts = [
        pair.student.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in completions
    ]
    student_offsets = []
    for ids in completions:
        offsets, cumulative = [], 0
        for i in ids:
            width = piece_byte_len(pair.student.convert_ids_to_tokens([i])[0])
            offsets.append((cumulative, cumulative + width))
            cumulative += width
        student_offsets.append(offsets)
    _, labels, _, teacher_offsets = build_teacher_inputs_from_texts(pair.teacher, [""] * len(texts), texts)
    groups = []
    for students, row, teachers in zip(torch.tensor(student_offsets), labels, teacher_offsets, strict=True):
        teachers = teachers[row != -100][:-1]  # without the appended stop token, which is GOLD's default
        groups.append(ULDLoss._align_by_byte_offsets(students.tolist(), teachers.tolist()))
    return groups


def dpca_published(
    pair: Pair, completions: Completions, encoded: list | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for row, ids in enumerate(completions):
        if encoded:
            teacher_ids = encoded[row].ids
        else:
            text = pair.student.decode(ids, skip_special_tokens=False)
            teacher_ids = pair.teacher(text, add_special_tokens=False)["input_ids"]
        log_probs, aligned = torch.zeros(len(teacher_ids)), torch.zeros(len(ids))
        student_chunks = torch.full((len(ids),), -1.0)
        at, number = (0, 0), 0
        while at[0] < len(ids) and at[1] < len(teacher_ids):
            match = next_match(pair, ids, teacher_ids, *at)
            if match is None:
                break  # the rest is not aligned
            sizes = match[0] - at[0], match[1] - at[1]
            budget = log_probs[at[1] : match[1]].sum()
            if max(sizes) <= LARGE_CHUNK:
                aligned[at[0] : match[0]] = budget / sizes[0]
                student_chunks[at[0] : match[0]] = number
            else:
                aligned[at[0] : match[0]] = float("inf")
            at, number = match, number + 1
        aligned[at[0] :] = float("inf")
        found.append((student_chunks, aligned))
    return found


def next_match(pair: Pair, student_ids: list[int], teacher_ids: list[int], s0: int, t0: int) -> tuple[int, int] | None:
    """The next ends after `s0`, `t0` at which both sides decode to the same text; None where it gets stuck."""
    s, t = s0 + 1, t0 + 1
    while s <= len(student_ids) and t <= len(teacher_ids):
        student = _decoded(pair.student, student_ids[s0:s])
        teacher = _decoded(pair.teacher, teacher_ids[t0:t])
        student_open, teacher_open = student.endswith("\ufffd"), teacher.endswith("\ufffd")
        if student == teacher and not student_open:
            return s, t
        more_student, more_teacher = s < len(student_ids), t < len(teacher_ids)
        if len(student) < len(teacher):
            step = (1, 0) if more_student else (0, 1)
        elif len(student) > len(teacher):
            step = (0, 1) if more_teacher else (1, 0)
        elif student_open == teacher_open:
            step = (more_student, more_teacher)
        elif student_open:
            step = (more_student, more_teacher and not more_student)
        else:
            step = (more_student and not more_teacher, more_teacher)
        if not any(step):
            return None
        s, t = s + step[0], t + step[1]
    return None


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return unicodedata.normalize("NFC", tokenizer.decode(ids, skip_special_tokens=False))


METHODS: dict[str, Callable[[Pair, Completions], list]] = {
    function.__name__: function for function in (ours, reference, gold, dpca_published)
}


# --- the results


def chunks_of_students(name: str, output: list) -> Chunks:
    if name == "ours":
        return [alignment.student_chunks for alignment in output]
    if name == "gold":
        return [_numbered(*groups) for groups in output]
    if name == "dpca_published":
        return [chunks.int().tolist() for chunks, _ in output]
    return [chunks for chunks, _ in output]


def _numbered(student_groups: list[list[int]], teacher_groups: list[list[int]]) -> list[int]:
    """A last group may have tokens of one side only."""
    pairs = enumerate(zip(student_groups, teacher_groups, strict=True))
    return [number if teachers else -1 for number, (students, teachers) in pairs for _ in students]


def check(alignments: list[TextAlignment], expected: list[tuple[list[int], list[int]]]) -> int:
    """Checks that both sides' chunks are the reference's where nothing is masked. Returns the number of such completions."""
    clean = 0
    for alignment, chunks in zip(alignments, expected, strict=True):
        if not alignment.masked:
            assert (alignment.student_chunks, alignment.teacher_chunks) == chunks, alignment.text[:200]
            clean += 1
    return clean


# --- texts


def read_texts(assets: Path) -> dict[str, list[str]]:
    """Shuffled, since the files are sorted by language."""
    files = {"gsm8k": ("gsm8k/train.jsonl", "answer"), "multilingual": ("multilingual/sample.jsonl", "text")}
    texts = {}
    for name, (path, field) in files.items():
        texts[name] = [json.loads(row)[field] for row in (assets / "datasets" / path).read_text().splitlines()]
        random.Random(0).shuffle(texts[name])
    return texts


def sample(student: PreTrainedTokenizerBase, texts: list[str], length: int) -> Completions:
    """Completions of `length` tokens, each from different texts."""
    completions, rows = [], iter(texts)
    for _ in range(BATCH_TOKENS // length):
        joined, ids, characters = "", [], 4 * length
        while len(ids) < length:
            while len(joined) < characters:
                joined += next(rows) + "\n"
            ids = student.encode(joined, add_special_tokens=False)
            characters *= 2
        completions.append(ids[:length])
    return completions


# --- times


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    with stopwatch() as spent:
        output = function()
    return spent.cpu_seconds, output


def refusal(pair: Pair, completions: Completions) -> str | None:
    """Why `gold` does not align these. It would count a SentencePiece student's bytes wrongly without an error."""
    if not is_byte_level_tokenizer(pair.student.backend_tokenizer):
        return "The student's tokenizer is not ByteLevel, which piece_byte_len documents as out of scope."
    try:
        gold(pair, completions)
    except (NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def run_rounds(runs: dict[str, Callable[[], Any]]) -> tuple[dict[str, dict[int, float]], dict[str, Any]]:
    """Seconds by round, and the last output of each. Methods with fewer rounds take part in the last ones."""
    times: dict[str, dict[int, float]] = {name: {} for name in runs}
    outputs = {name: run() for name, run in runs.items() if not name.startswith("dpca_published")}  # warm
    for left in reversed(range(max(ROUNDS.values()))):
        for name, run in runs.items():
            if left < ROUNDS[name] and max(times[name].values(), default=0) < SLOW_SECONDS:
                times[name][left], outputs[name] = seconds(run)
    return times, outputs


def measure(pair: Pair, completions: Completions, too_slow: bool) -> tuple[list[dict], dict]:
    """A record for each method, and the ratios of the others' times to those of `ours`."""
    texts = [pair.text(ids) for ids in completions]
    refused = {"gold": why} if (why := refusal(pair, completions)) else {}
    if too_slow:
        refused["dpca_published"] = f"It would take more than {10 * SLOW_SECONDS} s, as it grows with the square."
    runs = {name: partial(function, pair, completions) for name, function in METHODS.items() if name not in refused}
    encoded = align.encode_as_text(pair.teacher, texts)
    again = {f"{name}, encoded": partial(runs[name], encoded) for name in ("ours", "dpca_published") if name in runs}
    times, outputs = run_rounds({"encode": partial(encode, pair, texts), **runs, **again})
    without = {
        name: times.get(f"{name}, encoded", {n: time_ - times["encode"][n] for n, time_ in times[name].items()})
        for name in runs
    }
    tokens = sum(map(len, completions))
    records, ratios = [], {}
    for name in METHODS:
        if name in refused:
            fields = ("rounds", "us_per_token", "us_per_token_without_encode", "chunks", "masked_share")
            records.append({"method": name, **dict.fromkeys(fields), "why": refused[name]})
            ratios[name] = None
            continue
        chunks = chunks_of_students(name, outputs[name])
        records.append(
            {
                "method": name,
                "rounds": len(times[name]),
                "us_per_token": round(statistics.median(times[name].values()) / tokens * 1e6, 3),
                "us_per_token_without_encode": round(statistics.median(without[name].values()) / tokens * 1e6, 3),
                "chunks": sum(len({*own} - {-1}) for own in chunks),
                "masked_share": round(sum(own.count(-1) for own in chunks) / tokens, 5),
            }
        )
        ratios[name] = {"total": _ratio(times[name], times["ours"])}
        ratios[name]["without_encode"] = _ratio(without[name], without["ours"])
    return records, {
        "encode_us_per_token": round(statistics.median(times["encode"].values()) / tokens * 1e6, 3),
        "completions": len(completions),
        "completions_checked": check(outputs["ours"], outputs["reference"]),
        "over_ours": {name: ratio for name, ratio in ratios.items() if name != "ours"},
    }


def _ratio(theirs: dict[int, float], own: dict[int, float]) -> float:
    return round(statistics.median(time_ / own[n] for n, time_ in theirs.items()), 2)


def growth_exponent(records: list[dict]) -> float | None:
    """The slope of log seconds a completion over log tokens: 1 = linear."""
    records = [record for record in records if record["us_per_token"] is not None]
    if len(records) < 2:
        return None
    lengths = np.array([record["student_tokens"] for record in records])
    times = np.array([record["us_per_token"] for record in records]) * lengths
    return round(float(np.polyfit(np.log(lengths), np.log(times), 1)[0]), 3)


# --- output


def plot(records: list[dict], path: Path) -> None:
    text, pairs = PLOTTED
    figure, panels = plt.subplots(1, len(pairs), figsize=(10, 4.5), sharey=True, layout="constrained")
    for panel, (student, teacher) in zip(panels, pairs, strict=True):
        own = [r for r in records if (r["student"], r["teacher"], r["text"]) == (student, teacher, text)]
        for color, name in enumerate(METHODS):
            line = [r for r in own if r["method"] == name and r["us_per_token"]]
            if line:
                masked = max(r["masked_share"] for r in line)
                label = f"{name}, {masked:.0%} masked" if masked > 0.01 else name
                times = [r["us_per_token"] for r in line]
                panel.loglog([r["student_tokens"] for r in line], times, color=f"C{color}", marker="o", label=label)
        panel.set(title=f"{student} student, {teacher} teacher", xlabel="tokens in a completion")
        panel.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(loc="best")
    panels[0].set_ylabel("processor time, µs a student token")
    figure.suptitle(f"From sampled tokens to chunks, teacher's encoding included ({text})")
    figure.savefig(path, dpi=150)


def show(records: list[dict], ratios: list[dict]) -> None:
    table = Table(title="µs a student token; times those of ours, total (without the teacher's encoding)")
    for column in ("pair", "text", "tokens", "encode", *METHODS, "gold/ours", "dpca/ours", "dpca masked"):
        table.add_column(column, justify="left" if column in ("pair", "text") else "right")
    for i, case in enumerate(ratios):
        own = records[i * len(METHODS) :][: len(METHODS)]
        table.add_row(
            f"{case['student']} <- {case['teacher']}",
            case["text"],
            f"{case['student_tokens']:,}",
            f"{case['encode_us_per_token']:.2f}",
            *("-" if record["us_per_token"] is None else f"{record['us_per_token']:,.2f}" for record in own),
            *(
                "-" if ratio is None else f"{ratio['total']:,.1f} ({ratio['without_encode']:,.1f})"
                for ratio in (case["over_ours"]["gold"], case["over_ours"]["dpca_published"])
            ),
            "-" if own[-1]["masked_share"] is None else f"{own[-1]['masked_share']:.1%}",
        )
    Console(width=170).print(table)


def main(assets: Path) -> None:
    report: dict[str, Any] = header()
    report["settings"] = {
        "batch_tokens": BATCH_TOKENS,
        "lengths": LENGTHS,
        "rounds": ROUNDS,
        "slow_seconds": SLOW_SECONDS,
    }
    texts = read_texts(assets)
    builds, records, ratios, exponents = [], [], [], []
    for names in tqdm(PAIRS):
        pair = Pair(*(AutoTokenizer.from_pretrained(assets / "tokenizers" / name) for name in names))
        sides = dict(zip(("student", "teacher"), names, strict=True))
        gc.collect()
        gc.freeze()  # collections during a run then skip the vocabularies
        builds.append({**sides, "seconds": round(pair.build_seconds, 3)})
        for text in TEXTS:
            start, next_seconds = len(records), 0.0
            for length in LENGTHS:
                case = {**sides, "text": text, "student_tokens": length}
                too_slow = next_seconds > 10 * SLOW_SECONDS
                own_records, own_ratios = measure(pair, sample(pair.student, texts[text], length), too_slow)
                published = own_records[-1]["us_per_token"]
                next_seconds = 0 if published is None else 8 * published * BATCH_TOKENS / 1e6
                records += [{**case, **record} for record in own_records]
                ratios.append({**case, **own_ratios})
            found = {name: growth_exponent(records[start + i :: len(METHODS)]) for i, name in enumerate(METHODS)}
            exponents.append({**sides, "text": text, **found})
    report |= {"aligner_builds": builds, "records": records, "ratios": ratios, "growth_exponents": exponents}
    save(RESULTS / "alignment.json", report)
    plot(records, RESULTS / "alignment.png")
    show(records, ratios)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    logging.set_verbosity_error()  # completions may be longer than a tokenizer's model allows
    main(assets_folder(parser))
