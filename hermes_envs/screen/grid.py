"""pyte's screen, with what full-screen programs need beyond it.

pyte (0.8) knows no alternate screen, and forgets a line at a wide or joined character. Where terminals differ, this one does as
tmux does, since recordings are made in one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import pyte
from pyte import modes
from pyte.screens import Char, Cursor, Margins
from wcwidth import wcwidth

MAX_HISTORY_LINES = 2000


@dataclass
class _Page:
    """A screen that another one hides."""

    buffer: Any
    saved: tuple[Cursor, int] | None
    size: tuple[int, int]


class ScreenGrid(pyte.Screen):
    """A screen of `columns` x `lines` cells, and the last lines that scrolled off its top."""

    def __init__(self, columns: int, lines: int) -> None:
        self._history: deque[Any] = deque(maxlen=MAX_HISTORY_LINES)
        self._hidden: _Page | None = None
        self._saved: tuple[Cursor, int] | None = None
        self._last_drawn = ""
        super().__init__(columns, lines)

    @property
    def alternate(self) -> bool:
        """Whether the alternate screen is shown, as full-screen programs have it."""
        return self._hidden is not None

    @property
    def history(self) -> list[str]:
        """The last lines that scrolled off the top, as `row` gives them."""
        return [self._text(line) for line in self._history]

    def row(self, y: int) -> str:
        """A line as text, without the blanks at its end."""
        return self._text(self.buffer[y])

    def _text(self, line: Any) -> str:
        shown, x = [], 0
        while x < self.columns:
            text = line[x].data
            wide = bool(text) and wcwidth(text[0]) == 2
            whole = not wide or (x + 1 < self.columns and line[x + 1].data == "")
            # Half of a wide character, whose other half was written over, is a blank.
            shown.append(text if text and whole else " ")
            x += 2 if wide and whole else 1
        return "".join(shown).rstrip(" ")

    def show_alternate(self, on: bool, *, with_cursor: bool) -> None:
        """Change between the two screens; `with_cursor` it goes back to where it was saved."""
        if on and self._hidden is None:
            self._hidden = _Page(self.buffer.copy(), self._saved, (self.lines, self.columns))
            self.buffer.clear()
        elif not on and self._hidden is not None:
            page, size = self._hidden, (self.lines, self.columns)
            self._hidden = None
            self.buffer.clear()
            self.buffer.update(page.buffer)
            self._saved = page.saved
            # The hidden screen has missed what happened to the size meanwhile.
            self.lines, self.columns = page.size
            if with_cursor:
                self.restore_cursor()
            self.resize(*size)

    def reset(self) -> None:
        """As `pyte.Screen.reset`; the alternate screen is left as well."""
        self._hidden, self._saved = None, None
        super().reset()

    def draw(self, data: str) -> None:
        """Put text at the cursor. Characters without a width join the one before them."""
        table = self.g1_charset if self.charset else self.g0_charset
        for character in data.translate(table):
            width = wcwidth(character)
            if width > 0:
                self._put(character, width)
            elif width == 0:
                self._join(character)

    def _put(self, character: str, width: int) -> None:
        if self.cursor.x + width > self.columns:
            if modes.DECAWM in self.mode:
                self.carriage_return()
                self.linefeed()
            else:
                self.cursor.x = max(self.columns - width, 0)
        if modes.IRM in self.mode:
            self.insert_characters(width)
        line, attributes = self.buffer[self.cursor.y], self.cursor.attrs
        line[self.cursor.x] = attributes._replace(data=character)
        if width == 2:
            line[self.cursor.x + 1] = attributes._replace(data="")
        self.cursor.x = min(self.cursor.x + width, self.columns)
        self._last_drawn = character

    def _join(self, character: str) -> None:
        line, x = self.buffer[self.cursor.y], self.cursor.x - 1
        if x > 0 and line[x].data == "":
            x -= 1
        if x >= 0:
            line[x] = line[x]._replace(data=(line[x].data or " ") + character)

    def repeat(self, count: int) -> None:
        """Draw the last character again (REP)."""
        self.draw(self._last_drawn * min(max(count, 1), self.columns * self.lines))

    def index(self) -> None:
        """Move down, scrolling at the bottom margin; what leaves the top of the screen is history."""
        bottom = self.margins.bottom if self.margins else self.lines - 1
        if self.cursor.y == bottom:
            self.scroll_up(1)
        elif self.cursor.y < self.lines - 1:
            self.cursor.y += 1

    def reverse_index(self) -> None:
        """Move up, scrolling at the top margin."""
        top = self.margins.top if self.margins else 0
        if self.cursor.y == top:
            self.scroll_down(1)
        elif self.cursor.y > 0:
            self.cursor.y -= 1

    def scroll_up(self, count: int) -> None:
        """Scroll within the margins (SU)."""
        top, bottom = self.margins or Margins(0, self.lines - 1)
        self._move_up(top, bottom, max(count, 1))

    def scroll_down(self, count: int) -> None:
        """Scroll back within the margins (SD)."""
        top, bottom = self.margins or Margins(0, self.lines - 1)
        self._move_down(top, bottom, max(count, 1))

    def insert_lines(self, count: int | None = None) -> None:
        """Insert blank lines at the cursor."""
        top, bottom = self.margins or Margins(0, self.lines - 1)
        if top <= self.cursor.y <= bottom:
            self._move_down(self.cursor.y, bottom, count or 1)

    def delete_lines(self, count: int | None = None) -> None:
        """Delete lines at the cursor."""
        top, bottom = self.margins or Margins(0, self.lines - 1)
        if top <= self.cursor.y <= bottom:
            self._move_up(self.cursor.y, bottom, count or 1, keep=False)

    def _move_up(self, top: int, bottom: int, count: int, *, keep: bool = True) -> None:
        count = min(count, bottom - top + 1)
        if keep and top == 0 and not self.alternate:
            self._history.extend(self.buffer[y] for y in range(count))
        for y in range(top, bottom + 1):
            self._take(y, y + count if y + count <= bottom else None)

    def _move_down(self, top: int, bottom: int, count: int) -> None:
        count = min(count, bottom - top + 1)
        for y in range(bottom, top - 1, -1):
            self._take(y, y - count if y - count >= top else None)

    def _take(self, y: int, source: int | None) -> None:
        line = None if source is None else self.buffer.pop(source, None)
        if line is None:
            self.buffer.pop(y, None)
        else:
            self.buffer[y] = line

    def save_cursor(self) -> None:
        """Remember the cursor, in the one place there is."""
        self._saved = (self._cursor_copy(self.cursor), self.charset)

    def restore_cursor(self, *_: int) -> None:
        """Go where it was when it was saved, as often as asked for."""
        if self._saved is None:
            self.cursor_position()
            return
        saved, self.charset = self._saved
        self.cursor = self._cursor_copy(saved)
        self.ensure_hbounds()
        self.ensure_vbounds()

    def _cursor_copy(self, cursor: Cursor) -> Cursor:
        copied = Cursor(cursor.x, cursor.y, cursor.attrs)
        copied.hidden = cursor.hidden
        return copied

    def save_cursor_at(self, _: int) -> None:
        """SCP, which has a parameter that means nothing."""
        self.save_cursor()

    def cursor_up(self, count: int | None = None) -> None:
        """Move up, and off the place behind the last column."""
        self.ensure_hbounds()
        super().cursor_up(count)

    def cursor_down(self, count: int | None = None) -> None:
        """Move down, and off the place behind the last column."""
        self.ensure_hbounds()
        super().cursor_down(count)

    def cursor_to_column(self, column: int | None = None) -> None:
        """Move within the line."""
        self.cursor.x = (column or 1) - 1
        self.ensure_hbounds()

    def next_tabs(self, count: int) -> None:
        """CHT."""
        for _ in range(min(max(count, 1), self.columns)):
            self.tab()

    def previous_tabs(self, count: int) -> None:
        """CBT."""
        for _ in range(min(max(count, 1), self.columns)):
            self.cursor.x = max((stop for stop in self.tabstops if stop < self.cursor.x), default=0)

    def erase_in_display(self, how: int = 0, *args: Any, **kwargs: Any) -> None:
        """Erase; `3` erases the history."""
        if how == 3:
            self._history.clear()
        elif how in (0, 1, 2):
            super().erase_in_display(how)

    def erase_in_line(self, how: int = 0, private: bool = False) -> None:
        """Erase in the line; other numbers than 0, 1 and 2 mean nothing."""
        if how in (0, 1, 2):
            super().erase_in_line(how)

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        """Change the size. Lines below the cursor go first, then those at the top, which come back when there is room again.

        Long lines are cut, not wrapped anew.
        """
        lines, columns = lines or self.lines, columns or self.columns
        returning = 0 if self.alternate else min(max(lines - self.lines, 0), len(self._history))
        if returning:
            self._move_down(0, self.lines + returning - 1, returning)
            for y in reversed(range(returning)):
                self.buffer[y] = self._history.pop()
            self.cursor.y += returning
        surplus = max(self.cursor.y + 1 - lines, 0)
        if surplus:
            self._move_up(0, self.lines - 1, surplus)
            self.cursor.y -= surplus
        for y in [y for y in self.buffer if y >= lines]:
            del self.buffer[y]
        for line in self.buffer.values():
            for x in [x for x in line if x >= columns]:
                del line[x]
        self.lines, self.columns, self.margins = lines, columns, None
        self.tabstops = set(range(8, columns, 8))
        self.ensure_hbounds()
        self.ensure_vbounds()

    def alignment_display(self) -> None:
        """Fill the screen with E (DECALN)."""
        for y in range(self.lines):
            for x in range(self.columns):
                self.buffer[y][x] = Char("E")
