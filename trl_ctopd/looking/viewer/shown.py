"""What every object of the viewer can do."""

from pathlib import Path
from typing import TYPE_CHECKING

from ...text.aligner import TextAlignment


if TYPE_CHECKING:
    from rich.console import Console


class Shown:
    """Base of `TextAlignment` and `ScoredRollout` for display."""

    def html_fragment(self) -> str:
        """One `<div>`, for a page that has `trl_ctopd.looking.viewer.stylesheet()` in a `<style>`."""
        from .html import fragment

        return fragment(self)

    def _repr_html_(self) -> str:
        from .html import stylesheet

        return f"<style>{stylesheet()}</style>{self.html_fragment()}"

    def to_html(self, path: str | Path) -> None:
        """Writes one self-contained page: no script, nothing loaded from elsewhere."""
        from .html import page

        Path(path).write_text(page(self), encoding="utf-8")

    def print(self, console: "Console | None" = None) -> None:
        """Prints it in a terminal, at the width of the console."""
        from .terminal import print_shown

        print_shown(self, console)


# Added here, because the text package must not know how alignments are shown.
for _name in ("html_fragment", "_repr_html_", "to_html", "print"):
    setattr(TextAlignment, _name, getattr(Shown, _name))
