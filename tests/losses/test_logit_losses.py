"""The losses on distributions and strict_sampled against references that walk over dictionaries of byte strings."""

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import loss_references
import pytest
import torch
import toys
from loss_references import Row, Vocabularies, Vocabulary
from tokenizers import AddedToken, Tokenizer
from tokenizers_for_tests import byte_level, metaspace_bpe, unigram
from transformers import PreTrainedTokenizerFast

from trl_ctopd import align_text, token_bytes
from trl_ctopd.losses import DPCA, ScoredChunks, build_loss
from trl_ctopd.losses.bpm import standing_rows
from trl_ctopd.losses.distributions import Distributions
from trl_ctopd.losses.warping import warping_path
from trl_ctopd.text.one_tokenizer import OneTokenizer
from trl_ctopd.text.vocabulary import VocabularyPair


# (name, knobs): every loss, its defaults first
LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("strict_sampled", {}),
    ("strict_topk", {}),
    ("simct", {}),
    ("gold", {}),
    ("uld", {}),
    ("uld", {"uld_pairing": "chunk"}),
    ("bpm", {}),
    ("escd", {}),
    ("reverse_kl", {}),
    ("multi_level_ot", {}),
    ("xtoken", {}),
    ("cdm", {"top_k": 12, "threshold": 0.45}),
]
KNOBS: list[tuple[str, dict[str, Any]]] = [
    ("strict_sampled", {"advantage_clip": 1.0}),
    ("strict_sampled", {"advantage_clip": None}),
    ("strict_topk", {"top_k": None}),
    ("strict_topk", {"top_k": 3}),
    ("gold", {"beta": 0.0}),
    ("gold", {"beta": 0.9}),
    ("gold", {"beta": 1.0}),
    ("gold", {"matched_weight": 0.7}),
    ("gold", {"matched_weight": 2.0, "unmatched_weight": 3.0}),
    ("bpm", {"beta": 0.0, "mask_whitespace": False}),
    ("bpm", {"beta": 0.9}),
    ("escd", {"mask_whitespace": False}),
    ("reverse_kl", {"advantage_clip": 2.0}),
    ("reverse_kl", {"advantage_clip": None}),
    ("reverse_kl", {"top_k": 0}),
    ("reverse_kl", {"top_k": 5}),
    ("multi_level_ot", {"top_k": 5, "log_weight": 0.7, "sinkhorn_weight": 2.0, "epsilon": 0.5, "iterations": 3}),
    ("multi_level_ot", {"top_k": 10_000, "log_weight": 0.0}),
    ("cdm", {}),
    ("cdm", {"top_k": 40, "threshold": 0.25}),  # a distance that occurs
    ("cdm", {"top_k": 3, "threshold": 1.0}),
]


def named(losses: Sequence[tuple[str, dict[str, Any]]]) -> list[Any]:
    return [
        pytest.param(name, knobs, id=" ".join([name, *(f"{knob}={x}" for knob, x in knobs.items())]))
        for name, knobs in losses
    ]


every_loss = pytest.mark.parametrize(("name", "knobs"), named(LOSSES))


# --- pairs of tokenizers


@dataclass(frozen=True, eq=False)
class Pair:
    """Two tokenizers under heads that are a few rows longer, and how a turn ends on either side."""

    student: Any
    teacher: Any
    student_stops: list[int]
    teacher_stops: list[int]
    turn_end: list[int]  # in the teacher's ids
    extra: tuple[int, int] = (5, 11)

    @functools.cached_property
    def sizes(self) -> tuple[int, int]:
        return len(token_bytes(self.student)) + self.extra[0], len(token_bytes(self.teacher)) + self.extra[1]

    @functools.cached_property
    def vocabulary(self) -> VocabularyPair:
        """The library's."""
        return VocabularyPair(
            self.student,
            self.teacher,
            student_size=self.sizes[0],
            teacher_size=self.sizes[1],
            student_stops=self.student_stops,
            teacher_stops=self.teacher_stops,
            cache_dir=None,
        )

    @functools.cached_property
    def vocabularies(self) -> Vocabularies:
        """The references'."""
        student, teacher = (
            Vocabulary(rows + [b""] * (size - len(rows)), stops)
            for rows, size, stops in zip(
                (token_bytes(self.student), token_bytes(self.teacher)),
                self.sizes,
                (self.student_stops, self.teacher_stops),
                strict=True,
            )
        )
        encode = functools.partial(self.teacher.encode, add_special_tokens=False, split_special_tokens=True)
        known = self.vocabulary.student_puts_a_space, self.vocabulary.later_digits_undo
        return Vocabularies(student, teacher, encode, self._going_on, *known)

    def _going_on(self, w: int) -> set[int]:
        return set() if self.vocabulary.is_one_tokenizer else {*self.vocabulary.continuations.of(w).tolist()}


