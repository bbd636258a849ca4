"""What the viewer shows of an alignment and of a scored rollout, as text: HTML, terminal and figures."""

import io
import itertools
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers_for_tests import ANY_TEXT, LOSSLESS, byte_level, metaspace_bpe, unigram, word_piece
from toys import student_tokenizer, teacher_tokenizer

from trl_ctopd import TextAligner, align_text
from trl_ctopd.looking.viewer import ScoredRollout, alignment_of, as_compared, stylesheet, with_turn_end
from trl_ctopd.looking.viewer.segments import WHY, figures, lines, segments
from trl_ctopd.looking.viewer.visible import pieces, plain
from trl_ctopd.losses import LOSSES, ScoredChunks, build_loss
from trl_ctopd.losses.credit import gaps, shares
from trl_ctopd.rollouts.pairing import Prompt, collate, on_grid, pad_scores, pair, unscored
from trl_ctopd.text.one_tokenizer import OneTokenizer
from trl_ctopd.training.metrics import chunk_metrics


HOSTILE = "a <script>alert('x')</script> & \"b\" \x1b[31m \u202eevil\u202c \x00 </div><img src=x onerror=alert(1)>"


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def aligned(text: str, student=byte_level, teacher=metaspace_bpe):
    student, teacher = student(), teacher()
    return align_text(encode(student, text), student, teacher)


def scored(alignment, seed: int = 0, **settings) -> ScoredRollout:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        -torch.rand(len(ids), generator=generator).mul(5) for ids in (alignment.student_ids, alignment.teacher_ids)
    )
    return ScoredRollout.from_log_probs(alignment, student.tolist(), teacher.tolist(), **settings)


