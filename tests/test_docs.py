"""The pages lead where they say, and their code is code."""

import ast
import dataclasses
import json
import re
import textwrap
from pathlib import Path
from urllib.parse import unquote

import pytest

from trl_ctopd.losses import LOSSES


ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for folder in (".", "docs", "benchmarks", "findings", "notebooks", "examples")
    for kind in ("*.md", "*.ipynb")
    for page in ((ROOT / folder).glob(kind) if folder in (".", "docs") else (ROOT / folder).rglob(kind))
    if ".ipynb_checkpoints" not in page.parts
)
LINK = re.compile(r"\]\(([^()\s]+(?:\([^()\s]*\))?[^()\s]*)\)")
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    if page.suffix == ".md":
        return page.read_text(encoding="utf-8")
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    dead = []
    for link in LINK.findall(FENCE.sub("", text_of(page))):
        target, _, anchor = unquote(link).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(link)
    assert not dead


def test_every_page_of_the_documentation_can_be_reached_from_the_readme():
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = [unquote(link).partition("#")[0] for link in LINK.findall(FENCE.sub("", text_of(page)))]
        ahead += [file for link in links if link and (file := (page.parent / link).resolve()).exists()]
    assert set((ROOT / "docs").glob("*.md")) <= seen


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=lambda page: page.name)
def test_python_on_a_page_is_python_and_names_settings_that_exist(page):
    from trl_ctopd import CrossTokenizerGKDConfig

    settings = {field.name for field in dataclasses.fields(CrossTokenizerGKDConfig)}
    for language, code in FENCE.findall(text_of(page)):
        if language != "python" or code.lstrip().startswith(">>>"):
            continue
        indent = min(len(line) - len(line.lstrip()) for line in code.splitlines() if line.strip())
        # an ellipsis stands for the arguments of another example
        lines = [line[indent:] for line in code.splitlines() if line.strip() != "..."]
        tree = ast.parse("\n".join(lines))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == "CrossTokenizerGKDConfig":
                assert {word.arg for word in call.keywords if word.arg} <= settings


def test_pages_count_the_losses_that_there_are():
    numbers = {13: "thirteen", 14: "fourteen", 15: "fifteen", 16: "sixteen"}
    assert f"\n{numbers[len(LOSSES)].capitalize()} methods" in (ROOT / "docs" / "losses.md").read_text()
    assert f"[{numbers[len(LOSSES) - 2]} others](docs/losses.md)" in (ROOT / "README.md").read_text(), (
        "beside two that it names"
    )


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


def test_the_loss_of_contributing_runs_as_it_is_and_is_the_sum_of_squared_gaps():
    import torch
    from chunk_rows import as_tensors, random_rows, reference_budgets

    from trl_ctopd.losses import ScoredChunks

    [code] = [code for language, code in FENCE.findall(text_of(ROOT / "CONTRIBUTING.md")) if language == "python"]
    names = {"__package__": "trl_ctopd.losses", "__name__": "trl_ctopd.losses.squared_gap"}
    exec(textwrap.dedent(code), names)
    rows = random_rows(0)
    batch = ScoredChunks(*as_tensors(rows))
    value, metrics = names["SquaredGap"]()(batch, torch.tensor(7))
    budgets = [(reference_budgets(student), reference_budgets(teacher)) for student, teacher in rows]
    gaps = [theirs[chunk] - ours[chunk] for ours, theirs in budgets for chunk in ours]
    assert value.item() == pytest.approx(sum(gap**2 for gap in gaps) / 7)
    part, of = metrics["loss/compared_fraction"]
    assert part == batch.chunks.student_tokens.sum() and of == batch.scored_tokens
