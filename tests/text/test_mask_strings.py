"""Strings that are not to be scored: in plain text, in a template's markup, and with one tokenizer on both sides."""

import numpy as np
import pytest
from test_sections import QWEN, aligner_of, rollout, side
from tokenizers_for_tests import byte_level, gemma_like
from toys import fix_rollouts

from trl_ctopd import TextAligner
from trl_ctopd.looking.viewer.segments import figures
from trl_ctopd.rollouts.metrics import rollout_metrics
from trl_ctopd.rollouts.pairing import Prompt, pair
from trl_ctopd.text.one_tokenizer import OneTokenizer
from trl_ctopd.text.sections import SectionAligner


def masked(alignment):
    return [(alignment._spelled[one.start : one.end].decode(), one.reason) for one in alignment.masked]


def scored(found):
    """The student's tokens that take part, as text."""
    table = side("qwen3").tokenizer
    return [table.decode([i]) for i, c in zip(found.student_ids, found.student_chunks, strict=True) if c >= 0]


def test_markup_between_two_sections_is_masked_where_it_has_the_string_and_its_sections_are_not():
    plain = rollout("qwen3", "gptoss", QWEN)
    ours, theirs = side("qwen3"), side("gptoss")
    aligner = aligner_of(ours, theirs, ["</think>"])
    [found] = pair(
        [plain.prompt],
        [plain.student_ids],
        aligner,
        turn_ends=dict.fromkeys(ours.stop_ids(), theirs.turn_end),
        sections=SectionAligner(aligner, ours, theirs, masked_strings=["</think>"]),
    )
    assert "</think>" in "".join(scored(plain)) and "</think>" not in "".join(scored(found))
    assert {*scored(plain)} >= {*scored(found)} >= {"<think>", "<|im_end|>"}
    assert ("Two." in "".join(scored(found))) and ("Four." in "".join(scored(found)))
    [(text, reason)] = [own for own in masked(found.alignment) if "</think>" in own[0]]
    assert reason == "markup" and text.strip() == "</think>"
    assert found.teacher_ids == plain.teacher_ids, "the teacher reads what it read"


def test_with_one_tokenizer_the_tokens_that_hold_a_string_take_no_part_on_either_side():
    tokenizer = byte_level()
    ids = tokenizer.encode("the dog</think> is two", add_special_tokens=False)
    [plain], [found] = (OneTokenizer(tokenizer, own)([ids]) for own in ((), ["</think>"]))
    spelled = np.cumsum([len(own) for own in plain.chunk_bytes])
    held = [begin < 15 and end > 7 for begin, end in zip([0, *spelled[:-1]], spelled, strict=True)]
    assert any(held) and plain.student_chunks == list(range(len(ids)))
    numbers = iter(range(len(ids)))
    expected = [-1 if own else next(numbers) for own in held]
    assert found.student_chunks == found.teacher_chunks == expected
    assert found.teacher_ids == plain.teacher_ids == ids
    assert found.chunk_bytes == [own for own, out in zip(plain.chunk_bytes, held, strict=True) if not out]
    assert masked(found) == [("</think>", "markup")] and not plain.masked


def test_a_control_token_of_that_name_takes_no_part_either():
    tokenizer = gemma_like()
    control = tokenizer.all_special_ids[0]
    ids = [*tokenizer.encode("the dog", add_special_tokens=False), control]
    [plain], [found] = (OneTokenizer(tokenizer, own)([ids]) for own in ((), [tokenizer.convert_ids_to_tokens(control)]))
    assert plain.student_chunks[-1] >= 0 and found.student_chunks == [*plain.student_chunks[:-1], -1]


def test_a_run_counts_what_is_masked_and_the_teacher_reads_it_all_the_same(build):
    def run(**settings):
        trainer = fix_rollouts(build(train_sampling_strategy="sequential", **settings))
        trainer.train()
        return trainer.state.log_history[0]

    plain, found = run(), run(mask_strings=["sum"])
    assert plain["masked_bytes/markup"] == 0 < found["masked_bytes/markup"]
    assert found["alignment/masked_fraction"] > plain["alignment/masked_fraction"]


@pytest.mark.parametrize("strings", ["</think>", [""], [3]])
def test_what_is_no_list_of_strings_is_refused(build, strings):
    with pytest.raises(ValueError, match="mask_strings must be a list of strings"):
        build(mask_strings=strings)


@pytest.mark.parametrize(
    ("strings", "held"),
    [(["is the", "the sum"], "is the sum"), (["is the sum", "the", "sum"], "is the sum"), (["the the"], "the the the")],
    ids=["overlapping", "nested", "with itself"],
)
def test_bytes_that_several_strings_hold_count_once(strings, held):
    student, teacher = byte_level(), gemma_like()
    text = f"Dogs {held} of two"
    ids = student.encode(text, add_special_tokens=False)
    aligner = TextAligner(student, teacher, masked_strings=strings)
    [found] = pair([Prompt([1], [2])], [ids], aligner, turn_ends={})
    assert rollout_metrics([found])["masked_bytes/markup"] == (len(held), len(text))
    assert figures([found.alignment])["masked_bytes"] == {"markup": len(held)}


@pytest.mark.parametrize(
    ("teacher", "policies", "reason", "count"),
    [
        ("gptoss", {"markup_policy": "mask"}, "markup", len(QWEN) - len("Two.Four.<|im_end|>")),
        ("phi3", {}, "thought", len("<think>\nTwo.\n</think>")),
    ],
)
def test_the_share_of_masked_bytes_is_one_of_all_that_the_student_wrote_its_markup_by_name(
    teacher, policies, reason, count
):
    found = rollout("qwen3", teacher, QWEN, **policies)
    assert rollout_metrics([found])[f"masked_bytes/{reason}"] == (pytest.approx(count, abs=2), len(QWEN))
    assert sum(found.student_widths) < count
