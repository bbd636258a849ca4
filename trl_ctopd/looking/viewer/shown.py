"""What every object that the viewer shows can do."""

from pathlib import Path
from typing import TYPE_CHECKING

from ...text.aligner import TextAlignment


if TYPE_CHECKING:
    from rich.console import Console


class Shown:
    """A `TextAlignment` or a `ScoredRollout`, as a person sees it."""

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
        """The same in a terminal, as wide as the console is."""
        from .terminal import print_shown

        print_shown(self, console)


# The text package knows nothing of how its alignments look
for _name in ("html_fragment", "_repr_html_", "to_html", "print"):
    setattr(TextAlignment, _name, getattr(Shown, _name))