class Page(HTMLParser):
    """The elements of a page, and the text of those with a class: `of("x")`."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.data: list[tuple[tuple[str, ...], str]] = []
        self._open: list[tuple[str, str]] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self._open.append((tag, dict(attributes).get("class", "")))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        self.data.append((tuple(name for _, classes in self._open for name in classes.split()), data))

    def of(self, *classes: str, without: str = "box") -> str:
        return "".join(data for names, data in self.data if all(c in names for c in classes) and without not in names)


# --- what is visible


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b" a\n\tb\r", "␣a⏎⇥b␍"),
        (b"\xf0\x9f", "⟨F0 9F⟩"),
        (b"a\x80\xe4\xbd\xa0", "a⟨80⟩你"),
        ("\u202ea\u200b\ufeff\x00\u00a0".encode(), "⟨RLO⟩a⟨ZWSP⟩⟨BOM⟩⟨NUL⟩⟨NBSP⟩"),
        ("👩‍👩‍👧 ❤️ 🇩🇪".encode(), "👩‍👩‍👧␣❤️␣🇩🇪"),
        ("👩\u200d".encode(), "👩⟨ZWJ⟩"),
        ("\u0301x".encode(), "◌\u0301x"),
        ("e\u0301".encode(), "e\u0301"),
        ("می\u200cخوا".encode(), "می⟨ZWNJ⟩خوا"),
        (b"\x1b[31m", "⟨ESC⟩[31m"),
        ("\U0001f6fd".encode(), "⟨U+1F6FD⟩"),
    ],
)
def test_what_cannot_be_seen_gets_a_sign_or_a_name(data, shown):
    assert plain(data) == shown


@given(data=st.one_of(st.binary(max_size=20), st.text(max_size=20).map(lambda text: text.encode(errors="replace"))))
@settings(max_examples=200, deadline=None)
def test_no_control_or_format_character_is_passed_on_but_what_shapes_an_emoji(data):
    for piece in pieces(data):
        hidden = [
            c for c in piece.text if not c.isprintable() and c not in "\u200d" and not "\U000e0020" <= c <= "\U000e007f"
        ]
        assert not hidden or piece.text[0] not in hidden


# --- what stands where


@pytest.mark.parametrize(("student", "teacher"), [*itertools.product(LOSSLESS, LOSSLESS)])
@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_every_byte_and_every_token_stands_in_one_segment(student, teacher, data):
    student, teacher = LOSSLESS[student](), LOSSLESS[teacher]()
    ids = data.draw(
        st.one_of(
            ANY_TEXT.map(lambda text: encode(student, text)), st.lists(st.integers(0, len(student) - 1), max_size=20)
        )
    )
    check_segments(align_text(ids, student, teacher))


@pytest.mark.parametrize(("student", "teacher"), [*itertools.product(LOSSLESS, LOSSLESS)])
@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_of_an_alignment_those_chunks_stay_that_a_run_compared(student, teacher, data):
    whole = align_text(encode(LOSSLESS[student](), data.draw(ANY_TEXT)), LOSSLESS[student](), LOSSLESS[teacher]())
    of_run = np.array([data.draw(st.sampled_from([chunk, -1])) for chunk in range(whole.num_chunks)] + [-1])
    for chunk in range(1, whole.num_chunks):
        if min(of_run[chunk - 1], of_run[chunk]) >= 0 and data.draw(
            st.booleans()
        ):  # joined, as after a token that decides nothing
            of_run[chunk] = of_run[chunk - 1]
    found = as_compared(whole, of_run[whole.student.chunks])
    check_segments(found)
    names = {chunk: place for place, chunk in enumerate(sorted({*of_run.tolist()} - {-1}))} | {-1: -1}
    for side in ("student", "teacher"):
        expected = [names[of_run[chunk]] for chunk in getattr(whole, f"{side}_chunks")]
        assert getattr(found, f"{side}_chunks") == expected
    left_out = b"".join(text for text, chunk in zip(whole.chunk_bytes, of_run, strict=False) if chunk < 0)
    assert b"".join(found._spelled[m.start : m.end] for m in found.masked if m.reason == "left_out") == left_out


def test_a_stretch_that_was_left_out_is_cut_where_both_sides_cut():
    alignment = aligned("one two seventeen plus")
    found = segments(as_compared(alignment, [-1] * len(alignment.student_ids)))
    assert [(s.start, s.end, s.student, s.teacher) for s in found] == [
        (s.start, s.end, s.student, s.teacher) for s in segments(alignment)
    ]
    assert len(found) > 1 and {s.reasons for s in found} == {("left_out",)}


@given(text=ANY_TEXT)
@settings(max_examples=30, deadline=None)
def test_every_byte_and_every_token_stands_in_one_segment_of_lossy_tokenizers(text):
    for student, teacher in ((byte_level, word_piece), (word_piece, byte_level), (unigram, word_piece)):
        check_segments(aligned(text, student, teacher))


def check_segments(alignment):
    found = segments(alignment)
    assert [at for segment in found for at in range(segment.start, segment.end)] == [*range(len(alignment._spelled))]
    for side in ("student", "teacher"):
        tokens = [token for segment in found for token in getattr(segment, side)]
        assert tokens == [*range(len(getattr(alignment, f"{side}_ids")))]
        chunks = getattr(alignment, f"{side}_chunks")
        for segment in found:
            assert {chunks[token] for token in getattr(segment, side)} <= {segment.chunk, -1}
    assert [segment.chunk for segment in found if segment.chunk >= 0] == [*range(alignment.num_chunks)]
    assert all(segment.reasons for segment in found if segment.chunk < 0)
    shown = b"".join(group.data for line in lines(alignment) for group in line.groups)
    assert shown == alignment._spelled


def test_a_border_within_an_emoji_does_not_take_it_apart():
    alignment = aligned("a👩‍👩‍👧b")
    assert [group.data.decode() for line in lines(alignment) for group in line.groups] == ["a", "👩‍👩‍👧", "b"]
    assert alignment.num_chunks > 3


def test_each_line_flows_as_most_of_its_letters_do():
    assert [line.rtl for line in lines(aligned("hello\nمرحبا بالعالم 12\n42"))] == [False, True, False]


# --- HTML


def test_a_page_shows_the_text_once_and_each_token_on_both_sides():
    text = "The quick brown fox, 1234567"
    alignment = aligned(text)
    page = Page(alignment.html_fragment())
    assert page.of("x").replace("␣", " ") == text
    assert page.of("student", "t").replace("␣", " ") == text
    assert page.of("teacher", "t").replace("␣", " ") == " " + text  # the dummy prefix is the teacher's own


def test_merged_chunks_are_told_apart_by_words_too():
    alignment = aligned("unbelievable quickest")
    page = Page(alignment.html_fragment())
    kinds = [attributes["class"].split()[1] for tag, attributes in page.tags if attributes.get("class", "")[:2] == "c "]
    sizes = [(len(s.student), len(s.teacher)) for s in segments(alignment)]
    assert kinds == ["one" if size == (1, 1) else "merged" for size in sizes]
    assert "merged" in kinds
    assert page.of("note") == "".join(f"{m} : {k}" for m, k in sizes if (m, k) != (1, 1))


def hostile() -> list:
    controlled = student_tokenizer()
    teacher = teacher_tokenizer()
    return [
        aligned(HOSTILE),
        aligned(HOSTILE, metaspace_bpe, byte_level),
        align_text(encode(byte_level(), HOSTILE), byte_level(), word_piece()),
        align_text([controlled.eos_token_id, *encode(controlled, HOSTILE)], controlled, teacher),
        scored(aligned(HOSTILE), prompt=HOSTILE),
    ]


@pytest.mark.parametrize("index", range(5))
def test_a_hostile_completion_is_text_and_nothing_else(index, tmp_path):
    shown = hostile()[index]
    shown.to_html(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(html)
    allowed = {"html", "head", "meta", "title", "style", "body", "main", "div", "span", "p", "b", "i", "small", "bdi"}
    assert {tag for tag, _ in page.tags} <= allowed | {"details", "summary", "br"}
    names = {name for _, attributes in page.tags for name in attributes}
    assert names <= {
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "class",
        "dir",
        "tabindex",
        "style",
        "role",
        "open",
        "hidden",
    }
    assert not {"\x1b", "\x00", "\u202e", "\u202c"} & {*html}
    assert "<script>" in page.of("x")
    if index == 4:
        assert page.of("prompt").startswith("prompt a <script>alert('x')</script> & \"b\" ESC[31m RLOevil")
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def test_masked_text_is_shown_with_its_reason():
    student = byte_level()
    broken = align_text(
        [*encode(student, "ok "), encode(student, "🦊")[0], *encode(student, " so")], student, metaspace_bpe()
    )
    cases = [
        (broken, "invalid_utf8"),
        (aligned("ÇA VA", byte_level, word_piece), "normalized"),
        (aligned("the dog", word_piece, byte_level), "whitespace"),
        (aligned("a 𝌆 b", byte_level, lambda: unigram(byte_fallback=False)), "unknown_token"),
        (
            TextAligner(student, metaspace_bpe(), masked_strings=["<think>"])([encode(student, "a <think> b")])[0],
            "markup",
        ),
    ]
    for alignment, reason in cases:
        page = Page(alignment.html_fragment())
        assert WHY[reason][0] in page.of("masked", "note")
        assert WHY[reason][1] in page.of("legend")
        assert any(reason in segment.reasons for segment in segments(alignment))


def test_bytes_that_are_no_character_are_written_in_hexadecimal():
    student = byte_level(300)
    alignment = align_text(encode(student, "🙂"), student, byte_level(300))
    assert "F0" in Page(alignment.html_fragment()).of("student", "h")
    assert Page(alignment.html_fragment()).of("x") == "🙂"


def test_a_control_token_is_shown_by_its_name():
    student = student_tokenizer()
    alignment = align_text([student.eos_token_id, *encode(student, "one")], student, teacher_tokenizer())
    page = Page(alignment.html_fragment())
    assert page.of("masked", "student", "n") == "<|eot|>"
    assert page.of("masked", "note") == "no text"


def test_an_empty_completion_says_so():
    assert "an empty completion" in Page(aligned("").html_fragment()).of("empty")


def test_the_notebook_gets_the_style_with_the_fragment():
    alignment = aligned("the dog")
    assert alignment._repr_html_() == f"<style>{stylesheet()}</style>{alignment.html_fragment()}"
    rules = [rule for rule in stylesheet().replace("\n", "").split("}") if "{" in rule]
    assert all(".ctopd" in rule or "@media" in rule or "@supports" in rule for rule in rules)


def test_alignments_of_one_tokenizer_are_shown_too():
    tokenizer = byte_level()
    ids = [*encode(tokenizer, "the dog 🙂"), encode(tokenizer, "🦊")[0], tokenizer.eos_token_id, len(tokenizer) + 3]
    alignment = OneTokenizer(tokenizer)([ids])[0]
    check_segments(alignment)
    assert "<|end|>" in Page(alignment.html_fragment()).of("student", "n")


# --- scored rollouts


def test_credit_share_and_gap_are_those_of_the_credit_module():
    alignment = aligned("The quick brown fox, 1234567 jumps over")
    shown = scored(alignment)
    row = [torch.tensor(values)[None] for values in (shown.student_log_probs, shown.teacher_log_probs)]
    chunks = [torch.tensor(side)[None] for side in (alignment.student_chunks, alignment.teacher_chunks)]
    gap, _ = gaps(*row, *chunks, alignment.num_chunks)
    widths = torch.tensor(alignment.student_widths)[None]
    share = shares("semantic", row[0], chunks[0], widths, alignment.num_chunks)
    assert shown.gap == pytest.approx(gap[0].numpy())
    assert shown.shares == pytest.approx(share[0].numpy())
    assert shown.advantages == pytest.approx(
        [gap[0, c].item() * w.item() for c, w in zip(alignment.student_chunks, share[0], strict=True)]
    )
    assert shown.nats_per_byte == pytest.approx(-gap.sum().item() / len(alignment.text.encode()))


def test_a_clip_bounds_the_credit_shown():
    alignment = aligned("The quick brown fox, 1234567 jumps over")
    assert np.abs(scored(alignment, advantage_clip=0.5).advantages).max() == 0.5


def test_the_credit_of_any_loss_is_minus_its_slope():
    alignment = aligned("The quick brown fox, 1234567 jumps over")
    shown = scored(alignment, loss=build_loss("alm"))
    moved = shown.student_log_probs.copy()
    moved[3] += 1e-5

    def alm(log_probs):
        batch = ScoredChunks(
            *(torch.tensor(values)[None] for values in (log_probs, shown.teacher_log_probs)),
            *(torch.tensor(side)[None] for side in (alignment.student_chunks, alignment.teacher_chunks)),
            torch.tensor(alignment.student_widths)[None],
            alignment.num_chunks,
        )
        return build_loss("alm")(batch, 1)[0].item()

    assert shown.advantages[3] == pytest.approx((alm(shown.student_log_probs) - alm(moved)) / 1e-5, rel=1e-3)
    assert shown.shares is None
    assert shown.method == "alm"


def test_a_loss_on_distributions_has_no_credit_to_show():
    with pytest.raises(ValueError, match="SimCT reads whole distributions"):
        scored(aligned("the dog"), loss=build_loss("simct"))
    with pytest.raises(ValueError, match="GVPO reads more than the two models' log-probs of one text"):
        scored(aligned("the dog"), loss=build_loss("gvpo"))
    with pytest.raises(ValueError, match="does not depend on the student's log-probs"):
        scored(aligned("the dog"), loss=lambda batch, num_items: (batch.teacher_log_probs.sum(), {}))


@pytest.mark.parametrize(
    "name", [name for name, loss in LOSSES.items() if loss.signal != "logits" and not loss.reads_more]
)
def test_every_loss_on_log_probs_can_be_shown(name):
    shown = scored(aligned("The quick brown fox"), loss=build_loss(name))
    assert np.isfinite(shown.advantages).all()
    assert np.abs(shown.advantages).max() > 0
    assert f"by {name}" in Page(shown.html_fragment()).of("legend")


def test_wrong_numbers_of_log_probs_are_refused_with_both():
    alignment = aligned("the dog")
    with pytest.raises(ValueError, match=r"1 student log-probs for \d+ student tokens"):
        ScoredRollout.from_log_probs(alignment, [-1.0], [-1.0] * len(alignment.teacher_ids))
    with pytest.raises(ValueError, match=r"0 teacher log-probs for \d+ teacher tokens"):
        ScoredRollout.from_log_probs(alignment, [-1.0] * len(alignment.student_ids), [])
    with pytest.raises(ValueError, match="not finite"):
        ScoredRollout.from_log_probs(
            alignment, [math.nan] * len(alignment.student_ids), [-1.0] * len(alignment.teacher_ids)
        )


def test_a_chunk_without_a_finite_teacher_says_so_and_has_no_credit():
    alignment = aligned("the dog")
    teacher = [-1.0] * len(alignment.teacher_ids)
    teacher[-1] = math.nan
    shown = ScoredRollout.from_log_probs(alignment, [-2.0] * len(alignment.student_ids), teacher)
    assert shown.neutral.tolist() == [False] * (alignment.num_chunks - 1) + [True]
    assert shown.advantages[-1] == 0
    assert "not finite, so the chunk is left out" in Page(shown.html_fragment()).of("box", without="-")


def test_the_figures_of_a_token_stand_in_its_box():
    alignment = aligned("the dog")
    shown = scored(alignment)
    box = Page(shown.html_fragment()).of("box", without="-")
    for value in (*shown.student_log_probs, *shown.teacher_log_probs, *shown.advantages, *shown.gap):
        assert f"{value:+.2f}".replace("-", "−") in box
    assert all(f"{share:.0%}" in box for share in shown.shares)
    assert all(str(i) in box for i in (*alignment.student_ids, *alignment.teacher_ids))


def test_masked_tokens_have_no_figures():
    alignment = aligned("the dog", word_piece, byte_level)
    shown = ScoredRollout.from_log_probs(
        alignment, [-1.0] * len(alignment.student_ids), [-1.0] * len(alignment.teacher_ids)
    )
    page = Page(shown.html_fragment())
    assert "No token here has a credit" in page.of("masked", "box", without="-")
    assert page.of("masked", "student", "t") == page.of("masked", "student", "t", without="small")


def test_the_end_of_the_turn_is_a_last_chunk():
    student, teacher = student_tokenizer(), teacher_tokenizer()
    alignment = with_turn_end(align_text(encode(student, "one two"), student, teacher), student.eos_token_id, [4])
    check_segments(alignment)
    assert alignment.chunk_bytes[-1] == b""
    page = Page(scored(alignment).html_fragment())
    assert page.of("x").endswith("end of turn")
    assert page.of("student", "n") == "<|eot|>"
    with pytest.raises(ValueError, match="teacher_ids is empty"):
        with_turn_end(alignment, student.eos_token_id, [])


@pytest.mark.parametrize("eos_policy", ["bridge", "mask"])
def test_a_row_of_a_scored_batch_gives_the_rollout_that_was_scored(eos_policy):
    """As the trainer makes it: prompts of different lengths, padding, the turn's end, a text that is not read."""
    student, teacher = student_tokenizer(), teacher_tokenizer()
    prompts = [Prompt([5] * 7, [6] * 3), Prompt([5] * 2, [6] * 4), Prompt([5] * 4, [6] * 9)]
    completions = [[*encode(student, text), student.eos_token_id] for text in ("one two", "seventeen plus 30", "three")]
    completions[1] = completions[1][:-1]
    rollouts = pair(
        prompts,
        completions,
        TextAligner(student, teacher),
        turn_ends={student.eos_token_id: [4]},
        eos_policy=eos_policy,
        teacher_context=24,
    )
    rollouts.append(unscored(rollouts[0]))  # as by a gate
    tensors = collate(rollouts, 0)
    scored_tokens = -torch.rand(tensors["scored"].shape[1], dtype=torch.double)
    teachers = [-torch.rand(len(rollout.teacher_ids), dtype=torch.double) for rollout in rollouts]
    batch = ScoredChunks(
        student_log_probs=on_grid(scored_tokens, tensors["scored"], tensors["input_ids"]).requires_grad_(),
        teacher_log_probs=pad_scores(teachers, tensors["teacher_chunks"].shape[1]),
        **{name: tensors[name] for name in ("student_chunks", "teacher_chunks", "student_widths", "num_chunks")},
    )
    loss = build_loss("dpca", credit="byte_length", event="open")
    credit = -torch.autograd.grad(loss(batch, 1)[0], batch.student_log_probs)[0]
    for row, rollout in enumerate(rollouts):
        shown = ScoredRollout.from_batch(rollout, batch, row, loss=loss)
        check_segments(shown.alignment)
        assert shown.alignment == alignment_of(rollout)
        first = len(rollout.prompt.student_ids) - 1
        assert shown.advantages == pytest.approx(credit[row, first : first + len(rollout.student_ids)].numpy())
        assert shown.method == "dpca, byte_length credit"
        Page(shown.html_fragment())


