"""Workspaces and layers on a disk that is full: the problem of the command that fills it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest

from backends.base import Layer, Slot
from backends.local import LocalBackend, LocalOptions

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")


@pytest.fixture
def small_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="small-disk-") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m,mode=755", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


@pytest.fixture
async def backend(small_disk: Path) -> AsyncIterator[LocalBackend]:
    options = LocalOptions(local_slots=2, local_data_dir=str(small_disk), acquire_timeout_s=60, workspaces_on_disk=True)
    async with LocalBackend(options) as started:
        yield started


async def test_what_does_not_fit_is_told_and_the_room_comes_back(backend: LocalBackend) -> None:
    async with backend.slot("greedy") as slot:
        result = await backend.execute(slot, "bash", {"command": "cat /dev/zero > big"})
        assert not result.success
        assert "No space left on device" in result.output
        written = await backend.execute(slot, "write_file", {"path": "more", "content": "x" * 100_000})
        assert not written.success
        assert "No space left on device" in str(written.error)
    # What a slot leaves is deleted after the next one has got another.
    async with backend.slot("next") as slot:
        for _ in range(1000):
            written = await backend.execute(slot, "write_file", {"path": "more", "content": "x" * 100_000})
            if written.success:
                break
            await asyncio.sleep(0.1)
        assert written.success


async def test_a_layer_needs_its_room_once(backend: LocalBackend) -> None:
    async def build(slot: Slot, size: int = 4_000_000) -> None:
        result = await backend.execute(slot, "bash", {"command": f"head -c {size} /dev/zero > big"})
        if not result.success:
            raise ValueError(result.output)

    layer = Layer("large", build)
    async with backend.slot("one", layer=layer) as one, backend.slot("two", layer=layer) as two:
        for slot in (one, two):
            assert (await backend.execute(slot, "bash", {"command": "wc -c < big"})).output == "4000000\n"
    with pytest.raises(ValueError, match="No space left on device"):
        await backend.acquire("three", layer=Layer("larger", partial(build, size=8_000_000)))
    async with backend.slot("small") as slot:
        assert (await backend.execute(slot, "bash", {"command": "true"})).success
