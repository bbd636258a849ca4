"""`uld` and `gold` against TRL's own `ULDLoss`, fed as TRL's trainer feeds it; and where TRL goes wrong, what it does.

TRL averages over the groups of a text; ours is a sum over them divided by what the caller says, here their number.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers_for_tests import byte_level
from trl.experimental.gold import GOLDConfig
from trl.experimental.gold.gold_trainer import GOLDTrainer, ULDLoss, build_teacher_inputs_from_texts

from trl_ctopd import align_text, token_bytes
from trl_ctopd.losses import Distributions, ScoredChunks, build_loss
from trl_ctopd.text.vocabulary import VocabularyPair


EOS = 0
EXACT = {"rtol": 1e-6, "atol": 0.0}

# Digits that are cut otherwise, characters of which one side's tokens are halves, double spaces.
TEXTS = [
    "The quick brown fox jumps over the lazy dog, 1234567890 times",
    "def add(a, b):\n    return a + b  # 12 + 30 = 42\n\n\tprint(add(12, 30))",
    "Zwölf Boxkämpfer: 敏捷的棕色狐狸 🙂 naïf ?",
]
PAIRS = {
    "single digits, three digits": (byte_level(400, digits=1), byte_level(1200, digits=3)),
    "three digits, single digits": (byte_level(1200, digits=3), byte_level(400, digits=1)),
    "any digits, two digits": (byte_level(600), byte_level(500, digits=2)),
}
every_pair = pytest.mark.parametrize("pair", PAIRS)
every_text = pytest.mark.parametrize("text", TEXTS, ids=["words", "code", "many scripts"])


def trl_loss(student: Any, teacher: Any, **settings) -> ULDLoss:
    config = GOLDConfig(
        output_dir="unused",
        use_uld_loss=True,
        uld_token_merge_strategy="bayesian",
        bf16=False,
        report_to=[],
        **settings,
    )
    return ULDLoss(config, student_tokenizer=student, teacher_tokenizer=teacher)


@dataclass
class Reading:
    """A student's completion with random logits of both models; row i is the distribution that token i was drawn from.

    Args:
        extra: rows of the two heads beyond the tokenizers.
        sharp: how peaked the distributions are.
    """

    student: Any
    teacher: Any
    ids: list[int]
    extra: tuple[int, int] = (5, 9)
    sharp: float = 1.5
    seed: int = 0

    def __post_init__(self):
        self.read = align_text(self.ids, self.student, self.teacher)
        generator = torch.Generator().manual_seed(self.seed)
        self.student_logits, self.teacher_logits = (
            self.sharp * torch.randn(1, len(ids), len(tokenizer) + extra, generator=generator, dtype=torch.float64)
            for ids, tokenizer, extra in zip(
                (self.read.student_ids, self.read.teacher_ids), (self.student, self.teacher), self.extra, strict=True
            )
        )
        self.student_logits.requires_grad_()

    @property
    def groups(self) -> int:
        return len(self.read.chunk_bytes)

    def ours(self, name: str, num_items: int, **knobs) -> tuple[torch.Tensor, dict]:
        read = self.read
        batch = ScoredChunks(
            student_log_probs=observed(self.student_logits, read.student_ids),
            teacher_log_probs=observed(self.teacher_logits, read.teacher_ids),
            student_chunks=torch.tensor([read.student_chunks]),
            teacher_chunks=torch.tensor([read.teacher_chunks]),
            student_widths=torch.tensor([read.student_widths]),
            num_chunks=max(1, self.groups),
            student_ids=torch.tensor([read.student_ids]),
            teacher_ids=torch.tensor([read.teacher_ids]),
            student=Distributions(self.student_logits, lambda hidden: hidden),
            teacher=Distributions(self.teacher_logits, lambda hidden: hidden),
            vocabulary=VocabularyPair(
                self.student,
                self.teacher,
                student_size=self.student_logits.shape[-1],
                teacher_size=self.teacher_logits.shape[-1],
                student_stops=[EOS],
                teacher_stops=[EOS],
            ),
        )
        return build_loss(name, **knobs)(batch, num_items)

    def trl_inputs(self) -> dict[str, torch.Tensor]:
        """What TRL's trainer hands to its loss: each side's prompt of one token, the completion, the end of the turn,
        which the loss leaves out. Logits at the token before predict a token."""
        labels = torch.tensor([[-100, *self.ids, EOS]])
        batch = {"input_ids": torch.tensor([[EOS, *self.ids, EOS]]), "labels": labels}
        trainer = SimpleNamespace(
            use_uld_loss=True,
            teacher_tokenizer=self.teacher,
            uld_loss_fn=SimpleNamespace(use_extended_uld=True),
            _tokenizer=self.student,
        )
        GOLDTrainer._maybe_add_completion_byte_offsets(trainer, batch)
        completion = self.student.batch_decode([self.ids], clean_up_tokenization_spaces=False)
        teacher_ids, teacher_labels, _, teacher_offsets = build_teacher_inputs_from_texts(
            self.teacher, ["a"], completion
        )
        assert teacher_ids[0, 1:-1].tolist() == self.read.teacher_ids
        unused = [torch.zeros(1, 2, side.shape[-1]) for side in (self.student_logits, self.teacher_logits)]
        return {
            "student_logits": torch.cat([self.student_logits, unused[0]], 1),
            "teacher_logits": torch.cat([self.teacher_logits, unused[1]], 1),
            "student_labels": batch["labels"],
            "teacher_labels": teacher_labels,
            "student_input_ids": batch["input_ids"],
            "teacher_input_ids": teacher_ids,
            "student_byte_offsets": batch["byte_offsets"],
            "teacher_byte_offsets": teacher_offsets,
        }

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, self.student_logits)[0]

    def check_same(self, ours: torch.Tensor, trls: torch.Tensor):
        assert trls > 0.01
        torch.testing.assert_close(ours, trls, **EXACT)
        mine, theirs = self.gradient(ours), self.gradient(trls)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())


def observed(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, torch.tensor([ids])[..., None])[..., 0]


def reading(pair: str, text: str, **settings) -> Reading:
    student, teacher = PAIRS[pair]
    return Reading(student, teacher, student.encode(text, add_special_tokens=False), **settings)


# --- where TRL is right


@every_pair
@every_text
def test_chunks_are_the_groups_of_trls_alignment(pair, text):
    scene = reading(pair, text)
    inputs = scene.trl_inputs()
    groups = ULDLoss._align_by_byte_offsets(
        inputs["student_byte_offsets"][0, 1:-1].tolist(), inputs["teacher_byte_offsets"][0, 1:-1].tolist()
    )
    for side, chunks in zip(groups, (scene.read.student_chunks, scene.read.teacher_chunks), strict=True):
        assert [c for c, group in enumerate(side) for _ in group] == chunks
    assert any(len(group) > 1 for side in groups for group in side)


@every_pair
@every_text
def test_uld_by_position_is_trls_uld_that_is_not_extended(pair, text):
    scene = reading(pair, text)
    trl = trl_loss(scene.student, scene.teacher, use_extended_uld=False)
    positions = min(len(scene.read.student_ids), len(scene.read.teacher_ids))
    value, _ = scene.ours("uld", positions, uld_pairing="position")
    scene.check_same(value, trl(**scene.trl_inputs()))


@every_pair
@every_text
def test_uld_by_chunk_is_trls_extended_uld(pair, text):
    scene = reading(pair, text)
    trl = trl_loss(scene.student, scene.teacher, use_extended_uld=True)
    value, _ = scene.ours("uld", scene.groups, uld_pairing="chunk")
    scene.check_same(value, trl(**scene.trl_inputs()))


@every_pair
@every_text
def test_the_unmatched_part_of_gold_is_trls(pair, text):
    scene = reading(pair, text)
    settings = {"uld_hybrid_matched_weight": 0.0, "uld_hybrid_unmatched_weight": 1.0}
    trl = trl_loss(scene.student, scene.teacher, uld_use_hybrid_loss=True, beta=0.5, **settings)
    total = trl(**scene.trl_inputs())
    value, metrics = scene.ours("gold", scene.groups, matched_weight=0.0, unmatched_weight=1.0)
    unmatched, count = metrics["gold/unmatched"]
    assert count == scene.groups
    torch.testing.assert_close(unmatched / count, trl.last_unmatched_loss, **EXACT)
    scene.check_same(value, total)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@every_text
def test_gold_is_trls_where_both_sides_have_the_same_vocabulary_and_the_same_tokens(beta, text):
    """Then every part is a whole distribution, on which TRL's divergence is one."""
    tokenizer = byte_level(600)
    scene = Reading(tokenizer, tokenizer, tokenizer.encode(text, add_special_tokens=False), extra=(0, 0))
    assert scene.groups == len(scene.ids)
    trl = trl_loss(tokenizer, tokenizer, uld_use_hybrid_loss=True, beta=beta)
    total = trl(**scene.trl_inputs())
    assert trl.last_unmatched_loss == 0
    value, _ = scene.ours("gold", scene.groups, beta=beta)
    scene.check_same(value, total)