@pytest.mark.parametrize("by", ["chunks", "unclosed"])
def test_a_chunk_that_the_batch_leaves_out_has_no_credit_and_no_part_in_the_gap(by):
    student, teacher = student_tokenizer(), teacher_tokenizer()
    aligner, ids = TextAligner(student, teacher), encode(student, "one two three")
    [rollout] = pair([Prompt([5], [6])], [ids], aligner, turn_ends={student.eos_token_id: [4]})
    tensors, last = collate([rollout], 0), rollout.num_chunks - 1
    given = {name: tensors[name] for name in ("student_chunks", "teacher_chunks", "student_widths", "num_chunks")}
    out = tensors["student_chunks"] == last
    if by == "chunks":
        chunks = {
            name: given[name].masked_fill(given[name] == last, -1) for name in ("student_chunks", "teacher_chunks")
        }
    else:
        chunks = {"unclosed": torch.tensor([last])}
    batch = ScoredChunks(-torch.rand(out.shape), -torch.rand(1, len(rollout.teacher_ids)), **{**given, **chunks})
    shown = ScoredRollout.from_batch(rollout, batch, 0)
    assert shown.alignment.num_chunks == last and not shown.advantages[out[0].numpy()].any()
    logged = chunk_metrics(batch, torch.zeros(out.shape))["gap/nats_per_byte"]
    assert shown.nats_per_byte == pytest.approx((logged[0] / logged[1]).item(), rel=1e-5)


