"""Renders terminal recordings (asciicast v2, https://docs.asciinema.org/manual/asciicast/v2/)."""

from __future__ import annotations

import json
from typing import Any, Self

from hermes_envs.errors import RecordingError
from hermes_envs.screen.terminal import TerminalScreen

MAX_SIDE = 10_000
_LONGEST_SHOWN = 80


class AsciinemaStreamDecoder:
    """Shows what a terminal showed, from a recording that may come in pieces.

    A piece is text of the recording, cut anywhere: a line with the header, then one line for each event.
    """

    def __init__(self) -> None:
        self.time = 0.0
        """Seconds from the start of the recording to its last event."""
        self._screen: TerminalScreen | None = None
        self._rest: list[str] = []
        self._number = 0

    @classmethod
    def of(cls, recording: str) -> Self:
        """A decoder that has read a whole recording.

        Raises:
            RecordingError: as `feed`, or it ends within a line.
        """
        decoder = cls()
        decoder.feed(recording if recording.endswith("\n") else f"{recording}\n")
        return decoder

    def feed(self, piece: str) -> None:
        """Read on. After an error the decoder goes on with the line behind the bad one.

        Raises:
            RecordingError: a line is not what the format says; the text names it.
        """
        *complete, rest = piece.split("\n")
        if complete:
            complete[0] = "".join(self._rest) + complete[0]
            self._rest = []
        if rest:
            self._rest.append(rest)
        problem = None
        for line in complete:
            self._number += 1
            try:
                self._read_line(line)
            except RecordingError as error:
                problem = problem or error
        if problem is not None:
            raise problem

    def feed_event(self, event: object) -> None:
        """Take one event, `[seconds, kind, data]`, that has been decoded from JSON.

        Raises:
            RecordingError: it is none, or there was no header yet.
        """
        match event:
            case [bool(), *_]:
                pass
            case [int() | float() as time, str(kind), str(data)] if 0 <= time < float("inf"):
                self.time = float(time)
                if kind == "o":
                    self._shown.feed(data)
                elif kind == "r":
                    columns, lines = self._size(data.split("x"), data)
                    self._shown.resize(lines, columns)
                return
        raise self._error("not an event [seconds, kind, data]", event)

    @property
    def lines(self) -> list[str]:
        """The lines that are shown, each without the blanks at its end."""
        return [self._shown.row(y) for y in range(self._shown.lines)]

    @property
    def history(self) -> list[str]:
        """The last lines that scrolled off the top."""
        return self._shown.history

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines."""
        return self._shown.columns, self._shown.lines

    @property
    def cursor(self) -> tuple[int, int]:
        """Column and line of the cursor, both from 0."""
        return min(self._shown.cursor.x, self._shown.columns - 1), self._shown.cursor.y

    @property
    def alternate(self) -> bool:
        """Whether a full-screen program has the alternate screen."""
        return self._shown.alternate

    def text(self, *, with_history: bool = False) -> str:
        """What is shown, as one text without the empty lines at its end."""
        lines = [*self.history, *self.lines] if with_history else self.lines
        return "\n".join(lines).rstrip("\n")

    @property
    def _shown(self) -> TerminalScreen:
        if self._screen is None:
            raise RecordingError("there is no header yet, which says how large the terminal is")
        return self._screen

    def _read_line(self, line: str) -> None:
        if not line.strip():
            return
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._error(f"not JSON ({error})", line) from None
        if self._screen is None:
            self._read_header(value)
        else:
            self.feed_event(value)

    def _read_header(self, header: object) -> None:
        if not isinstance(header, dict):
            raise self._error("not a header, which is a JSON object", header)
        if header.get("version") != 2:
            raise self._error("only version 2 of the format is known, not", header.get("version"))
        columns, lines = self._size([header.get("width"), header.get("height")], header)
        self._screen = TerminalScreen(columns, lines)

    def _size(self, sides: list[Any], shown: object) -> tuple[int, int]:
        numbers = [int(side) if isinstance(side, str) and side.isascii() and side.isdigit() else side for side in sides]
        if len(numbers) != 2 or not all(type(side) is int and 0 < side <= MAX_SIDE for side in numbers):
            raise self._error(f"not a size in columns and lines from 1 to {MAX_SIDE}", shown)
        return numbers[0], numbers[1]

    def _error(self, problem: str, found: object) -> RecordingError:
        text = found if isinstance(found, str) else repr(found)
        where = f"line {self._number}: " if self._number else ""
        return RecordingError(f"{where}{problem}: {text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + '...'}")