@every_pair
def test_golds_weight_of_the_matched_part_is_trls(pair):
    """It is the shared part of the teacher's head; TRL's parts are taken as they are."""
    scene = reading(pair, TEXTS[0])
    trl = trl_loss(scene.student, scene.teacher, uld_use_hybrid_loss=True, beta=0.5)
    total = trl(**scene.trl_inputs())
    weight = ((total - trl.last_unmatched_loss) / (trl.last_matched_loss - trl.last_unmatched_loss)).item()
    ours, metrics = scene.ours("gold", scene.groups)
    matched, unmatched = (metrics[f"gold/{part}"][0] / scene.groups for part in ("matched", "unmatched"))
    torch.testing.assert_close(ours, weight * matched + (1 - weight) * unmatched, **EXACT)


# --- where TRL is wrong


def one_shared_token_each(mass_of_the_student: float, mass_of_the_teacher: float) -> Reading:
    """A text of one token, on whose shared vocabulary both models agree, up to how much they put there in all."""
    student, teacher = PAIRS["any digits, two digits"]
    scene = Reading(student, teacher, student.encode("a"))
    shared = VocabularyPair(
        student,
        teacher,
        student_size=scene.student_logits.shape[-1],
        teacher_size=scene.teacher_logits.shape[-1],
        student_stops=[EOS],
        teacher_stops=[EOS],
    ).shared
    assert len(shared.student_rest) and len(shared.teacher_rest)
    weights = torch.arange(1.0, 1 + len(shared.student_ids), dtype=torch.float64)
    with torch.no_grad():
        for logits, ids, rest, mass in (
            (scene.student_logits, shared.student_ids, shared.student_rest, mass_of_the_student),
            (scene.teacher_logits, shared.teacher_ids, shared.teacher_rest, mass_of_the_teacher),
        ):
            logits[0, 0, ids] = (mass * weights / weights.sum()).log()
            logits[0, 0, rest] = torch.tensor((1 - mass) / len(rest), dtype=torch.float64).log()
    return scene