def test_a_text_beyond_the_teachers_context_is_shown_token_by_token_with_that_reason():
    student, teacher = student_tokenizer(), teacher_tokenizer()
    ids = [*encode(student, "one two"), student.eos_token_id]
    [rollout] = pair(
        [Prompt([5], [6])], [ids], TextAligner(student, teacher), turn_ends={ids[-1]: [4]}, teacher_context=2
    )
    shown = ScoredRollout.from_batch(rollout, _unscored(len(ids)), 0)
    assert shown.nats_per_byte is None
    found = segments(shown.alignment)
    assert [segment.student for segment in found] == [[token] for token in range(len(ids))]
    assert {segment.reasons for segment in found[:-1]} == {("teacher_context",)}


def _unscored(length: int) -> ScoredChunks:
    nothing = torch.full((1, length), -1)
    zeros = torch.zeros(1, length)
    return ScoredChunks(zeros, zeros[:, :1], nothing, nothing[:, :1], nothing * 0, 1)


# --- terminal


def printed(shown, width: int = 80, **console) -> str:
    file = io.StringIO()
    shown.print(Console(file=file, width=width, **console))
    return file.getvalue()


def test_the_terminal_shows_text_tokens_and_credit_within_its_width():
    alignment = aligned("The quick brown fox [bold]jumps[/bold], \x1b[31m 1234567 你好 over\nthe lazy dog")
    shown = scored(alignment)
    text = printed(shown, width=60)
    assert "[bold]" in text.replace("│", "").replace("╎", "").replace(" ", "")
    assert "\x1b" not in text
    assert all(len(line) <= 60 for line in text.splitlines()[1:-2] if line.isascii())
    for value in shown.advantages:
        assert f"{value:+.2f}".replace("-", "−") in text


