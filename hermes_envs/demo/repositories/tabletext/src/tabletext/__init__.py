"""Tables as plain text."""

from tabletext.delimited import parse_csv, to_csv
from tabletext.numbers import format_number, is_number
from tabletext.styles import GRID, MARKDOWN, PLAIN, Style, get_style
from tabletext.table import Column, Table
from tabletext.width import display_width, pad, truncate
from tabletext.wrap import wrap

__all__ = [
    "GRID",
    "MARKDOWN",
    "PLAIN",
    "Column",
    "Style",
    "Table",
    "display_width",
    "format_number",
    "get_style",
    "is_number",
    "pad",
    "parse_csv",
    "to_csv",
    "truncate",
    "wrap",
]