def _byte_levels() -> Pair:
    return Pair(byte_level(400, digits=1), byte_level(1200, digits=3), [0], [0], [0])


def _prefix_of_the_teacher() -> Pair:
    """The teacher ends its turn with two tokens, so that no single one is the student's stop."""
    return Pair(byte_level(600), metaspace_bpe(), [0], [], [2, 1])


def _text_of_the_teacher() -> Pair:
    """Of the teacher above, the end of a plain text, which it writes in one token."""
    return replace(_prefix_of_the_teacher(), turn_end=[1])


def _prefix_of_the_student() -> Pair:
    """Two stops of the student's; its letters are pieces and byte rows."""
    return Pair(metaspace_bpe(), byte_level(600), [2, 1], [0], [0])


def _digits_and_numbers() -> Pair:
    """The toys: single digits, numbers of two; several stops on both sides."""
    return Pair(toys.student_tokenizer(), toys.teacher_tokenizer(), [2, 0], [4, 1], [4])


def _numbers_and_digits() -> Pair:
    """The teacher writes a newline before it ends its turn."""
    newline = token_bytes(byte_level(400, digits=1)).index(b"\n")
    return Pair(byte_level(600, digits=2), byte_level(400, digits=1), [0], [], [newline, 0])


def _prefixes_of_both() -> Pair:
    return Pair(metaspace_bpe(), unigram(), [2], [1], [1])


TOYS: dict[str, Callable[[], Pair]] = {
    "byte-level to byte-level": functools.cache(_byte_levels),
    "teacher with a dummy prefix": functools.cache(_prefix_of_the_teacher),
    "text of a teacher with a dummy prefix": functools.cache(_text_of_the_teacher),
    "student with a dummy prefix": functools.cache(_prefix_of_the_student),
    "two dummy prefixes": functools.cache(_prefixes_of_both),
    "digits to numbers": functools.cache(_digits_and_numbers),
    "numbers to digits": functools.cache(_numbers_and_digits),
}


# --- completions

# What the toys were trained on, so that their tokens are long, between what they know less of.
TEXTS = [
    "What is 42 plus 94?\n\n the lazy dog, 1234567890 times",
    "def add(a, b):\n    return 96 + b  # 12 is the sum of two",
    "The quick brown fox  jumps over été \t Zwölf 30 Boxkämpfer",
    "敏捷的棕色狐狸 hundred thousand 57 is the sum; the dog doesn't care",
]


def in_any_tokens(text: bytes, rows: Sequence[bytes], rng: random.Random) -> list[int]:
    """The text cut at random into the tokenizer's tokens."""
    ids = []
    while text:
        fitting = [v for v, row in enumerate(rows) if row and text.startswith(row)]
        longest = sorted(fitting, key=lambda v: len(rows[v]))[-3:]
        ids.append(rng.choice(rng.choice([fitting, longest])))
        text = text[len(rows[ids[-1]]) :]
    return ids


@dataclass(frozen=True)
class Completion:
    """What one row scores, by side: ids and their chunks."""

    student_ids: list[int]
    teacher_ids: list[int]
    student_chunks: list[int]
    teacher_chunks: list[int]
    widths: list[int]


def completion(pair: Pair, ids: list[int], ended: bool = False) -> Completion:
    read = align_text(ids, pair.student, pair.teacher)
    chunk, end = len(read.chunk_bytes), pair.turn_end if ended else []
    return Completion(
        ids + pair.student_stops[:1] * ended,
        read.teacher_ids + end,
        read.student_chunks + [chunk] * ended,
        read.teacher_chunks + [chunk] * len(end),
        read.student_widths + [0] * ended,
    )


def completions(pair: Pair, seed: int = 0, tokens: int = 12) -> list[Completion]:
    """A text as its tokenizer writes it, one in other tokens, one of any ids (no UTF-8; padding rows) and none."""
    rng = random.Random(seed)
    rows = token_bytes(pair.student)
    first, second = rng.sample(TEXTS, 2)
    written = pair.student.encode(first, add_special_tokens=False)[:tokens]
    with_prefix = b"".join(rows[v] for v in pair.student.encode(second, add_special_tokens=False))
    text = [v for v, row in enumerate(rows) if row]
    return [
        completion(pair, written, ended=True),
        completion(pair, in_any_tokens(with_prefix, rows, rng)[:tokens], ended=True),
        completion(pair, [*(rng.choice(text) for _ in range(tokens)), pair.sizes[0] - 1, rng.choice(text)]),
        Completion([], [], [], [], []),
    ]


