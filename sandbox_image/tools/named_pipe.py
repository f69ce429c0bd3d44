"""Pipes that programs in a box open by name, again for each use.

A program in the box holds the read end only; a writer opens `/proc/PID/fd/N` of that program. Each writer so gets an open file
description of its own, and cannot make that of another one non-blocking; when the last one is closed the stream ends.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from sandbox_image.kernel import linux

_READ_BYTES = 65536


class NamedPipe:
    """A pipe whose read end the server holds. While it is in use, what is written to it goes to a sink."""

    def __init__(self, uid: int | None) -> None:
        self.read_end, write_end = os.pipe()
        os.close(write_end)
        os.set_blocking(self.read_end, False)
        if uid is not None:
            # Opening it by name needs permission for its inode, which belongs to the server.
            os.fchown(self.read_end, uid, uid)
        self._write_end: int | None = None
        self._sink: Callable[[bytes], None] | None = None

    @property
    def in_use(self) -> bool:
        """Whether it has a writer, or the server still expects one."""
        return self._sink is not None

    def open(self, sink: Callable[[bytes], None]) -> None:
        """Pass what is written from now on to `sink`, until `leave`."""
        # A pipe without writers is at its end and always readable: the server stays a writer itself.
        if self._write_end is None:
            self._write_end = os.open(f"/proc/self/fd/{self.read_end}", os.O_WRONLY)
        if self._sink is None:
            asyncio.get_running_loop().add_reader(self.read_end, self._on_readable)
        self._sink = sink

    def drain(self) -> None:
        """Read what it contains now; not what is added meanwhile, which may never end."""
        left = linux.bytes_in_pipe(self.read_end)
        # At least once, to notice the end.
        while (size := self._take()) and size < left:
            left -= size

    def leave(self, sink: Callable[[bytes], None]) -> None:
        """Pass what comes later to another sink, until the last writer has closed it and it is not in use any more."""
        self._sink = sink
        self._close_write_end()
        self.drain()

    def close(self) -> None:
        """Close it."""
        if self._sink is not None:
            asyncio.get_running_loop().remove_reader(self.read_end)
        self._sink = None
        self._close_write_end()
        os.close(self.read_end)

    def _on_readable(self) -> None:
        self._take()

    def _take(self) -> int:
        """Read once; how many bytes there were."""
        if self._sink is None:
            return 0
        try:
            chunk = os.read(self.read_end, _READ_BYTES)
        except BlockingIOError:
            return 0
        if chunk:
            self._sink(chunk)
        else:
            asyncio.get_running_loop().remove_reader(self.read_end)
            self._sink = None
        return len(chunk)

    def _close_write_end(self) -> None:
        if self._write_end is not None:
            os.close(self._write_end)
            self._write_end = None