@pytest.mark.parametrize(("beta", "masses"), [(0.0, (0.9, 0.3)), (1.0, (0.3, 0.9))])
def test_trls_divergence_of_parts_that_do_not_sum_to_1_is_negative_where_ours_is_zero(beta, masses):
    """KL(q ‖ p) of parts is q's mass times the log of how much greater it is: negative where it is less."""
    scene = one_shared_token_each(*masses)
    trl = trl_loss(scene.student, scene.teacher, uld_use_hybrid_loss=True, beta=beta)
    trl(**scene.trl_inputs())
    less, more = sorted(masses)
    expected = less * torch.tensor(less / more, dtype=torch.float64).log()
    torch.testing.assert_close(trl.last_matched_loss, expected, rtol=1e-6, atol=0)
    assert trl.last_matched_loss < -0.3
    _, metrics = scene.ours("gold", 1, beta=beta)
    matched, _ = metrics["gold/matched"]
    assert matched.abs() < 1e-12


def test_trls_divergence_at_beta_one_half_is_above_zero_for_parts_that_differ_in_their_mass_alone():
    """It cannot be negative there, x log x being convex; it is zero for parts that are equal, not for those alike."""
    scene = one_shared_token_each(0.9, 0.3)
    trl = trl_loss(scene.student, scene.teacher, uld_use_hybrid_loss=True, beta=0.5)
    trl(**scene.trl_inputs())
    assert trl.last_matched_loss > 0.05
    _, metrics = scene.ours("gold", 1, beta=0.5)
    assert metrics["gold/matched"][0].abs() < 1e-12


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@every_pair
def test_golds_matched_part_is_never_below_zero(beta, pair):
    for seed in range(5):
        scene = reading(pair, TEXTS[seed % 3], sharp=3.0, seed=seed)
        matched, _ = scene.ours("gold", scene.groups, beta=beta)[1]["gold/matched"]
        assert matched > 0


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@every_text
def test_gold_of_a_model_against_itself_is_zero_and_so_is_its_gradient(beta, text):
    tokenizer = byte_level(600)
    scene = Reading(tokenizer, tokenizer, tokenizer.encode(text, add_special_tokens=False), extra=(5, 5))
    scene.teacher_logits = scene.student_logits.detach()
    value, _ = scene.ours("gold", 1, beta=beta)
    assert value.abs() < 1e-12
    assert scene.gradient(value).abs().max() < 1e-12


# --- a byte that is no UTF-8


BEFORE, AFTER = "The quick brown fox", " jumps over the lazy dog, 1234567890 times"


