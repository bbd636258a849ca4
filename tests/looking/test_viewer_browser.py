"""The viewer in a real browser, Debian's Chromium: what a person sees, points at and tabs through."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from browsing import lowest_contrast
from PIL import Image
from tokenizers_for_tests import byte_level, metaspace_bpe, word_piece
from toys import student_tokenizer, teacher_tokenizer

from trl_ctopd import align_text
from trl_ctopd.looking.viewer import ScoredRollout, stylesheet, with_turn_end


HOSTILE = (
    "<script>window.hacked = 1</script> <img src=x onerror='window.hacked = 1'> \x1b[31m \u202eevil\u202c \x00 </div></body>"
    " <style>* {display: none}</style> &lt;b&gt; http://127.0.0.1:9/x"
)
SENTENCE = "The quick brown fox doesn't care; 1234567890 times"


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def aligned(text: str, student=byte_level, teacher=metaspace_bpe):
    return align_text(encode(student(), text), student(), teacher())


def scored(alignment, **settings) -> ScoredRollout:
    """Figures of every size and sign."""
    sizes = [0.01, 0.3, 9, 2, 0.7, 30, 5]
    student, teacher = (
        [-sizes[(n * step) % 7] - n / 1000 for n in range(len(ids))]
        for ids, step in ((alignment.student_ids, 1), (alignment.teacher_ids, 3))
    )
    return ScoredRollout.from_log_probs(alignment, student, teacher, **settings)


@pytest.fixture
def visit(open_page, tmp_path):
    """`visit(shown)` opens its page, or one of your own."""

    def visit(shown, html: str | None = None, **screen):
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.html"
        if html is None:
            shown.to_html(file)
        else:
            file.write_text(html, encoding="utf-8")
        return open_page(file, **screen)

    return visit


def shown_boxes(page) -> list[str]:
    return [box.inner_text() for box in page.locator(".box").all() if box.is_visible()]


def figures_of(shown: ScoredRollout, token: int) -> list[str]:
    """What the box of a student token has to say."""
    chunk = shown.alignment.student_chunks[token]
    values = (
        shown.student_log_probs[token],
        shown.advantages[token],
        shown.student_budget[chunk],
        shown.teacher_budget[chunk],
        shown.gap[chunk],
    )
    nats = [f"{value:+.1f}" if abs(value) >= 9.995 else f"{value:+.2f}" for value in values]
    nats = ["0" if float(text) == 0 else text.replace("-", "−") for text in nats]
    return [*nats, f"{shown.shares[token]:.0%}"]


def on_screen(page, locator) -> bool:
    box, screen = locator.bounding_box(), page.viewport_size
    return (
        box["x"] >= 0
        and box["y"] >= 0
        and box["x"] + box["width"] <= screen["width"]
        and box["y"] + box["height"] <= screen["height"]
    )


def test_it_opens_from_disk_and_asks_the_network_for_nothing(visit):
    page = visit(scored(aligned(SENTENCE), prompt="Say something"))
    assert page.locator(".x").all_inner_texts() != []
    assert page.evaluate("document.scripts.length") == 0


@pytest.mark.parametrize("token", [0, 5, -1])
def test_pointing_at_a_token_shows_its_figures_beside_its_chunk(visit, token):
    shown = scored(aligned(SENTENCE))
    page = visit(shown)
    assert shown_boxes(page) == []
    tokens = page.locator(".student .t")
    token %= tokens.count()
    tokens.nth(token).hover()
    [text] = shown_boxes(page)
    assert all(figure in text for figure in figures_of(shown, token))
    box = page.locator(".box:visible")
    assert on_screen(page, box)
    place, at = page.locator(".c:hover").bounding_box(), box.bounding_box()
    assert min(abs(at["y"] - place["y"] - place["height"]), abs(at["y"] + at["height"] - place["y"])) < 10
    marked = page.locator(".box:visible .of-student").all()
    colours = [row.evaluate("row => getComputedStyle(row).backgroundColor") for row in marked]
    first = shown.alignment.student_chunks.index(shown.alignment.student_chunks[token])
    assert [colour != "rgba(0, 0, 0, 0)" for colour in colours] == [n == token - first for n in range(len(marked))]


def test_the_keyboard_reaches_every_token_and_shows_its_figures(visit):
    shown = scored(aligned("The quick 1234567890"))
    page = visit(shown)
    tokens = page.locator(".t").count()
    reached = set()
    for _ in range(tokens):
        page.keyboard.press("Tab")
        [text] = shown_boxes(page)
        assert on_screen(page, page.locator(".box:visible"))
        side, token = page.evaluate(
            "[...document.querySelectorAll('.student .t')].includes(document.activeElement)"
            "? ['student', [...document.querySelectorAll('.student .t')].indexOf(document.activeElement)]"
            ": ['teacher', [...document.querySelectorAll('.teacher .t')].indexOf(document.activeElement)]"
        )
        reached.add((side, token))
        if side == "student":
            assert all(figure in text for figure in figures_of(shown, token))
    assert len(reached) == tokens


def test_what_is_pointed_at_wins_over_what_has_the_focus(visit):
    page = visit(scored(aligned(SENTENCE)))
    page.keyboard.press("Tab")
    page.locator(".student .t").nth(4).hover()
    [text] = shown_boxes(page)
    assert text.startswith(f"Chunk {aligned(SENTENCE).student_chunks[4] + 1} ")


def test_a_hostile_completion_stays_text(visit):
    for alignment in (
        aligned(HOSTILE),
        aligned(HOSTILE, metaspace_bpe, byte_level),
        aligned(HOSTILE, byte_level, word_piece),
    ):
        page = visit(scored(alignment, prompt=HOSTILE))
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("document.querySelectorAll('script, img, a, iframe').length") == 0
        assert page.evaluate("document.querySelectorAll('style').length") == 1
        text = "".join(page.locator(".x").all_inner_texts()).replace("␣", " ")
        assert "<script>window.hacked = 1</script>" in text
        assert "&lt;b&gt;" in text
        assert "ESC" in text
        assert "\u202e" not in page.content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_that_reading_takes_in_light_and_in_dark(visit, scheme):
    shown = scored(aligned(SENTENCE))
    assert shown.advantages.max() > 5 and shown.advantages.min() < -5  # noqa: PT018
    page = visit(shown, scheme=scheme)
    assert lowest_contrast(page) >= 4.5
    channels = re.findall(r"\d+", page.locator(".ctopd").evaluate("e => getComputedStyle(e).backgroundColor"))
    assert (int(channels[0]) > 128) == (scheme == "light")


@pytest.mark.parametrize("deficiency", ["protanopia", "deuteranopia", "tritanopia"])
def test_a_colour_blind_reader_tells_praise_from_blame_by_the_colour(visit, deficiency):
    shown = scored(aligned(SENTENCE))
    page = visit(shown)
    page.context.new_cdp_session(page).send("Emulation.setEmulatedVisionDeficiency", {"type": deficiency})
    up, down = (
        np.asarray(Image.open(io.BytesIO(page.locator(".student .t").nth(int(token)).screenshot())).convert("RGB"))[
            4, 8
        ]
        for token in (shown.advantages.argmax(), shown.advantages.argmin())
    )
    assert np.linalg.norm(up.astype(float) - down) > 100


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_it_without_scrolling_sideways_and_the_figures_at_a_tap(visit, width):
    long = aligned("supercalifragilisticexpialidocious" * 3 + " ÇA VA BIEN " * 8, byte_level, word_piece)
    page = visit(scored(long, prompt="a" * 200), width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page = visit(scored(aligned(SENTENCE)), width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".student .t").nth(6).tap()
    [text] = shown_boxes(page)
    assert all(figure in text for figure in figures_of(scored(aligned(SENTENCE)), 6))
    box = page.locator(".box:visible")
    assert on_screen(page, box)
    assert box.bounding_box()["width"] == width


def test_lines_read_from_right_to_left_flow_that_way(visit):
    page = visit(aligned("نص حكيم له سر قاطع\nThe quick brown fox"))
    for line, (before, after) in ((0, (1, 0)), (1, (0, 1))):
        groups = page.locator(".line").nth(line).locator(".g")
        places = [groups.nth(n).bounding_box()["x"] for n in range(2)]
        assert places[before] < places[after]


def test_rows_stand_beside_their_names_wherever_a_line_wraps(visit):
    student, teacher = student_tokenizer(), teacher_tokenizer()
    end = with_turn_end(aligned("one two 🙂", student_tokenizer, teacher_tokenizer), student.eos_token_id, [4])
    assert teacher.convert_ids_to_tokens(4) == "<|end|>"
    for shown in (
        aligned(SENTENCE * 4),
        scored(aligned(SENTENCE * 4)),
        scored(end),
        aligned("ÇA VA 👩‍👩‍👧 ไทย", byte_level, word_piece),
    ):
        page = visit(shown, width=600)
        tops = page.evaluate(
            "[...document.querySelectorAll('.g')].flatMap(g => ['.student', '.teacher', '.note'].map("
            "row => [...g.querySelectorAll(row)].map(e => e.getBoundingClientRect().y - g.getBoundingClientRect().y)))"
        )
        assert len({tuple(sorted({round(top, 1) for top in found})) for found in tops}) == 3
        heights = page.evaluate("[...document.querySelectorAll('.g')].map(g => g.getBoundingClientRect().height)")
        painted = page.evaluate("getComputedStyle(document.querySelector('.line'), '::before').maskSize")
        assert {f"{height:.4g}px" for height in heights} == {painted.split()[1]}


def test_several_stand_on_one_page_with_one_stylesheet(visit):
    first, second = scored(aligned("The quick")), aligned("brown fox")
    page = visit(
        None,
        html=f"<!doctype html><meta charset=utf-8><style>{stylesheet()}</style><p class=c>{first.html_fragment()}"
        f"{second.html_fragment()}{first._repr_html_()}",
    )
    assert page.locator(".ctopd").count() == 3
    page.locator(".ctopd").nth(1).locator(".student .t").first.hover()
    assert len(shown_boxes(page)) == 1
    page.locator(".ctopd").nth(2).locator(".student .t").first.hover()
    [text] = shown_boxes(page)
    assert figures_of(first, 0)[0] in text
    page.locator(".ctopd").nth(0).locator(".student .t").nth(1).focus()  # in another one: the pointer wins there too
    assert shown_boxes(page) == [text]


def test_where_a_viewer_of_notebooks_takes_the_style_away_the_boxes_stay_shut(visit):
    page = visit(None, html=f"<!doctype html><meta charset=utf-8>{scored(aligned(SENTENCE)).html_fragment()}")
    assert page.locator(".box:visible").count() == 0
    assert page.locator(".student .t").first.is_visible()


def test_the_file_is_one_and_whole(tmp_path):
    aligned(SENTENCE).to_html(tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert not re.search(r"""(src|href)\s*=|url\((?!"data:)|@import""", Path(tmp_path / "page.html").read_text("utf-8"))
