"""A terminal recording in asciicast v2 (https://docs.asciinema.org/manual/asciicast/v2/), of limited size."""

from __future__ import annotations

import codecs
import json
import time

MAX_RECORDING_BYTES = 4 * 1024 * 1024
_EVENT_CHARACTERS = 2048
_RESET = "\x1bc"


class Recording:
    """The output of a terminal since its first start; a restart is part of it."""

    def __init__(self) -> None:
        self._begin = 0.0
        self._lines: list[bytes] = []
        self._size = 0
        self._read = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.full = False
        """Whether output was left out because the limit was reached."""

    def start(self, width: int, height: int, terminal: str) -> None:
        """Record the start of a terminal."""
        if not self._lines:
            self._begin = time.monotonic()
            header = {"version": 2, "width": width, "height": height, "timestamp": int(time.time()), "env": {"TERM": terminal}}
            self._keep(json.dumps(header).encode() + b"\n")
            return
        self._decoder.reset()
        self._event("o", _RESET)
        self.resize(width, height)

    def output(self, chunk: bytes) -> None:
        """Record output."""
        text = self._decoder.decode(chunk)
        for start in range(0, len(text), _EVENT_CHARACTERS):
            self._event("o", text[start : start + _EVENT_CHARACTERS])

    def resize(self, width: int, height: int) -> None:
        """Record a change of the size."""
        self._event("r", f"{width}x{height}")

    def content(self) -> bytes:
        """The whole recording, as an asciicast file."""
        return b"".join(self._lines)

    def next_lines(self, max_bytes: int, *, from_start: bool) -> tuple[list[bytes], bool]:
        """The lines since the last call, at least one if there is one, and whether there are more."""
        if from_start:
            self._read = 0
        start, size = self._read, 0
        while self._read < len(self._lines):
            size += len(self._lines[self._read])
            if size > max_bytes and self._read > start:
                break
            self._read += 1
        return self._lines[start : self._read], self._read < len(self._lines)

    def _event(self, kind: str, data: str) -> None:
        if not self.full:
            event = [round(time.monotonic() - self._begin, 6), kind, data]
            self._keep(json.dumps(event, ensure_ascii=False).encode("utf-8", "replace") + b"\n")

    def _keep(self, line: bytes) -> None:
        if self._size + len(line) > MAX_RECORDING_BYTES:
            self.full = True
            return
        self._size += len(line)
        self._lines.append(line)
