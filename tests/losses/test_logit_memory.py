"""What a loss on distributions holds beyond the models, in bytes that the allocator counted: a bound on the CPU and, with
other kernels, a close guess elsewhere."""

from dataclasses import replace

import pytest
import torch
from tokenizers_for_tests import byte_level
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.speed.loss import peak_bytes
from trl_ctopd import align_text
from trl_ctopd.losses import LOSSES, Distributions, ScoredChunks, build_loss
from trl_ctopd.models.heads import add_token_scores
from trl_ctopd.text.vocabulary import VocabularyPair


STUDENT_SIZE, TEACHER_SIZE, HIDDEN, TILE = 20_000, 24_000, 4, 64  # mostly rows beyond the tokenizers
TEXT = "The quick brown fox jumps over the lazy dog, 1234567890 times; пьют чаю, いろはにほへと. "
ON_LOGITS = [name for name, loss in LOSSES.items() if loss.signal == "logits"]
QUICK = ("strict_topk", "bpm", "uld")  # the others are tried by `make test-all`
CASES = [pytest.param(name, {}, marks=[] if name in QUICK else pytest.mark.slow) for name in ON_LOGITS]
CASES.append(pytest.param("uld", {"uld_pairing": "chunk"}, marks=pytest.mark.slow))


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
        close_log_probs=torch.full((1, len(alignment.student_ids)), -0.1, requires_grad=True),
    )


def peak_of(loss, batch: ScoredChunks) -> int:
    loss(batch, 1)[0].backward()  # what is built once is built now
    return peak_bytes(lambda: loss(batch, 1)[0].backward())


@pytest.fixture(scope="module")
def batches():
    """Short and long."""
    student, teacher = byte_level(400, digits=1), byte_level(1200, digits=3)
    stops = {"student_stops": [0], "teacher_stops": [0]}
    vocabulary = VocabularyPair(student, teacher, student_size=STUDENT_SIZE, teacher_size=TEACHER_SIZE, **stops)
    ids = student.encode(TEXT * 40)
    return [scored_text(ids[:length], student, teacher, vocabulary, HIDDEN, TILE) for length in (96, 768)]


@pytest.mark.parametrize(("name", "knobs"), CASES)
def test_no_more_than_a_tiles_float32_logits_of_both_models_are_alive_whatever_the_length(batches, name, knobs):
    bound = TILE * (STUDENT_SIZE + TEACHER_SIZE) * 4
    short, long = (peak_of(build_loss(name, **knobs), batch) for batch in batches)
    assert bound / 8 < short < bound
    assert long < bound
    assert long < 768 * (STUDENT_SIZE + TEACHER_SIZE) * 4 / 10, "far from all logits at once"


def test_reverse_kl_projects_nothing_twice_where_the_texts_are_short_and_stays_below_the_bound(batches):
    """`logit_tile_tokens` of 96 rows are kept at 256, and not at 64."""
    loss, projected, values = build_loss("reverse_kl"), {}, []
    for tile in (64, 256):
        calls = []

        def counted(side: Distributions, calls=calls) -> Distributions:
            return replace(side, head=lambda rows: calls.append(len(rows)) or side.head(rows))

        batch = replace(batches[0], tile_tokens=tile, student=counted(batches[0].student))
        hidden = batch.student.hidden
        hidden.grad = None
        value, _ = loss(batch, 1)
        value.backward()
        values.append((value.detach(), hidden.grad))
        projected[tile] = sum(calls)
        assert peak_of(loss, batch) < tile * (STUDENT_SIZE + TEACHER_SIZE) * 4
    rows = projected[256]
    assert rows <= 96 and projected[64] > 1.8 * rows
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ON_LOGITS])
def test_a_loss_on_log_probs_never_holds_a_row_of_a_vocabulary(batches, name):
    assert peak_of(build_loss(name), batches[0]) < STUDENT_SIZE * 4


def test_scoring_sampled_tokens_costs_no_more_where_the_vocabulary_is_four_times_as_large():
    """Log-probs by the head's small tiles, and back: under 64 kB a token, whatever the rows."""
    peaks = []
    for rows in (2_000, 8_000):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=rows, hidden_size=8, num_hidden_layers=0, num_attention_heads=1)
        ).requires_grad_(False)
        model.model.norm.requires_grad_(True)
        add_token_scores(model, entropy=True)
        ids = torch.arange(513)[None] * 3 % rows
        scored = torch.stack([torch.zeros(512, dtype=torch.long), torch.arange(-513, -1)])

        def step(model=model, ids=ids, scored=scored):
            model(input_ids=ids, scored=scored, targets=ids[0, 1:]).log_probs.sum().backward()

        step()
        peaks.append(peak_bytes(step))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)
    assert peaks[1] < 512 * 64_000
