"""What a loss on distributions holds beyond the models, in bytes that the allocator counted: a bound on the CPU and, with
other kernels, a close guess elsewhere."""

import sys
from pathlib import Path

import pytest
from tokenizers_for_tests import byte_level

from trl_ctopd.losses import LOSSES, build_loss
from trl_ctopd.vocabulary import VocabularyPair


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from loss_memory import peak_bytes, scored_text


STUDENT_SIZE, TEACHER_SIZE, HIDDEN, TILE = 20_000, 24_000, 4, 64  # mostly rows beyond the tokenizers
TEXT = "The quick brown fox jumps over the lazy dog, 1234567890 times; пьют чаю, いろはにほへと. "
ON_LOGITS = [name for name, loss in LOSSES.items() if loss.signal == "logits"]
CASES = [*((name, {}) for name in ON_LOGITS), ("uld", {"uld_pairing": "chunk"})]


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
    short, long = (peak_bytes(build_loss(name, **knobs), batch) for batch in batches)
    assert bound / 8 < short < bound
    assert long < bound
    assert long < 768 * (STUDENT_SIZE + TEACHER_SIZE) * 4 / 10, "far from all logits at once"


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ON_LOGITS])
def test_a_loss_on_log_probs_never_holds_a_row_of_a_vocabulary(batches, name):
    assert peak_bytes(build_loss(name), batches[0]) < STUDENT_SIZE * 4
