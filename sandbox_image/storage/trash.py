"""Deletion in the background."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from sandbox_image.storage.trees import move_tree, remove_tree


class Trash:
    """Deletes directories and frees file systems in the background, one after the other."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def take(self, path: Path) -> None:
        """Delete a directory; it has been renamed when this returns."""
        doomed = self._directory / secrets.token_hex(8)
        move_tree(path, doomed)
        self._later(lambda: remove_tree(doomed))

    def close_files(self, descriptors: Sequence[int]) -> None:
        """Close descriptors; that of an unmounted file system in memory may take long, as it frees the memory."""

        def close() -> None:
            for descriptor in descriptors:
                os.close(descriptor)

        self._later(close)

    async def close(self) -> None:
        """Wait until everything is deleted."""
        await asyncio.gather(*self._tasks)

    def _later(self, work: Callable[[], None]) -> None:
        task = asyncio.create_task(self._do(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _do(self, work: Callable[[], None]) -> None:
        async with self._turn:
            await asyncio.to_thread(work)
