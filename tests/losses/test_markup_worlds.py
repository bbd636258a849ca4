"""Texts of two chat templates, through the library's own parsing, pairing and closings, with the exact expectation over all of them: thoughts
and answers between markup that the two sides spell otherwise, and tokens that join text and markup."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_logit_losses import Completion, Pair
from test_perfect_students import closings_before
from test_reverse_kl import World, moved
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_ctopd.losses import build_loss
from trl_ctopd.rollouts.closing import ends, student_ends, without_undecided
from trl_ctopd.rollouts.pairing import Frame, Prompt, pair
from trl_ctopd.rollouts.stops import with_other_stops
from trl_ctopd.text.chat import Conversation, Speaker, beside_markup, masked_beginnings
from trl_ctopd.text.sections import SectionAligner, aligner_of
from trl_ctopd.text.turns import USER
from trl_ctopd.text.vocabulary import VocabularyPair


CONTROLS = ["<|a|>", "<|u|>", "<t>", "</t>", "<x>", "<y>"]
STOP = ((".", "\n"),)
Markup = tuple[str, ...]  # before a thought, between it and the answer, the end of the turn, and before an answer alone


def template(before: str, between: str, end: str, alone: str = "") -> str:
    written = [f"{{{{ '{part}' }}}}".replace("\n", "\\n") for part in (before, between, end, alone)]
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|a|>{% if m.reasoning_content %}"
        f"{written[0]}{{{{ m.reasoning_content }}}}{written[1]}{{% else %}}{written[3]}{{% endif %}}{{{{ m['content'] }}}}{written[2]}"
        "{% else %}<|u|>{{ m['content'] }}<|e|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
    )


def byte_level(merges, markup: Markup) -> PreTrainedTokenizerFast:
    """BPE of single characters with these merges, without a pre-tokenizer of words."""
    spelled = [tuple(part.replace("\n", "Ċ") for part in merge) for merge in merges]
    tokens = [*(chr(code) for code in range(33, 127)), "Ċ", "Ġ", *map("".join, spelled)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, spelled))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|e|>", "pad_token": "<|e|>", "extra_special_tokens": CONTROLS}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template(*markup)
    return tokenizer


def with_dummy_space(markup: Markup) -> PreTrainedTokenizerFast:
    """As SentencePiece writes: a word's first token brings a space, also at the beginning of a text."""
    tokens = [*(chr(code) for code in range(33, 127)), "▁", "▁a", "▁b", "\n"]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("▁", "a"), ("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    special = {"eos_token": "<|e|>", "pad_token": "<|e|>", "extra_special_tokens": CONTROLS}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = template(*markup)
    return tokenizer


class Templates:
    """All of `texts`, as the student writes them after its prompt, with random probabilities; both models have this law."""

    def __init__(self, student, teacher, texts: list[str], more_stops: tuple[str, ...] = (), **policies):
        self.student = student
        ours, theirs = Speaker(student), Speaker(teacher)
        aligner = aligner_of(ours, theirs)
        opened, read = ours.opened(Conversation([USER])), theirs.opened(Conversation([USER]))
        prompt = Prompt(opened.ids, read.ids, frame=Frame.of(opened, read, opened.ids).to_json())
        stops, end = [*ours.stop_ids(), *student.convert_tokens_to_ids([*more_stops])], theirs.turn_end
        own = Pair(student, teacher, stops, theirs.stop_ids() if len(end) == 1 else [], end, extra=(0, 0))
        own.__dict__["vocabulary"] = VocabularyPair(
            student,
            teacher,
            student_size=own.sizes[0],
            teacher_size=own.sizes[1],
            student_stops=stops,
            teacher_stops=own.teacher_stops,
            student_markup=ours.turn_markup
            | masked_beginnings(ours, theirs, lambda _: policies.get("markup_policy") == "mask"),
            beside=beside_markup(ours, theirs),
            cache_dir=None,
        )
        self.table, self.stops = own.vocabulary.continuations, stops
        written = [student.encode(text, add_special_tokens=False) for text in texts]
        found = pair(
            [prompt] * len(texts),
            written,
            aligner,
            turn_ends=dict.fromkeys(stops, end),
            sections=SectionAligner(aligner, ours, theirs, **policies),
        )
        assert (
            len({tuple(rollout.teacher_prompt_ids) for rollout in found}) == 1
        )  # so that what is scored is the whole law
        self.rollouts = [without_undecided(rollout, {"": self.table}) for rollout in found]
        sides = ("student_ids", "teacher_ids", "student_chunks", "teacher_chunks", "student_widths")
        rows = [Completion(*(list(getattr(rollout, side)) for side in sides)) for rollout in self.rollouts]
        weights = torch.rand(len(texts), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
        self.world = World(own, rows, weights / weights.sum())

    def gradient(self, name: str, student_logits=None, **knobs) -> torch.Tensor:
        own, loss = self.world, build_loss(name, **knobs)
        ended = [ends(rollout) for rollout in self.rollouts], [student_ends(rollout) for rollout in self.rollouts]
        teacher = [row.teacher_ids for row in own.rows], own.micro_batch.teacher_logits
        told = closings_before(self.table.reverse, ended[1], *teacher)
        marked = {}
        for name in ("markup", "untold"):
            marked[name] = torch.zeros(own.micro_batch.student_ids.shape, dtype=torch.bool)
            for n, rollout in enumerate(self.rollouts):
                if (found := getattr(rollout, name)) is not None:
                    marked[name][n, : len(found)] = torch.as_tensor(found)

        def closed(batch, num_items):
            others = torch.zeros_like(batch.student_log_probs)
            for n, row in enumerate(own.rows):
                place = len(row.student_ids) - 1
                of_stops = batch.student.hidden[n, place].log_softmax(-1)[self.stops].exp()
                others = others.index_put(
                    (torch.tensor(n), torch.tensor(place)),
                    of_stops.sum() - of_stops[self.stops.index(row.student_ids[-1])],
                )
            batch = replace(batch, student_log_probs=with_other_stops(batch.student_log_probs, others))
            close = closings_before(self.table, ended[0], [row.student_ids for row in own.rows], batch.student.hidden)
            closings = {"close_log_probs": close, "teacher_close_log_probs": told}
            value, metrics = loss(replace(batch, **closings, **marked), num_items)
            self.value = value.item()
            return value, metrics

        return own.expected_gradient(closed, student_logits)


def check_expectation(own: Templates):
    """The expected gradient of `reverse_kl` is that of closed chunks, away from the teacher."""
    student = moved(own.world, by=0.5)
    expected = own.gradient("dpca", student, advantage_clip=None)
    assert expected.abs().max() > 0.05
    for top_k in (None, 8):
        found = own.gradient("reverse_kl", student, advantage_clip=None, top_k=top_k)
        assert (found - expected).abs().max() < 1e-10


def thoughts(markup: Markup, letters: str) -> list[str]:
    words = ["".join(word) for size in (1, 2) for word in itertools.product(letters, repeat=size)]
    words = [word for word in words if word.strip()]  # one of whitespace alone is none
    return [markup[0] + word + markup[1] + answer + markup[2] for word in words for answer in ("a", "b.")]


PLAIN: Markup = ("<t>", "</t>", "<|e|>")
LINES: Markup = ("<t>\n", "\n</t>\n\n", "<|e|>")
OTHER = (("q", "q"),)  # without which the two tokenizers are one
EMPTY_LINE = (("\n", "\n"), (".", "\n\n"))
WORLDS = {  # the student's markup and merges, and the teacher's
    "control tokens": (PLAIN, (), ("<x>", "<y>", "<|e|>"), OTHER),
    "several tokens on either side": (LINES, (), ("<x><x>", "<y>\n<x>", "<|e|>"), OTHER),
    "a newline of the student's alone": (("<t>", "\n</t>", "<|e|>"), (), ("<x>", "<y>", "<|e|>"), OTHER),
    "a newline of the teacher's alone": (PLAIN, (), ("<x>", "\n<y>", "<|e|>"), OTHER),
    "chunks of several tokens": (LINES, (("a", "b"),), ("<x>", "\n<y>", "<|e|>"), (("b", "."),)),
    "the teacher joins text and markup": (PLAIN, (), ("<x>\n", "\n<y>\n\n", "<|e|>"), STOP),
    "the teacher joins text and two newlines": (PLAIN, (), ("<x>", "\n\n<y>", "<|e|>"), (*EMPTY_LINE, *STOP)),
    "the teacher joins text and markup of both": (LINES, (), ("<x>\n", "\n<y>\n\n", "<|e|>"), STOP),
    "the teacher joins two letters and markup": (
        PLAIN,
        (("a", "b"),),
        ("<x>", "\n<y>", "<|e|>"),
        (("b", "."), ("b.", "\n")),
    ),
    "the student joins text and markup": (LINES, STOP, ("<x>", "<y>", "<|e|>"), ()),
    "both do": (LINES, STOP, ("<x>\n", "\n<y>\n\n", "<|e|>"), STOP + OTHER),
    "the teacher joins text and the end": (PLAIN, (), ("<x>", "<y>", "\n<|e|>"), STOP),
}
LOSSES = [("dpca", {}), ("dpca", {"baseline": "kl"}), ("reverse_kl", {}), ("reverse_kl", {"top_k": 8})]


LETTERS = ["ab.", "b.\n"]  # of the thoughts: a newline may be text or the markup's


@functools.cache
def world(name: str, letters: str = "ab.") -> Templates:
    ours, merges, theirs, other_merges = WORLDS[name]
    return Templates(byte_level(merges, ours), byte_level(other_merges, theirs), thoughts(ours, letters))


@pytest.mark.parametrize("letters", LETTERS)
@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize(("loss", "knobs"), LOSSES)
def test_a_perfect_student_stays_whatever_markup_the_two_templates_have(loss, knobs, name, letters):
    own = world(name, letters)
    assert not own.world.pair.vocabulary.is_one_tokenizer
    assert all((rollout.student_chunks >= 0).all() and rollout.markup.any() for rollout in own.rollouts)
    assert own.gradient(loss, **knobs).abs().max() < 1e-10


def test_without_what_stands_beside_a_newline_a_joined_token_moves_it(monkeypatch):
    own = world("the teacher joins text and markup")
    known, controls = own.table.of, {*own.student.added_tokens_decoder}
    monkeypatch.setattr(own.table, "of", lambda token: np.array([i for i in known(token) if i not in controls], int))
    assert own.gradient("dpca").abs().max() > 0.01


BEGUN_ALIKE = {  # the markup before a thought begins as that before an answer alone
    "the teacher's": (("<t>", "</t>", "<|e|>", "<x>"), (), ("<t>", "<y>", "<|e|>", "<t><y>"), OTHER),
    "the student's": (("<t>\n", "</t>", "<|e|>", "<t>\n\n</t>"), (), ("<t>", "<y>", "<|e|>", "<x>"), OTHER),
    "both": (("<t>", "</t>", "<|e|>", "<t></t>"), (), ("<x>", "<y>", "<|e|>", "<x><y>"), OTHER),
}


@functools.cache
def with_and_without_thoughts(name: str) -> Templates:
    ours, merges, theirs, other_merges = BEGUN_ALIKE[name]
    alone = [ours[3] + answer + ours[2] for answer in ("a", "b", "ab", "ba")]
    later = [ours[0] + "\n" + word + ours[1] + "a" + ours[2] for word in ("a", "b", "\na")]
    texts = [*thoughts(ours, "ab"), *later, *alone]
    return Templates(byte_level(merges, ours), byte_level(other_merges, theirs), texts)


@pytest.mark.parametrize("name", BEGUN_ALIKE)
@pytest.mark.parametrize(("loss", "knobs"), LOSSES)
def test_a_perfect_student_stays_where_only_what_follows_tells_what_markup_was(loss, knobs, name):
    own = with_and_without_thoughts(name)
    assert all((rollout.student_chunks >= 0).all() for rollout in own.rollouts)
    assert own.gradient(loss, **knobs).abs().max() < 1e-10


@pytest.mark.parametrize("name", BEGUN_ALIKE)
def test_the_expectation_is_that_of_closed_chunks_where_only_what_follows_tells_what_markup_was(name):
    check_expectation(with_and_without_thoughts(name))


SEVERAL_STOPS = {
    "single letters": (PLAIN, (), ("<x>", "<y>", "<|e|>"), OTHER),
    "chunks of several tokens": (PLAIN, (("a", "b"),), ("<x>", "<y>", "<|e|>"), (("b", "."), ("b", "a"))),
}


@functools.cache
def with_several_stops(name: str) -> Templates:
    ours, merges, theirs, other_merges = SEVERAL_STOPS[name]
    texts = [text + stop for text in ("a", "b", "ab", "ba", "b.", "ab.") for stop in ("<|e|>", "<x>")]
    return Templates(byte_level(merges, ours), byte_level(other_merges, theirs), texts, more_stops=("<x>",))


@pytest.mark.parametrize("name", SEVERAL_STOPS)
@pytest.mark.parametrize(("loss", "knobs"), LOSSES)
def test_a_perfect_student_ends_its_texts_as_it_did_with_any_of_its_stop_tokens(loss, knobs, name):
    assert with_several_stops(name).gradient(loss, **knobs).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("loss", "knobs"),
    [
        *[(name, {}) for name in ("gold", "xtoken", "simct", "strict_sampled", "alm", "gvpo")],
        ("bpm", {"mask_whitespace": False}),
        ("escd", {"mask_whitespace": False}),
        ("cdm", {"threshold": 0.0}),
        ("strict_topk", {"top_k": None}),
    ],
)
def test_nor_does_any_other_loss_move_one_of_several_stop_tokens_where_all_chunks_are_one_token(loss, knobs):
    assert with_several_stops("single letters").gradient(loss, **knobs).abs().max() < 1e-10


@pytest.mark.parametrize(("loss", "knobs"), [("uld", {}), ("uld", {"uld_pairing": "chunk"}), ("multi_level_ot", {})])
def test_and_for_a_distance_of_ranks_that_has_a_kink_at_0_a_perfect_student_is_at_0(loss, knobs):
    own = with_several_stops("single letters")
    own.gradient(loss, **knobs)
    perfect = own.value
    own.gradient(loss, moved(own.world, by=0.1), **knobs)
    assert abs(perfect) < 1e-10 and own.value > 1e-3


@pytest.mark.parametrize("name", SEVERAL_STOPS)
def test_held_alone_against_all_of_the_teachers_end_each_stop_token_moves_it(name, monkeypatch):
    own = with_several_stops(name)
    monkeypatch.setattr("test_markup_worlds.with_other_stops", lambda log_probs, others: log_probs)
    assert own.gradient("dpca").abs().max() > 0.01


@pytest.mark.parametrize("name", SEVERAL_STOPS)
def test_the_expectation_is_that_of_closed_chunks_with_several_stop_tokens(name):
    check_expectation(with_several_stops(name))


ONE_SIDED = {  # a turn is an answer, or a thought and one, and one side alone has markup before one of them
    "the teacher's answer": (PLAIN, (), ("<x>", "<y>", "<|e|>", "<t>"), OTHER),
    "the teacher's answer, begun as its thought": (PLAIN, (), ("<x>", "<y>", "<|e|>", "<x><y>"), OTHER),
    "both of the teacher's, begun alike": (PLAIN, (), ("<x><x>", "<y>", "<|e|>", "<x><t>"), OTHER),
    "the teacher's answer, with text": (PLAIN, (), ("<x>", "<y>", "<|e|>", "<x>\n<y>\n"), OTHER),
    "the teacher's, an empty thought of a newline more": (
        PLAIN,
        (),
        ("<x>\n", "\n<y>\n\n", "<|e|>", "<x>\n\n<y>\n\n"),
        (("\n", "\n"),),
    ),
    "the same, and the student has markup before both": (
        ("<t>", "</t>", "<|e|>", "<x>"),
        (),
        ("<x>\n", "<y>", "<|e|>", "<x>\n\n<y>"),
        (("\n", "\n"),),
    ),
    "the student's answer": (("<t>", "</t>", "<|e|>", "<x>"), (), ("<x>", "<y>", "<|e|>"), OTHER),
    "the student's answer, with text": (("<t>", "</t>", "<|e|>", "<t>\n</t>\n"), (), ("<x>", "<y>", "<|e|>"), OTHER),
    "chunks of several tokens": (PLAIN, (("a", "b"),), ("<x>", "<y>", "<|e|>", "<t>"), (("b", "."), ("b", "a"))),
    "the student's, in chunks of several tokens": (
        ("<t>", "</t>", "<|e|>", "<x>"),
        (("a", "b"),),
        ("<x>", "<y>", "<|e|>"),
        (("b", "a"),),
    ),
}


@functools.cache
def with_one_sided_openings(name: str, **policies) -> Templates:
    ours, merges, theirs, other_merges = ONE_SIDED[name]
    alone = [(ours[3] if len(ours) > 3 else "") + answer + ours[2] for answer in ("a", "b", "ab", "ba", "b.")]
    later = [ours[0] + "\n" + word + ours[1] + "a" + ours[2] for word in ("a", "ba")]
    texts = [*thoughts(ours, "ab"), *(later if "newline" in name else []), *alone]
    return Templates(byte_level(merges, ours), byte_level(other_merges, theirs), texts, **policies)


@pytest.mark.parametrize("name", ONE_SIDED)
@pytest.mark.parametrize(("loss", "knobs"), LOSSES)
def test_a_perfect_student_thinks_as_often_as_its_teacher_where_one_side_alone_has_markup_before_an_answer(
    loss, knobs, name
):
    own = with_one_sided_openings(name)
    assert all((rollout.student_chunks >= 0).all() for rollout in own.rollouts)
    assert own.gradient(loss, **knobs).abs().max() < 1e-10


@pytest.mark.parametrize("name", ONE_SIDED)
def test_the_expectation_is_that_of_closed_chunks_where_one_side_alone_has_markup_before_an_answer(name):
    check_expectation(with_one_sided_openings(name))


@pytest.mark.parametrize("name", ONE_SIDED)
@pytest.mark.parametrize(("loss", "knobs"), LOSSES)
def test_a_perfect_student_thinks_as_often_as_its_teacher_where_markup_is_masked(loss, knobs, name):
    """A first token that is an answer's, without markup, still tells of the form, and so does the teacher's markup before it. What the student
    decides within its markup is not scored: that is left, and masked text beside unlike tokens or a newline that a token joins with it."""
    own = with_one_sided_openings(name, markup_policy="mask")
    assert all((rollout.student_chunks == -1).any() for rollout in own.rollouts[:4]), "thoughts"
    moves = name == "the student's answer, with text"
    moves |= "chunks of several tokens" in name and (loss, knobs) != ("dpca", {})
    moves |= "newline" in name and loss == "reverse_kl"
    assert (own.gradient(loss, **knobs).abs().max() < 1e-10) == (not moves)


@pytest.mark.parametrize("letters", LETTERS)
@pytest.mark.parametrize("name", WORLDS)
def test_the_expectation_is_that_of_closed_chunks_whatever_markup_the_two_templates_have(name, letters):
    check_expectation(world(name, letters))


@pytest.mark.parametrize("letters", LETTERS)
@pytest.mark.parametrize("name", [name for name, [markup, *_] in WORLDS.items() if markup[1].startswith("\n")])
@pytest.mark.parametrize(("loss", "knobs"), LOSSES)
def test_a_perfect_student_stays_where_masked_markup_begins_with_a_newline(loss, knobs, name, letters):
    """Whether a newline is scored then depends on what follows: it has no guess. What is left is of masked text beside unlike tokens."""
    ours, merges, theirs, other_merges = WORLDS[name]
    sides = byte_level(merges, ours), byte_level(other_merges, theirs)
    own = Templates(*sides, thoughts(ours, letters), markup_policy="mask")
    assert all((rollout.student_chunks == -1).any() for rollout in own.rollouts)
    unlike = name in ("chunks of several tokens", "the student joins text and markup")
    assert own.gradient(loss, **knobs).abs().max() < (0.03 if unlike else 1e-10)


@pytest.mark.parametrize("loss", ["dpca", "reverse_kl"])
def test_a_newline_of_one_sides_markup_that_only_the_others_tokenizer_joins_with_text_moves_a_perfect_student(loss):
    """What the docs say is left."""
    markup = ("<t>", "\n</t>", "<|e|>")
    ours, theirs = byte_level((), markup), byte_level(STOP, ("<x>", "<y>", "<|e|>"))
    assert 0.01 < Templates(ours, theirs, thoughts(markup, "b.\n")).gradient(loss).abs().max() < 0.3
    assert Templates(ours, theirs, thoughts(markup, "ab\n")).gradient(loss).abs().max() < 1e-10


@pytest.mark.parametrize(("loss", "knobs"), LOSSES)
def test_a_first_token_that_brings_a_space_is_compared_no_more_than_markup_in_its_place(loss, knobs):
    """A student of SentencePiece's may begin with a thought's mark or with a word."""
    teacher = byte_level((), ("<x>", "<y>", "<|e|>"))
    words = ["".join(word) for word in itertools.product("ab", repeat=2)]
    texts = [f"<t>{word}</t>{word}<|e|>" for word in words] + [f" {word}<|e|>" for word in words]
    own = Templates(with_dummy_space(PLAIN), teacher, texts)
    assert own.gradient(loss, **knobs).abs().max() < 1e-10
