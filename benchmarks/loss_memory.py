"""What each loss holds beyond the models, at real vocabularies: the greatest amount alive in the loss and its backward pass.

    CTOPD_ASSETS=... python benchmarks/loss_memory.py        # writes benchmarks/results/loss_memory.json

Two LM heads of the sizes of Llama-3.2's and Qwen2.5's read random hidden states of a real text, cut by both tokenizers, at
two lengths. `bytes_a_token` is what a longer text costs; `share_of_bound` the peak at the longer one over
`tile_tokens` float32 logits of both models. The allocator counts, so the figures are those of this machine's kernels; there
are no times in them.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
from pathlib import Path

import torch
from real_input import machine
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from trl_ctopd import align_text
from trl_ctopd.losses import LOSSES, Distributions, ScoredChunks, build_loss
from trl_ctopd.vocabulary import CACHE_DIR, VocabularyPair


STUDENT, STUDENT_SIZE = "llama-3.2", 128_256
TEACHER, TEACHER_SIZE = "qwen2.5", 151_936
HIDDEN, TILE_TOKENS, LENGTHS = 256, 64, (128, 384)


def peak_bytes(loss, batch) -> int:
    """The most that `loss` and its backward pass hold at once, beyond what was there before."""
    loss(batch, 1)[0].backward()  # what is built once is built now
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss(batch, 1)[0].backward()
    total = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def scored_text(ids, student, teacher, vocabulary: VocabularyPair, hidden_size: int, tile_tokens: int) -> ScoredChunks:
    """One completion of student tokens `ids` under two random models, whose hidden states are what there is."""
    alignment = align_text(ids, student, teacher)
    generator = torch.Generator().manual_seed(0)
    sides, sampled = [], []
    for ids, size in (
        (alignment.student_ids, vocabulary.student_size),
        (alignment.teacher_ids, vocabulary.teacher_size),
    ):
        hidden = torch.randn(1, len(ids), hidden_size, generator=generator)
        weight = torch.randn(size, hidden_size, generator=generator) / hidden_size**0.5
        sides.append(Distributions(hidden, lambda rows, weight=weight: rows @ weight.T))
        found = [sides[-1].log_probs(rows)[0, token] for rows, token in zip(hidden[0].split(1), ids, strict=True)]
        sampled.append(torch.stack(found)[None])
    sides[0].hidden.requires_grad_()
    columns = (alignment.student_chunks, alignment.teacher_chunks, alignment.student_widths)
    return ScoredChunks(
        sampled[0].requires_grad_(),
        sampled[1],
        *(torch.tensor([column]) for column in columns),
        len(alignment.chunk_bytes),
        student_ids=torch.tensor([alignment.student_ids]),
        teacher_ids=torch.tensor([alignment.teacher_ids]),
        student=sides[0],
        teacher=sides[1],
        vocabulary=vocabulary,
        tile_tokens=tile_tokens,
    )


def main(assets: Path, output: Path) -> None:
    student, teacher = (AutoTokenizer.from_pretrained(assets / "tokenizers" / name) for name in (STUDENT, TEACHER))
    vocabulary = VocabularyPair(
        student,
        teacher,
        student_size=STUDENT_SIZE,
        teacher_size=TEACHER_SIZE,
        student_stops=[student.eos_token_id],
        teacher_stops=[teacher.eos_token_id],
        cache_dir=CACHE_DIR,
    )
    rows = (assets / "datasets" / "gsm8k" / "train.jsonl").read_text().splitlines()[:20]
    ids = student.encode(" ".join(json.loads(row)["answer"] for row in rows), add_special_tokens=False)
    batches = [scored_text(ids[:length], student, teacher, vocabulary, HIDDEN, TILE_TOKENS) for length in LENGTHS]
    bound = TILE_TOKENS * (STUDENT_SIZE + TEACHER_SIZE) * 4
    results = {}
    for name in tqdm(LOSSES):
        short, long = (peak_bytes(build_loss(name), batch) for batch in batches)
        results[name] = {
            "signal": LOSSES[name].signal,
            "peak_bytes": [short, long],
            "bytes_a_token": round((long - short) / (LENGTHS[1] - LENGTHS[0])),
            "share_of_bound": round(long / bound, 3),
        }
        print(f"{name:16s} {results[name]['bytes_a_token']:>10,} bytes a token, {long / bound:.3f} of the bound")
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "torch": importlib.metadata.version("torch"),
        "vocabularies": [STUDENT_SIZE, TEACHER_SIZE],
        "hidden_size": HIDDEN,
        "tile_tokens": TILE_TOKENS,
        "student_tokens": LENGTHS,
        "bound_bytes": bound,
        "bytes_a_token_of_all_logits": (STUDENT_SIZE + TEACHER_SIZE) * 4,
        "losses": results,
    }
    output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--assets", type=Path, default=os.environ.get("CTOPD_ASSETS"), help="folder of real tokenizers and data"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "loss_memory.json")
    arguments = parser.parse_args()
    if arguments.assets is None:
        parser.error("say where the real tokenizers and data are: --assets, or CTOPD_ASSETS")
    main(Path(arguments.assets), arguments.output)
