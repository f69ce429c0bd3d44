"""The text of a Python module, addressed by the nodes of its syntax tree."""

from __future__ import annotations

import ast
import io
import tokenize
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Edit:
    """Characters `start` to `end` become `replacement`."""

    start: int
    end: int
    replacement: str


@dataclass(frozen=True)
class Token:
    """A token of the module by character offsets."""

    text: str
    start: int
    end: int


class SourceText:
    """One module. All offsets count characters from the start of the text."""

    def __init__(self, text: str) -> None:
        """Raises `SyntaxError` if the text is no Python."""
        self.text = text
        self.tree = ast.parse(text)
        # As the tokenizer counts lines: form feeds and the like end none.
        self._lines = text.split("\n")
        starts = [0]
        for line in self._lines:
            starts.append(starts[-1] + len(line) + 1)
        self._line_starts = starts

    def start(self, node: ast.AST) -> int:
        """Where a node starts."""
        return self._offset(node.lineno, node.col_offset)  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        """Where a node ends."""
        return self._offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def of(self, node: ast.AST) -> str:
        """A node's own text, without parentheses around it."""
        return self.text[self.start(node) : self.end(node)]

    def line_start(self, line: int) -> int:
        """Where a line starts; lines count from 1, and the one after the last starts at the end."""
        return min(self._line_starts[line - 1], len(self.text))

    def line(self, line: int) -> str:
        """A line without its newline."""
        return self._lines[line - 1]

    def tokens_between(self, start: int, end: int) -> list[Token]:
        """The tokens that lie in a range, without comments and line ends."""
        first = bisect_left(self._tokens, start, key=lambda token: token.start)
        last = bisect_right(self._tokens, end, lo=first, key=lambda token: token.end)
        return self._tokens[first:last]

    def owns_its_lines(self, first: ast.stmt, last: ast.stmt) -> bool:
        """Whether nothing but comments shares the lines from one statement to another."""
        before = self.text[self.line_start(first.lineno) : self.start(first)]
        after = self.text[self.end(last) : self.line_start((last.end_lineno or last.lineno) + 1)].strip()
        return not before.strip() and (not after or after.startswith("#"))

    def _offset(self, line: int, utf8_column: int) -> int:
        text = self._lines[line - 1]
        # Encoding the line for each of its nodes would take quadratic time for a long one.
        column = utf8_column if text.isascii() else len(text.encode()[:utf8_column].decode())
        return self._line_starts[line - 1] + column

    @cached_property
    def _tokens(self) -> list[Token]:
        ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
        return [
            Token(
                token.string,
                self._line_starts[token.start[0] - 1] + token.start[1],
                self._line_starts[token.end[0] - 1] + token.end[1],
            )
            for token in tokenize.generate_tokens(io.StringIO(self.text).readline)
            if token.type not in ignored
        ]


def apply_edits(text: str, edits: tuple[Edit, ...]) -> str:
    """The text after some edits, which do not overlap."""
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        text = text[: edit.start] + edit.replacement + text[edit.end :]
    return text