def broken(student: Any, teacher: Any, byte: bytes = b"\xff", **settings) -> tuple[Reading, Reading, int]:
    """A completion with a byte in its middle that is no UTF-8; the same with it left out, with the same logits
    elsewhere; and which student token it is."""
    before, after = (student.encode(text, add_special_tokens=False) for text in (BEFORE, AFTER))
    bad = token_bytes(student).index(byte)
    whole = Reading(student, teacher, [*before, *after], **settings)
    scene = Reading(student, teacher, [*before, bad, *after], **settings)
    assert scene.read.text == f"{BEFORE}\ufffd{AFTER}"
    keeps = [[chunk >= 0 for chunk in side] for side in (scene.read.student_chunks, scene.read.teacher_chunks)]
    whole.student_logits = scene.student_logits.detach()[:, keeps[0]].requires_grad_()
    whole.teacher_logits = scene.teacher_logits[:, keeps[1]]
    return scene, whole, len(before)


@pytest.mark.parametrize("byte", [b"\xff", b"\xe4", b"\x94"], ids=["never in UTF-8", "a beginning", "a middle"])
@every_pair
def test_only_the_stretch_around_a_byte_that_is_no_utf_8_takes_no_part(pair, byte):
    scene, whole, at = broken(*PAIRS[pair], byte)
    assert [n for n, chunk in enumerate(scene.read.student_chunks) if chunk < 0] == [at]
    ids, chunks = scene.read.teacher_ids, scene.read.teacher_chunks
    masked = b"".join(token_bytes(scene.teacher)[i] for i, chunk in zip(ids, chunks, strict=True) if chunk < 0)
    assert masked == "\ufffd".encode()
    assert [i for i, chunk in zip(ids, chunks, strict=True) if chunk >= 0] == whole.read.teacher_ids
    assert scene.read.chunk_bytes == whole.read.chunk_bytes
    assert [chunk for chunk in chunks if chunk >= 0] == whole.read.teacher_chunks


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("uld", {"uld_pairing": "position"}), ("uld", {"uld_pairing": "chunk"}), ("gold", {}), ("gold", {"beta": 0.0})],
)
@every_pair
def test_a_byte_that_is_no_utf_8_leaves_the_loss_of_the_rest_as_it_is(pair, name, knobs):
    scene, whole, at = broken(*PAIRS[pair])
    value, expected = (side.ours(name, whole.groups, **knobs)[0] for side in (scene, whole))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    gradient = scene.gradient(value)
    assert not gradient[:, at].any()
    rest = torch.cat([gradient[:, :at], gradient[:, at + 1 :]], 1)
    torch.testing.assert_close(rest, whole.gradient(expected), rtol=1e-9, atol=1e-15)


@every_pair
def test_trls_groups_hold_other_bytes_on_either_side_after_a_byte_that_is_no_utf_8(pair):
    """It counts a byte for it in the student's ids, and in the text that it decodes them to the three of U+FFFD."""
    scene, _, at = broken(*PAIRS[pair])
    inputs = scene.trl_inputs()
    student_offsets, teacher_offsets = (
        inputs[f"{side}_byte_offsets"][0, 1:-1].tolist() for side in ("student", "teacher")
    )
    assert student_offsets[-1][1] == len(BEFORE) + 1 + len(AFTER)
    assert teacher_offsets[-1][1] == len(BEFORE) + 3 + len(AFTER)
    groups = zip(*ULDLoss._align_by_byte_offsets(student_offsets, teacher_offsets), strict=True)
    written = [
        [b"".join(token_bytes(tokenizer)[ids[n]] for n in group) for tokenizer, ids, group in sides]
        for sides in (
            ((scene.student, scene.read.student_ids, one), (scene.teacher, scene.read.teacher_ids, other))
            for one, other in groups
        )
    ]
    same = [one == other for one, other in written]
    first = same.index(False)
    assert b"".join(one for one, _ in written[:first]) == BEFORE.encode()
    assert not any(same[first:])


def test_trl_finds_fault_after_a_byte_that_is_no_utf_8_with_a_teacher_that_agrees_everywhere():
    """Student and teacher are one model, and but for the byte every distribution of theirs is the same."""
    tokenizer = byte_level(600)
    scene, whole, _ = broken(tokenizer, tokenizer, extra=(0, 0), sharp=3.0)
    for side in (scene, whole):
        kept = [[chunk >= 0 for chunk in chunks] for chunks in (side.read.student_chunks, side.read.teacher_chunks)]
        side.teacher_logits[:, kept[1]] = side.student_logits.detach()[:, kept[0]]
    trl = trl_loss(tokenizer, tokenizer)
    assert trl(**whole.trl_inputs()) == 0
    assert trl(**scene.trl_inputs()) > 0.1
    assert scene.ours("uld", 1, uld_pairing="chunk")[0] == whole.ours("uld", 1, uld_pairing="chunk")[0] == 0