def test_colour_is_written_only_where_the_terminal_has_it():
    shown = scored(aligned("the dog"))
    assert "\x1b[" in printed(shown, color_system="truecolor", force_terminal=True)
    assert "\x1b[" not in printed(shown)


# --- figures


@pytest.mark.parametrize(
    ("student", "teacher"), [(byte_level, metaspace_bpe), (byte_level, word_piece), (word_piece, unigram)]
)
def test_the_figures_are_those_of_a_naive_count(student, teacher):
    texts = ["The quick brown fox", "ÇA VA, 1234567 🙂", "", "def add(a, b):\n\treturn a + b"]
    student, teacher = student(), teacher()
    alignments = TextAligner(student, teacher)([encode(student, text) for text in texts])
    found = figures(alignments)
    pairs = [
        (alignment.student_chunks.count(chunk), alignment.teacher_chunks.count(chunk))
        for alignment in alignments
        for chunk in range(alignment.num_chunks)
    ]
    tokens = sum(len(alignment.student_ids) for alignment in alignments)
    size = sum(len(alignment.text.encode()) for alignment in alignments)
    masked = {}
    for stretch in (stretch for alignment in alignments for stretch in alignment.masked):
        masked[stretch.reason] = masked.get(stretch.reason, 0) + stretch.end - stretch.start
    assert found == {
        "texts": 4,
        "bytes": size,
        "student_tokens": tokens,
        "teacher_tokens": sum(len(alignment.teacher_ids) for alignment in alignments),
        "chunks": len(pairs),
        "one_to_one_chunks": pairs.count((1, 1)),
        "coverage": sum(len(data) for alignment in alignments for data in alignment.chunk_bytes) / size,
        "one_to_one_fraction": pairs.count((1, 1)) / tokens,
        "student_tokens_per_chunk": sum(m for m, _ in pairs) / len(pairs),
        "teacher_tokens_per_chunk": sum(k for _, k in pairs) / len(pairs),
        "masked_bytes": masked,
    }
    json.dumps(found)


def test_figures_of_nothing_are_none():
    assert figures([aligned("")])["coverage"] is None
