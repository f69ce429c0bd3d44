"""What stands between the cells."""

from dataclasses import dataclass
from typing import List, Sequence


@dataclass(frozen=True)
class Style:
    """The lines and separators of a table.

    ``boxed`` puts a rule above the heading, below it, between body and totals, and at the end. ``marks_alignment`` writes colons
    into the rule below the heading, as Markdown wants.
    """

    name: str
    separator: str
    edge: str = ""
    rule: str = "-"
    crossing: str = ""
    boxed: bool = False
    marks_alignment: bool = False

    def join(self, cells: Sequence[str]) -> str:
        """One line of cells that are already padded."""
        if not self.edge:
            return self.separator.join(cells).rstrip()
        return f"{self.edge} {self.separator.join(cells)} {self.edge}"

    def rule_line(self, widths: Sequence[int], aligns: Sequence[str]) -> str:
        """The line between heading and body."""
        if not self.edge:
            return self.separator.join(self.rule * width for width in widths)
        cells: List[str] = []
        for width, align in zip(widths, aligns):
            dashes = self.rule * (width + 2)
            if self.marks_alignment:
                left = ":" if align in ("left", "center") else self.rule
                right = ":" if align in ("right", "center") else self.rule
                dashes = left + self.rule * width + right
            cells.append(dashes)
        return self.crossing + self.crossing.join(cells) + self.crossing


PLAIN = Style("plain", separator="  ")
GRID = Style("grid", separator=" | ", edge="|", crossing="+", boxed=True)
MARKDOWN = Style("markdown", separator=" | ", edge="|", crossing="|", marks_alignment=True)

_STYLES = {style.name: style for style in (PLAIN, GRID, MARKDOWN)}


def get_style(name: str) -> Style:
    """The style of that name, in any case.

    Raises:
        ValueError: there is none; the message lists those that are.
    """
    try:
        return _STYLES[name.lower()]
    except KeyError:
        raise ValueError(f"no style {name!r}; there are {', '.join(sorted(_STYLES))}") from None
