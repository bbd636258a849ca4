"""Fixtures that several test files use, and the last lines of a run, which say what it left out."""

import functools
import gc
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import needs
import pytest
from hypothesis import HealthCheck, settings


# a busy machine is slow, not broken
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_configure():
    """Processes that tests start find what tests find: the package of this checkout and tests/helpers."""
    tests = Path(__file__).parent
    paths = [str(tests.parent), str(tests / "helpers"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def pytest_terminal_summary(terminalreporter):
    """Each reason for which tests were skipped, once, with their number."""
    skipped = [report.longrepr for report in terminalreporter.stats.get("skipped", [])]
    reasons = Counter(entry[2].removeprefix("Skipped: ") for entry in skipped if isinstance(entry, tuple))
    if reasons:
        terminalreporter.section("what was skipped, and what it needs")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:5d}  {reason}")


@pytest.fixture(scope="module", autouse=True)
def _what_lives_on_is_not_searched_for_garbage():
    """Libraries and thousands of collected tests stay to the end, and Accelerate collects garbage with every trainer. It took a
    sixth of the time of tests/trainer."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real tokenizers and data, where there is one: CTOPD_ASSETS."""
    return needs.assets()


@pytest.fixture(scope="session")
def real_tokenizer(assets: Path) -> Callable[[str], Any]:
    """`real_tokenizer("gpt2")` is the tokenizer of that folder, loaded once in a test run."""
    return functools.cache(needs.tokenizer)


@pytest.fixture(scope="session")
def build_in():
    """`build_in(folder)` is `build` with its output there."""
    from toys import prompts, student_model, student_tokenizer, teacher_model, teacher_tokenizer

    from trl_ctopd import CrossTokenizerGKDConfig, CrossTokenizerGKDTrainer

    def build(folder, model=None, teacher=None, dataset=None, **settings):
        arguments = {
            name: settings.pop(name)
            for name in (
                "peft_config",
                "eval_dataset",
                "callbacks",
                "optimizers",
                "reward_funcs",
                "reward_processing_classes",
                "teacher_gate",
            )  # fmt: skip
            if name in settings
        }
        tokenizers = {
            "processing_class": settings.pop("processing_class", None) or student_tokenizer(),
            "teacher_processing_class": settings.pop("teacher_processing_class", None) or teacher_tokenizer(),
        }
        settings = {
            "output_dir": str(folder / "run"),
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "max_new_tokens": 8,
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-2,
            **settings,
        }
        return CrossTokenizerGKDTrainer(
            model=student_model() if model is None else model,
            teacher_model=teacher_model() if teacher is None else teacher,
            args=CrossTokenizerGKDConfig(**settings),
            train_dataset=prompts() if dataset is None else dataset,
            **tokenizers,
            **arguments,
        )

    return lambda folder: partial(build, folder)


@pytest.fixture
def build(build_in, tmp_path):
    """A trainer of toy models on the CPU; keyword arguments are settings, or arguments of the trainer."""
    return build_in(tmp_path)


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, driven by Playwright."""
    executable = needs.browser()
    playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser's driver: pip install playwright")
    quiet = ("gpu", "quic", "background-networking", "component-update", "sync")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=executable,
            timeout=600_000,
            args=["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """`open_page(file)` opens it from disk; what the page asks for, logs or pops up is in `page.seen`. By the end of the
    test it must have been nothing but the page itself."""
    pages = []

    def open_page(file: Path, width: int = 1000, scheme: str = "light"):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=width < 500
        )
        context.set_default_timeout(600_000)  # ms: a busy machine is slow, not broken
        page = context.new_page()
        page.seen, page.address = [], file.as_uri()
        page.on("request", lambda request: page.seen.append(request.url))
        page.on("console", lambda message: page.seen.append(message.text))
        page.on("pageerror", lambda error: page.seen.append(str(error)))
        page.on("dialog", lambda dialog: page.seen.append(dialog.message))
        page.goto(file.as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        assert page.seen == [page.address]
        page.context.close()
