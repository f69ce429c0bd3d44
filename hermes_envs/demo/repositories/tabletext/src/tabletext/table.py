"""Rows and columns, and their text."""

from dataclasses import dataclass
from typing import Any, List, Optional, Sequence, Union

from tabletext.numbers import format_number, is_number
from tabletext.styles import PLAIN, Style
from tabletext.width import ALIGNMENTS, display_width, pad
from tabletext.wrap import wrap


@dataclass
class Column:
    """How one column looks.

    Without ``align``, a column of numbers is aligned to the right and any other to the left. Cells wider than ``max_width`` are
    wrapped. ``decimals`` and ``thousands`` are for numbers only.
    """

    title: str
    align: Optional[str] = None
    max_width: Optional[int] = None
    decimals: Optional[int] = None
    thousands: str = ""

    def __post_init__(self) -> None:
        if self.align is not None and self.align not in ALIGNMENTS:
            raise ValueError(f"no such alignment: {self.align!r}")

    def text(self, value: Any) -> str:
        """A value as it is shown; None is an empty cell."""
        if value is None:
            return ""
        if is_number(value):
            return format_number(value, self.decimals, self.thousands)
        return str(value)

    def lines(self, value: Any) -> List[str]:
        """A value as the lines of its cell."""
        text = self.text(value)
        return text.split("\n") if self.max_width is None else wrap(text, self.max_width)


class Table:
    """A table under construction. Columns are given by title or as `Column`."""

    def __init__(self, columns: Sequence[Union[str, Column]], missing: Any = None) -> None:
        self.columns = [column if isinstance(column, Column) else Column(column) for column in columns]
        self.missing = missing
        self.rows: List[List[Any]] = []

    def add_row(self, values: Sequence[Any]) -> None:
        """Add a row; values that are not given are ``missing``.

        Raises:
            ValueError: there are more values than columns.
        """
        if len(values) > len(self.columns):
            raise ValueError(f"{len(values)} values for {len(self.columns)} columns")
        self.rows.append([*values, *[self.missing] * (len(self.columns) - len(values))])

    def index_of(self, title: str) -> int:
        """The position of the column with that title.

        Raises:
            KeyError: there is none.
        """
        for index, column in enumerate(self.columns):
            if column.title == title:
                return index
        raise KeyError(title)

    def sort_by(self, title: str, reverse: bool = False) -> None:
        """Order the rows by one column, keeping the order of equal ones. Empty cells come last in both directions."""
        index = self.index_of(title)
        filled = [row for row in self.rows if row[index] is not None]
        empty = [row for row in self.rows if row[index] is None]
        self.rows = sorted(filled, key=lambda row: row[index], reverse=reverse) + empty

    def totals(self) -> List[Any]:
        """The sum of each column of numbers; None for any other. Empty cells count as nothing."""
        sums: List[Any] = []
        for index in range(len(self.columns)):
            values = [row[index] for row in self.rows if row[index] is not None]
            sums.append(sum(values) if values and all(is_number(value) for value in values) else None)
        return sums

    def alignment(self, index: int) -> str:
        """The alignment of a column, chosen by its values if it was not given."""
        column = self.columns[index]
        if column.align is not None:
            return column.align
        values = [row[index] for row in self.rows if row[index] is not None]
        return "right" if values and all(is_number(value) for value in values) else "left"

    def render(self, style: Style = PLAIN, totals: bool = False) -> str:
        """The table as text without a newline at the end; ``totals`` adds a last row with the sums."""
        body = [self._cells(row) for row in self.rows]
        footer = [self._cells(self.totals())] if totals else []
        heading = [column.title.split("\n") for column in self.columns]
        widths = [
            max(display_width(line) for cells in [heading, *body, *footer] for line in cells[index])
            for index in range(len(self.columns))
        ]
        aligns = [self.alignment(index) for index in range(len(self.columns))]
        rule = style.rule_line(widths, aligns)
        lines = [rule] if style.boxed else []
        lines += self._row_lines(heading, widths, aligns, style)
        lines.append(rule)
        for cells in body:
            lines += self._row_lines(cells, widths, aligns, style)
        if footer:
            if not style.marks_alignment:
                lines.append(rule)
            lines += self._row_lines(footer[0], widths, aligns, style)
        if style.boxed:
            lines.append(rule)
        return "\n".join(lines)

    def _cells(self, row: Sequence[Any]) -> List[List[str]]:
        return [column.lines(value) for column, value in zip(self.columns, row)]

    @staticmethod
    def _row_lines(cells: List[List[str]], widths: List[int], aligns: List[str], style: Style) -> List[str]:
        height = max(len(lines) for lines in cells)
        filled = [lines + [""] * (height - len(lines)) for lines in cells]
        return [
            style.join([pad(lines[level], width, align) for lines, width, align in zip(filled, widths, aligns)])
            for level in range(height)
        ]