# --- micro-batches


@dataclass(frozen=True)
class Scene:
    """A micro-batch with all logits (B, S, V_S) and (B, T, V_T); the student's rows begin with a prompt."""

    pair: Pair
    student_ids: torch.Tensor
    teacher_ids: torch.Tensor
    student_chunks: torch.Tensor
    teacher_chunks: torch.Tensor
    widths: torch.Tensor
    student_logits: torch.Tensor
    teacher_logits: torch.Tensor

    def __getitem__(self, rows: slice) -> "Scene":
        tensors = {name: value[rows] for name, value in vars(self).items() if name != "pair"}
        return replace(self, **tensors)

    @property
    def num_chunks(self) -> int:
        return max(1, 1 + int(max(self.student_chunks.max(), self.teacher_chunks.max())))


def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    length = max(1, *map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def logits(kind: str, ids: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random ones; where they are peaked, half of the tokens are likely and the others anything."""
    values = torch.randn(*ids.shape, size, generator=generator, dtype=torch.float64)
    if kind == "flat":
        return values / 2
    likely = 9 * torch.rand(ids.shape, generator=generator, dtype=torch.float64).round()
    return (4 * values).scatter_add(-1, ids[..., None], likely[..., None])


def scene(pair: Pair, rows: Sequence[Completion], kind: str = "peaked", seed: int = 0) -> Scene:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    prompts = [[rng.randrange(pair.sizes[0]) for _ in range(1 + n % 3)] for n in range(len(rows))]
    student_ids = padded([prompt + row.student_ids for prompt, row in zip(prompts, rows, strict=True)], 0)
    teacher_ids = padded([row.teacher_ids for row in rows], 0)
    return Scene(
        pair,
        student_ids,
        teacher_ids,
        padded([[-1] * len(prompt) + row.student_chunks for prompt, row in zip(prompts, rows, strict=True)], -1),
        padded([row.teacher_chunks for row in rows], -1),
        padded([[0] * len(prompt) + row.widths for prompt, row in zip(prompts, rows, strict=True)], 0),
        logits(kind, student_ids, pair.sizes[0], generator),
        logits(kind, teacher_ids, pair.sizes[1], generator),
    )


@functools.cache
def toy_scene(name: str, kind: str = "peaked", seed: int = 0) -> Scene:
    pair = TOYS[name]()
    return scene(pair, completions(pair, seed), kind, seed)


def log_probs(logits: torch.Tensor, ids: torch.Tensor, chunks: torch.Tensor) -> torch.Tensor:
    """Of the tokens themselves, 0 where none takes part."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return scores.gather(-1, ids[..., None])[..., 0].masked_fill(chunks < 0, 0)


def batch_of(scene: Scene, tile_tokens: int = 1024) -> ScoredChunks:
    """What the library is given."""
    return ScoredChunks(
        log_probs(scene.student_logits, scene.student_ids, scene.student_chunks),
        log_probs(scene.teacher_logits, scene.teacher_ids, scene.teacher_chunks),
        scene.student_chunks,
        scene.teacher_chunks,
        scene.widths,
        scene.num_chunks,
        student_ids=scene.student_ids,
        teacher_ids=scene.teacher_ids,
        student=Distributions(scene.student_logits, lambda hidden: hidden),
        teacher=Distributions(scene.teacher_logits, lambda hidden: hidden),
        vocabulary=scene.pair.vocabulary,
        tile_tokens=tile_tokens,
    )


def value_and_gradient(
    loss: Any, scene: Scene, num_items: int = 7, tile_tokens: int = 1024
) -> tuple[float, torch.Tensor]:
    """The library's loss, and its gradient with respect to the student's logits."""
    leaf = scene.student_logits.clone().requires_grad_()
    value, _ = loss(batch_of(replace(scene, student_logits=leaf), tile_tokens), num_items)
    value.backward()
    return value.item(), leaf.grad


def reference_rows(scene: Scene) -> list[Row]:
    return [
        Row(*(ids.tolist() for ids in row[:4]), *row[4:])
        for row in zip(
            scene.student_ids,
            scene.teacher_ids,
            scene.student_chunks,
            scene.teacher_chunks,
            scene.student_logits.log_softmax(-1),
            scene.teacher_logits.log_softmax(-1),
            strict=True,
        )
    ]


def expected(name: str, knobs: dict[str, Any], scene: Scene, num_items: int = 7) -> tuple[float, torch.Tensor]:
    """`value_and_gradient` of the reference."""
    reference = getattr(loss_references, name)
    leaf = scene.student_logits.clone().requires_grad_()
    rows = reference_rows(replace(scene, student_logits=leaf))
    value = sum((reference(row, scene.pair.vocabularies, **knobs) for row in rows), 0 * leaf.sum()) / num_items
    value.backward()
    return value.item(), leaf.grad


def assert_equal(
    found: tuple[float, torch.Tensor], wanted: tuple[float, torch.Tensor], tolerance: float = 1e-7
) -> None:
    """Relative to the greatest part of the gradient, or to 1e-3 where there is next to none."""
    assert found[0] == pytest.approx(wanted[0], rel=tolerance, abs=tolerance * 1e-3)
    assert found[1].isfinite().all()
    bound = tolerance * max(1e-3, wanted[1].abs().max().item())
    assert (found[1].double() - wanted[1]).abs().max().item() <= bound


# --- value and gradient


@pytest.mark.parametrize("pair", TOYS)
@pytest.mark.parametrize(("name", "knobs"), named(LOSSES + KNOBS))
def test_value_and_gradient_equal_the_formula_over_byte_strings(pair, name, knobs):
    micro_batch = toy_scene(pair)
    wanted = expected(name, knobs, micro_batch)
    assert wanted[1].abs().max() > 1e-4
    assert_equal(value_and_gradient(build_loss(name, **knobs), micro_batch), wanted)


@pytest.mark.parametrize("pair", TOYS)
@pytest.mark.parametrize("seed", [1, 2])
@every_loss
def test_flat_distributions_of_other_completions_give_the_formula_too(pair, seed, name, knobs):
    micro_batch = toy_scene(pair, "flat", seed)
    assert_equal(value_and_gradient(build_loss(name, **knobs), micro_batch), expected(name, knobs, micro_batch))


def scored_chunks(scene: Scene) -> list[tuple[Row, loss_references.Chunk]]:
    return [(row, chunk) for row in reference_rows(scene) for chunk in row.scorable()]


def test_the_completions_hold_every_kind_of_chunk_byte_and_match():
    """What the tests above are about does occur in them."""
    shapes, excesses, written, fuzzy, invalid = set(), set(), 0, 0, 0
    for name in TOYS:
        micro_batch, pair = toy_scene(name), TOYS[name]().vocabularies
        for row, chunk in scored_chunks(micro_batch):
            shapes.add((min(2, len(chunk.student)), min(2, len(chunk.teacher))))
            excesses.add(row.excess(chunk, pair))
            for i, j in loss_references.cdm_pairs(row, pair, chunk):
                forward, backward = loss_references.cdm_maps(row, pair, i, j, 12, 0.45)
                fuzzy += sum(w not in pair.student_partner for w, _ in forward)
                fuzzy += sum(v not in pair.teacher_partner for v, _ in backward)
        for row in reference_rows(micro_batch):
            written += sum(bool(found.written) for found in loss_references.byte_rows(row, pair, True))
            invalid += sum(pair.student.rows[v] == b"" for v in row.student_ids)
    assert shapes == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert excesses == {-1, 0, 1}
    assert min(written, fuzzy, invalid) > 10


# --- one tokenizer


def one_tokenizer_scene(tokenizer: Any, stops: list[int], tokens_a_chunk: int = 1, kind: str = "peaked") -> Scene:
    """Two heads of one tokenizer over the very same ids, control tokens and a padding row among them."""
    pair = Pair(tokenizer, tokenizer, stops, stops, stops[:1], extra=(5, 5))
    rng = random.Random(0)
    rows = []
    for length in (9, 14):
        ids = [rng.randrange(pair.sizes[0] - 5) for _ in range(length)] + [pair.sizes[0] - 2, 0, stops[-1]]
        read = OneTokenizer(tokenizer)([ids])[0]
        chunks = [[max(-1, c // tokens_a_chunk) for c in side] for side in (read.student_chunks, read.teacher_chunks)]
        rows.append(Completion(read.student_ids, read.teacher_ids, *chunks, read.student_widths))
    return scene(pair, rows, kind)


def with_one_model(micro_batch: Scene) -> Scene:
    """The same where the teacher is the student: the n-th token that it scores is the student's n-th."""
    teacher_logits = micro_batch.teacher_logits.clone()
    for row in range(len(teacher_logits)):
        ours, theirs = (chunks[row] >= 0 for chunks in (micro_batch.student_chunks, micro_batch.teacher_chunks))
        teacher_logits[row, theirs] = micro_batch.student_logits[row, ours]
    return replace(micro_batch, teacher_logits=teacher_logits)


@pytest.mark.parametrize("tokens_a_chunk", [1, 2])
@pytest.mark.parametrize("kind", ["peaked", "flat"])
@every_loss
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(name, knobs, kind, tokens_a_chunk):
    micro_batch = with_one_model(one_tokenizer_scene(toys.student_tokenizer(), [2], tokens_a_chunk, kind))
    value, gradient = value_and_gradient(build_loss(name, **knobs), micro_batch)
    assert abs(value) < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize(("name", "knobs"), named([loss for loss in LOSSES if loss[0] != "cdm"]))
def test_two_spellings_of_one_text_are_no_loss_for_a_student_that_is_its_teacher(name, knobs):
    """Letters are pieces and byte rows, and there are two stops. cdm compares an id with the first of its class."""
    value, gradient = value_and_gradient(
        build_loss(name, **knobs), with_one_model(one_tokenizer_scene(metaspace_bpe(), [2, 1]))
    )
    assert abs(value) < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize(("tokenizer", "stops"), [(toys.student_tokenizer, [2, 3]), (metaspace_bpe, [2])])
@every_loss
def test_two_models_of_one_tokenizer_give_the_formula_too(name, knobs, tokenizer, stops):
    """Control tokens in the middle of a text are chunks without text there."""
    micro_batch = one_tokenizer_scene(tokenizer(), stops)
    assert_equal(value_and_gradient(build_loss(name, **knobs), micro_batch), expected(name, knobs, micro_batch))


@pytest.mark.parametrize("credit", ["semantic", "macro"])
def test_strict_sampled_is_dpca_where_all_chunks_are_one_to_one(credit):
    micro_batch = one_tokenizer_scene(toys.student_tokenizer(), [2])
    found = value_and_gradient(build_loss("strict_sampled"), micro_batch)
    wanted = value_and_gradient(DPCA(credit, event="open"), micro_batch)
    assert wanted[1].abs().max() > 0.1
    assert_equal(found, wanted, 1e-12)


# --- batches

COMMON = "teacher with a dummy prefix"


def wider(micro_batch: Scene, student: int = 3, teacher: int = 4) -> Scene:
    """The same with padding at the end, and any logits there."""

    def pad(x: torch.Tensor, extra: int, fill: int) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, extra), value=fill)

    def noise(x: torch.Tensor, extra: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        more = 4 * torch.randn(len(x), extra, x.shape[-1], generator=generator, dtype=x.dtype)
        return torch.cat([x, more], 1)

    return Scene(
        micro_batch.pair,
        pad(micro_batch.student_ids, student, 0),
        pad(micro_batch.teacher_ids, teacher, 0),
        pad(micro_batch.student_chunks, student, -1),
        pad(micro_batch.teacher_chunks, teacher, -1),
        pad(micro_batch.widths, student, 0),
        noise(micro_batch.student_logits, student),
        noise(micro_batch.teacher_logits, teacher),
    )


@every_loss
def test_tokens_without_part_get_no_gradient(name, knobs):
    """Prompts, padding and what is masked."""
    micro_batch = toy_scene(COMMON)
    _, gradient = value_and_gradient(build_loss(name, **knobs), micro_batch)
    assert gradient.any()
    assert not gradient[micro_batch.student_chunks < 0].any()


@every_loss
def test_padding_changes_nothing(name, knobs):
    micro_batch, loss = toy_scene(COMMON), build_loss(name, **knobs)
    value, gradient = value_and_gradient(loss, wider(micro_batch))
    assert not gradient[:, -3:].any()
    assert_equal((value, gradient[:, :-3]), value_and_gradient(loss, micro_batch), 1e-9)


@pytest.mark.parametrize("size", [1, 3])
@every_loss
def test_micro_batches_of_one_step_add_up_to_the_whole_batch(name, knobs, size):
    """One row at a time too, the empty one among them."""
    micro_batch, loss = toy_scene(COMMON), build_loss(name, **knobs)
    parts = [value_and_gradient(loss, micro_batch[start : start + size]) for start in range(0, 4, size)]
    whole = sum(value for value, _ in parts), torch.cat([gradient for _, gradient in parts])
    assert_equal(value_and_gradient(loss, micro_batch), whole, 1e-9)


@every_loss
def test_renumbering_the_chunks_changes_nothing(name, knobs):
    micro_batch, loss = toy_scene(COMMON), build_loss(name, **knobs)
    shuffle = torch.tensor([*random.Random(0).sample(range(micro_batch.num_chunks), micro_batch.num_chunks), -1])
    renumbered = replace(
        micro_batch,
        student_chunks=shuffle[micro_batch.student_chunks],
        teacher_chunks=shuffle[micro_batch.teacher_chunks],
    )
    assert_equal(value_and_gradient(loss, renumbered), value_and_gradient(loss, micro_batch), 1e-9)


@pytest.mark.parametrize("tile_tokens", [1, 8, 64, 10**6])
@every_loss
def test_the_size_of_a_tile_changes_nothing(name, knobs, tile_tokens):
    micro_batch, loss = toy_scene(COMMON), build_loss(name, **knobs)
    found = value_and_gradient(loss, micro_batch, tile_tokens=tile_tokens)
    assert_equal(found, value_and_gradient(loss, micro_batch), 1e-9)


@every_loss
def test_num_items_divides_value_and_gradient(name, knobs):
    """By a power of two, which rounds nothing: escd's prefix sums magnify a rounding that comes back through them."""
    micro_batch, loss = toy_scene(COMMON), build_loss(name, **knobs)
    value, gradient = value_and_gradient(loss, micro_batch, num_items=4)
    assert_equal((value * 4, gradient * 4), value_and_gradient(loss, micro_batch, num_items=1), 1e-9)


def in_dtype(micro_batch: Scene, dtype: torch.dtype) -> Scene:
    return replace(
        micro_batch,
        student_logits=micro_batch.student_logits.to(dtype),
        teacher_logits=micro_batch.teacher_logits.to(dtype),
    )


def without_ties(micro_batch: Scene) -> Scene:
    """Logits of up to 8 nats that bfloat16 can hold, no two equal at a position: no choice depends on rounding."""
    halvings, steps = torch.arange(-8.0, 3.0), torch.arange(128) / 128
    positive = (2 ** halvings[:, None] * (1 + steps)).flatten().double()
    grid = torch.cat([-positive, positive])
    assert torch.equal(grid.bfloat16().double(), grid) and len(grid.unique()) == 2816
    generator = torch.Generator().manual_seed(0)

    def draw(like: torch.Tensor) -> torch.Tensor:
        positions, size = like[..., 0].numel(), like.shape[-1]
        rows = [grid[torch.randperm(len(grid), generator=generator)[:size]] for _ in range(positions)]
        return torch.stack(rows).view(like.shape)

    return replace(
        micro_batch,
        student_logits=draw(micro_batch.student_logits),
        teacher_logits=draw(micro_batch.teacher_logits),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("pair", [COMMON, "student with a dummy prefix"])
@every_loss
def test_lower_precision_stays_close_to_float64(name, knobs, pair, dtype, tolerance):
    """Of a mean over the scored tokens; the inputs are what bfloat16 can hold."""
    exact, loss = without_ties(toy_scene(pair)), build_loss(name, **knobs)
    num_items = int((exact.student_chunks >= 0).sum())
    wanted = value_and_gradient(loss, exact, num_items)
    value, gradient = value_and_gradient(loss, in_dtype(exact, dtype), num_items)
    assert gradient.dtype == dtype
    assert abs(value - wanted[0]) < tolerance * max(1, abs(wanted[0]))
    assert (gradient.double() - wanted[1]).abs().max() < tolerance * wanted[1].abs().max()


# --- hard cases


@every_loss
def test_nothing_scored_is_a_zero_loss_with_a_zero_gradient(name, knobs):
    micro_batch = toy_scene(COMMON)
    nothing = replace(
        micro_batch,
        student_chunks=torch.full_like(micro_batch.student_chunks, -1),
        teacher_chunks=torch.full_like(micro_batch.teacher_chunks, -1),
    )
    value, gradient = value_and_gradient(build_loss(name, **knobs), nothing)
    assert value == 0
    assert gradient is not None and not gradient.any()


@pytest.mark.parametrize("side", ["student_chunks", "teacher_chunks"])
@every_loss
def test_chunks_that_one_side_has_no_token_in_give_nothing(name, knobs, side):
    micro_batch = toy_scene(COMMON)
    one_sided = replace(micro_batch, **{side: torch.full_like(getattr(micro_batch, side), -1)})
    value, gradient = value_and_gradient(build_loss(name, **knobs), one_sided)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("bad", ["all nan", "impossible token"])
@every_loss
def test_a_teacher_that_has_no_finite_score_takes_out_its_chunk_and_nothing_else(name, knobs, bad):
    """Of one chunk of one token and one of several. What the teacher never writes is bounded by a clip where there is one."""
    micro_batch, loss = toy_scene(COMMON), build_loss(name, **knobs)
    if bad == "impossible token" and name in ("strict_sampled", "reverse_kl"):
        bad = "all nan"
    row = reference_rows(micro_batch)[0]
    level = row.level(micro_batch.pair.vocabularies)
    broken = [next(chunk for chunk in level if chunk.one_to_one == one_to_one) for one_to_one in (True, False)]
    teacher_logits = micro_batch.teacher_logits.clone()
    student_chunks, teacher_chunks = micro_batch.student_chunks.clone(), micro_batch.teacher_chunks.clone()
    for chunk in broken:
        j = chunk.teacher[-1]
        if bad == "all nan":
            teacher_logits[0, j] = math.nan
        else:
            teacher_logits[0, j, row.teacher_ids[j]] = -math.inf
        student_chunks[0, chunk.student], teacher_chunks[0, chunk.teacher] = -1, -1
    clean = replace(micro_batch, student_chunks=student_chunks, teacher_chunks=teacher_chunks)
    found = value_and_gradient(loss, replace(micro_batch, teacher_logits=teacher_logits))
    assert_equal(found, value_and_gradient(loss, clean), 1e-9)
    assert found[0] != pytest.approx(value_and_gradient(loss, micro_batch)[0], rel=1e-6)


@every_loss
def test_distributions_of_tokens_without_part_are_never_read(name, knobs):
    micro_batch, loss = toy_scene(COMMON), build_loss(name, **knobs)
    student_logits, teacher_logits = micro_batch.student_logits.clone(), micro_batch.teacher_logits.clone()
    student_logits[micro_batch.student_chunks < 0] = math.nan
    teacher_logits[micro_batch.teacher_chunks < 0] = math.nan
    broken = replace(micro_batch, student_logits=student_logits, teacher_logits=teacher_logits)
    value, gradient = value_and_gradient(loss, broken)
    own = micro_batch.student_chunks >= 0
    wanted = value_and_gradient(loss, micro_batch)
    assert_equal((value, gradient[own]), (wanted[0], wanted[1][own]), 1e-9)


def certain(micro_batch: Scene, side: str) -> Scene:
    """One model gives each token 120 nats more than any other."""
    ids, free = getattr(micro_batch, f"{side}_ids"), getattr(micro_batch, f"{side}_logits")
    sure = torch.full_like(free, -60.0).scatter_(-1, ids[..., None], 60.0)
    return replace(micro_batch, **{f"{side}_logits": sure + free / 100})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("side", ["student", "teacher"])
@every_loss
def test_a_model_certain_of_every_token_keeps_loss_and_gradient_finite(name, knobs, side, dtype):
    micro_batch = in_dtype(certain(toy_scene(COMMON), side), dtype)
    value, gradient = value_and_gradient(build_loss(name, **knobs), micro_batch)
    assert math.isfinite(value)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("pair", [COMMON, "digits to numbers"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(("name", "knobs"), named([loss for loss in LOSSES if loss[0] != "multi_level_ot"]))
def test_a_model_certain_of_every_token_gives_the_formula_too(name, knobs, side, pair):
    """Without multi_level_ot: the sums that it ranks are whole numbers there, and rounding decides."""
    micro_batch = certain(toy_scene(pair), side)
    assert_equal(value_and_gradient(build_loss(name, **knobs), micro_batch), expected(name, knobs, micro_batch))


@pytest.mark.parametrize(("name", "knobs"), [("escd", {}), ("bpm", {"beta": 0.0}), ("bpm", {"beta": 0.5})])
def test_a_student_that_can_write_nothing_without_text_is_still_trained(name, knobs):
    """All of its ids but the bridged stop have text, and the teacher's do not: KL(t ‖ p') is infinite by its formula."""
    pair = Pair(byte_level(600), byte_level(400, digits=1), [0], [0], [0], extra=(0, 11))
    micro_batch = scene(pair, completions(pair))
    value, gradient = value_and_gradient(build_loss(name, **knobs), micro_batch)
    _, wanted = expected(name, knobs, micro_batch)
    assert math.isfinite(value)
    assert wanted.any()
    assert (gradient - wanted).abs().max() < 1e-7 * wanted.abs().max()


def test_cdm_takes_the_diagonal_first_where_all_paths_cost_the_same():
    """One token again and again, three to two and two to three."""
    micro_batch = one_tokenizer_scene(toys.student_tokenizer(), [2])[:1]
    ours, theirs = (chunks[0] >= 0 for chunks in (micro_batch.student_chunks, micro_batch.teacher_chunks))
    student_chunks, teacher_chunks = micro_batch.student_chunks.clone(), micro_batch.teacher_chunks.clone()
    student_chunks[0, ours] = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3])
    teacher_chunks[0, theirs] = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
    token = 100
    repeated = replace(
        micro_batch,
        student_ids=torch.full_like(micro_batch.student_ids, token),
        teacher_ids=torch.full_like(micro_batch.teacher_ids, token),
        student_chunks=student_chunks,
        teacher_chunks=teacher_chunks,
    )
    knobs = {"top_k": 12}
    assert_equal(value_and_gradient(build_loss("cdm", **knobs), repeated), expected("cdm", knobs, repeated))


def with_words(tokenizer: Any, words: list[str]) -> Any:
    """A copy that has these words as tokens too."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)


@pytest.mark.parametrize(("length", "is_matched"), [(32, True), (33, False)])
def test_cdm_matches_near_spellings_of_up_to_32_bytes(length, is_matched):
    """The likeliest token of either side is a word that the other spells with one letter less."""
    words = "a" * length, "a" * (length - 1)
    pair = Pair(*(with_words(byte_level(400, digits=1), [word]) for word in words), [0], [0], [0])
    micro_batch = scene(pair, completions(pair))
    for logits, tokenizer in ((micro_batch.student_logits, pair.student), (micro_batch.teacher_logits, pair.teacher)):
        logits[..., len(tokenizer) - 1] += 20
    row, chunk = scored_chunks(micro_batch)[0]
    matches, _ = loss_references.cdm_maps(row, pair.vocabularies, chunk.student[0], chunk.teacher[0], 5, 0.1)
    assert ((len(pair.teacher) - 1, len(pair.student) - 1) in matches) == is_matched
    knobs = {"top_k": 5, "threshold": 0.1}
    assert_equal(value_and_gradient(build_loss("cdm", **knobs), micro_batch), expected("cdm", knobs, micro_batch))


# --- what the losses are for


@pytest.mark.parametrize("pair", TOYS)
@pytest.mark.parametrize(
    ("name", "knobs"), named([loss for loss in LOSSES if loss[0] not in ("strict_sampled", "reverse_kl")])
)
def test_one_step_down_the_gradient_lowers_the_loss(name, knobs, pair):
    micro_batch, loss = toy_scene(pair), build_loss(name, **knobs)
    value, gradient = value_and_gradient(loss, micro_batch)
    step = 1e-5 / gradient.abs().max()
    lower, _ = value_and_gradient(
        loss, replace(micro_batch, student_logits=micro_batch.student_logits - step * gradient)
    )
    assert value - lower == pytest.approx((step * gradient.square().sum()).item(), rel=0.2)


def test_a_step_of_strict_sampled_brings_one_to_one_tokens_nearer_to_what_the_teacher_says():
    micro_batch, loss = toy_scene(COMMON), build_loss("strict_sampled")

    def distance(micro_batch: Scene) -> float:
        chunks = [(row, chunk) for row, chunk in scored_chunks(micro_batch) if chunk.one_to_one]
        return sum(float(row.student_budget(chunk) - row.teacher_budget(chunk)) ** 2 for row, chunk in chunks)

    _, gradient = value_and_gradient(loss, micro_batch)
    moved = replace(micro_batch, student_logits=micro_batch.student_logits - 0.1 * gradient)
    assert distance(moved) < distance(micro_batch)


# --- real tokenizers


@functools.cache
def real_scene(student: Any, teacher: Any) -> Scene:
    """A text and any ids, few tokens of each, under both full vocabularies."""
    pair = Pair(student, teacher, [student.eos_token_id], [teacher.eos_token_id], [teacher.eos_token_id])
    return scene(pair, [row for row in completions(pair, seed=3, tokens=4) if row.student_ids])


@pytest.mark.parametrize(
    "pair", ["smollm2-instruct gpt2", pytest.param("llama-2 smollm2-instruct", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("name", "knobs"), named(LOSSES))
def test_full_vocabularies_give_the_formula_too(real_tokenizer, pair, name, knobs):
    micro_batch = real_scene(*map(real_tokenizer, pair.split()))
    wanted = expected(name, knobs, micro_batch)
    assert wanted[1].any()
    assert_equal(value_and_gradient(build_loss(name, **knobs), micro_batch), wanted, 1e-6)


@pytest.mark.parametrize("pair", TOYS)
def test_what_cdm_and_escd_tell_of_their_matches_is_a_mean_over_the_places_that_they_compare(pair):
    batch = batch_of(toy_scene(pair))
    _, metrics = build_loss("cdm")(batch, 1)
    path = warping_path(batch, 64)
    assert metrics["cdm/mapped_mass"][1] == len(path[0]) and metrics["loss/compared_fraction"][0] == len(
        set(path[0].tolist())
    )
    _, metrics = build_loss("escd")(batch, 1)
    assert metrics["escd/completable_mass"][1] == (standing_rows(batch, True).written > 0).sum()
