"""The run's report in a real browser, Debian's Chromium, after a real run of toy models."""

import math
from pathlib import Path

import pytest
from browsing import lowest_contrast
from toys import prompts

from trl_ctopd.looking import report


HOSTILE = "</main><script>window.hacked = 1</script><img src=x onerror='hacked=1'> \x1b[31m"


@pytest.fixture(scope="module")
def file(build_in, tmp_path_factory) -> Path:
    """Of a run whose prompts and completions are hostile; every prompt is answered with what its step has to say."""
    folder = tmp_path_factory.mktemp("report")
    dataset = prompts(8).map(lambda row: {"prompt": [{"role": "user", "content": HOSTILE}]})
    trainer = build_in(folder)(
        dataset=dataset,
        report=True,
        max_steps=2,
        max_new_tokens=100,
        num_completions_to_print=2,
        lr_scheduler_type="constant",
    )
    trainer.rollouts.write = lambda model, asked, step: [
        (trainer.processing_class.encode(f"{HOSTILE} step {step + 1}"), None) for _ in asked
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "MOST_OF_THE_TIME", math.inf)
        trainer.train()
    return folder / "run" / "report.html"


@pytest.fixture
def page(file, open_page):
    return unfolded(open_page(file))


def unfolded(page):
    """With all that is folded away opened."""
    page.evaluate("document.querySelectorAll('main > details, .panel details').forEach(e => e.open = true)")
    return page


def test_it_opens_from_disk_and_asks_the_network_for_nothing(page):
    assert page.locator("h1").inner_text() == "LlamaForCausalLM learns from Qwen2ForCausalLM"
    assert page.evaluate("document.scripts.length") == 0
    assert page.locator("figure.chart svg[role=img]").count() >= 8


def test_a_hostile_prompt_and_completion_stay_text(page):
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('script, img, a, iframe').length") == 0
    assert page.evaluate("document.querySelectorAll('main').length") == 1
    assert "<script>window.hacked = 1</script>" in page.locator(".prompt").first.inner_text()
    written = "".join(page.locator(".ctopd").first.locator(".x").all_inner_texts()).replace("␣", " ")
    assert "<script>window.hacked = 1</script>" in written and "ESC" in written


def test_first_and_latest_completions_stand_side_by_side_with_credit_at_the_pointer_and_the_keyboard(page):
    first, latest = page.locator(".samples h3").all()[:2]
    assert (first.inner_text(), latest.inner_text()) == ("First sample, step 1", "Latest sample, step 2")
    places = [heading.bounding_box() for heading in (first, latest)]
    assert places[0]["y"] == places[1]["y"] and places[0]["x"] < places[1]["x"]
    for view in page.locator(".ctopd.scored").all()[:2]:
        token = view.locator(".student .t").nth(3)
        credit = token.locator("small").inner_text()
        for reach in (token.hover, token.focus):
            reach()
            [text] = page.locator(".box:visible").all_inner_texts()
            assert credit in text and "log-prob" in text
            page.mouse.move(0, 0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_the_contrast_that_reading_takes_in_light_and_in_dark(file, open_page, scheme):
    page = unfolded(open_page(file, scheme=scheme))
    assert lowest_contrast(page) >= 4.5
    light = page.evaluate("parseInt(getComputedStyle(document.body).backgroundColor.slice(4)) > 128")
    assert light == (scheme == "light")


def test_a_phone_shows_it_without_scrolling_sideways_and_the_figures_at_a_tap(file, open_page):
    width = 320
    page = unfolded(open_page(file, width=width))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = "[...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && e.innerText?.trim())"
    assert page.evaluate(f"Math.min(...{small}.map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 9
    page.locator(".ctopd .student .t").nth(3).tap()
    assert page.locator(".box:visible").bounding_box()["width"] == width


def test_lines_of_one_chart_are_told_apart_without_colour(page):
    several = [chart for chart in page.locator("figure.chart").all() if chart.locator(".keys svg").count() > 1]
    assert several
    dashes = "lines => lines.map(line => getComputedStyle(line).strokeDasharray)"
    for chart in several:
        drawn, keys = (
            chart.locator(lines).evaluate_all(dashes) for lines in (":scope > svg polyline", ".keys polyline")
        )
        assert drawn == keys and len(set(drawn)) == len(drawn)
