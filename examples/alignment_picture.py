"""The README's picture of the viewer: the scored sentence of `notebooks/look_inside.ipynb`, with the pointer on a token.

python -m examples.alignment_picture     # writes examples/alignment.png; needs playwright and a chromium on the PATH
"""

import shutil
import tempfile
from pathlib import Path

import nbformat
from playwright.sync_api import sync_playwright


NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "look_inside.ipynb"
PICTURE = Path(__file__).with_name("alignment.png")
POINTED_AT = ".student .t:has(bdi:text-is('v'))"
MARGIN = 12


def main() -> None:
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        raise SystemExit("no chromium on the PATH (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        file = Path(folder) / "page.html"
        file.write_text(f"<!doctype html><meta charset=utf-8><body style='margin:{MARGIN}px'>{scored_view()}", "utf-8")
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1080, "height": 800}, device_scale_factor=2)
        page.goto(file.as_uri())
        page.locator(POINTED_AT).hover()
        shown = [page.locator(name).bounding_box() for name in (".ctopd", ".box:visible")]
        bottom = max(box["y"] + box["height"] for box in shown) + MARGIN
        page.screenshot(path=PICTURE, clip={"x": 0, "y": 0, "width": 1080, "height": bottom})
        browser.close()


def scored_view() -> str:
    """The HTML of the notebook's scored rollout."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs if "data" in output]
    [html] = [html for output in outputs if 'class="ctopd scored"' in (html := output.data.get("text/html", ""))]
    return html


if __name__ == "__main__":
    main()
